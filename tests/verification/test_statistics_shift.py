"""How far statistics moved, held against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch

from bntool.verification.statistics_shift import NO_SHIFT, WorstShift, measure_shift, measure_worst_shift


def test_measures_are_those_of_torch() -> None:
    torch.manual_seed(0)
    old_mean, new_mean = torch.randn(2, 50, dtype=torch.float64)
    old_var, new_var = torch.rand(2, 50, dtype=torch.float64) * 3
    shift = measure_shift(
        (old_mean.tolist(), old_var.tolist()), (new_mean.tolist(), new_var.tolist()), old_eps=1e-3, new_eps=1e-5
    )
    d = (old_mean - new_mean) / (new_var + 1e-5).sqrt()
    r = ((new_var + 1e-5) / (old_var + 1e-3)).log()
    assert shift.mean_shift == pytest.approx(d.square().mean().sqrt().item())
    assert shift.worst_mean_shift == pytest.approx(d.abs().max().item())
    assert shift.variance_ratio == pytest.approx(r.mean().exp().item())
    assert shift.variance_spread == pytest.approx(r.square().mean().sqrt().exp().item())
    assert shift.worst_variance_ratio == pytest.approx(r[r.abs().argmax()].exp().item())
    assert shift.worst == pytest.approx(max(d.abs().max().item(), r.abs().max().item()))
    assert shift.finite
    sums = ((old_var + 1e-3).tolist(), (new_var + 1e-5).tolist())
    worst = measure_worst_shift((old_mean.tolist(), sums[0]), (new_mean.tolist(), sums[1]))
    assert worst.worst_mean_shift == pytest.approx(d.abs().max().item())
    assert worst.worst_variance_ratio == pytest.approx(r[r.abs().argmax()].exp().item())
    assert worst.severity == pytest.approx(shift.worst)


def test_nothing_moved() -> None:
    numbers = ([1.0, -2.0], [0.5, 0.0])
    assert measure_shift(numbers, numbers, old_eps=1e-5, new_eps=1e-5) == NO_SHIFT
    assert (NO_SHIFT.worst, NO_SHIFT.severity) == (0.0, 0.0)
    assert measure_shift(([], []), ([], []), old_eps=1e-5, new_eps=1e-5) == NO_SHIFT
    assert measure_worst_shift(([], []), ([], [])) == WorstShift(0.0, 1.0, finite=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("is_new", [False, True])
def test_statistics_that_are_of_no_use(bad: float, is_new: bool) -> None:
    good, broken = ([0.0, 1.0], [1.0, 1.0]), ([3.0, 1.0], [1.0, bad])
    old, new = (good, broken) if is_new else (broken, good)
    shift = measure_shift(old, new, old_eps=1e-5, new_eps=1e-5)
    assert not shift.finite
    assert (shift.severity, shift.worst) == (math.inf, math.inf)
    assert math.isnan(shift.variance_ratio)
    assert measure_worst_shift(old, new).severity == math.inf
    if not is_new:  # the means can be held against the new spread all the same
        assert shift.mean_shift == pytest.approx(3 / math.sqrt(2), rel=1e-4)


@pytest.mark.parametrize("old", [0.0, 1e-5, 1.0, 1e300])
@pytest.mark.parametrize("new", [0.0, 1e-5, 1.0, 1e300])
def test_the_worst_channel_is_that_of_the_whole_measure_at_the_ends_of_the_range(old: float, new: float) -> None:
    before, after = ([0.0, 1e160], [1.0, old]), ([1.0, -1e160], [1.0, new])
    whole = measure_shift(before, after, old_eps=0, new_eps=0)
    worst = measure_worst_shift(before, after)
    assert worst.finite == whole.finite
    assert worst.severity == pytest.approx(whole.worst)
