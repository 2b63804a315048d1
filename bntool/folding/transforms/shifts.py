"""What is added to channels: unknown shifts, some of which are sums of two others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bntool.folding.channels import Array, Integers
from bntool.folding.transforms.unknowns import CLOSE, NOBODY, Contradiction, Equations, Mask, Unknowns


class _Sums(NamedTuple):
    """Sums that nodes ask for: of three shifts, each times a factor, zero is left, for each channel.

    Attributes:
        shifts: a row for each of the three, a column for each channel.
        factors: of the same shape.
        origins: the nodes.
        roots: of the shifts, when they were looked at last; of a sum that follows from equations the constant.
    """

    shifts: Integers
    factors: Array
    origins: Integers
    roots: Integers


class _HeldSum(NamedTuple):
    """total = factor * own + weight * other, where ``own`` occurs in nothing else."""

    total: Integers
    own: Integers
    other: Integers
    factor: float
    weight: float


@dataclass
class Shifts(Unknowns):
    """The unknown shifts of channels, in units of the original.

    A sum becomes an equation as soon as at most two of its three shifts are unknown. A sum of which one occurs nowhere
    else holds in any case, and is solved last.
    """

    value: float = 0.0
    _sums: _Sums | None = None
    _noted_sums: list[_Sums] = field(default_factory=list)
    _held: list[_HeldSum] = field(default_factory=list)

    def add_sums(
        self, total: Integers, parts: tuple[Integers, Integers], factors: tuple[float, float], origin: int
    ) -> None:
        """Note total = f * one + g * other, before :meth:`add_noted`; :meth:`simplify` makes use of them."""
        shifts = np.stack([total, *parts])
        column = np.array([[1.0], [-factors[0]], [-factors[1]]])
        never = np.full(shifts.shape, NOBODY)
        self._noted_sums.append(
            _Sums(shifts, np.broadcast_to(column, shifts.shape), np.full(len(total), origin), never)
        )

    def hold_sums(self, total: Integers, parts: tuple[Integers, Integers], factors: tuple[float, float]) -> None:
        """Add total = f * one + g * other, where ``one`` occurs in nothing else: it is what the others leave."""
        self._held.append(_HeldSum(total, *parts, *factors))

    def add_noted(self) -> None:
        super().add_noted()
        if self._noted_sums:
            self._sums = _Sums(*(np.concatenate(part, axis=-1) for part in zip(*self._noted_sums, strict=True)))

    def _find_open(self, sums: _Sums) -> Integers:
        """Return the sums that follow from no equation."""
        which: Integers = (sums.roots[0] != self.constant).nonzero()[0]
        return which

    def fix_open(self) -> None:
        """Fix the shifts of sums that are still open: nothing changes there."""
        if self._sums is not None:
            self.fix(np.unique(self._sums.shifts[:, self._find_open(self._sums)]), NOBODY)

    def simplify(self) -> None:
        """Use the sums in which at most two unknowns are left, until none is.

        Raises:
            Contradiction: one cannot hold, or it is not seen that all can hold together.
        """
        sums = self._sums
        if sums is None:
            return
        any_moved = False
        while True:
            moved = self.parent[sums.roots] != sums.roots  # they are roots no more
            (which,) = (moved[0] | moved[1] | moved[2]).nonzero()
            if not which.size:
                break
            any_moved = True
            self._use(sums, which)
        # with fewer sums there still is an order in which they can be solved
        if any_moved and self._peel(sums.roots[:, self._find_open(sums)]) is None:
            raise Contradiction(())

    def _use(self, sums: _Sums, which: Integers) -> None:
        """Look at some sums, and make equations of those that have at most two unknowns by now."""
        roots, slopes, rest, size = self._read(sums, which)
        there = slopes != 0
        count = there.sum(axis=0)
        self.write(sums.roots, (slice(None), which), np.where(count == 3, roots, self.constant))
        wrong = (count == 0) & (np.abs(rest) > CLOSE * size)
        if np.count_nonzero(wrong):
            raise Contradiction(sums.origins[which[wrong]][:1])
        (mine,) = ((count == 1) | (count == 2)).nonzero()
        if not mine.size:
            return
        one = there[:, mine].argmax(axis=0)  # the first that is left, and the second
        other = np.where(there[0, mine] & there[1, mine], 1, 2)
        two = (other > one) & there[other, mine]
        slope = slopes[one, mine]
        right = np.where(two, roots[other, mine], self.constant)
        factor = np.where(two, -slopes[other, mine] / slope, 1.0)
        self.add(Equations(roots[one, mine], right, factor, rest[mine] / slope, sums.origins[which[mine]]))

    def _read(self, sums: _Sums, which: Integers) -> tuple[Integers, Array, Array, Array]:
        """Read some sums as slopes times roots = rest, each root once."""
        found, factors, offsets = self.find(sums.shifts[:, which].ravel())
        roots, given = found.reshape(3, -1), sums.factors[:, which]
        slopes, terms = given * factors.reshape(3, -1), given * offsets.reshape(3, -1)
        largest = np.abs(slopes).max(axis=0)
        for one, two in ((0, 1), (0, 2), (1, 2)):
            same = roots[one] == roots[two]
            if np.count_nonzero(same):
                slopes[one] += np.where(same, slopes[two], 0.0)
                slopes[two, same] = 0.0
        slopes[(roots == self.constant) | (np.abs(slopes) <= CLOSE * largest)] = 0.0
        return roots, slopes, -terms.sum(axis=0), np.abs(terms).sum(axis=0)

    def _peel(self, roots: Integers) -> list[tuple[Integers, Mask]] | None:
        """Order sums that are solved by an unknown of their own, the first ones last, with a mask of those unknowns;
        None where there is no such order.

        Args:
            roots: of sums with three unknowns each.
        """
        left = np.arange(roots.shape[1])
        order: list[tuple[Integers, Mask]] = []
        while left.size:
            mine = roots[:, left]
            once = np.bincount(mine.ravel(), minlength=self.size + 1)[mine] == 1
            solved = once[0] | once[1] | once[2]
            if not np.count_nonzero(solved):
                return None
            order.append((left[solved], once[:, solved]))
            left = left[~solved]
        return order

    def choose(self) -> Array:
        """Return every shift: what is free becomes zero, and sums are held by the unknown that fewest others depend
        on.
        """
        found, factors, offsets = self.find_all()
        values = np.zeros(self.size + 1)  # of the roots
        if self._sums is not None:
            roots, slopes, rest, _ = self._read(self._sums, self._find_open(self._sums))
            sizes: Array = np.bincount(found, weights=self.weights, minlength=self.size + 1).astype(float)
            order = self._peel(roots)
            assert order is not None
            for solved, once in reversed(order):
                column = np.where(once, sizes[roots[:, solved]], np.inf).argmin(axis=0)
                others = slopes[:, solved] * values[roots[:, solved]]
                others[column, np.arange(len(solved))] = 0.0
                values[roots[column, solved]] = (rest[solved] - others.sum(axis=0)) / slopes[column, solved]
        values[self.constant] = self.value
        chosen = np.append(factors * values[found] + offsets, self.value)
        for total, own, other, factor, weight in self._held:
            chosen[own] = (chosen[total] - weight * chosen[other]) / factor
        return chosen[:-1]
