"""Unknown numbers, each known up to one of its class: what channels are multiplied by, and what is added to them.

A weighted union-find over arrays: equations come in blocks, one for each channel, and are added or taken back at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bntool.folding.channels import Array, Integers

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


@dataclass
class Equations:
    """Equations left = factor * right + offset, with factors that are not zero, and what is known of both sides.

    Attributes:
        origins: the nodes that ask for them.
        channels: which of a block of ``size`` they are.
        roots, factors: of the left sides.
        others: roots of the right sides.
        slope, rest: factors * root = slope * other + rest.
        apart: those of which the sides have different roots.
        solvable: those of which both sides have one root, whose value follows.
    """

    left: Integers
    right: Integers
    factor: Array
    offset: Array
    origins: Integers
    channels: Integers | None = None
    size: int = 0
    roots: Integers = field(init=False)
    factors: Array = field(init=False)
    others: Integers = field(init=False)
    slope: Array = field(init=False)
    rest: Array = field(init=False)
    apart: Integers = field(init=False)
    solvable: Integers = field(init=False)

    def __post_init__(self) -> None:
        self.size = self.size or len(self.left)

    def of(self, which: Integers) -> Integers:
        """Return which of the block some of them are."""
        return which if self.channels is None else self.channels[which]

    def part(self, which: Integers) -> Equations:
        """Return some of them, of which nothing is known yet."""
        sides = self.left[which], self.right[which], self.factor[which], self.offset[which]
        return Equations(*sides, self.origins[which], self.of(which), self.size)


@dataclass
class _Noted:
    """What is asked for before anything is tried: it is added at once.

    Attributes:
        equations: all of them.
        fixed, positive: unknowns that are to be the constant, or positive, and the node that asks for that, once for
            each array.
    """

    equations: list[Equations] = field(default_factory=list)
    fixed: dict[int, tuple[Integers, int]] = field(default_factory=dict)
    positive: dict[int, tuple[Integers, int]] = field(default_factory=dict)


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
    _noted: _Noted | None = field(default_factory=_Noted)
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
        if not np.count_nonzero(above != root):
            return root, factor, offset
        origin = self.origin[which]
        while True:
            tied = (above == self.constant) & (root != self.constant)
            origin = np.where(tied, self.origin[root], origin)
            offset = factor * self.offset[root] + offset
            factor = factor * self.factor[root]
            root = above
            above = self.parent[root]
            if not np.count_nonzero(above != root):
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
            if not np.count_nonzero(above != root):
                return root[:-1], factor[:-1], offset[:-1]
            offset = factor * offset[root] + offset
            factor = factor * factor[root]
            root = above

    def _shorten(self) -> None:
        """Let all unknowns lie right below their roots, where none is tied and nothing is taken back."""
        self.parent[:-1], self.factor[:-1], self.offset[:-1] = self.find_all()

    def settled(self, which: Integers) -> Array:
        """Return the values of those that are tied to the constant, and zero for others."""
        root, factor, offset = self.find(which)
        return np.where(root == self.constant, factor * self.value + offset, 0.0)

    def find_origins(self, which: Integers) -> Integers:
        """Return the node that tied each unknown to the constant; -1 for those that are not tied to it."""
        root, _, _ = self.find(which)
        return np.where(root == self.constant, self.origin[which], _NOBODY)

    def link(self, left: Integers, right: Integers, *, factor: Array, offset: Array, origin: int) -> None:
        """Add left = factor * right + offset, with factors that are not zero; ``origin`` is the node that asks for it.

        Until :meth:`add_noted` that is only noted.

        Raises:
            Contradiction: that cannot hold.
        """
        equations = Equations(left, right, factor, offset, np.full(len(left), origin))
        if self._noted is None:
            self.add(self.look_at(equations))
        else:
            self._noted.equations.append(equations)

    def look_at(self, equations: Equations) -> Equations:
        """Return equations, which are not added yet, with what is known of both sides.

        Raises:
            Contradiction: that is against one of them.
        """
        here = equations
        here.roots, here.factors, offsets = self.find(here.left)
        here.others, other_factors, moved = self.find(here.right)
        moved = here.factor * moved
        here.slope, here.rest = here.factor * other_factors, moved + here.offset - offsets
        differs = here.roots != here.others
        (here.apart,), here.solvable = differs.nonzero(), np.empty(0, int)
        if here.apart.size == len(differs):
            return here
        (same,) = (~differs).nonzero()
        factors, rest = here.factors[same], here.rest[same]
        slope, known = factors - here.slope[same], here.roots[same] == self.constant
        flat = np.abs(slope) <= _CLOSE * np.abs(factors)
        size = np.abs(offsets[same]) + np.abs(moved[same]) + np.abs(here.offset[same])
        size += np.where(known, np.abs(factors * self.value), 0.0)
        wrong = np.abs(np.where(known, slope * self.value - rest, np.where(flat, rest, 0.0))) > _CLOSE * size
        (free,) = (~known & ~flat).nonzero()
        if free.size:
            here.solvable = same[free]
            wrong[free] |= ~self.can_be(rest[free] / slope[free])
        if np.count_nonzero(wrong):
            raise self._contradict(here, same[wrong])
        return here

    def _contradict(
        self, equations: Equations, which: Integers, asked: Iterable[int] = (), *, is_sign: bool = False
    ) -> Contradiction:
        """Return what some equations are, named by what ties the sides of the first, and who asked for its signs."""
        channels = np.zeros(equations.size, bool)
        channels[equations.of(which)] = True
        tied = self.find_origins(np.array([equations.left[which[0]], equations.right[which[0]]]))
        return Contradiction(channels, _name((*asked, *tied, equations.origins[which[0]])), is_sign=is_sign)

    def add(self, equations: Equations) -> None:
        """Add equations that were looked at just now.

        Raises:
            Contradiction: they cannot hold together.
        """
        here = equations
        while here.apart.size or here.solvable.size:
            held = self._join_classes(here) if here.apart.size else self._solve(here)
            if self._noted is not None:  # chains are the longest, and nothing is tied yet
                self._shorten()
            if len(held) == len(here.left):
                return
            open_ones = np.zeros(len(here.left), bool)
            open_ones[here.apart] = open_ones[here.solvable] = True
            open_ones[held] = False
            here = self.look_at(here.part(open_ones.nonzero()[0]))

    def _join_classes(self, equations: Equations) -> Integers:
        """Let classes become one where the two sides have different roots; return of which equations that was."""
        chosen, mine, theirs = equations.apart, equations.left, equations.right
        lower = np.minimum(equations.roots, equations.others)[chosen]
        if np.count_nonzero(lower[1:] <= lower[:-1]):  # of those with one root that whose other one is the last
            chosen = chosen[np.maximum(equations.roots, equations.others)[chosen].argsort(kind="stable")[::-1]]
            lower, first = _find_first(np.minimum(equations.roots, equations.others)[chosen])
            chosen = chosen[first]
        roots, others = equations.roots[chosen], equations.others[chosen]
        forward = roots < others  # the left one's root gets the right one's above it
        own, other, rest = equations.factors[chosen], equations.slope[chosen], equations.rest[chosen]
        # the class that is tied says by whom, unless this equation is what ties it
        tied = self.origin[np.where(forward, theirs[chosen], mine[chosen])]
        known = (theirs[chosen] == self.constant) | (mine[chosen] == self.constant) | (tied == _NOBODY)
        self.write(self.origin, lower, np.where(known, equations.origins[chosen], tied))
        self.attach(lower, np.maximum(roots, others))
        self.write(self.factor, lower, np.where(forward, other / own, own / other))
        self.write(self.offset, lower, np.where(forward, rest / own, -rest / other))
        self.check_linked(lower, mine, equations.origins)
        return chosen

    def _solve(self, equations: Equations) -> Integers:
        """Tie the roots that both sides have to the constant; return by which equations."""
        low, first = _find_first(equations.roots[equations.solvable])
        chosen = equations.solvable[first]
        value = equations.rest[chosen] / (equations.factors[chosen] - equations.slope[chosen])
        self.write(self.origin, low, equations.origins[chosen])
        self.attach(low, self.constant)
        self.write(self.factor, low, 1.0)
        self.write(self.offset, low, value - self.value)
        return chosen

    def attach(self, roots: Integers, above: Integers | int) -> None:
        """Let roots of classes lie below others."""
        self.write(self.parent, roots, above)

    def can_be(self, values: Array) -> Mask:
        """Return whether an unknown may have a value."""
        finite: Mask = np.isfinite(values)
        return finite

    def may_be_constant(self, roots: Integers) -> bool:
        """Return whether nothing that is known of classes is against it."""
        return not np.count_nonzero(roots == self.constant)

    def check_linked(self, low: Integers, left: Integers, origins: Integers) -> None:
        """Check that what is known of classes that became one agrees."""

    def fix(self, which: Integers, origin: int) -> None:
        """Add that each is the constant; until :meth:`add_noted` that is only noted.

        Raises:
            Contradiction: that cannot hold.
        """
        if self._noted is not None:
            self._noted.fixed.setdefault(id(which), (which, origin))
        else:
            self._fix(which, np.full(len(which), origin))

    def add_noted(self) -> None:
        """Add what was noted; of several nodes that ask for the same the first is the one that is named."""
        noted = self._noted or _Noted()
        if noted.equations:
            parts = [(e.left, e.right, e.factor, e.offset, e.origins) for e in noted.equations]
            left, right, factor, offset, origins = map(np.concatenate, zip(*parts, strict=True))
            self.add(self.look_at(Equations(left, right, factor, offset, origins)))
        self._noted = None
        if noted.fixed:
            self._fix(*_concatenate(noted.fixed.values()))

    def _fix(self, which: Integers, origins: Integers) -> None:
        roots, factors, offsets = self.find(which)
        free = roots != self.constant
        is_other = np.where(free, (factors != 1) | (offsets != 0), factors * self.value + offsets != self.value)
        if np.count_nonzero(is_other) or not self.may_be_constant(roots[free]):
            ones, zeros = np.ones(len(which)), np.zeros(len(which))
            constant = np.full(len(which), self.constant)
            self.add(self.look_at(Equations(which, constant, ones, zeros, origins)))
        elif np.count_nonzero(free):
            roots = roots[free][::-1]  # the first one that asks for it is named
            self.write(self.origin, roots, origins[free][::-1])
            self.attach(roots, self.constant)
            self.write(self.factor, roots, 1.0)
            self.write(self.offset, roots, 0.0)

    def equate(self, left: Integers, right: Integers, origin: int) -> None:
        """Add left = right.

        Raises:
            Contradiction: that cannot hold.
        """
        if left is right or (len(left) == len(right) and not np.count_nonzero(left != right)):
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
        return not np.count_nonzero(self.signs[1][roots])

    def require_positive(self, which: Integers, origin: int) -> None:
        """Add that each is positive; until :meth:`add_noted` that is only noted.

        Raises:
            Contradiction: it is negative.
        """
        if self._noted is None:
            self._require_positive(which, np.full(len(which), origin))
        else:
            self._noted.positive.pop(id(which), None)  # the last one that asks for it is named
            self._noted.positive[id(which)] = which, origin

    def add_noted(self) -> None:
        positive = self._noted.positive.values() if self._noted is not None else ()
        super().add_noted()
        if positive:
            self._require_positive(*_concatenate(positive))

    def _require_positive(self, which: Integers, origins: Integers) -> None:
        roots, factors, _ = self.find(which)
        for sign, there in ((0, factors > 0), (1, factors < 0)):
            self._require_sign(sign, roots[there], origins[there])
        self._check_signs(which, roots, origins)

    def _require_sign(self, sign: int, roots: Integers, origins: Integers) -> None:
        if roots.size:
            self.write(self.signs[sign], roots, True)
            self.write(self.sign_origins[sign], roots, origins)

    def check_linked(self, low: Integers, left: Integers, origins: Integers) -> None:
        flagged = low[self.signs[0][low] | self.signs[1][low]]
        if not flagged.size:
            return
        roots, factors, _ = self.find(flagged)
        for sign in (0, 1):
            mine = self.signs[sign][flagged]
            for goal, there in ((sign, mine & (factors > 0)), (1 - sign, mine & (factors < 0))):
                self._require_sign(goal, roots[there], self.sign_origins[sign][flagged[there]])
        self._check_signs(left, self.find(left)[0], origins)

    def _check_signs(self, which: Integers, roots: Integers, asked: Integers) -> None:
        both = self.signs[0][roots] & self.signs[1][roots]
        if np.count_nonzero(both):
            at = both.argmax()
            origins = [sign[roots[at]] for sign in self.sign_origins]
            found = (*origins, *self.find_origins(which[at : at + 1]), asked[at])
            raise Contradiction(both, _name(found), is_sign=True)

    def look_at(self, equations: Equations) -> Equations:
        here = super().look_at(equations)
        mine, theirs = here.roots[here.apart], here.others[here.apart]
        differs = (here.slope * here.factors)[here.apart] < 0  # the two roots have different signs
        one, other = self.signs
        wrong = differs & (one[mine] & one[theirs] | other[mine] & other[theirs])
        wrong |= ~differs & (one[mine] & other[theirs] | other[mine] & one[theirs])
        if np.count_nonzero(wrong):
            roots = np.array([mine[wrong.argmax()], theirs[wrong.argmax()]])
            signs = zip(self.signs, self.sign_origins, strict=True)
            asked = [origin for sign, origins in signs for origin in origins[roots[sign[roots]]]]
            raise self._contradict(here, here.apart[wrong], asked, is_sign=True)
        return here

    def are_apart(self, equations: Equations) -> bool:
        """Return whether the two sides of equations that were looked at are a class each, and none is tied."""
        classes = np.sort(np.concatenate([equations.roots, equations.others]))
        return bool(classes[-1] != self.constant) and not np.count_nonzero(classes[1:] == classes[:-1])

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
            number = (np.bincount(roots[free]) > 0).cumsum()  # of each class: small ones are sorted by their digits
            order = sizes.argsort()
            small = number[roots[free][order]].astype(np.min_scalar_type(number[-1]))
            order = order[small.argsort(kind="stable")]
            ordered, their, weights = sizes[order], roots[free][order], self.weights[free][order]
            other = their[1:] != their[:-1]
            starts = _find_starts(other | (ordered[1:] > ordered[:-1] * (1 + _CLOSE)))
            first = _find_starts(other)
            lengths = np.add.reduceat(weights, starts)
            of = first.searchsorted(starts, side="right") - 1  # the class of each run of equal sizes
            most = np.maximum.reduceat(lengths, starts.searchsorted(first))
            (best,) = (lengths == most[of]).nonzero()
            common = np.ones(self.size + 1)
            common[their[starts][best[::-1]]] = ordered[starts][best[::-1]]  # the smallest of several
            low, high, roots_of = ordered[first], np.append(ordered[first[1:] - 1], ordered[-1]), their[first]
            far = (high > _MOST * common[roots_of]) | (low * _MOST < common[roots_of])
            common[roots_of[far]] = np.sqrt(low[far]) * np.sqrt(high[far])
            negative = np.where(self.signs[1][roots[free]], -1.0, 1.0)
            values[free] = negative * factors[free] / common[roots[free]]
        return values


@dataclass
class _Sums:
    """Sums that nodes ask for: of three unknowns, each times a factor, zero is left, for each channel.

    Attributes:
        unknowns: a row for each of the three, a column for each channel.
        factors: of the same shape.
        origins: the nodes.
        roots: of the unknowns, when they were looked at last; of a sum that holds by other equations the constant.
        is_open: which of them hold by no other equation yet.
    """

    unknowns: Integers
    factors: Array
    origins: Integers
    roots: Integers = field(init=False)
    is_open: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.roots, self.is_open = self.unknowns.copy(), np.ones(len(self.origins), bool)


@dataclass
class Shifts(Unknowns):
    """The shifts of channels, in units of the original, and sums of two of them that are a third.

    Sums that hold in any case, because one of the three occurs nowhere else, are solved last.
    """

    value: float = 0.0
    _sums: list[_Sums] = field(default_factory=list)  # of each node; one of all of them once they are added
    _held: list[tuple[Integers, tuple[Integers, Integers], tuple[float, float]]] = field(default_factory=list)
    _changed: Mask = field(init=False)  # unknowns that are roots no more since the sums were looked at

    def __post_init__(self) -> None:
        super().__post_init__()
        self._changed = np.ones(self.size + 1, bool)

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
        unknowns = np.stack([total, *parts])
        column = np.array([[1.0], [-factors[0]], [-factors[1]]])
        self._sums.append(_Sums(unknowns, np.broadcast_to(column, unknowns.shape), np.full(len(total), origin)))

    def add_noted(self) -> None:
        super().add_noted()
        parts = zip(*((sums.unknowns, sums.factors, sums.origins) for sums in self._sums), strict=True)
        self._sums = [_Sums(*(np.concatenate(part, axis=-1) for part in parts))] if self._sums else []

    def hold_sums(self, total: Integers, parts: tuple[Integers, Integers], factors: tuple[float, float]) -> None:
        """Add total = f * one + g * other, where ``one`` occurs in nothing else: it is what the others leave."""
        self._held.append((total, parts, factors))

    def fix_open(self) -> None:
        """Fix the unknowns of sums that are still open: nothing changes there."""
        for sums in self._sums:
            self.fix(np.unique(sums.unknowns[:, sums.is_open]), _NOBODY)

    def simplify(self) -> None:
        """Use the sums in which at most two unknowns are left, until none is.

        Raises:
            Contradiction: one cannot hold, or it is not seen that all can hold together.
        """
        for sums in self._sums:
            moved = False
            while True:
                (changed,) = self._changed.nonzero()
                here = self._changed[sums.roots] if changed.size else np.zeros((3, 0), bool)
                (which,) = (here[0] | here[1] | here[2]).nonzero()
                self._changed[changed] = False  # what is used now may change others
                if not which.size:
                    break
                moved = True
                self._use(sums, which)
            # with fewer sums there still is an order in which they can be solved
            if moved and self._peel(sums.roots[:, sums.is_open]) is None:
                raise Contradiction(np.ones(1, bool), ())

    def _use(self, sums: _Sums, which: Integers) -> None:
        """Look at some sums, and make equations of those that have at most two unknowns by now."""
        roots, slopes, rest, size = self._read(sums, which)
        there = slopes != 0
        count = there.sum(axis=0)
        three = count == 3
        self.write(sums.roots, (slice(None), which), np.where(three, roots, self.constant))
        self.write(sums.is_open, which, three)
        wrong = (count == 0) & (np.abs(rest) > _CLOSE * size)
        if np.count_nonzero(wrong):
            raise Contradiction(np.ones(1, bool), (int(sums.origins[which[wrong.argmax()]]),))
        (mine,) = ((count == 1) | (count == 2)).nonzero()
        if not mine.size:
            return
        one = there[:, mine].argmax(axis=0)  # the first that is left, and the second
        other = np.where(there[0, mine] & there[1, mine], 1, 2)
        two = (other > one) & there[other, mine]
        slope = slopes[one, mine]
        right = np.where(two, roots[other, mine], self.constant)
        factor = np.where(two, -slopes[other, mine] / slope, 1.0)
        equations = Equations(roots[one, mine], right, factor, rest[mine] / slope, sums.origins[which[mine]])
        self.add(self.look_at(equations))

    def _read(self, sums: _Sums, which: Integers) -> tuple[Integers, Array, Array, Array]:
        """Read some sums as slopes times roots = rest, each root once."""
        found, factors, offsets = self.find(sums.unknowns[:, which].ravel())
        roots, given = found.reshape(3, -1), sums.factors[:, which]
        slopes, terms = given * factors.reshape(3, -1), given * offsets.reshape(3, -1)
        largest = np.abs(slopes).max(axis=0)
        for one, two in ((0, 1), (0, 2), (1, 2)):
            same = roots[one] == roots[two]
            if np.count_nonzero(same):
                slopes[one] += np.where(same, slopes[two], 0.0)
                slopes[two, same] = 0.0
        slopes[(roots == self.constant) | (np.abs(slopes) <= _CLOSE * largest)] = 0.0
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
        values = np.zeros(self.size + 1)
        for sums in self._sums:
            roots, slopes, rest, _ = self._read(sums, sums.is_open.nonzero()[0])
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
        for total, (own, other), (factor, weight) in self._held:
            chosen[own] = (chosen[total] - weight * chosen[other]) / factor
        return chosen[:-1]


def _name(origins: Iterable[int]) -> tuple[int, ...]:
    """Return those that are known, each once."""
    return tuple(dict.fromkeys(int(one) for one in origins if one != _NOBODY))


def _find_first(values: Integers) -> tuple[Integers, Integers]:
    """Return the values, each once and sorted, and where each occurs first: ``numpy.unique`` takes five times as long
    for a few hundred.
    """
    order = values.argsort(kind="stable")
    ordered = values[order]
    first = np.append(True, ordered[1:] != ordered[:-1])
    return ordered[first], order[first]


def _concatenate(noted: Iterable[tuple[Integers, int]]) -> tuple[Integers, Integers]:
    """Return all unknowns, and for each of them the node that asks for something."""
    which, origins = zip(*noted, strict=True)
    return np.concatenate(which), np.repeat(origins, [len(one) for one in which])


def _find_starts(differs: Mask) -> Integers:
    """Return where runs begin, of elements that are told whether they differ from the one before, the first aside."""
    return np.append(0, differs.nonzero()[0] + 1)
