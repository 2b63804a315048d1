"""Moments against numpy in float64 and against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bntool.recalibration.activation_moments import measure
from bntool.recalibration.moments import Moments, merge_all


def of_numbers(numbers):
    return measure(torch.tensor(numbers, dtype=torch.float64).reshape(-1, 1))


numbers = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=30)


@settings(max_examples=100)
@given(st.lists(numbers, min_size=1, max_size=8))
def test_merged_moments_are_those_of_all_values_together(parts):
    merged = merge_all(of_numbers(part) for part in parts)
    values = [Fraction(number) for part in parts for number in part]
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    scale = max(Fraction(1), *map(abs, values))
    assert merged.count == len(values)
    assert abs(Fraction(merged.mean.item()) - mean) <= scale * Fraction(1, 10**14)
    assert abs(Fraction(merged.squares.item()) - squares) <= scale * scale * len(values) * Fraction(1, 10**13)


@settings(max_examples=30)
@given(st.lists(numbers, min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_order_does_not_matter(parts, random):
    forward = merge_all(of_numbers(part) for part in parts)
    shuffled = list(parts)
    random.shuffle(shuffled)
    other = merge_all(of_numbers(part) for part in shuffled)
    scale = max(1.0, *(abs(number) for part in parts for number in part))
    assert other.mean.item() == pytest.approx(forward.mean.item(), abs=1e-13 * scale)
    assert other.squares.item() == pytest.approx(forward.squares.item(), rel=1e-11, abs=1e-11 * scale * scale)


SHAPES = [(64, 5), (300, 3, 7), (8, 3, 96, 96), (2, 4, 5, 6, 7), (1, 2, 70, 70), (6, 200, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_float32_activations_of_any_mean(shape, mean, layout):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean
    if layout == "channels_last" and len(shape) == 4:
        values = values.to(memory_format=torch.channels_last)
    if layout == "strided":
        values = torch.stack([values, values], dim=-1)[..., 0]
    moments = measure(values)
    axes = tuple(d for d in range(values.ndim) if d != 1)
    exact = values.numpy().astype("f8")
    assert moments.count == exact.size // shape[1]
    # in sigmas; the fast kernel for channels last sums in float32
    assert np.abs(moments.mean - exact.mean(axes)).max() < 1e-6
    tolerance = 2e-5 if layout == "channels_last" and mean == 0 else 1e-6
    assert np.abs(moments.biased_variance / exact.var(axes) - 1).max() < tolerance
    assert np.abs(moments.unbiased_variance / exact.var(axes, ddof=1) - 1).max() < tolerance


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_as_float32(dtype, layout):
    values = (torch.randn(16, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 100 + 300).to(dtype)
    values = values.contiguous(memory_format=layout)
    moments = measure(values)
    exact = values.double().numpy()
    tolerance = 2e-5 if layout == torch.channels_last else 1e-6
    assert np.abs(moments.mean / exact.mean((0, 2, 3)) - 1).max() < 1e-6
    assert np.abs(moments.biased_variance / exact.var((0, 2, 3)) - 1).max() < tolerance


def test_halves_of_any_number_are_summed_as_well():
    values = (torch.randn(2, 3, 1000, 500, generator=torch.Generator().manual_seed(0)) + 5).to(torch.bfloat16)
    exact = values.double().numpy()
    moments = measure(values)
    assert np.abs(moments.biased_variance / exact.var((0, 2, 3)) - 1).max() < 1e-6
    assert np.abs(moments.mean / exact.mean((0, 2, 3)) - 1).max() < 1e-7


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_numbers_whose_squares_float32_cannot_hold(layout):
    values = (torch.randn(16, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 1e25).to(memory_format=layout)
    moments = measure(values)
    exact = values.double().numpy()
    assert moments.is_finite
    assert np.abs(moments.biased_variance / exact.var((0, 2, 3)) - 1).max() < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(8, 3, 16, 16), (8, 3)])
def test_one_bad_value_is_noticed(bad, shape):
    values = torch.zeros(shape)
    assert measure(values).is_finite
    values[3, 1] = bad
    assert not measure(values).is_finite


def test_nothing_and_constants():
    assert measure(torch.zeros(0, 3, 2, 2)).count == 0
    assert measure(torch.zeros(2, 3, 0, 2)).count == 0
    constant = measure(torch.full((32, 2, 16, 16), 7.0))
    assert constant.mean.tolist() == [7.0, 7.0]
    assert constant.squares.tolist() == [0.0, 0.0]
    empty = Moments(0, np.zeros(2), np.zeros(2))
    merged = merge_all([empty, constant, empty])
    assert (merged.count, merged.mean.tolist(), merged.squares.tolist()) == (constant.count, [7.0, 7.0], [0.0, 0.0])
