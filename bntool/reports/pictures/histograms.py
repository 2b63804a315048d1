"""Values of channels counted on a logarithmic axis, as data: each rendering draws it at its own size."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SLOTS = 48  # of an axis: divides evenly into pictures of 8, 12, 16, 24 and 48 columns
_REACH = 1e4  # an axis goes so far to either side of what is usual; its first and last slot take what lies beyond


class LogAxis(NamedTuple):
    """A logarithmic axis of :data:`SLOTS` slots that several histograms share.

    Attributes:
        low, high: its ends, positive.
        below, above: there are values beyond that end, which count in the slot there.
    """

    low: float
    high: float
    below: bool
    above: bool

    def edges(self) -> list[float]:
        """Return where one slot ends and the next begins, ``SLOTS - 1`` values."""
        start, width = math.log(self.low), (math.log(self.high) - math.log(self.low)) / SLOTS
        return [math.exp(start + width * slot) for slot in range(1, SLOTS)]


def find_axis(groups: Iterable[Sequence[float]]) -> LogAxis | None:
    """Return the axis for groups of values, each sorted; None where no value is positive and finite.

    It reaches from the smallest to the largest value, but at most four decades to either side of the median of the
    groups' medians, so that one absurd value does not squeeze all others into one slot.
    """
    low, high, medians = math.inf, 0.0, []
    least, most = math.inf, -math.inf
    for values in groups:
        if not values:
            continue
        least, most = min(least, values[0]), max(most, values[-1])
        start = 0 if values[0] > 0 else bisect_right(values, 0.0)
        stop = len(values) if values[-1] < math.inf else bisect_left(values, math.inf)
        if start < stop:
            low, high = min(low, values[start]), max(high, values[stop - 1])
            medians.append(values[(start + stop) // 2])
    if not medians:
        return None
    usual = sorted(medians)[len(medians) // 2]
    low, high = max(low, usual / _REACH), min(high, usual * _REACH)
    if high <= low * 1.0001:  # all the same: in the middle of an axis of one decade
        low, high = low / math.sqrt(10), low * math.sqrt(10)
    return LogAxis(low, high, below=least < low, above=most > high)


def count_values(values: Sequence[float], edges: Sequence[float]) -> tuple[int, ...]:
    """Count the values in each slot; zero, negative and infinite ones lie in the outermost.

    Args:
        values: sorted, without NaN.
        edges: of an axis.
    """
    if not values:
        return (0,) * (len(edges) + 1)
    first, last = bisect_right(edges, values[0]), bisect_right(edges, values[-1])
    counts, start = [0] * (len(edges) + 1), 0
    for slot in range(first, last):
        stop = bisect_left(values, edges[slot], start)
        counts[slot] = stop - start
        start = stop
    counts[last] = len(values) - start
    return tuple(counts)


def merge_slots(counts: Sequence[int], slots: int) -> list[int]:
    """Merge slots of a histogram to fewer, a divisor of :data:`SLOTS`."""
    width = len(counts) // slots
    return [sum(counts[start : start + width]) for start in range(0, len(counts), width)]


def find_axis_of_ratios(groups: Iterable[Sequence[float]]) -> LogAxis | None:
    """Find an axis for ratios, each sorted: what did not change lies in the middle of it; None where there are none."""
    axis = find_axis(groups)
    if axis is None:
        return None
    reach = max(axis.high, 1 / axis.low, 1.1)
    return LogAxis(1 / reach, reach, axis.below, axis.above)
