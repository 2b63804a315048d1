"""The channels that moved most, in words: averages over a layer hide them."""

from __future__ import annotations

import math

from bntool.reports.layer_table import describe_channels
from bntool.representation import format_number
from bntool.verification.statistics_shift import StatisticsShift

_MOST = 0.75  # of the squares of all channels, from which on one of them is what moved


def describe_worst_channel(shift: StatisticsShift) -> str:
    """Describe which statistic of which channel moved most, and how far; "" where none did, or the numbers allow no
    measure.
    """
    channel = shift.find_worst_channel()
    if channel is None:
        return ""
    if shift.worst_mean_shift >= abs(math.log(shift.worst_variance_ratio)):
        return f"running_mean of channel {channel} by {format_number(shift.worst_mean_shift, 2)} σ"
    return f"running_var of channel {channel} by a factor of {format_number(shift.worst_variance_ratio, 2)}"


def describe_unusable_channels(shift: StatisticsShift) -> str:
    """Describe which channels allow no measure, to stand behind the name of their layer; "" where all do."""
    return describe_channels(shift.list_unusable_channels())


def find_lone_mean(shift: StatisticsShift) -> int | None:
    """Return the channel whose running_mean moved far more than those of all others together; None where none did."""
    return _find_lone([d * d for d in shift.mean_shifts()])


def find_lone_variance(shift: StatisticsShift) -> int | None:
    """Return the channel whose running_var moved far more than those of all others together; None where none did."""
    return _find_lone([math.log(ratio) ** 2 for ratio in shift.variance_ratios()])


def _find_lone(squares: list[float]) -> int | None:
    largest = max(squares, default=0.0)
    return squares.index(largest) if len(squares) > 1 and largest > _MOST * math.fsum(squares) else None
