"""The drift of layers: how far stored statistics and those of the data lie apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bntool.recalibration.moments import Array, Tally
from bntool.verification.statistics_shift import StatisticsShift, measure_shift

PARTED_SIGMAS = 0.1
PARTED_RATIO = 1.25
PARTED_CHANNEL = 10.0  # times as far, one channel alone tells: many others would hide it in an average
_ERRORS = 4.0  # a drift within so many sampling errors says nothing
_ERRORS_OF_CHANNEL = 2.5  # times as many, of the channel that moved most

_DESCRIBED = (
    *("layer", "channels", "positions", "calls", "mean_shift", "worst_mean_shift", "variance_ratio"),
    *("variance_spread", "sampling_error", "finite"),
)


@dataclass(frozen=True)
class LayerDrift:
    """Stored statistics of one layer against those measured, whatever prior they are blended with afterwards.

    Attributes:
        layer: its name.
        channels: how many.
        positions: values of each channel that were measured.
        calls: batches, or calls, that were measured.
        shift: from the stored statistics to the measured ones, channel by channel.
        sampling_error: standard error of the new mean in sigmas, root mean square over channels, from the spread of
            batch means; None with fewer than two batches.
    """

    layer: str
    channels: int
    positions: int
    calls: int
    shift: StatisticsShift = field(repr=False)
    sampling_error: float | None

    @property
    def mean_shift(self) -> float:
        return self.shift.mean_shift

    @property
    def worst_mean_shift(self) -> float:
        return self.shift.worst_mean_shift

    @property
    def variance_ratio(self) -> float:
        return self.shift.variance_ratio

    @property
    def variance_spread(self) -> float:
        return self.shift.variance_spread

    @property
    def finite(self) -> bool:
        return self.shift.finite

    @property
    def has_parted(self) -> bool:
        """Whether stored and real statistics differ by more than sampling explains, and by enough to matter.

        Over all channels, or in one channel so much that no average may hide it.
        """
        if not self.finite:
            return True
        least = max(PARTED_SIGMAS, _ERRORS * (self.sampling_error or 0.0))
        ratio = max(PARTED_RATIO, 1 + least)
        if self.mean_shift > least or self.variance_spread > ratio:
            return True
        return self.worst_mean_shift > PARTED_CHANNEL * least or self._worst_factor > ratio**PARTED_CHANNEL

    @property
    def is_sampling(self) -> bool:
        """Whether the sampling error explains the whole difference; False where no sampling error is known."""
        if not self.finite or self.sampling_error is None:
            return False
        least = _ERRORS * self.sampling_error
        # the variance of normal values errs by sqrt(2) of what the mean errs by, relatively
        ratio = 1 + math.sqrt(2) * least
        if self.mean_shift > least or self.variance_spread > ratio:
            return False
        return self.worst_mean_shift <= _ERRORS_OF_CHANNEL * least and self._worst_factor <= ratio**_ERRORS_OF_CHANNEL

    @property
    def _worst_factor(self) -> float:
        """The factor by which the variance of the channel that moved most grew or shrank, at least 1."""
        ratio = self.shift.worst_variance_ratio
        return max(ratio, 1 / ratio)

    def describe(self) -> dict[str, Any]:
        """Return the drift as JSON data, without the channels."""
        return {name: getattr(self, name) for name in _DESCRIBED}

    @property
    def severity(self) -> float:
        """The number that the table is sorted by: shift in sigmas, or log of the variance ratio, whichever is
        larger.
        """
        return max(self.mean_shift, math.log(self.variance_spread)) if self.finite else math.inf


def measure_drift(
    layer: str,
    *,
    stored: tuple[Array, Array],
    measured: tuple[Array, Array],
    tally: Tally,
    eps: float,
) -> LayerDrift:
    """Compare statistics; all arrays float64, shape (channels,)."""
    old, new = ((mean.tolist(), variance.tolist()) for mean, variance in (stored, measured))
    shift = measure_shift(old, new, old_eps=eps, new_eps=eps)
    error = None
    if tally.calls > 1:
        spread = np.sqrt(tally.means.unbiased_variance / tally.calls) / np.sqrt(measured[1] + eps)
        error = math.sqrt(float(np.square(spread).mean()))
    return LayerDrift(
        layer=layer,
        channels=len(measured[0]),
        positions=tally.positions,
        calls=tally.calls,
        shift=shift,
        sampling_error=error,
    )


def find_first_parted(drifts: Sequence[LayerDrift]) -> LayerDrift | None:
    """Return the first layer in execution order whose stored statistics are not those of the data."""
    return next((drift for drift in drifts if drift.has_parted), None)
