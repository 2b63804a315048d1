"""Values of a stored graph: which channels of which nodes lie where, along which axis of a tensor.

Operations that only move elements (transposition, reshaping, concatenation, splitting) become no nodes: they change
where channels lie. Extents that the file does not say are symbols, so that the same unknown extent is known to be one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

MAX_LABELS = 1 << 22  # elements of one tensor of labels; beyond, its channels count as not told apart


class Extent(NamedTuple):
    """Elements along an axis: a number times unknown ones, each with its name."""

    number: int
    unknown: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        return not self.unknown


Shape = tuple[Extent, ...]


class Spread(Enum):
    """The way in which channels lie along an axis that they share with positions of which the number is not known."""

    RUNS = "each channel holds a run of elements"
    ROUNDS = "the channels follow each other again and again"


@dataclass(frozen=True)
class Value:
    """A tensor between nodes.

    Attributes:
        sources: the nodes whose outputs it holds.
        shape: None where not even the number of axes is known; its channels can only lie along the second one then.
        axes: those along which channels differ, ascending.
        labels: the channels that meet at each place along these axes, as the builder numbers them; the last dimension
            lists those that meet at one place. None where channels are not told apart.
        spread: where its only axis of channels has positions between them.
        dtype: of its elements, where that is known.
    """

    sources: tuple[int, ...] = ()
    shape: Shape | None = None
    axes: tuple[int, ...] = ()
    labels: Integers | None = None
    spread: Spread | None = None
    dtype: object = None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    def without_labels(self, shape: Shape | None = None) -> Value:
        """Return the value with its channels not told apart."""
        return Value(self.sources, shape, dtype=self.dtype)

    def with_extents(self, shape: Shape | None) -> Value:
        """Return the value with other extents of axes along which no channels differ."""
        return self if shape is None else replace(self, shape=shape)


def size_of(shape: Sequence[Extent]) -> Extent:
    """Return the product of extents."""
    return Extent(math.prod(one.number for one in shape), tuple(sorted(name for one in shape for name in one.unknown)))


def fill_in(extents: Sequence[Extent | None], whole: Extent, unknown: Callable[[], Extent]) -> Shape:
    """Fill in the one extent of a shape that is None from what the others leave.

    Args:
        unknown: gives one that nothing tells.
    """
    told = size_of([one for one in extents if one is not None])
    rest = list(whole.unknown)
    for name in told.unknown:
        if name not in rest:
            return tuple(one or unknown() for one in extents)
        rest.remove(name)
    number, left = divmod(whole.number, told.number) if told.number > 0 else (0, 1)
    missing = Extent(number, tuple(rest)) if not left else unknown()
    return tuple(missing if one is None else one for one in extents)


def known(*extents: int) -> Shape:
    """Make a shape of which everything is known."""
    return tuple(Extent(extent) for extent in extents)


def read_along(value: Value, axis: int, count: int) -> Integers | None:
    """Return the channels that meet each of ``count`` places along an axis, a row for each; None where that is not
    known.
    """
    labels = value.labels
    if labels is None:
        return None
    if value.shape is not None:
        axis = axis % len(value.shape) if -len(value.shape) <= axis < len(value.shape) else -1
    if axis not in value.axes:
        return None
    place = value.axes.index(axis)
    moved = np.moveaxis(labels, place, 0)
    moved = moved.reshape(moved.shape[0], -1)
    if value.spread is not None:
        rounds, rest = divmod(count, len(moved)) if len(moved) else (0, 1)
        if rest or not rounds:
            return None
        if value.spread is Spread.RUNS:
            return np.repeat(moved, rounds, axis=0)
        return np.tile(moved, (rounds, 1))
    return moved if len(moved) == count else None


def transpose(value: Value, order: Sequence[int] | None) -> Value:
    """Permute the axes; None reverses them."""
    if value.shape is None:
        return value.without_labels()
    rank = len(value.shape)
    order = (
        tuple(reversed(range(rank))) if order is None else tuple(axis % rank for axis in order if -rank <= axis < rank)
    )
    if sorted(order) != list(range(rank)):
        return value.without_labels()
    shape = tuple(value.shape[axis] for axis in order)
    if value.labels is None:
        return replace(value, shape=shape)
    found = [(order.index(axis), number) for number, axis in enumerate(value.axes)]
    found.sort()
    numbers = [number for _, number in found]
    labels = np.transpose(value.labels, (*numbers, value.labels.ndim - 1))
    return replace(value, shape=shape, axes=tuple(axis for axis, _ in found), labels=labels)


def reshape(value: Value, wanted: Shape) -> Value:
    """Return the elements in another shape."""
    if value.shape is None or size_of(value.shape) != size_of(wanted):
        return value.without_labels(wanted)
    if value.labels is None:
        return replace(value, shape=wanted)
    if value.spread is not None:
        return _reshape_spread(value, wanted)
    result = _Reshaping(value, wanted)
    return result.build() or value.without_labels(wanted)


def _reshape_spread(value: Value, wanted: Shape) -> Value:
    """Reshape where only axes of one element come and go."""
    assert value.shape is not None
    old = [axis for axis, extent in enumerate(value.shape) if extent != Extent(1)]
    new = [axis for axis, extent in enumerate(wanted) if extent != Extent(1)]
    if [value.shape[axis] for axis in old] != [wanted[axis] for axis in new] or value.axes[0] not in old:
        return value.without_labels(wanted)
    return replace(value, shape=wanted, axes=(new[old.index(value.axes[0])],))


class _Reshaping:
    """Groups of axes that become groups of axes; each group holds the same elements before and after."""

    def __init__(self, value: Value, wanted: Shape) -> None:
        assert value.labels is not None
        self.value, self.wanted = value, wanted
        self.labels = value.labels
        self.axes: list[int] = []  # new axes along which channels lie
        self.spread: Spread | None = None

    def build(self) -> Value | None:
        """Build the value; None where the channels are not told apart afterwards."""
        groups = self._group()
        if groups is None:
            return None
        at = 0  # dimension of the labels that the next group begins with
        for old, new in groups:
            mine = [axis for axis in old if axis in self.value.axes]
            if not mine:
                continue
            if not self._regroup(old, mine, new, at):
                return None
            at = len(self.axes)
        return self._without_equal()

    def _group(self) -> list[tuple[list[int], list[int]]] | None:
        old_shape, new_shape = self.value.shape or (), self.wanted
        groups, old, new = [], 0, 0
        while old < len(old_shape) or new < len(new_shape):
            first, second = old, new
            mine, theirs = Extent(1), Extent(1)
            while True:
                if mine == theirs and (old, new) != (first, second):
                    break
                # whichever is shorter goes on; where that is not known both ends are one group
                goes_old = old < len(old_shape) and (new >= len(new_shape) or _is_shorter(mine, theirs))
                if goes_old:
                    mine = size_of((mine, old_shape[old]))
                    old += 1
                elif new < len(new_shape):
                    theirs = size_of((theirs, new_shape[new]))
                    new += 1
                else:
                    return None
            groups.append((list(range(first, old)), list(range(second, new))))
        return groups

    def _regroup(self, old: list[int], mine: list[int], new: list[int], at: int) -> bool:
        shape = self.value.shape or ()
        if len(old) == 1 and len(new) == 1:
            self.axes.append(new[0])
            return True
        extents = [shape[axis] for axis in old]
        targets = [self.wanted[axis] for axis in new]
        if all(one.is_known for one in (*extents, *targets)):
            full = [one.number for one in extents]
            here = self.labels.shape
            if math.prod(full) * (self.labels.size // max(math.prod(here[at : at + len(mine)]), 1)) > MAX_LABELS:
                return False
            spread = [shape[axis].number if axis in mine else 1 for axis in old]
            labels = self.labels.reshape(*here[:at], *spread, *here[at + len(mine) :])
            labels = np.broadcast_to(labels, (*here[:at], *full, *here[at + len(mine) :]))
            self.labels = labels.reshape(*here[:at], *(one.number for one in targets), *here[at + len(mine) :])
            self.axes += new
            return True
        # channels and positions, the number of which is not known, on one axis
        units = [axis for axis in new if self.wanted[axis] == Extent(1)]
        rest = [axis for axis in new if axis not in units]
        others = [axis for axis in old if axis not in mine and shape[axis] != Extent(1)]
        if len(mine) != 1 or len(rest) != 1 or self.labels.ndim != 2:
            return False
        if others and not (all(axis > mine[0] for axis in others) or all(axis < mine[0] for axis in others)):
            return False
        if others:
            self.spread = Spread.RUNS if others[0] > mine[0] else Spread.ROUNDS
        self.axes.append(rest[0])
        return True

    def _without_equal(self) -> Value | None:
        """Drop axes along which no channels differ."""
        labels, axes = self.labels, list(self.axes)
        for number in reversed(range(len(axes))):
            if self.spread is None and len(axes) > 1:
                first = np.take(labels, [0], axis=number) if labels.shape[number] else labels
                if labels.shape[number] and np.array_equal(np.broadcast_to(first, labels.shape), labels):
                    labels = np.take(labels, 0, axis=number)
                    del axes[number]
        return replace(self.value, shape=self.wanted, axes=tuple(axes), labels=labels, spread=self.spread)


def _is_shorter(mine: Extent, theirs: Extent) -> bool:
    """Return whether the first of two products has to grow before the second."""
    if set(theirs.unknown) - set(mine.unknown):
        return True
    if set(mine.unknown) - set(theirs.unknown):
        return False
    return mine.number <= theirs.number


def take(value: Value, axis: int, places: Sequence[int] | None, extent: Extent) -> Value:
    """Take some places along an axis, in that order.

    Args:
        places: None where they are not known.
        extent: how many they are.
    """
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return value.without_labels()
    axis %= len(value.shape)
    shape = (*value.shape[:axis], extent, *value.shape[axis + 1 :])
    if value.labels is None or axis not in value.axes:
        return replace(value, shape=shape)
    if places is None or value.spread is not None:
        return value.without_labels(shape)
    number = value.axes.index(axis)
    count = value.labels.shape[number]
    if any(not -count <= place < count for place in places):
        return value.without_labels(shape)
    return replace(
        value, shape=shape, labels=np.take(value.labels, np.asarray(places, dtype=int) % max(count, 1), axis=number)
    )


def drop(value: Value, axis: int, place: int | None) -> Value:
    """Take one place along an axis, which is gone then."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return value.without_labels()
    axis %= len(value.shape)
    one = take(value, axis, None if place is None else [place], Extent(1))
    shape = one.shape or ()
    return reshape(one, (*shape[:axis], *shape[axis + 1 :]))


def concatenate(values: Sequence[Value], axis: int) -> Value:
    """Join tensors one after the other along an axis."""
    sources = tuple(dict.fromkeys(source for value in values for source in value.sources))
    first = values[0]
    dtype = first.dtype if all(value.dtype == first.dtype for value in values) else None
    shapes = [value.shape for value in values if value.shape is not None]
    rank = len(shapes[0]) if shapes else 0
    if len(shapes) < len(values) or any(len(shape) != rank for shape in shapes) or not -rank <= axis < rank:
        return Value(sources, None, dtype=dtype)
    axis %= rank
    extents = [shape[axis] for shape in shapes]
    all_known = all(one.is_known for one in extents)
    total = Extent(sum(one.number for one in extents)) if all_known else Extent(1, (f"sum of {sources} {axis}",))
    shape = (*shapes[0][:axis], total, *shapes[0][axis + 1 :])
    labels = [value.labels for value in values if value.labels is not None]
    axes = first.axes
    same = len(labels) == len(values) and all(value.axes == axes and value.spread is None for value in values)
    if not same:
        return Value(sources, shape, dtype=dtype)
    number = axes.index(axis) if axis in axes else None
    outer = [tuple(e for i, e in enumerate(one.shape[:-1]) if i != number) for one in labels]
    if any(one != outer[0] for one in outer) or sum(one.size for one in labels) > MAX_LABELS:
        return Value(sources, shape, dtype=dtype)
    if number is None:  # they lie along positions: where one has its channels the others have theirs
        return Value(sources, shape, axes, np.concatenate(labels, axis=-1), dtype=dtype)
    most = max(one.shape[-1] for one in labels)
    filled = [np.concatenate([one, *[one[..., :1]] * (most - one.shape[-1])], axis=-1) for one in labels]
    return Value(sources, shape, axes, np.concatenate(filled, axis=number), dtype=dtype)
