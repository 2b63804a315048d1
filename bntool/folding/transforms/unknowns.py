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
_MOST = 8.0  # three of the bits of a quantisation of a whole tensor


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
        weights: how many channels each of them stands for.
    """

    size: int
    value: float
    weights: Integers = field(init=False)
    _log: list[tuple[Any, Any, Any]] | None = None
    parent: Integers = field(init=False)
    factor: Array = field(init=False)
    offset: Array = field(init=False)
    origin: Integers = field(init=False)  # of the class, by its root and by what is tied to the constant: who said so

    def __post_init__(self) -> None:
        self.parent = np.arange(self.size + 1)
        self.factor, self.offset = np.ones(self.size + 1), np.zeros(self.size + 1)
        self.origin = np.full(self.size + 1, _NOBODY)
        self.weights = np.ones(self.size, int)

    @property
    def constant(self) -> int:
        return self.size

    # what is tried can be taken back

    def mark(self) -> int:
        """Return the state of now: :meth:`return_to` takes back all that is written from here on."""
        if self._log is None:
            self._log = []
        return len(self._log)

    def return_to(self, mark: int) -> None:
        """Take back all that was written since."""
        log = self._log or []
        for written, where, before in reversed(log[mark:]):
            written[where] = before
        del log[mark:]

    def write(self, written: NDArray[Any] | list[Any], where: Any, values: Any) -> None:
        """Set elements of an array or a list so that it can be taken back."""
        if self._log is not None:
            self._log.append((written, where, written[where]))
        written[where] = values

    # classes

    def find(self, which: Integers) -> tuple[Integers, Array, Array]:
        """Find the root, factor and offset of each unknown."""
        root, factor, offset = self.parent[which], self.factor[which], self.offset[which]
        above = self.parent[root]
        if np.array_equal(above, root):
            return root, factor, offset
        origin = self.origin[which]
        while True:
            tied = (above == self.constant) & (root != self.constant)
            origin = np.where(tied, self.origin[root], origin)
            offset = factor * self.offset[root] + offset
            factor = factor * self.factor[root]
            root = above
            above = self.parent[root]
            if np.array_equal(above, root):
                break
        self.write(self.parent, which, root)
        self.write(self.factor, which, factor)
        self.write(self.offset, which, offset)
        self.write(self.origin, which, origin)
        return root, factor, offset

    def find_all(self) -> tuple[Integers, Array, Array]:
        """Find the same of all but the constant: each pass doubles how far every one looks up its chain."""
        root, factor, offset = self.parent, self.factor, self.offset
        while True:
            above = root[root]
            if np.array_equal(above, root):
                return root[:-1], factor[:-1], offset[:-1]
            offset = factor * offset[root] + offset
            factor = factor * factor[root]
            root = above

    def settled(self, which: Integers) -> Array:
        """Return the values of those that are tied to the constant, and zero for others."""
        root, factor, offset = self.find(which)
        return np.where(root == self.constant, factor * self.value + offset, 0.0)

    def find_origins(self, which: Integers) -> Integers:
        """Return the node that tied each unknown to the constant; -1 for those that are not tied to it."""
        root, _, _ = self.find(which)
        return np.where(root == self.constant, self.origin[which], _NOBODY)

    def link(self, left: Integers, right: Integers, *, factor: Array, offset: Array, origin: int) -> None:
        """Add left = factor * right + offset, with factors that are not zero.

        Args:
            origin: the node that asks for it.

        Raises:
            Contradiction: that cannot hold.
        """
        rows: Integers | slice = slice(None)  # those that do not hold by construction yet
        while True:
            mine, theirs, ratio, difference = left[rows], right[rows], factor[rows], offset[rows]
            roots, factors, offsets = self.find(mine)
            others, other_factors, other_offsets = self.find(theirs)
            slope, rest = ratio * other_factors, ratio * other_offsets + difference - offsets
            apart = np.flatnonzero(roots != others)
            if not apart.size:
                size = np.abs(offsets) + np.abs(ratio * other_offsets) + np.abs(difference)
                one = _OneUnknown(roots, factors, factors - slope, rest, size)
                held = self._settle(one, np.arange(len(left))[rows], (left, right), origin)
            else:
                lower = np.minimum(roots, others)[apart]
                chosen = apart
                if np.any(lower[1:] <= lower[:-1]):  # one after the other where several have one root
                    lower, first = np.unique(lower, return_index=True)
                    chosen = apart[first]
                forward = roots[chosen] < others[chosen]  # the left one's root gets the right one's above it
                own, other = factors[chosen], slope[chosen]
                # the class that is tied says by whom, unless this equation is what ties it
                tied = np.where(forward, self.origin[theirs[chosen]], self.origin[mine[chosen]])
                known = (theirs[chosen] == self.constant) | (mine[chosen] == self.constant) | (tied == _NOBODY)
                self.write(self.origin, lower, np.where(known, origin, tied))
                self.attach(lower, np.maximum(roots, others)[chosen])
                self.write(self.factor, lower, np.where(forward, other / own, own / other))
                self.write(self.offset, lower, np.where(forward, rest[chosen] / own, -rest[chosen] / other))
                self.check_linked(lower, left, origin)
                held = chosen
            if len(held) == len(mine):
                return
            open_rows = np.ones(len(mine), bool)
            open_rows[held] = False
            rows = np.arange(len(left))[rows][open_rows]

    def attach(self, roots: Integers, above: Integers | int) -> None:
        """Let roots of classes lie below others."""
        self.write(self.parent, roots, above)

    def _settle(
        self, equations: _OneUnknown, rows: Integers, sides: tuple[Integers, Integers], origin: int
    ) -> Integers:
        """Solve equations in one unknown each, the root that both sides have; return which of them are known to hold
        now.
        """
        roots, factors, slope, rest = equations.roots, equations.factors, equations.slope, equations.rest
        flat = np.abs(slope) <= _CLOSE * np.abs(factors)
        known = roots == self.constant
        size = equations.size + np.where(known, np.abs(factors * self.value), 0.0)
        missed = np.where(known, slope * self.value - rest, np.where(flat, rest, 0.0))
        wrong = np.abs(missed) > _CLOSE * size
        free = ~known & ~flat
        if free.any():
            wrong |= free & ~self.can_be(np.where(flat, 0.0, rest / np.where(flat, 1.0, slope)))
        if wrong.any():
            at = rows[np.flatnonzero(wrong)[0]]
            channels = np.zeros(len(sides[0]), bool)
            channels[rows[wrong]] = True
            raise Contradiction(channels, self._origins_of(sides[0][at], sides[1][at], origin))
        new = np.flatnonzero(free)
        if not new.size:
            return np.arange(len(roots))
        low, first = np.unique(roots[new], return_index=True)
        chosen = new[first]
        self.write(self.origin, low, origin)
        self.attach(low, self.constant)
        self.write(self.factor, low, 1.0)
        self.write(self.offset, low, rest[chosen] / slope[chosen] - self.value)
        held = ~free
        held[chosen] = True
        return np.flatnonzero(held)

    def _origins_of(self, left: np.int64, right: np.int64, origin: int) -> tuple[int, ...]:
        found = self.find_origins(np.array([left, right]))
        return tuple(dict.fromkeys(int(one) for one in (*found, origin) if one != _NOBODY))

    def can_be(self, values: Array) -> Mask:
        """Return whether an unknown may have a value."""
        finite: Mask = np.isfinite(values)
        return finite

    def may_be_constant(self, roots: Integers) -> bool:
        """Return whether nothing that is known of classes is against it."""
        return bool(np.all(roots != self.constant))

    def check_linked(self, low: Integers, left: Integers, origin: int) -> None:
        """Check that what is known of classes that became one agrees."""

    def fix(self, which: Integers, origin: int) -> None:
        """Add that each is the constant.

        Raises:
            Contradiction: that cannot hold.
        """
        roots, factors, offsets = self.find(which)
        free = roots != self.constant
        if np.all(np.where(free, (factors == 1) & (offsets == 0), factors * self.value + offsets == self.value)):
            roots = roots[free]
            if self.may_be_constant(roots):
                if roots.size:
                    self.write(self.origin, roots, origin)
                    self.attach(roots, self.constant)
                    self.write(self.factor, roots, 1.0)
                    self.write(self.offset, roots, 0.0)
                return
        ones = np.ones(len(which))
        self.link(which, np.full(len(which), self.constant), factor=ones, offset=np.zeros(len(which)), origin=origin)

    def equate(self, left: Integers, right: Integers, origin: int) -> None:
        """Add left = right.

        Raises:
            Contradiction: that cannot hold.
        """
        if left is right or np.array_equal(left, right):
            return
        self.link(left, right, factor=np.ones(len(left)), offset=np.zeros(len(left)), origin=origin)


@dataclass
class Scales(Unknowns):
    """The factors of channels: never zero, and of a known sign where something passes positive ones only."""

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

    def may_be_constant(self, roots: Integers) -> bool:
        return not self.signs[1][roots].any()

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
        if not flagged.size:
            return
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
        """Return every scale: of a class that is free the value that most of it has becomes one.

        So what must not change at all stays in most places as it is. Where something else then changed by more
        than a factor of ``_MOST``, the smallest and the largest are equally far from one instead: the worst factor is
        the least that there is.
        """
        roots, factors, offsets = self.find_all()
        values = factors * self.value + offsets  # where the root is the constant
        free = roots != self.constant
        uneven = np.zeros(self.size + 1, bool)  # the roots of classes in which not all are stored alike
        uneven[roots[free & (np.abs(factors) != 1)]] = True
        even = free & ~uneven[roots]
        values[even] = np.where(self.signs[1][roots[even]], -factors[even], factors[even])
        free &= ~even
        if free.any():
            sizes = np.abs(factors[free])
            order = np.lexsort((sizes, roots[free]))
            ordered, their, weights = sizes[order], roots[free][order], self.weights[free][order]
            new = np.ones(len(order), bool)
            new[1:] = (their[1:] != their[:-1]) | (ordered[1:] > ordered[:-1] * (1 + _CLOSE))
            starts = np.flatnonzero(new)
            lengths = np.add.reduceat(weights, starts)
            best = np.lexsort((-lengths, their[starts]))
            heads = best[np.append(True, np.diff(their[starts][best]) != 0)]
            common = np.ones(self.size + 1)
            common[their[starts][heads]] = ordered[starts][heads]
            first = np.flatnonzero(np.append(True, their[1:] != their[:-1]))
            low, high, roots_of = ordered[first], np.append(ordered[first[1:] - 1], ordered[-1]), their[first]
            far = (high > _MOST * common[roots_of]) | (low * _MOST < common[roots_of])
            common[roots_of[far]] = np.sqrt(low[far]) * np.sqrt(high[far])
            negative = np.where(self.signs[1][roots[free]], -1.0, 1.0)
            values[free] = negative * factors[free] / common[roots[free]]
        return values


@dataclass
class _Sums:
    """Sums that a node asks for: of three unknowns, each times a factor, zero is left, for each channel.

    Attributes:
        unknowns: a row for each channel, a column for each of the three.
        factors: of the columns.
        origin: the node.
        is_open: which of them hold by no other equation yet.
        number: position among all of them.
    """

    unknowns: Integers
    factors: Array
    origin: int
    is_open: Mask
    number: int


@dataclass
class Shifts(Unknowns):
    """The shifts of channels, in units of the original, and sums of two of them that are a third.

    Sums that hold in any case, because one of the three occurs nowhere else, are solved last.
    """

    value: float = 0.0
    sums: list[_Sums] = field(default_factory=list)
    _held: list[tuple[Integers, tuple[Integers, Integers], tuple[float, float]]] = field(default_factory=list)
    _changed: Mask = field(init=False)  # roots that are none any more since the sums were looked at
    # the roots of the open sums when they were looked at last; None before that
    _roots: list[Integers | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._changed = np.zeros(self.size + 1, bool)

    def return_to(self, mark: int) -> None:
        super().return_to(mark)
        self._changed[:] = False

    def attach(self, roots: Integers, above: Integers | int) -> None:
        super().attach(roots, above)
        self._changed[roots] = True

    def add_sums(
        self, total: Integers, parts: tuple[Integers, Integers], factors: tuple[float, float], origin: int
    ) -> None:
        """Add total = f * one + g * other; :meth:`simplify` makes use of them."""
        unknowns = np.stack([total, *parts], axis=1)
        row = np.array([1.0, -factors[0], -factors[1]])
        self.sums.append(_Sums(unknowns, row, origin, np.ones(len(total), bool), len(self.sums)))
        self._roots.append(None)

    def hold_sums(self, total: Integers, parts: tuple[Integers, Integers], factors: tuple[float, float]) -> None:
        """Add total = f * one + g * other, where ``one`` occurs in nothing else: it is what the others leave."""
        self._held.append((total, parts, factors))

    def fix_open(self) -> None:
        """Fix the unknowns of sums that are still open: nothing changes there."""
        for sums in self.sums:
            if sums.is_open.any():
                self.fix(np.unique(sums.unknowns[sums.is_open]), _NOBODY)

    def simplify(self) -> None:
        """Use the sums in which at most two unknowns are left, until none is.

        Raises:
            Contradiction: one cannot hold, or it is not seen that all can hold together.
        """
        touched, moved = True, False
        while touched:
            touched = False
            changed = np.flatnonzero(self._changed)
            for sums, roots in zip(self.sums, self._roots, strict=True):
                if roots is None or (roots.size and self._changed[roots].any()):
                    touched = True
                    moved = self._use(sums) or moved
            self._changed[changed] = False
        if moved:  # with fewer sums there still is an order in which they can be solved
            left = np.concatenate([roots for roots in self._roots if roots is not None])
            if self._peel(left) is None:
                raise Contradiction(np.ones(1, bool), ())

    def _use(self, sums: _Sums) -> bool:
        """Look at sums, and make equations of those that have at most two unknowns by now; whether others are left."""
        rows = np.flatnonzero(sums.is_open)
        roots, slopes, rest, size = self._read(sums, rows)
        count = (slopes != 0).sum(axis=1)
        left = roots[count == 3]
        self.write(self._roots, sums.number, left)
        if len(left) == len(rows):
            return True
        self.write(sums.is_open, rows[count < 3], False)
        wrong = (count == 0) & (np.abs(rest) > _CLOSE * size)
        if wrong.any():
            raise Contradiction(np.ones(1, bool), (sums.origin,))
        mine = (count == 1) | (count == 2)
        if not mine.any():
            return bool(len(left))
        roots, slopes, rest = roots[mine], slopes[mine], rest[mine]
        order = np.argsort(slopes == 0, axis=1, kind="stable")  # those that are left come first
        roots, slopes = np.take_along_axis(roots, order, axis=1), np.take_along_axis(slopes, order, axis=1)
        two = slopes[:, 1] != 0
        right = np.where(two, roots[:, 1], self.constant)
        factor = np.where(two, -slopes[:, 1] / slopes[:, 0], 1.0)
        self.link(roots[:, 0], right, factor=factor, offset=rest / slopes[:, 0], origin=sums.origin)
        return bool(len(left))

    def _read(self, sums: _Sums, rows: Integers) -> tuple[Integers, Array, Array, Array]:
        """Read the sums as slopes times roots = rest, each root once."""
        found, factors, offsets = self.find(sums.unknowns[rows].ravel())
        roots = found.reshape(-1, 3)
        slopes = sums.factors * factors.reshape(-1, 3)
        terms = sums.factors * offsets.reshape(-1, 3)
        largest = np.abs(slopes).max(axis=1, keepdims=True)
        for one, two in ((0, 1), (0, 2), (1, 2)):
            same = roots[:, one] == roots[:, two]
            if same.any():
                slopes[:, one] += np.where(same, slopes[:, two], 0.0)
                slopes[same, two] = 0.0
        slopes[(roots == self.constant) | (np.abs(slopes) <= _CLOSE * largest)] = 0.0
        return roots, slopes, -terms.sum(axis=1), np.abs(terms).sum(axis=1)

    def _peel(self, roots: Integers, sizes: Array | None = None) -> list[tuple[Integers, Integers]] | None:
        """Order rows that are solved by an unknown of their own, the first ones last; None where there is no such
        order.

        Args:
            roots: of sums with three unknowns each.
            sizes: how many depend on each unknown; the smallest is taken.
        """
        left = np.arange(len(roots))
        order: list[tuple[Integers, Integers]] = []
        while left.size:
            mine = roots[left]
            once = np.bincount(mine.ravel(), minlength=self.size + 1)[mine] == 1
            solved = once.any(axis=1)
            if not solved.any():
                return None
            cost = np.where(once, 0.0 if sizes is None else sizes[mine], np.inf)
            order.append((left[solved], cost[solved].argmin(axis=1)))
            left = left[~solved]
        return order

    def choose(self) -> Array:
        """Return every shift: what is free becomes zero, and sums are held by the unknown that fewest others depend
        on.
        """
        found, factors, offsets = self.find_all()
        values = np.zeros(self.size + 1)
        still_open = [(sums, np.flatnonzero(sums.is_open)) for sums in self.sums]
        read = [self._read(sums, rows) for sums, rows in still_open if rows.size]
        if read:
            roots, slopes, rest = (np.concatenate([one[part] for one in read]) for part in range(3))
            sizes: Array = np.bincount(found, weights=self.weights, minlength=self.size + 1).astype(float)
            order = self._peel(roots, sizes)
            assert order is not None
            for solved, column in reversed(order):
                others = slopes[solved] * values[roots[solved]]
                here = np.arange(len(solved)), column
                others[here] = 0.0
                values[roots[solved][here]] = (rest[solved] - others.sum(axis=1)) / slopes[solved][here]
        values[self.constant] = self.value
        chosen = np.append(factors * values[found] + offsets, self.value)
        for total, (own, other), (factor, weight) in self._held:
            chosen[own] = (chosen[total] - weight * chosen[other]) / factor
        return chosen[:-1]
