"""Mean and variance for each channel, merged in float64: of one layer, or of the channels of many side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import numpy as np

from bntool.representation import short_repr

Array: TypeAlias = "np.ndarray[Any, Any]"
Count: TypeAlias = "int | Array"


@dataclass(frozen=True)
class Moments:
    """The moments of each channel: how many values, their mean, and the sum of squared differences from it.

    Attributes:
        count: values of each channel; int64 of shape (channels,) where channels of several layers stand side by side.
        mean: float64, shape (channels,).
        squares: float64, shape (channels,): sum of (x - mean)^2.
    """

    count: Count
    mean: Array
    squares: Array

    __repr__ = short_repr

    @property
    def biased_variance(self) -> Array:
        """``squares / count``: what BatchNorm normalises a batch by."""
        return self.squares / np.maximum(self.count, 1)

    @property
    def unbiased_variance(self) -> Array:
        """``squares / (count - 1)``: what PyTorch stores as running_var."""
        return self.squares / np.maximum(np.subtract(self.count, 1), 1)

    @property
    def is_finite(self) -> bool:
        with np.errstate(over="ignore", invalid="ignore"):
            return math.isfinite(self.mean.sum() + self.squares.sum())


def merge(first: Moments, second: Moments) -> Moments:
    """Merge the moments of two sets of values; either may be empty.

    With d = mean2 - mean1 and n = n1 + n2: mean = mean1 + d * n2 / n, squares = squares1 + squares2 + d^2 * n1 * n2 / n
    (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances").
    """
    count = first.count + second.count
    share = second.count / np.maximum(count, 1)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is noticed in the result
        difference = second.mean - first.mean
        mean = difference * share
        mean += first.mean
        # in place: new memory costs more than the arithmetic
        share = first.count * share
        share *= difference
        difference *= share
        difference += first.squares + second.squares
    return Moments(count, mean, difference)


def merge_all(moments: Iterable[Moments]) -> Moments:
    """Merge the moments of any number of sets, in order; there must be at least one."""
    return reduce(merge, moments)


@dataclass(frozen=True)
class Tally:
    """The values that layers have seen so far: one layer, or several side by side.

    Attributes:
        pooled: moments of all positions of all batches.
        means: moments of the batch means, each batch counting once: tells how far the estimate is to be trusted. Their
            count is the number of batches, or calls, that were measured.
        variances: float64, shape (channels,): sum of the unbiased variances of the batches.
    """

    pooled: Moments
    means: Moments
    variances: Array

    __repr__ = short_repr

    @classmethod
    def of(cls, moments: Moments) -> Tally:
        """Make a tally of one call."""
        return cls(moments, Moments(1, moments.mean, np.zeros_like(moments.mean)), moments.unbiased_variance)

    @property
    def positions(self) -> int:
        """Values of each channel; of one layer."""
        return int(self.pooled.count)

    @property
    def calls(self) -> int:
        """The number of batches, or calls, that were measured; of one layer."""
        return int(self.means.count)

    @property
    def is_finite(self) -> bool:
        with np.errstate(over="ignore", invalid="ignore"):
            return self.pooled.is_finite and self.means.is_finite and math.isfinite(self.variances.sum())

    def and_(self, other: Tally) -> Tally:
        """Return both tallies together."""
        return Tally(
            pooled=merge(self.pooled, other.pooled),
            means=merge(self.means, other.means),
            variances=self.variances + other.variances,
        )


def put_side_by_side(tallies: Sequence[Tally | None], channels: Sequence[int]) -> Tally:
    """Return the tallies of several layers as one.

    Args:
        tallies: of each layer; None for one that has seen nothing.
        channels: of each layer.
    """
    parts = [_make_empty(width) if tally is None else tally for tally, width in zip(tallies, channels, strict=True)]

    def join(moments: Sequence[Moments]) -> Moments:
        count = np.repeat(np.array([one.count for one in moments], np.int64), channels)
        return Moments(count, _concatenate([m.mean for m in moments]), _concatenate([m.squares for m in moments]))

    return Tally(
        join([part.pooled for part in parts]),
        join([part.means for part in parts]),
        _concatenate([part.variances for part in parts]),
    )


def take_apart(tally: Tally, channels: Sequence[int]) -> list[Tally]:
    """Return the reverse of :func:`put_side_by_side`; a layer that has seen nothing has a count of 0."""
    ends = np.cumsum(channels).tolist()
    slices = [slice(end - width, end) for end, width in zip(ends, channels, strict=True)]

    def cut(moments: Moments, part: slice) -> Moments:
        assert not isinstance(moments.count, int)
        return Moments(int(moments.count[part.start]), moments.mean[part], moments.squares[part])

    return [Tally(cut(tally.pooled, s), cut(tally.means, s), tally.variances[s]) for s in slices]


def _make_empty(channels: int) -> Tally:
    zeros = np.zeros(channels)
    return Tally(Moments(0, zeros, zeros), Moments(0, zeros, zeros), zeros)


def _concatenate(arrays: Sequence[Array]) -> Array:
    return np.concatenate(arrays) if arrays else np.zeros(0)
