"""Each finding on layers that have it, and on layers just short of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bntool.inspection.findings import FindingCode, Severity
from bntool.inspection.layer_findings import find_in_layer
from bntool.inspection.results import Summary, summarize


def layer(*, dtype: str = "float32", counter: Any = 1000, **changes: list[float]) -> dict[str, Summary]:
    """A healthy layer of four channels, with changes."""
    tensors = {
        "weight": [1.0, 0.9, 1.1, -0.5],
        "bias": [0.0, 0.1, -0.2, 0.3],
        "running_mean": [0.5, -0.3, 0.2, 0.0],
        "running_var": [0.8, 1.2, 0.4, 2.0],
        **changes,
    }
    found = {role: summarize(values, dtype=dtype, shape=(len(values),)) for role, values in tensors.items()}
    if counter is not None:
        found["num_batches_tracked"] = summarize([counter], dtype="int64", shape=())
    return found


def codes(tensors: dict[str, Summary], **options: Any) -> dict[FindingCode, Severity]:
    return {finding.code: finding.severity for finding in find_in_layer(tensors, eps=None, **options)}


def test_a_healthy_layer_has_none() -> None:
    assert codes(layer()) == {}
    assert codes(layer(counter=None)) == {}


CASES: list[tuple[dict[str, Any], dict[FindingCode, Severity]]] = [
    ({"running_var": [0.8, math.nan, 0.4, 2.0]}, {FindingCode.NON_FINITE: Severity.ERROR}),
    ({"weight": [1.0, math.inf, 1.0, 1.0]}, {FindingCode.NON_FINITE: Severity.ERROR}),
    ({"running_mean": [math.inf, -math.inf, 0.4, 2.0]}, {FindingCode.NON_FINITE: Severity.ERROR}),
    ({"running_var": [0.8, -1e-3, 0.4, 2.0]}, {FindingCode.NEGATIVE_VARIANCE: Severity.ERROR}),
    ({"running_var": [0.8, 0.0, 0.4, 2.0]}, {FindingCode.ZERO_VARIANCE: Severity.WARNING}),
    (
        {"running_mean": [0.0] * 4, "running_var": [1.0] * 4, "counter": 0},
        {FindingCode.NEVER_UPDATED: Severity.WARNING},
    ),
    (
        {"running_mean": [0.0, 0.0, 0.2, 0.1], "running_var": [1.0, 1.0, 0.4, 0.1]},
        {FindingCode.PARTLY_INITIAL: Severity.WARNING},
    ),
    ({"running_mean": [0.0, 0.1, 0.2, 0.1], "running_var": [1.0, 0.2, 0.4, 0.1]}, {}),
    ({"counter": 0}, {FindingCode.COUNTER_ZERO: Severity.NOTICE}),
    ({"counter": 1}, {FindingCode.COUNTER_LOW: Severity.WARNING}),
    ({"counter": 21}, {FindingCode.COUNTER_LOW: Severity.WARNING}),
    ({"counter": 22}, {}),
    ({"weight": [1.0, 1e-9, 0.0, 1.0]}, {FindingCode.DEAD_CHANNELS: Severity.WARNING}),
    ({"weight": [1.0, 1e-4, 0.1, 1.0]}, {}),
    ({"weight": [1e-9] * 4}, {}),  # all alike: small, but nothing beside them that would drown them
    (
        {"running_var": [1e-9, 0.5, 0.4, 2.0], "weight": [10.0, 1.0, 1.0, 1.0]},
        {FindingCode.EXPLODING_SCALE: Severity.WARNING},
    ),
    ({"dtype": "bfloat16"}, {FindingCode.HALF_STATISTICS: Severity.NOTICE}),
    (
        {"dtype": "float16", "running_var": [1e-5, 0.5, 0.4, 2.0]},
        {FindingCode.HALF_STATISTICS: Severity.NOTICE, FindingCode.UNDERFLOW: Severity.WARNING},
    ),
    (
        {"dtype": "float16", "running_var": [65504.0, 0.5, 0.4, 2.0]},
        {FindingCode.HALF_STATISTICS: Severity.NOTICE, FindingCode.OVERFLOW: Severity.ERROR},
    ),
    ({"weight": [1.0, 1.0]}, {FindingCode.SHAPE_MISMATCH: Severity.ERROR}),
]


@pytest.mark.parametrize(("changes", "expected"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_each_defect_is_found_and_nothing_else(changes: dict[str, Any], expected: dict[FindingCode, Severity]) -> None:
    assert codes(layer(**changes)) == expected


def test_one_dead_channel_among_many_is_only_worth_a_notice() -> None:
    many = {"weight": [0.0] + [1.0] * 99, "bias": [0.1] * 100, "running_mean": [0.1] * 100, "running_var": [0.5] * 100}
    assert codes(layer(**many)) == {FindingCode.DEAD_CHANNELS: Severity.NOTICE}


def test_recorded_recalibration_explains_a_low_counter() -> None:
    assert codes(layer(counter=3), recalibrated=True) == {}


def test_a_counter_of_odd_dtype() -> None:
    tensors = {**layer(), "num_batches_tracked": summarize([5.0], dtype="float32", shape=())}
    assert codes(tensors) == {FindingCode.COUNTER_DTYPE: Severity.WARNING}


def test_messages_are_sentences_with_the_numbers() -> None:
    for changes, _ in CASES:
        for finding in find_in_layer(layer(**changes), eps=1e-5):
            assert len(finding.message) > 30
            assert finding.short
            assert "\n" not in finding.message


def test_summaries_count_what_is_not_finite_and_leave_it_out() -> None:
    summary = summarize([1.0, math.nan, 3.0, math.inf, -math.inf], dtype="float32", shape=(5,))
    assert (summary.minimum, summary.mean, summary.maximum, summary.nonfinite) == (1.0, 2.0, 3.0, 3)
    nothing = summarize([math.nan], dtype="float32", shape=(1,))
    assert (nothing.minimum, nothing.mean, nothing.maximum, nothing.nonfinite) == (None, None, None, 1)
    assert summarize([], dtype="float32", shape=(0,)).nonfinite == 0


def test_a_sum_that_overflows_is_not_mistaken_for_infinity() -> None:
    summary = summarize([1.7e308, 1.7e308], dtype="float64", shape=(2,))
    assert summary.nonfinite == 0
    assert summary.maximum == 1.7e308
