"""Unknown numbers, each known up to one of its class: what channels are multiplied by, and what is added to them.

A weighted union-find over arrays: equations come in blocks, one for each channel, and are added or taken back at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

_CLOSE = 1e-10  # relative; values that follow from each other in two ways differ by their rounding
_NOBODY = -1


class Contradiction(Exception):  # noqa: N818 an answer, not an error of the program
    """Equations that cannot hold together.

    Attributes:
        channels: which of the equations of the block.
        origins: the nodes that ask for the one and the other; -1 for one that is not known.
        is_sign: each of them could hold with the other sign.
    """

    def __init__(self, channels: Mask, origins: tuple[int, ...], *, is_sign: bool = False) -> None:
        super().__init__("equations that cannot hold together")
        self.channels, self.origins, self.is_sign = channels, origins, is_sign


@dataclass(frozen=True)
class _OneUnknown:
    """Equations slope * root = rest.

    Attributes:
        roots: of both sides.
        factors: of the left sides.
        slope, rest: the equations.
        size: of the terms that ``rest`` is the sum of.
    """

    roots: Integers
    factors: Array
    slope: Array
    rest: Array
    size: Array


@dataclass
class Unknowns:
    """Numbers x, each of them factor * r + offset of the root r of its class. The last one is known: a constant.

    Attributes:
        size: how many there are without the constant, whose index this is.
        value: of the constant.
    """

    size: int
    value: float
    _log: list[tuple[NDArray[Any], Integers, NDArray[Any]]] | None = None
    parent: Integers = field(init=False)
    factor: Array = field(init=False)
    offset: Array = field(init=False)
    origin: Integers = field(init=False)  # of the class, by its root and by what is tied to the constant: who said so

    def __post_init__(self) -> None:
        self.parent = np.arange(self.size + 1)
        self.factor, self.offset = np.ones(self.size + 1), np.zeros(self.size + 1)
        self.origin = np.full(self.size + 1, _NOBODY)

    @property
    def constant(self) -> int:
        return self.size

    # what is tried can be taken back

    def begin(self) -> None:
        self._log = []

    def commit(self) -> None:
        self._log = None

    def roll_back(self) -> None:
        for array, where, before in reversed(self._log or ()):
            array[where] = before
        self._log = None

    def write(self, array: NDArray[Any], where: Integers, values: Any) -> None:
        if self._log is not None:
            self._log.append((array, where, array[where]))
        array[where] = values

    # classes

    def find(self, which: Integers) -> tuple[Integers, Array, Array]:
        """Root, factor and offset of each."""
        root, factor, offset = self.parent[which], self.factor[which], self.offset[which]
        origin = self.origin[which]
        moved = False
        while True:
            above = self.parent[root]
            if np.array_equal(above, root):
                break
            moved = True
            tied = (above == self.constant) & (root != self.constant)
            origin = np.where(tied, self.origin[root], origin)
            offset = factor * self.offset[root] + offset
            factor = factor * self.factor[root]
            root = above
        if moved:
            self.write(self.parent, which, root)
            self.write(self.factor, which, factor)
            self.write(self.offset, which, offset)
            self.write(self.origin, which, origin)
        return root, factor, offset

    def find_origins(self, which: Integers) -> Integers:
        """For each that is tied to the constant the node that tied it; -1 for others."""
        root, _, _ = self.find(which)
        return np.where(root == self.constant, self.origin[which], _NOBODY)

    def link(self, left: Integers, right: Integers, *, factor: Array, offset: Array, origin: int) -> None:
        """Add left = factor * right + offset, with factors that are not zero.

        Args:
            origin: the node that asks for it.

        Raises:
            Contradiction: that cannot hold.
        """
        while True:
            roots, factors, offsets = self.find(left)
            others, other_factors, other_offsets = self.find(right)
            slope, rest = factor * other_factors, factor * other_offsets + offset - offsets
            apart = np.flatnonzero(roots != others)
            if not apart.size:
                size = np.abs(offsets) + np.abs(factor * other_offsets) + np.abs(offset)
                one = _OneUnknown(roots, factors, factors - slope, rest, size)
                if not self._settle(left, right, one, origin):
                    return
                continue
            low, first = np.unique(np.minimum(roots, others)[apart], return_index=True)
            chosen = apart[first]
            forward = roots[chosen] < others[chosen]  # the left one's root gets the right one's above it
            own, other = factors[chosen], slope[chosen]
            # the class that is tied says by whom, unless this equation is what ties it
            tied = np.where(forward, self.origin[right[chosen]], self.origin[left[chosen]])
            known = (right[chosen] == self.constant) | (left[chosen] == self.constant) | (tied == _NOBODY)
            self.write(self.origin, low, np.where(known, origin, tied))
            self.write(self.parent, low, np.maximum(roots, others)[chosen])
            self.write(self.factor, low, np.where(forward, other / own, own / other))
            self.write(self.offset, low, np.where(forward, rest[chosen] / own, -rest[chosen] / other))
            self.check_linked(low, left, origin)

    def _settle(self, left: Integers, right: Integers, equations: _OneUnknown, origin: int) -> bool:
        """Equations in one unknown each, the root that both sides have; whether one of them was new."""
        roots, factors, slope, rest = equations.roots, equations.factors, equations.slope, equations.rest
        flat = np.abs(slope) <= _CLOSE * np.abs(factors)
        known = roots == self.constant
        size = equations.size + np.where(known, np.abs(factors * self.value), 0.0)
        missed = np.where(known, slope * self.value - rest, np.where(flat, rest, 0.0))
        wrong = np.abs(missed) > _CLOSE * size
        wrong |= ~known & ~flat & ~self.can_be(np.where(flat, 0.0, rest / np.where(flat, 1.0, slope)))
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise Contradiction(wrong, self._origins_of(left[at], right[at], origin))
        new = np.flatnonzero(~known & ~flat)
        if not new.size:
            return False
        low, first = np.unique(roots[new], return_index=True)
        chosen = new[first]
        self.write(self.origin, low, origin)
        self.write(self.parent, low, self.constant)
        self.write(self.factor, low, 1.0)
        self.write(self.offset, low, rest[chosen] / slope[chosen] - self.value)
        return True

    def _origins_of(self, left: np.int64, right: np.int64, origin: int) -> tuple[int, ...]:
        found = self.find_origins(np.array([left, right]))
        return tuple(dict.fromkeys(int(one) for one in (*found, origin) if one != _NOBODY))

    def can_be(self, values: Array) -> Mask:
        """Whether an unknown may have a value."""
        finite: Mask = np.isfinite(values)
        return finite

    def check_linked(self, low: Integers, left: Integers, origin: int) -> None:
        """Hold what is known of classes that became one against each other."""

    def fix(self, which: Integers, origin: int) -> None:
        """Add that each is the constant.

        Raises:
            Contradiction: that cannot hold.
        """
        ones = np.ones(len(which))
        self.link(which, np.full(len(which), self.constant), factor=ones, offset=np.zeros(len(which)), origin=origin)

    def equate(self, left: Integers, right: Integers, origin: int) -> None:
        """Add left = right.

        Raises:
            Contradiction: that cannot hold.
        """
        self.link(left, right, factor=np.ones(len(left)), offset=np.zeros(len(left)), origin=origin)


@dataclass
class Scales(Unknowns):
    """What channels are multiplied by: never zero, and of a known sign where something passes positive ones only."""

    value: float = 1.0
    signs: tuple[Mask, Mask] = field(init=False)  # whether a root has to be positive, and whether negative
    sign_origins: tuple[Integers, Integers] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.signs = (np.zeros(self.size + 1, bool), np.zeros(self.size + 1, bool))
        self.sign_origins = (np.full(self.size + 1, _NOBODY), np.full(self.size + 1, _NOBODY))
        self.signs[0][self.constant] = True

    def can_be(self, values: Array) -> Mask:
        usable: Mask = np.isfinite(values) & (values != 0)
        return usable

    def require_positive(self, which: Integers, origin: int) -> None:
        """Add that each is positive.

        Raises:
            Contradiction: it is negative.
        """
        roots, factors, _ = self.find(which)
        for sign, there in ((0, factors > 0), (1, factors < 0)):
            self.write(self.signs[sign], roots[there], True)
            self.write(self.sign_origins[sign], roots[there], origin)
        self._check_signs(which, roots, origin)

    def check_linked(self, low: Integers, left: Integers, origin: int) -> None:
        flagged = low[self.signs[0][low] | self.signs[1][low]]
        roots, factors, _ = self.find(flagged)
        for sign in (0, 1):
            mine = self.signs[sign][flagged]
            for goal, there in ((sign, mine & (factors > 0)), (1 - sign, mine & (factors < 0))):
                self.write(self.signs[goal], roots[there], True)
                self.write(self.sign_origins[goal], roots[there], self.sign_origins[sign][flagged[there]])
        self._check_signs(left, self.find(left)[0], origin)

    def _check_signs(self, which: Integers, roots: Integers, origin: int) -> None:
        both = self.signs[0][roots] & self.signs[1][roots]
        if both.any():
            at = int(np.flatnonzero(both)[0])
            origins = [int(self.sign_origins[sign][roots[at]]) for sign in (0, 1)]
            tied = int(self.find_origins(which[at : at + 1])[0])
            found = tuple(dict.fromkeys(one for one in (*origins, tied, origin) if one != _NOBODY))
            raise Contradiction(both, found, is_sign=True)

    def choose(self) -> Array:
        """Every scale: of a class that is free the value that most of it has becomes one.

        So what must not change at all stays in most places as it is.
        """
        which = np.arange(self.size)
        roots, factors, offsets = self.find(which)
        values = factors * self.value + offsets  # where the root is the constant
        free = roots != self.constant
        if free.any():
            sizes = np.abs(factors[free])
            order = np.lexsort((sizes, roots[free]))
            ordered, their = sizes[order], roots[free][order]
            new = np.ones(len(order), bool)
            new[1:] = (their[1:] != their[:-1]) | (ordered[1:] > ordered[:-1] * (1 + _CLOSE))
            starts = np.flatnonzero(new)
            lengths = np.diff(np.append(starts, len(order)))
            best = np.lexsort((-lengths, their[starts]))
            heads = best[np.append(True, np.diff(their[starts][best]) != 0)]
            common = np.ones(self.size + 1)
            common[their[starts][heads]] = ordered[starts][heads]
            negative = np.where(self.signs[1][roots[free]], -1.0, 1.0)
            values[free] = negative * factors[free] / common[roots[free]]
        return values


@dataclass
class Shifts(Unknowns):
    """What is added to channels, in units of the original, and sums of two of them that are a third.

    Sums that hold in any case, because one of the three occurs nowhere else, are solved last.
    """

    value: float = 0.0
    sums: Integers = field(init=False)  # three columns: a = f b + g c
    factors: Array = field(init=False)  # 1, -f, -g
    owners: Integers = field(init=False)
    is_open: Mask = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sums, self.factors = np.zeros((0, 3), int), np.zeros((0, 3))
        self.owners, self.is_open = np.zeros(0, int), np.zeros(0, bool)

    def add_sums(
        self, total: Integers, parts: tuple[Integers, Integers], factors: tuple[float, float], origin: int
    ) -> None:
        """Add total = f * one + g * other; :meth:`simplify` makes use of them."""
        self.sums = np.concatenate([self.sums, np.stack([total, *parts], axis=1)])
        row = np.array([[1.0, -factors[0], -factors[1]]])
        self.factors = np.concatenate([self.factors, np.repeat(row, len(total), axis=0)])
        self.owners = np.concatenate([self.owners, np.full(len(total), origin)])
        self.is_open = np.concatenate([self.is_open, np.ones(len(total), bool)])

    def simplify(self) -> None:
        """Use the sums in which at most two unknowns are left, until none is.

        Raises:
            Contradiction: one cannot hold, or it is not seen that all can hold together.
        """
        while True:
            rows = np.flatnonzero(self.is_open)
            if not rows.size:
                return
            roots, slopes, rest, size = self._read(rows)
            count = (slopes != 0).sum(axis=1)
            done = rows[count < 3]
            if not done.size:
                if self._peel(roots) is None:
                    raise Contradiction(np.ones(1, bool), ())
                return
            self.write(self.is_open, done, False)
            none = count == 0
            wrong = none & (np.abs(rest) > _CLOSE * size)
            if wrong.any():
                raise Contradiction(np.ones(1, bool), (int(self.owners[rows[wrong][0]]),))
            for owner in np.unique(self.owners[rows[(count == 1) | (count == 2)]]):
                mine = (self.owners[rows] == owner) & (count > 0) & (count < 3)
                self._use(roots[mine], slopes[mine], rest[mine], int(owner))

    def _read(self, rows: Integers) -> tuple[Integers, Array, Array, Array]:
        """Sums as slopes times roots = rest, each root once."""
        found, factors, offsets = self.find(self.sums[rows].ravel())
        roots = found.reshape(-1, 3)
        slopes = self.factors[rows] * factors.reshape(-1, 3)
        terms = self.factors[rows] * offsets.reshape(-1, 3)
        largest = np.abs(slopes).max(axis=1, keepdims=True)
        for one, two in ((0, 1), (0, 2), (1, 2)):
            same = roots[:, one] == roots[:, two]
            slopes[:, one] += np.where(same, slopes[:, two], 0.0)
            slopes[same, two] = 0.0
        slopes[(roots == self.constant) | (np.abs(slopes) <= _CLOSE * largest)] = 0.0
        return roots, slopes, -terms.sum(axis=1), np.abs(terms).sum(axis=1)

    def _use(self, roots: Integers, slopes: Array, rest: Array, origin: int) -> None:
        order = np.argsort(slopes == 0, axis=1, kind="stable")  # those that are left come first
        roots, slopes = np.take_along_axis(roots, order, axis=1), np.take_along_axis(slopes, order, axis=1)
        two = slopes[:, 1] != 0
        right = np.where(two, roots[:, 1], self.constant)
        factor = np.where(two, -slopes[:, 1] / slopes[:, 0], 1.0)
        self.link(roots[:, 0], right, factor=factor, offset=rest / slopes[:, 0], origin=origin)

    def _peel(self, roots: Integers) -> list[tuple[Integers, Integers]] | None:
        """Rows that are solved by an unknown of their own, the first ones last; None where there is no such order.

        Args:
            roots: of sums with three unknowns each.
        """
        left = np.arange(len(roots))
        order: list[tuple[Integers, Integers]] = []
        while left.size:
            _, places, counts = np.unique(roots[left].ravel(), return_inverse=True, return_counts=True)
            once = counts[places.reshape(-1)].reshape(len(left), 3) == 1
            solved = once.any(axis=1)
            if not solved.any():
                return None
            sizes = np.where(once, self._class_sizes(roots[left]), np.inf)
            order.append((left[solved], sizes[solved].argmin(axis=1)))
            left = left[~solved]
        return order

    def _class_sizes(self, roots: Integers) -> Array:
        return self._counts[roots] if self._counts is not None else np.zeros(roots.shape)

    _counts: Array | None = None

    def choose(self) -> Array:
        """Every shift: what is free becomes zero, and sums are held by the unknown that fewest others depend on."""
        self._counts = np.bincount(self.find(np.arange(self.size))[0], minlength=self.size + 1).astype(float)
        values = np.zeros(self.size + 1)
        rows = np.flatnonzero(self.is_open)
        if rows.size:
            roots, slopes, rest, _ = self._read(rows)
            order = self._peel(roots)
            assert order is not None
            for solved, column in reversed(order):
                others = slopes[solved] * values[roots[solved]]
                here = np.arange(len(solved)), column
                others[here] = 0.0
                values[roots[solved][here]] = (rest[solved] - others.sum(axis=1)) / slopes[solved][here]
        which = np.arange(self.size)
        found, factors, offsets = self.find(which)
        values[self.constant] = self.value
        return factors * values[found] + offsets
