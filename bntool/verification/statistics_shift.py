"""How far running statistics moved, in one unit for every command: sigmas of the new ones, and factors of variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Statistics = tuple[Sequence[float], Sequence[float]]  # running_mean and running_var, a number for each channel


@dataclass(frozen=True)
class StatisticsShift:
    """Old against new statistics of one layer.

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
        """abs(d) of each channel; NaN where it is not defined."""
        if self.old is None or self.new is None:
            return []
        sums = [variance + self.new_eps for variance in self.new[1]]
        return [
            abs(a - b) / math.sqrt(s) if s > 0 else math.nan
            for a, b, s in zip(self.old[0], self.new[0], sums, strict=True)
        ]

    def variance_ratios(self) -> list[float]:
        """R of each channel; NaN where it is not defined."""
        if self.old is None or self.new is None:
            return []
        pairs = zip(self.old[1], self.new[1], strict=True)
        sums = [(before + self.old_eps, after + self.new_eps) for before, after in pairs]
        return [after / before if before > 0 and after > 0 else math.nan for before, after in sums]

    @property
    def severity(self) -> float:
        """One number to sort by: shift in sigmas, or log of the variance ratio, whichever is larger."""
        return max(self.mean_shift, math.log(self.variance_spread)) if self.finite else math.inf

    @property
    def worst(self) -> float:
        """The same for the channel that moved most."""
        return max(self.worst_mean_shift, abs(math.log(self.worst_variance_ratio))) if self.finite else math.inf


NO_SHIFT = StatisticsShift(0.0, 0.0, 1.0, 1.0, 1.0, finite=True)


def measure_shift(old: Statistics, new: Statistics, *, old_eps: float, new_eps: float) -> StatisticsShift:
    """How far statistics of as many channels moved."""
    (old_mean, old_variance), (new_mean, new_variance) = old, new
    before, after = [v + old_eps for v in old_variance], [v + new_eps for v in new_variance]
    numbers = (*old_mean, *new_mean, *before, *after)
    if not all(map(math.isfinite, numbers)) or min((*before, *after), default=1.0) <= 0:
        usable = all(map(math.isfinite, (*old_mean, *new_mean, *after))) and min(after, default=1.0) > 0
        shifts = _find_shifts(old_mean, new_mean, after) if usable else [math.nan]
        return StatisticsShift(
            mean_shift=_rms(shifts),
            worst_mean_shift=max(shifts, default=0.0),
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
    logarithms = [math.log(b / a) for a, b in zip(before, after, strict=True)]
    return StatisticsShift(
        mean_shift=_rms(shifts),
        worst_mean_shift=max(shifts, default=0.0),
        variance_ratio=math.exp(math.fsum(logarithms) / max(len(logarithms), 1)),
        variance_spread=math.exp(_rms(logarithms)),
        worst_variance_ratio=math.exp(max(logarithms, key=abs, default=0.0)),
        finite=True,
        old=old,
        new=new,
        old_eps=old_eps,
        new_eps=new_eps,
    )


def _find_shifts(old: Sequence[float], new: Sequence[float], spread: Sequence[float]) -> list[float]:
    return [abs(a - b) / math.sqrt(s) for a, b, s in zip(old, new, spread, strict=True)]


def _rms(values: Sequence[float]) -> float:
    """Root mean square, whatever the magnitude."""
    return math.hypot(*values) / math.sqrt(max(len(values), 1))
