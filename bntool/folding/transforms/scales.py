"""What channels are multiplied by: numbers that are never zero, and positive where something passes no others."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bntool.folding.channels import Array, Integers
from bntool.folding.transforms.unknowns import (
    CLOSE,
    NOBODY,
    Contradiction,
    Equations,
    Mask,
    Sides,
    Unknowns,
    concatenate,
)

_MOST = 8.0  # three of the bits of a quantisation of a whole tensor


@dataclass
class Scales(Unknowns):
    """The unknown scales of channels.

    Attributes:
        sign: of each root, 1 or -1 where something asks for it, and 0 elsewhere.
        sign_origin: the node that asks.
    """

    value: float = 1.0
    sign: NDArray[np.int8] = field(init=False)
    sign_origin: Integers = field(init=False)
    _positive: list[tuple[Integers, int]] = field(default_factory=list)  # noted, too

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sign, self.sign_origin = np.zeros(self.size + 1, np.int8), np.full(self.size + 1, NOBODY)
        self.sign[self.constant] = 1

    def can_be(self, values: Array) -> Mask:
        usable: Mask = np.isfinite(values) & (values != 0)
        return usable

    def require_positive(self, which: Integers, origin: int) -> None:
        """Note that each is positive, before :meth:`add_noted`; ``origin`` is the node that asks for it."""
        self._positive.append((which, origin))

    def add_noted(self) -> None:
        super().add_noted()
        if self._positive:
            which, origins = concatenate(self._positive)
            roots, factors, _ = self.find(which)
            self._ask(roots, np.sign(factors), origins)

    def _ask(self, roots: Integers, signs: Array, origins: Integers) -> None:
        """Require signs of roots.

        Raises:
            Contradiction: one has to have another.
        """
        before, asked_before = self.sign[roots], self.sign_origin[roots]
        self.write(self.sign, roots, signs)
        self.write(self.sign_origin, roots, origins)
        wrong = (before * signs < 0) | (self.sign[roots] != signs)
        if np.count_nonzero(wrong):
            at = wrong.argmax()
            raise Contradiction((asked_before[at], self.sign_origin[roots[at]], origins[at]), is_sign=True)

    def check_joined(self, lower: Integers) -> None:
        flagged = lower[self.sign[lower] != 0]
        if flagged.size:
            roots, factors, _ = self.find(flagged)
            self._ask(roots, self.sign[flagged] * np.sign(factors), self.sign_origin[flagged])

    def look_at(self, equations: Equations, is_open: Mask | None = None) -> Sides:
        sides = super().look_at(equations, is_open)
        mine, theirs = sides.roots[sides.apart], sides.others[sides.apart]
        wrong = self.sign[mine] * self.sign[theirs] * (sides.slope * sides.factors)[sides.apart] < 0
        if np.count_nonzero(wrong):
            at = wrong.argmax()
            asked = self.sign_origin[[mine[at], theirs[at]]]
            raise self.contradict(equations, sides.apart[wrong], asked, is_sign=True)
        return sides

    def are_apart(self, sides: Sides) -> bool:
        """Return whether all of both sides are classes of their own, and none is constant."""
        classes = np.sort(np.concatenate([sides.roots, sides.others]))
        return bool(classes[-1] != self.constant) and not np.count_nonzero(classes[1:] == classes[:-1])

    def choose(self) -> Array:
        """Return every scale: of a class that is free the value that most of it has becomes one.

        So what must not change at all stays in most places as it is. Where something else then changed by more
        than a factor of ``_MOST``, the smallest and the largest are equally far from one instead: the worst factor is
        the least that there is.
        """
        roots, factors, offsets = self.find_all()
        free, sizes = roots != self.constant, np.abs(factors)
        unit = np.ones(self.size + 1)  # by the root
        is_uneven = np.zeros(self.size + 1, bool)  # also by the root: not all of its class are stored alike
        is_uneven[roots[free & (sizes != 1)]] = True
        uneven = free & is_uneven[roots]
        if uneven.any():
            _choose_units(unit, roots[uneven], sizes[uneven], self.weights[uneven])
        turned = np.where(self.sign[roots] < 0, -1.0, 1.0)
        return np.where(free, turned * factors / unit[roots], factors * self.value + offsets)


def _choose_units(unit: Array, roots: Integers, sizes: Array, weights: Integers) -> None:
    """Set by their roots what the sizes of the members of classes are divided by."""
    order = np.lexsort((sizes, roots))
    sizes, roots, weights = sizes[order], roots[order], weights[order]
    is_other = roots[1:] != roots[:-1]
    first = _find_starts(is_other)  # of each class
    starts = _find_starts(is_other | (sizes[1:] > sizes[:-1] * (1 + CLOSE)))  # of each run of equal sizes
    lengths = np.add.reduceat(weights, starts)
    longest = np.maximum.reduceat(lengths, starts.searchsorted(first))
    (most,) = (lengths == longest[first.searchsorted(starts, side="right") - 1]).nonzero()
    most = starts[most[::-1]]  # the smallest of several is written last
    unit[roots[most]] = sizes[most]
    low, high, classes = sizes[first], sizes[np.append(first[1:], len(sizes)) - 1], roots[first]
    far = (high > _MOST * unit[classes]) | (low * _MOST < unit[classes])
    unit[classes[far]] = np.sqrt(low[far]) * np.sqrt(high[far])


def _find_starts(differs: Mask) -> Integers:
    """Return where runs begin, of elements that are told whether they differ from the one before, the first aside."""
    return np.append(0, differs.nonzero()[0] + 1)
