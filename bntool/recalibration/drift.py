"""How far stored statistics and those of the data lie apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bntool.recalibration.pooled import Tally

_PARTED_SIGMAS = 0.1
_PARTED_RATIO = 1.25
_ERRORS = 4.0  # a drift within so many sampling errors says nothing


@dataclass(frozen=True)
class LayerDrift:
    """Stored against new statistics of one layer.

    With d = (old_mean - new_mean) / sqrt(new_var + eps) and r = (new_var + eps) / (old_var + eps) of each channel:

    Attributes:
        layer: its name.
        channels: how many.
        positions: values of each channel that were measured.
        calls: batches, or calls, that were measured.
        mean_shift: root mean square of d over channels, in sigmas.
        worst_mean_shift: the largest abs(d).
        variance_ratio: exp of the mean of log r: how much larger the data's variance is.
        variance_spread: exp of the root mean square of log r; 1 for no drift in any channel.
        sampling_error: standard error of the new mean in sigmas, root mean square over channels, from the spread of
            batch means; None with fewer than two batches.
        finite: whether the stored statistics were usable at all.
    """

    layer: str
    channels: int
    positions: int
    calls: int
    mean_shift: float
    worst_mean_shift: float
    variance_ratio: float
    variance_spread: float
    sampling_error: float | None
    finite: bool

    @property
    def has_parted(self) -> bool:
        """Whether stored and real statistics differ by more than sampling explains."""
        if not self.finite:
            return True
        least = max(_PARTED_SIGMAS, _ERRORS * (self.sampling_error or 0.0))
        return self.mean_shift > least or self.variance_spread > max(_PARTED_RATIO, 1 + least)

    @property
    def severity(self) -> float:
        """What the table is sorted by: shift in sigmas, or log of the variance ratio, whichever is larger."""
        if not self.finite:
            return math.inf
        return max(self.mean_shift, math.log(self.variance_spread))


def measure_drift(
    layer: str,
    *,
    old: tuple[torch.Tensor, torch.Tensor],
    new: tuple[torch.Tensor, torch.Tensor],
    tally: Tally,
    eps: float,
) -> LayerDrift:
    """Compare statistics; all tensors float64, shape (channels,)."""
    (old_mean, old_variance), (new_mean, new_variance) = old, new
    scale = (new_variance + eps).sqrt()
    finite = bool(
        torch.isfinite(old_mean).all() and torch.isfinite(old_variance).all() and (old_variance + eps > 0).all()
    )
    shift = (old_mean - new_mean) / scale
    logarithm = ((new_variance + eps) / (old_variance + eps)).log()
    error = None
    if tally.calls > 1:
        error = _rms((tally.means.unbiased_variance / tally.calls).sqrt() / scale)
    return LayerDrift(
        layer=layer,
        channels=len(new_mean),
        positions=tally.pooled.count,
        calls=tally.calls,
        mean_shift=_rms(shift),
        worst_mean_shift=float(shift.abs().max()),
        variance_ratio=math.exp(float(logarithm.mean())) if finite else math.nan,
        variance_spread=math.exp(_rms(logarithm)) if finite else math.nan,
        sampling_error=error,
        finite=finite,
    )


def find_first_parted(drifts: tuple[LayerDrift, ...]) -> LayerDrift | None:
    """The first layer in execution order whose stored statistics are not those of the data."""
    return next((drift for drift in drifts if drift.has_parted), None)


def _rms(values: torch.Tensor) -> float:
    return math.sqrt(float(values.square().mean()))
