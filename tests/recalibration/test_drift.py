"""One channel that is far off stands out of an average over many, in verdicts and in words."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from bntool.recalibration.drift import LayerDrift
from bntool.reports.recalibration import _diagnosis
from bntool.verification.statistics_shift import measure_shift


def make_drift(
    name: str = "bn",
    *,
    channels: int = 2048,
    error: float | None = 0.01,
    change: Callable[[list[float], list[float]], None] = lambda mean, variance: None,
) -> LayerDrift:
    """Of a layer whose stored statistics were changed from those of the data."""
    data = [0.1 * (i % 7) for i in range(channels)], [0.5 + 0.1 * (i % 5) for i in range(channels)]
    stored = list(data[0]), list(data[1])
    change(*stored)
    shift = measure_shift(stored, data, old_eps=1e-5, new_eps=1e-5)
    return LayerDrift(
        layer=name,
        channels=channels,
        positions=1000,
        calls=4,
        shift=shift,
        sampling_error=error,
    )


def say(*drifts: LayerDrift) -> str:
    return "\n".join(text for block in _diagnosis(drifts) for text, _ in block.pieces())


def multiply_variance(channel: int, factor: float) -> Callable[[list[float], list[float]], None]:
    def change(_mean: list[float], variance: list[float]) -> None:
        variance[channel] *= factor

    return change


def move_mean(channel: int, distance: float) -> Callable[[list[float], list[float]], None]:
    def change(mean: list[float], _variance: list[float]) -> None:
        mean[channel] += distance

    return change


def test_one_channel_of_many_parts_a_layer() -> None:
    drift = make_drift(change=multiply_variance(7, 1e4))
    assert drift.variance_spread < 1.25  # the average of 2,048 channels says nothing
    assert drift.has_parted
    assert not drift.is_sampling
    said = say(drift)
    assert "its variances by factors of 0.0001 (channel 7) to 1." in said
    drift = make_drift(change=move_mean(9, 4.0))
    assert drift.mean_shift < 0.15
    assert drift.has_parted
    assert "σ in channel 9)" in say(drift)


def test_what_sampling_does_to_one_channel_parts_none() -> None:
    assert not make_drift(change=multiply_variance(7, 1.1)).has_parted
    assert make_drift(change=multiply_variance(7, 1.1)).is_sampling
    assert not make_drift(change=move_mean(9, 0.5)).has_parted


def test_one_batch_says_how_far_the_worst_channel_is_off() -> None:
    said = say(make_drift(error=None), make_drift("layer4.bn", error=None, change=multiply_variance(7, 2.0)))
    assert "furthest off in layer4.bn, running_var of channel 7 by a factor of 0.5. One batch" in said


def test_a_channel_of_a_layer_that_is_not_named_otherwise_is_named() -> None:
    def shift_all(mean: list[float], _variance: list[float]) -> None:
        mean[:] = [value + 1 for value in mean]

    said = say(make_drift("first", change=shift_all), make_drift("second", change=multiply_variance(7, 1e6)))
    assert said.startswith("First layer in execution order to part from the data: first is off by")
    assert "one of second: running_var of channel 7 by a factor of 1e-6" in said


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_channels_that_allow_no_measure_are_numbered(value: float) -> None:
    def break_two(_mean: list[float], variance: list[float]) -> None:
        variance[3] = variance[11] = value

    assert "(NaN, infinite or negative variance) (channels 3, 11)" in say(make_drift(change=break_two))


def test_long_names_do_not_cut_a_sentence() -> None:
    said = say(make_drift("block." * 60 + "bn", change=multiply_variance(7, 1e4)))
    assert said.endswith(".")
    assert "…" not in said
