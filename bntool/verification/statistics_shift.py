"""The shift of running statistics, in one unit for all commands: standard deviations, and factors of the variance."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Statistics = tuple[Sequence[float], Sequence[float]]  # running_mean and running_var, a number for each channel


@dataclass(frozen=True)
class StatisticsShift:
    """Old statistics of one layer compared with new ones.

    With d = (old_mean - new_mean) / sqrt(new_var + new_eps) and r = (new_var + new_eps) / (old_var + old_eps) of each
    channel:

    Attributes:
        mean_shift: root mean square of d over channels, in sigmas.
        worst_mean_shift: the largest abs(d).
        variance_ratio: exp of the mean of log r: how much larger the new variance is.
        variance_spread: exp of the root mean square of log r; 1 where no channel's variance moved.
        worst_variance_ratio: r of the channel whose abs(log r) is largest.
        finite: all numbers are finite and no variance + eps is negative or 0; else the measures may be NaN or infinite.
        old, new: the statistics themselves; None where they are the same and were not read.
        old_eps, new_eps: what is added to their variances.
    """

    mean_shift: float
    worst_mean_shift: float
    variance_ratio: float
    variance_spread: float
    worst_variance_ratio: float
    finite: bool
    old: Statistics | None = field(default=None, repr=False, compare=False)
    new: Statistics | None = field(default=None, repr=False, compare=False)
    old_eps: float = field(default=0.0, repr=False, compare=False)
    new_eps: float = field(default=0.0, repr=False, compare=False)

    def mean_shifts(self) -> list[float]:
        """Return abs(d) of each channel; NaN where it is not defined."""
        if self.old is None or self.new is None:
            return []
        sums = [variance + self.new_eps for variance in self.new[1]]
        return [
            abs(a - b) / math.sqrt(s) if s > 0 else math.nan
            for a, b, s in zip(self.old[0], self.new[0], sums, strict=True)
        ]

    def variance_ratios(self) -> list[float]:
        """Return R of each channel; NaN where it is not defined."""
        if self.old is None or self.new is None:
            return []
        pairs = zip(self.old[1], self.new[1], strict=True)
        sums = [(before + self.old_eps, after + self.new_eps) for before, after in pairs]
        return [after / before if before > 0 and after > 0 else math.nan for before, after in sums]

    def find_worst_channel(self) -> int | None:
        """Return the channel that moved most; None where none did, or the numbers allow no measure."""
        if not self.finite:
            return None
        sizes = list(map(max, self.mean_shifts(), map(abs, map(math.log, self.variance_ratios()))))
        largest = max(sizes, default=0.0)
        return sizes.index(largest) if largest else None

    def list_unusable_channels(self) -> list[int]:
        """List the channels whose old or new statistics are not finite, or whose variance + eps is negative or 0."""
        pairs = enumerate(zip(self.mean_shifts(), self.variance_ratios(), strict=True))
        return [at for at, (shift, ratio) in pairs if not (math.isfinite(shift) and 0 < ratio < math.inf)]

    @property
    def severity(self) -> float:
        """One number to sort by: shift in sigmas, or log of the variance ratio, whichever is larger."""
        return max(self.mean_shift, math.log(self.variance_spread)) if self.finite else math.inf

    @property
    def worst(self) -> float:
        """The same for the channel that moved most."""
        return WorstShift(self.worst_mean_shift, self.worst_variance_ratio, self.finite).severity


class WorstShift(NamedTuple):
    """The shift of the channels that moved most, of a :class:`StatisticsShift`: measured in half of the time."""

    worst_mean_shift: float
    worst_variance_ratio: float
    finite: bool

    @property
    def severity(self) -> float:
        """One number to sort by: shift in sigmas, or log of the variance ratio, whichever is larger."""
        return max(self.worst_mean_shift, abs(math.log(self.worst_variance_ratio))) if self.finite else math.inf


NO_SHIFT = StatisticsShift(0.0, 0.0, 1.0, 1.0, 1.0, finite=True)


def measure_shift(old: Statistics, new: Statistics, *, old_eps: float, new_eps: float) -> StatisticsShift:
    """Compare old and new statistics of a layer channel by channel."""
    (old_mean, old_variance), (new_mean, new_variance) = old, new
    before, after = [v + old_eps for v in old_variance], [v + new_eps for v in new_variance]
    known = _are_finite(old_mean, new_mean, after)
    least = min(min(before, default=1.0), min(after, default=1.0))
    if not known or not _are_finite(before) or least <= 0:
        usable = known and min(after, default=1.0) > 0
        shifts = _find_shifts(old_mean, new_mean, after) if usable else [math.nan]
        return StatisticsShift(
            mean_shift=_rms(shifts),
            worst_mean_shift=abs(_find_worst(shifts)),
            variance_ratio=math.nan,
            variance_spread=math.nan,
            worst_variance_ratio=math.nan,
            finite=False,
            old=old,
            new=new,
            old_eps=old_eps,
            new_eps=new_eps,
        )
    shifts = _find_shifts(old_mean, new_mean, after)
    logarithms = list(map(math.log, map(operator.truediv, after, before)))
    return StatisticsShift(
        mean_shift=_rms(shifts),
        worst_mean_shift=abs(_find_worst(shifts)),
        variance_ratio=math.exp(math.fsum(logarithms) / max(len(logarithms), 1)),
        variance_spread=math.exp(_rms(logarithms)),
        worst_variance_ratio=math.exp(_find_worst(logarithms)),
        finite=True,
        old=old,
        new=new,
        old_eps=old_eps,
        new_eps=new_eps,
    )


def measure_worst_shift(old: Statistics, new: Statistics, *, usable: bool = False) -> WorstShift:
    """Measure the shift of the channels that moved most, where eps is in the variances already.

    Args:
        usable: all numbers are known to be finite, and the variances to be positive.
    """
    (old_mean, before), (new_mean, after) = old, new
    if usable and before == after and old_mean == new_mean:  # those of a frozen layer; else the first number tells
        return WorstShift(0.0, 1.0, finite=True)
    if not usable:
        least = min(min(before, default=1.0), min(after, default=1.0))
        usable = _are_finite(old_mean, new_mean, before, after) and least > 0
    largest = math.inf
    if usable:
        shifts = list(map(operator.sub, old_mean, new_mean))
        largest = max(map(operator.truediv, map(operator.mul, shifts, shifts), after), default=0.0)
    if not usable or not math.isfinite(largest):  # which measure the numbers allow is decided there
        shift = measure_shift(old, new, old_eps=0.0, new_eps=0.0)
        return WorstShift(shift.worst_mean_shift, shift.worst_variance_ratio, shift.finite)
    ratios = list(map(operator.truediv, after, before))
    ends = (max(ratios, default=1.0), min(ratios, default=1.0))
    return WorstShift(math.sqrt(largest), max(ends, key=lambda ratio: abs(math.log(ratio))), finite=True)


# whole lists at a time: files of many channels are compared one after another
def _are_finite(*lists: Sequence[float]) -> bool:
    return all(math.isfinite(sum(values)) or all(map(math.isfinite, values)) for values in lists)


def _find_shifts(old: Sequence[float], new: Sequence[float], spread: Sequence[float]) -> list[float]:
    if not len(old) == len(new) == len(spread):
        raise ValueError(f"statistics of {len(old)} and {len(new)} channels cannot be compared")
    return list(map(operator.truediv, map(operator.sub, old, new), map(math.sqrt, spread)))


def _find_worst(values: Sequence[float]) -> float:
    """Return the value of the largest magnitude."""
    return max(max(values, default=0.0), min(values, default=0.0), key=abs)


def _rms(values: Sequence[float]) -> float:
    """Compute the root mean square, whatever the magnitude."""
    return math.hypot(*values) / math.sqrt(max(len(values), 1))
