"""Each finding on layers that have it, and on layers just short of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bntool
from bntool.inspection.findings import FindingCode, Severity
from bntool.inspection.layer_findings import compare_shapes, find_in_layer
from bntool.inspection.results import Summary


def layer(*, dtype: str = "float32", counter: Any = 1000, **changes: list[float]) -> dict[str, Summary]:
    """A healthy layer of four channels, with changes."""
    tensors = {
        "weight": [1.0, 0.9, 1.1, -0.5],
        "bias": [0.0, 0.1, -0.2, 0.3],
        "running_mean": [0.5, -0.3, 0.2, 0.0],
        "running_var": [0.8, 1.2, 0.4, 2.0],
        **changes,
    }
    found = {role: Summary(values, dtype=dtype, shape=(len(values),)) for role, values in tensors.items()}
    if counter is not None:
        found["num_batches_tracked"] = Summary([counter], dtype="int64", shape=())
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
    ({"running_var": [0.8, 1e9, 0.4, 2.0]}, {FindingCode.OUTLYING_VARIANCE: Severity.ERROR}),
    ({"running_var": [0.8, 2.1e6, 0.4, 2.0]}, {FindingCode.OUTLYING_VARIANCE: Severity.ERROR}),
    ({"running_var": [0.8, 1.9e6, 0.4, 2.0]}, {FindingCode.OUTLYING_VARIANCE: Severity.WARNING}),
    ({"running_var": [0.8, 2.1e3, 0.4, 2.0]}, {FindingCode.OUTLYING_VARIANCE: Severity.WARNING}),
    ({"running_var": [0.8, 1.9e3, 0.4, 2.0]}, {}),
    ({"running_var": [0.8e5, 1.2e9, 0.4, 2.0]}, {FindingCode.OUTLYING_VARIANCE: Severity.WARNING}),  # two of four
    ({"running_var": [3e9, 1.2e9, 4e9, 2.0]}, {}),  # three of four: the one is odd
    (
        {"running_var": [1e-30, 1e-36, 1e-6, 2.0]},  # constant inputs, and one channel that lives
        {FindingCode.ZERO_VARIANCE: Severity.NOTICE},
    ),
    ({"running_mean": [0.5, -1e9, 0.2, 0.0]}, {FindingCode.OUTLYING_MEAN: Severity.ERROR}),
    ({"running_mean": [0.5, -150.0, 0.2, 0.0]}, {FindingCode.OUTLYING_MEAN: Severity.WARNING}),
    ({"running_mean": [0.5, 130.0, 0.2, 0.0]}, {}),  # the largest sigma of the others is 1.41
    ({"running_mean": [1e7, 1.1e7, 0.9e7, 1.2e7]}, {}),
    ({"dtype": "bfloat16"}, {FindingCode.HALF_STATISTICS: Severity.NOTICE}),
    (
        {"dtype": "float16", "running_var": [1e-5, 0.5, 0.4, 2.0]},
        {FindingCode.HALF_STATISTICS: Severity.NOTICE, FindingCode.UNDERFLOW: Severity.WARNING},
    ),
    (
        {"dtype": "float16", "running_var": [65504.0, 65504.0, 65504.0, 2.0]},
        {FindingCode.HALF_STATISTICS: Severity.NOTICE, FindingCode.OVERFLOW: Severity.ERROR},
    ),
    ({"weight": [1.0, 1.0]}, {FindingCode.SHAPE_MISMATCH: Severity.ERROR}),
    # one of the two statistics was lost
    ({"running_mean": [0.0] * 4}, {FindingCode.PARTLY_INITIAL: Severity.WARNING}),
    ({"running_var": [1.0] * 4}, {FindingCode.PARTLY_INITIAL: Severity.WARNING}),
    ({"running_mean": [0.0, 0.0, 0.0, 1e-9]}, {}),
    ({"running_mean": [0.0] * 4, "running_var": [0.99999] * 4}, {}),  # detectron2's FrozenBatchNorm: 1 - eps
    # channels whose input is constant
    (
        {"running_var": [0.8, 0.0, 0.4, 2.0], "weight": [1.0, 0.0, 1.0, 1.0]},
        {FindingCode.DEAD_CHANNELS: Severity.WARNING},
    ),
    ({"running_var": [0.8, 1e-12, 0.4, 2.0]}, {FindingCode.ZERO_VARIANCE: Severity.NOTICE}),
    ({"running_var": [0.8, 1e-30, 0.4, 2.0], "weight": [1.0, 1e-3, 1.0, 1.0]}, {}),
    ({"running_var": [0.8, 2e-12, 0.4, 2.0]}, {}),
    ({"running_mean": [0.0] * 4, "dtype": "bfloat16"}, {FindingCode.HALF_STATISTICS: Severity.NOTICE}),
    ({"bias": [0.0, 0.1, -0.2, -1.2e3]}, {FindingCode.OUTLYING_BIAS: Severity.WARNING}),
    ({"bias": [0.0, 0.1, -0.2, -1.0e3]}, {}),  # the largest weight is 1.1
    ({"bias": [-900.0, 0.1, -0.2, -1.2e3]}, {}),
    ({"counter": -3}, {FindingCode.COUNTER_DTYPE: Severity.WARNING}),
    ({"running_var": [1e-38, 1e-30, 1e-38, 1e-38]}, {FindingCode.ZERO_VARIANCE: Severity.WARNING}),
    ({"dtype": "float8_e5m2"}, {FindingCode.HALF_STATISTICS: Severity.WARNING}),
    ({"dtype": "bool", "running_mean": [1.0, 0.0, 1.0, 1.0]}, {FindingCode.HALF_STATISTICS: Severity.WARNING}),
    ({"dtype": "int32", "running_var": [1.0, 2.0, 5.0, 2.0]}, {FindingCode.HALF_STATISTICS: Severity.WARNING}),
]


@pytest.mark.parametrize(("changes", "expected"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_each_defect_is_found_and_nothing_else(changes: dict[str, Any], expected: dict[FindingCode, Severity]) -> None:
    assert codes(layer(**changes)) == expected


def test_channels_are_numbered() -> None:
    (finding,) = find_in_layer(layer(running_var=[1e9, 1.2, 0.4, 3e9]), eps=None)
    assert finding.channels == (0, 3)
    assert "2 of 4 channels" in finding.message
    (finding,) = find_in_layer(layer(running_var=[0.8, 1.2, 1e9, 2.0]), eps=None)
    assert finding.channels == (2,)
    assert "channel 2 (1e9)" in finding.message
    (finding,) = find_in_layer(layer(weight=[1.0, 0.0, 1.0, 0.0]), eps=None)
    assert finding.channels == (1, 3)
    (finding,) = find_in_layer(layer(weight=[0.0, 1.0, math.nan, 1.0], running_var=[0.5] * 4), eps=None)[1:]
    assert (finding.code, finding.channels) == (FindingCode.DEAD_CHANNELS, (0,))


def test_one_dead_channel_among_many_is_only_worth_a_notice() -> None:
    many = {"weight": [0.0] + [1.0] * 99, "bias": [0.1] * 100, "running_mean": [0.1] * 100, "running_var": [0.5] * 100}
    assert codes(layer(**many)) == {FindingCode.DEAD_CHANNELS: Severity.NOTICE}


def test_recorded_recalibration_explains_a_low_counter() -> None:
    assert codes(layer(counter=3), recalibrated=True) == {}


def test_a_counter_of_odd_dtype() -> None:
    tensors = {**layer(), "num_batches_tracked": Summary([5.0], dtype="float32", shape=())}
    assert codes(tensors) == {FindingCode.COUNTER_DTYPE: Severity.WARNING}


def test_messages_are_sentences_with_the_numbers() -> None:
    for changes, _ in CASES:
        for finding in find_in_layer(layer(**changes), eps=1e-5):
            assert len(finding.message) > 30
            assert finding.short
            assert "\n" not in finding.message


def test_summaries_count_what_is_not_finite_and_leave_it_out() -> None:
    summary = Summary([1.0, math.nan, 3.0, math.inf, -math.inf], dtype="float32", shape=(5,))
    assert (summary.minimum, summary.mean, summary.maximum, summary.nonfinite) == (1.0, 2.0, 3.0, 3)
    nothing = Summary([math.nan], dtype="float32", shape=(1,))
    assert (nothing.minimum, nothing.mean, nothing.maximum, nothing.nonfinite) == (None, None, None, 1)
    assert Summary([], dtype="float32", shape=(0,)).nonfinite == 0


def test_a_sum_that_overflows_is_not_mistaken_for_infinity() -> None:
    summary = Summary([1.7e308, 1.7e308], dtype="float64", shape=(2,))
    assert summary.nonfinite == 0
    assert summary.maximum == 1.7e308


def updated(count, momentum, *, dtype=torch.float32, scale=0.0):
    """A layer after so many real updates on data that do not vary: what torch leaves of the initial 1."""
    bn = torch.nn.BatchNorm2d(4, momentum=momentum).to(dtype)
    for _ in range(count):
        bn(torch.randn(8, 4, 2, 2).to(dtype) * scale + 3)
    return bn


@pytest.mark.parametrize("momentum", [0.01, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("count", [1, 2, 7, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_counter_that_torch_itself_made_is_believed(count, momentum, dtype):
    found = bntool.inspect(updated(count, momentum, dtype=dtype)).state_dicts[0].layers[0].findings
    assert FindingCode.COUNTER_LOW in {finding.code for finding in found}


@pytest.mark.parametrize(
    ("momentum", "count", "variance", "contradicts"),
    [
        (0.03, 1, 1.07e-5, True),  # YOLOv5's copies count anew
        (0.03, 1, 0.95, True),
        (0.03, 1, 0.975, False),
        (0.1, 21, 0.05, True),
        (0.1, 21, 0.12, False),
        (0.1, 5, 700.0, False),
        (None, 1, 1.07e-5, False),  # a cumulative average forgets the initial value at once
        (1.0, 1, 1.07e-5, False),
    ],
)
@pytest.mark.parametrize("form", ["pickled module", "live model", "converted", "state dict"])
def test_a_counter_that_the_values_contradict_is_not(momentum, count, variance, contradicts, form, tmp_path):
    bn = torch.nn.BatchNorm2d(4, momentum=momentum)
    bn.num_batches_tracked.fill_(count)
    bn.running_mean.fill_(0.5)
    bn.running_var.fill_(900.0)
    bn.running_var[2] = variance  # one channel is enough
    torch.save(bn if form != "state dict" else bn.state_dict(), tmp_path / "bn.pt")
    source = bn if form == "live model" else tmp_path / "bn.pt"
    if form == "converted":
        source = tmp_path / "bn.safetensors"
        bntool.convert(tmp_path / "bn.pt", source, to="safetensors")
    codes = {finding.code for finding in bntool.inspect(source).state_dicts[0].layers[0].findings}
    known = form in ("pickled module", "live model", "converted")
    assert (FindingCode.COUNTER_LOW in codes) is not (contradicts and known)


@pytest.mark.parametrize("infinite", [("running_var",), ("running_var", "weight"), ("running_mean",)])
def test_what_is_said_of_infinite_values_is_what_torch_computes(infinite):
    bn = torch.nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        bn.bias.normal_()
        for role in infinite:
            getattr(bn, role)[2] = torch.inf
    out = bn(torch.randn(3, 4, 2, 2))[:, 2]
    (finding,) = [f for f in bntool.inspect(bn).state_dicts[0].layers[0].findings if f.code is FindingCode.NON_FINITE]
    if infinite == ("running_var",):
        assert torch.equal(out, bn.bias[2].expand_as(out))
        assert "These channels are constant, their bias" in finding.message
    else:
        assert not torch.isfinite(out).all()
        assert "constant" not in finding.message


def test_channels_beside_one_that_explodes_are_not_called_dead() -> None:
    (finding,) = find_in_layer(layer(weight=[1.0, 1e7, 0.5, 0.8]), eps=1e-5)
    assert (finding.code, finding.channels) == (FindingCode.EXPLODING_SCALE, (1,))
    assert "large weight" in finding.message
    assert "tiny variance" not in finding.message
    assert "no data restore" in finding.advice


def test_of_two_channels_only_a_gap_that_no_data_make_is_told() -> None:
    two = {"weight": [1.0, 0.9], "bias": [0.1, 0.2], "running_mean": [0.1, 0.3]}
    assert codes(layer(**two, running_var=[0.8, 1e9])) == {FindingCode.OUTLYING_VARIANCE: Severity.ERROR}
    assert codes(layer(**two, running_var=[0.8, 1e4])) == {}
    two = two | {"running_mean": [0.1, -1e6]}
    assert codes(layer(**two, running_var=[0.8, 1.2])) == {FindingCode.OUTLYING_MEAN: Severity.ERROR}


@pytest.mark.parametrize(
    ("role", "value", "said"),
    [
        ("running_mean", math.inf, "are infinite"),
        ("running_mean", math.nan, "are NaN"),
        ("bias", math.inf, "are infinite"),
        ("weight", math.inf, "are NaN or infinite"),
        ("running_var", -math.inf, "are NaN"),
    ],
)
def test_what_comes_out_of_channels_that_are_not_finite_is_what_torch_gives(role: str, value: float, said: str) -> None:
    tensors = {key: [0.5, 0.5, 0.5, 0.5] for key in ("weight", "bias", "running_mean", "running_var")}
    tensors[role] = [0.5, value, 0.5, 0.5]
    (finding,) = [f for f in find_in_layer(layer(**tensors), eps=1e-5) if f.code is FindingCode.NON_FINITE]
    assert finding.message.endswith(said)
    given = {key: torch.tensor(values) for key, values in tensors.items()}
    out = F.batch_norm(torch.linspace(-2, 2, 28).reshape(7, 4), **given)[:, 1]
    assert not torch.isfinite(out).any()
    assert bool(torch.isnan(out).any()) == ("NaN" in said)
    assert bool(torch.isinf(out).any()) == ("infinite" in said)


@pytest.mark.parametrize(("momentum", "enough"), [(0.1, 22), (0.01, 231), (0.003, 772)])
def test_a_small_momentum_needs_more_updates(momentum: float, enough: int) -> None:
    bn = torch.nn.BatchNorm1d(4, momentum=momentum)
    batch = torch.tensor([[-4.0], [4.0]]) * torch.tensor([[1.0, 1.2, 1.4, 2.0]]) + 2
    for _ in range(enough):
        before = {
            role: Summary(t.double().reshape(-1).tolist(), dtype="float32", shape=(4,))
            for role, t in bn.state_dict().items()
        }
        before["num_batches_tracked"] = Summary([int(bn.num_batches_tracked)], dtype="int64", shape=())
        initial = 1 - bn.running_mean[0].item() / 2  # what torch has left of the initial 0
        bn(batch)
    assert initial > 0.9**22 > 0.999 * (1 - bn.running_mean[0].item() / 2)
    (finding,) = find_in_layer(before, eps=None, momentum=momentum)
    assert finding.code is FindingCode.COUNTER_LOW
    assert momentum == 0.1 or f"{initial:.0%} of the initial" in finding.message
    after = {**before, "num_batches_tracked": Summary([enough], dtype="int64", shape=())}
    assert find_in_layer(after, eps=None, momentum=momentum) == []


@pytest.mark.parametrize(("variance", "code"), [(0.13, FindingCode.COUNTER_RESET), (0.14, FindingCode.COUNTER_LOW)])
def test_many_updates_of_a_small_momentum_are_contradicted_as_few_are(variance: float, code: FindingCode) -> None:
    (finding,) = find_in_layer(layer(counter=200, running_var=[variance, 0.5, 0.4, 2.0]), eps=None, momentum=0.01)
    assert finding.code is code  # 0.99^200 = 0.134


def test_a_plain_average_that_the_next_batch_replaces() -> None:
    bn = torch.nn.BatchNorm1d(1, momentum=None)
    bn.running_mean.fill_(5.0)  # num_batches_tracked is 0
    bn(torch.tensor([[1.0], [3.0]]))
    assert bn.running_mean.item() == 2.0
    (known,), (unknown,) = (find_in_layer(layer(counter=0), eps=None, averages_all=known) for known in (True, False))
    assert "takes their place" in known.message
    assert "takes their place" not in unknown.message


def test_tensors_of_one_length_and_different_shapes() -> None:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (8,))
    assert compare_shapes(shapes) == []
    assert compare_shapes(dict.fromkeys(shapes, (1, 8, 1, 1))) == []  # of a module written by hand
    (finding,) = compare_shapes({**shapes, "running_mean": (1, 8, 1, 1)})
    assert finding.severity is Severity.WARNING
    assert "running_mean [1, 8, 1, 1]" in finding.message
