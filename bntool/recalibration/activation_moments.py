"""Mean and variance of activations for each channel: measured in pieces, merged in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bntool.recalibration.moments import Moments, merge_all

_RUN = 128  # positions that a kernel adds up in float32: to about 5e-7 of a variance
_PIECE = 1 << 18  # elements measured at a time: still in the processor's cache when the kernel needs them again
HALF = (torch.float16, torch.bfloat16)
_SMALL = 1 << 14  # elements for which float64 costs next to nothing
_ROWS = 1 << 16  # positions widened to float64 at a time
_LARGE_MEAN = 30.0  # |mean| / std from which float32 sums lose digits of the variance that matter


def measure(values: torch.Tensor) -> Moments:
    """Measure the moments of a batch of activations.

    float32 (and half precision, widened first) is measured in short runs and merged in float64; channels whose mean is
    large against their spread are measured again in float64, because float32 cannot hold both. Small batches are
    measured in float64 throughout.

    Args:
        values: floating, shape (N, C) or (N, C, ...).
    """
    channels = values.shape[1]
    if values.numel() == 0:
        zeros = np.zeros(channels)
        return Moments(0, zeros, zeros)
    if values.ndim == 2 or values.dtype == torch.float64 or values.numel() <= _SMALL:
        return _measure_exactly(values)
    moments = _measure_fast(values)
    if not moments.is_finite:
        return _measure_exactly(values)  # squares of large numbers may not be
    large = np.abs(moments.mean) > _LARGE_MEAN * np.sqrt(moments.biased_variance)
    if large.any():
        again = _measure_exactly(values[:, torch.from_numpy(large).to(values.device)])
        moments.mean[large], moments.squares[large] = again.mean, again.squares
    return moments


def _measure_fast(values: torch.Tensor) -> Moments:
    channels, rows = values.shape[1], values.movedim(1, -1)
    dtype = torch.float32 if values.dtype in HALF else values.dtype
    if values.is_contiguous() or not rows.is_contiguous():
        # the kernel for this layout sums in double precision, if it is not given halves
        samples = max(1, _PIECE // values[0].numel()) if values.dtype in HALF else len(values)
        return merge_all(
            _measure_runs([piece.to(dtype).contiguous()], length=piece.numel() // channels, channels=channels)
            for piece in torch.split(values, samples)
        )
    # channels last: positions are the rows of a matrix, which the kernel adds up row by row. Seen as a matrix of few
    # rows with many positions side by side, as many short runs are added up as there are positions in a row
    rows = rows.reshape(-1, channels)
    end = len(rows) // _RUN * _RUN
    step = max(1, _PIECE // (_RUN * channels)) * _RUN
    pieces = [rows[start : min(start + step, end)].view(_RUN, -1) for start in range(0, end, step)]
    parts = [_measure_runs(pieces, length=_RUN, channels=channels)] if pieces else []
    if end < len(rows):
        parts.append(_measure_runs([rows[end:]], length=len(rows) - end, channels=channels))
    return merge_all(parts)


def _measure_runs(pieces: Sequence[torch.Tensor], *, length: int, channels: int) -> Moments:
    """Measure the moments of runs of equal length, of which each piece has one or more side by side."""
    means, variances = [], []
    for piece in pieces:
        unused: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if piece.dtype in HALF:
            # beside float32 statistics the kernel sums halves in float32, and answers in it
            unused = tuple(piece.new_zeros((2, piece.shape[1]), dtype=torch.float32))
        mean, variance = torch.ops.aten.batch_norm_update_stats(piece, *unused, 1.0)
        means.append(mean)
        variances.append(variance)
    # what merge() does, for all runs at once; by numpy, because torch takes longer for what is small
    mean_of_each, variance_of_each = (torch.cat(c).cpu().numpy().reshape(-1, channels) for c in (means, variances))
    runs = len(mean_of_each)
    mean = np.add.reduce(mean_of_each, axis=0, dtype=np.float64) / runs
    difference = mean_of_each - mean
    spread = np.add.reduce(variance_of_each, axis=0, dtype=np.float64) + np.einsum("rc,rc->c", difference, difference)
    return Moments(length * runs, mean, spread * length)


def _measure_exactly(values: torch.Tensor) -> Moments:
    """Measure in float64, a sample or a run of rows at a time so that little memory is needed."""
    spatial = values[0, 0].numel()
    pieces = torch.split(values, max(1, _ROWS // spatial))
    return merge_all(_measure_in_double(piece) for piece in pieces)


def _measure_in_double(piece: torch.Tensor) -> Moments:
    # some accelerators have no float64
    wide = piece.double() if piece.device.type in ("cpu", "cuda") else piece.cpu().double()
    variance, mean = torch.var_mean(wide, dim=[d for d in range(wide.ndim) if d != 1], correction=0)
    count = piece.numel() // piece.shape[1]
    return Moments(count, mean.cpu().numpy(), variance.cpu().numpy() * count)
