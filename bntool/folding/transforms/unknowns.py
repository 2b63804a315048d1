"""Unknown numbers in classes: each is factor * root + offset of the one that stands for its class.

A weighted union-find over arrays. Equations come in blocks, one for each channel, and can be taken back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bntool.folding.channels import Array, Integers

Mask = NDArray[np.bool_]

CLOSE = 1e-10  # relative; values that follow from each other in two ways differ by their rounding
NOBODY = -1


class Contradiction(Exception):  # noqa: N818 an answer, not an error of the program
    """Equations that cannot hold together.

    Attributes:
        origins: the nodes that ask for the one and the other, as far as they are known.
        channels: which of the equations of the block; None where that is not told.
        is_sign: they could hold with another sign.
    """

    def __init__(self, origins: Iterable[int], channels: Mask | None = None, *, is_sign: bool = False) -> None:
        super().__init__("equations that cannot hold together")
        self.origins = {int(origin) for origin in origins} - {NOBODY}
        self.channels, self.is_sign = channels, is_sign


class Equations(NamedTuple):
    """A block of equations left = factor * right + offset, with factors that are not zero.

    Attributes:
        origins: the nodes that ask for them.
    """

    left: Integers
    right: Integers
    factor: Array
    offset: Array
    origins: Integers


class Sides(NamedTuple):
    """What is known of both sides of a block of equations: factors * roots = slope * others + rest.

    Attributes:
        roots, factors: of the left sides.
        others: the roots of the right sides.
        apart: the equations between different classes.
        solvable: those within one class, whose value follows.
    """

    roots: Integers
    factors: Array
    others: Integers
    slope: Array
    rest: Array
    apart: Integers
    solvable: Integers


@dataclass
class Unknowns:
    """Numbers in classes. The last one is known: what is constant is in its class.

    At first equations are noted only: :meth:`add_noted` adds them at once, which costs much less than one by one.

    Attributes:
        size: how many there are without the constant, whose number this is.
        value: of the constant.
        weights: of how many channels each of them is the number.
    """

    size: int
    value: float
    weights: Integers = field(init=False)
    parent: Integers = field(init=False)  # the unknown that each one is a multiple of; a root is its own
    factor: Array = field(init=False)
    offset: Array = field(init=False)
    origin: Integers = field(init=False)  # the node that tied a class to the constant: by its root, and by its members
    _log: list[tuple[Any, Any, Any]] = field(default_factory=list)  # what was written, where, and what was there before
    _noted: list[Equations] | None = field(default_factory=list)
    _fixed: dict[int, tuple[Integers, int]] = field(default_factory=dict)  # noted, too

    def __post_init__(self) -> None:
        self.parent = np.arange(self.size + 1)
        self.factor, self.offset = np.ones(self.size + 1), np.zeros(self.size + 1)
        self.origin = np.full(self.size + 1, NOBODY)
        self.weights = np.ones(self.size, int)

    @property
    def constant(self) -> int:
        return self.size

    # what is tried can be taken back

    def mark(self) -> int:
        """Return the state of now, for :meth:`return_to`."""
        return len(self._log)

    def return_to(self, mark: int) -> None:
        """Take back all that was written since."""
        for written, where, before in reversed(self._log[mark:]):
            written[where] = before
        del self._log[mark:]

    def write(self, written: NDArray[Any], where: Any, values: Any) -> None:
        """Set elements of an array so that it can be taken back."""
        self._log.append((written, where, written[where]))
        written[where] = values

    # classes

    def find(self, which: Integers) -> tuple[Integers, Array, Array]:
        """Find the root, factor and offset of each unknown, and let it lie right below its root."""
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

    def settled(self, which: Integers) -> Array:
        """Return the values of those that are constant, and zero for others."""
        root, factor, offset = self.find(which)
        return np.where(root == self.constant, factor * self.value + offset, 0.0)

    def find_origins(self, which: Integers) -> Integers:
        """Return the node that tied each unknown to the constant; -1 for those that are free."""
        root, _, _ = self.find(which)
        return np.where(root == self.constant, self.origin[which], NOBODY)

    # equations

    def equate(self, left: Integers, right: Integers, origin: int) -> None:
        """Add left = right.

        Raises:
            Contradiction: that cannot hold.
        """
        if left is not right and (len(left) != len(right) or np.count_nonzero(left != right)):
            self.link(left, right, factor=np.ones(len(left)), offset=np.zeros(len(left)), origin=origin)

    def fix(self, which: Integers, origin: int) -> None:
        """Add that each is the constant.

        Raises:
            Contradiction: that cannot hold.
        """
        if self._noted is None:
            self.equate(which, np.full(len(which), self.constant), origin)
        else:
            self._fixed.setdefault(id(which), (which, origin))  # many ask it of what shares its unknowns

    def link(self, left: Integers, right: Integers, *, factor: Array, offset: Array, origin: int) -> None:
        """Add left = factor * right + offset, with factors that are not zero; ``origin`` is the node that asks for it.

        Raises:
            Contradiction: that cannot hold.
        """
        equations = Equations(left, right, factor, offset, np.full(len(left), origin))
        if self._noted is None:
            self.add(equations)
        else:
            self._noted.append(equations)

    def add_noted(self) -> None:
        """Add what was noted; of several nodes that ask for the constant the first is the one that is named."""
        if self._noted:
            self.add(Equations(*map(np.concatenate, zip(*self._noted, strict=True))))
        if self._fixed:
            which, origins = concatenate(self._fixed.values())
            constant, ones, zeros = np.full(len(which), self.constant), np.ones(len(which)), np.zeros(len(which))
            self.add(Equations(which, constant, ones, zeros, origins))
        self._noted = None
        self._log.clear()

    def add(self, equations: Equations, sides: Sides | None = None) -> None:
        """Add equations.

        Args:
            sides: of these equations, where they were looked at just now.

        Raises:
            Contradiction: they cannot hold together.
        """
        sides = sides or self.look_at(equations)
        while sides.apart.size or sides.solvable.size:
            held = self._join_classes(equations, sides) if sides.apart.size else self._solve(equations, sides)
            if self._noted is not None:  # chains are the longest
                self.parent[:-1], self.factor[:-1], self.offset[:-1] = self.find_all()
            if len(held) == len(equations.left):
                return
            is_open = np.zeros(len(equations.left), bool)
            is_open[sides.apart] = is_open[sides.solvable] = True
            is_open[held] = False
            sides = self.look_at(equations, is_open)

    def look_at(self, equations: Equations, is_open: Mask | None = None) -> Sides:
        """Return what is known of both sides.

        Args:
            is_open: which of the equations are not held yet; None for all.

        Raises:
            Contradiction: what is known is against one of them.
        """
        left, right, factor, offset, _ = equations
        roots, factors, offsets = self.find(left)
        others, other_factors, moved = self.find(right)
        moved = factor * moved
        slope, rest = factor * other_factors, moved + offset - offsets
        differs = roots != others
        is_apart, is_same = (differs, ~differs) if is_open is None else (differs & is_open, ~differs & is_open)
        (apart,), (same,) = is_apart.nonzero(), is_same.nonzero()
        sides = Sides(roots, factors, others, slope, rest, apart, same[:0])
        if not same.size:
            return sides
        mine, rest = factors[same], rest[same]
        slope, known = mine - slope[same], roots[same] == self.constant
        flat = np.abs(slope) <= CLOSE * np.abs(mine)
        size = np.abs(offsets[same]) + np.abs(moved[same]) + np.abs(offset[same])
        size += np.where(known, np.abs(mine * self.value), 0.0)
        wrong = np.abs(np.where(known, slope * self.value - rest, np.where(flat, rest, 0.0))) > CLOSE * size
        (free,) = (~known & ~flat).nonzero()
        if free.size:
            wrong[free] |= ~self.can_be(rest[free] / slope[free])
        if np.count_nonzero(wrong):
            raise self.contradict(equations, same[wrong])
        return sides._replace(solvable=same[free])

    def contradict(
        self, equations: Equations, which: Integers, asked: Iterable[int] = (), *, is_sign: bool = False
    ) -> Contradiction:
        """Return what some equations are, named by what ties the sides of the first, and by what else is asked."""
        channels = np.zeros(len(equations.left), bool)
        channels[which] = True
        first = which[:1]
        tied = self.find_origins(equations.left[first]), self.find_origins(equations.right[first])
        return Contradiction((*asked, *tied[0], *tied[1], *equations.origins[first]), channels, is_sign=is_sign)

    def _join_classes(self, equations: Equations, sides: Sides) -> Integers:
        """Let classes become one where the two sides have different roots; return of which equations that was."""
        chosen, mine, theirs = sides.apart, equations.left, equations.right
        lower = np.minimum(sides.roots, sides.others)[chosen]
        if np.count_nonzero(lower[1:] <= lower[:-1]):  # of those with one root that whose other one is the last
            chosen = chosen[(-np.maximum(sides.roots, sides.others)[chosen]).argsort(kind="stable")]
            lower, first = find_first(np.minimum(sides.roots, sides.others)[chosen])
            chosen = chosen[first]
        roots, others = sides.roots[chosen], sides.others[chosen]
        forward = roots < others  # the left one's root gets the right one's above it
        own, other, rest = sides.factors[chosen], sides.slope[chosen], sides.rest[chosen]
        # the class that is tied says by whom, unless this equation is what ties it
        tied = self.origin[np.where(forward, theirs[chosen], mine[chosen])]
        known = (theirs[chosen] == self.constant) | (mine[chosen] == self.constant) | (tied == NOBODY)
        self.write(self.origin, lower, np.where(known, equations.origins[chosen], tied))
        self.write(self.parent, lower, np.maximum(roots, others))
        self.write(self.factor, lower, np.where(forward, other / own, own / other))
        self.write(self.offset, lower, np.where(forward, rest / own, -rest / other))
        self.check_joined(lower)
        return chosen

    def _solve(self, equations: Equations, sides: Sides) -> Integers:
        """Tie the roots that both sides have to the constant; return by which equations."""
        roots, first = find_first(sides.roots[sides.solvable])
        chosen = sides.solvable[first]
        value = sides.rest[chosen] / (sides.factors[chosen] - sides.slope[chosen])
        self.write(self.origin, roots, equations.origins[chosen])
        self.write(self.parent, roots, self.constant)
        self.write(self.factor, roots, 1.0)
        self.write(self.offset, roots, value - self.value)
        return chosen

    def can_be(self, values: Array) -> Mask:
        """Return whether an unknown may have a value."""
        finite: Mask = np.isfinite(values)
        return finite

    def check_joined(self, lower: Integers) -> None:
        """Check that what is known of classes that became one agrees; ``lower`` were their roots."""


def find_first(values: Integers) -> tuple[Integers, Integers]:
    """Return the values, each once and sorted, and where each occurs first: ``numpy.unique`` takes five times as long
    for a few hundred.
    """
    order = values.argsort(kind="stable")
    ordered = values[order]
    first = np.append(True, ordered[1:] != ordered[:-1])
    return ordered[first], order[first]


def concatenate(noted: Iterable[tuple[Integers, int]]) -> tuple[Integers, Integers]:
    """Return all unknowns, and for each of them the node that asks for something."""
    which, origins = zip(*noted, strict=True)
    return np.concatenate(which), np.repeat(origins, [len(one) for one in which])
