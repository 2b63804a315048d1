"""What is folded is exact, and what is not allowed is refused with its reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bntool.errors import UsageError
from bntool.folding.options import FoldOptions, Layout
from bntool.folding.planning import Level, plan_fold
from bntool.graphs.declared import declare
from bntool.modules.application import read_state
from tests.folding.folding_networks import LAYOUTS, Functional, fold, largest_difference, randomise, reasons

EXACT = 1e-12


def image(channels: int = 4, size: int = 7) -> torch.Tensor:
    return torch.randn(3, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


PRODUCERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (3, 4, 7, 7)),
    "conv2d with bias, padding, stride": (nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), (3, 4, 7, 7)),
    "conv2d circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6), (3, 4, 7, 7)),
    "conv2d same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), nn.BatchNorm2d(6), (3, 4, 7, 7)),
    "conv2d groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (3, 4, 7, 7)),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (3, 4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), (2, 2, 5, 5, 5)),
    "transpose1d": (nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (3, 4, 9)),
    "transpose2d": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (3, 4, 5, 5)),
    "transpose2d groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (3, 4, 5, 5)),
    "transpose3d groups": (nn.ConvTranspose3d(4, 8, 3, groups=4), nn.BatchNorm3d(8), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), (4, 5)),
    "linear without bias": (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), (4, 5)),
    "affine=False": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (3, 4, 7, 7)),
    "eps": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=1e-3), (3, 4, 7, 7)),
    "SyncBatchNorm": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (3, 4, 7, 7)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PRODUCERS)
def test_every_producer_is_folded_exactly(name: str, layout: Layout) -> None:
    producer, batchnorm, shape = PRODUCERS[name]
    model = randomise(nn.Sequential(producer, batchnorm, nn.ReLU()).double())
    inputs = torch.randn(shape, dtype=torch.float64)
    folded, plan = fold(model, inputs, layout=layout)
    assert [f.level for f in plan.folds] == [Level.DIRECT]
    assert not plan.skips
    assert largest_difference(model, folded, inputs) < EXACT
    if layout is Layout.FOLDED:
        assert isinstance(folded[1], nn.Identity)
        assert folded[0].bias is not None
    else:
        assert list(folded.state_dict()) == list(model.state_dict())
        assert not folded[1].running_mean.any() or not batchnorm.affine


def test_batchnorm_without_bias() -> None:
    batchnorm = nn.BatchNorm2d(6)
    batchnorm.bias = None
    model = randomise(nn.Sequential(nn.Conv2d(4, 6, 3), batchnorm).double())
    for layout in LAYOUTS:
        folded, plan = fold(model, image(), layout=layout)
        assert len(plan.folds) == 1
        assert largest_difference(model, folded, image()) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))).to(dtype)
    folded, _ = fold(model, image().to(dtype))
    assert {t.dtype for t in folded.state_dict().values()} == {dtype}
    # against the exact fold: each element is rounded once, so to half a unit in its last place
    exact, _ = fold(model.double(), image())
    for name, tensor in folded.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].to(dtype))


def test_overflow_is_refused() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)))
    with torch.no_grad():
        model[1].weight[2] = 40000
        model[1].running_var[2] = 1e-3
    model = model.half()
    _, plan = fold(model, image().half())
    assert reasons(plan) == {"1": "OVERFLOW"}
    assert not plan.steps


# each row of what is not allowed, with its reason


def shared(self, x):
    y = self.conv(x)
    return self.bn(y) + y


def read_by_shape_only(self, x):
    y = self.conv(x)
    return self.bn(y) + torch.zeros_like(y) + y.shape[0]


def two_norms(self, x):
    y = self.conv(x)
    return self.bn(y) + self.bn2(y)


def returned_too(self, x):
    y = self.conv(x)
    return {"out": self.bn(y), "features": [y]}


def kept_too(self, x):
    self.kept = self.conv(x)
    return self.bn(self.kept)


def concatenated_too(self, x):
    y = self.conv(x)
    return torch.cat([self.bn(y), y], 1)


def called_twice(self, x):
    return self.bn(self.conv(self.conv(x)))


def norm_called_twice(self, x):
    return self.bn(F.relu(self.bn(self.conv(x))))


def between(self, x):
    return self.bn(F.relu(self.conv(x)))


def softmax_between(self, x):
    return self.bn(self.conv(x).softmax(1))


def dropout_between(self, x):
    return self.bn(F.dropout(self.conv(x), training=True))


def padding_between(self, x):
    return self.bn(F.pad(self.conv(x), (1, 1, 1, 1)))


def padded_average_between(self, x):
    return self.bn(F.avg_pool2d(self.conv(x), 3, padding=1))


def constant_added(self, x):
    return self.bn(self.conv(x) + 1)


def input_added(self, x):
    return self.bn(self.conv(x) + x)


def input_concatenated(self, x):
    return self.bn(torch.cat([self.conv(x)[:, :2], x[:, 2:]], 1))


def pre_activation(self, x):
    """By name and by registration bn would go into conv, which comes after it."""
    return self.conv(F.relu(self.bn(x)))


def changed_in_place(self, x):
    y = self.conv(x)
    y += 1
    return self.bn(y)


def changed_through_view(self, x):
    y = self.conv(x)
    y[:, :2].mul_(2)
    return self.bn(y)


def read_behind_the_back(self, x):
    y = self.conv(x)
    hidden = y.data
    return self.bn(y) * hidden.mean()


def instance(self, x):
    return self.norm(self.conv(x))


def by_batch(self, x):
    y = self.conv(x)
    bn = self.bn
    return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True)


def in_train_mode(self, x):
    return self.bn.train()(self.conv(x))


def weight_computed(self, x):
    weight = self.conv.weight - self.conv.weight.mean()
    return self.bn(F.conv2d(x, weight, self.conv.bias))


def weight_used_elsewhere(self, x):
    return self.bn(self.conv(x)) * self.conv.weight.norm()


def reversed_pyramid(self, x):
    return [self.bn(self.conv(x)), self.bn2(self.conv(x[:, :, ::2]))]


def taken_if_bright(self, x):
    return self.bn(self.conv(x if x.mean() > 0 else -x))


def read_as_number(self, x):
    return self.bn(self.conv(x * x.sum().item()))


def read_as_array(self, x):
    return self.bn(self.conv(x * float(x.numpy().mean())))


def read_by_numpy(self, x):
    return self.bn(self.conv(x * float(np.asarray(x).mean())))


def read_as_list(self, x):
    return self.bn(self.conv(x if x.tolist() else -x))


def norm_first(self, x):
    return F.relu(self.bn(x))


def unused(self, x):
    return self.conv(x)


NOT_ALLOWED = {
    shared: {"bn": "SHARED_OUTPUT"},
    returned_too: {"bn": "SHARED_OUTPUT"},
    kept_too: {"bn": "SHARED_OUTPUT"},
    concatenated_too: {"bn": "SHARED_OUTPUT"},
    called_twice: {"bn": "REUSED"},
    norm_called_twice: {"bn": "NOT_ADJACENT"},
    between: {"bn": "NOT_ADJACENT"},
    softmax_between: {"bn": "NOT_ADJACENT"},
    dropout_between: {"bn": "NOT_ADJACENT"},
    padding_between: {"bn": "NOT_ADJACENT"},
    padded_average_between: {"bn": "NOT_ADJACENT"},
    constant_added: {"bn": "NOT_ADJACENT"},
    input_added: {"bn": "NO_PRODUCER"},
    input_concatenated: {"bn": "NO_PRODUCER"},
    pre_activation: {"bn": "NO_PRODUCER"},
    changed_in_place: {"bn": "NOT_ADJACENT"},
    changed_through_view: {"bn": "NOT_ADJACENT"},
    read_behind_the_back: {"bn": "SHARED_OUTPUT"},
    by_batch: {"bn": "TRAIN_MODE"},
    in_train_mode: {"bn": "TRAIN_MODE"},
    weight_computed: {"bn": "COMPUTED_WEIGHT"},
    weight_used_elsewhere: {"bn": "REUSED"},
    taken_if_bright: {"bn": "DATA_DEPENDENT"},
    read_as_number: {"bn": "DATA_DEPENDENT"},
    read_as_array: {"bn": "DATA_DEPENDENT"},
    read_by_numpy: {"bn": "DATA_DEPENDENT"},
    read_as_list: {"bn": "DATA_DEPENDENT"},
    norm_first: {"bn": "NO_PRODUCER"},
    unused: {"bn": "NEVER_REACHED"},
}


@pytest.mark.parametrize("forward", NOT_ALLOWED, ids=lambda forward: forward.__name__)
def test_what_is_not_allowed_has_its_reason(forward) -> None:
    modules = {"conv": nn.Conv2d(4, 4, 3, padding=1), "bn": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)}
    model = randomise(Functional(forward, **modules).double())
    folded, plan = fold(model, image())
    expected = {"bn2": "NEVER_REACHED", **NOT_ALLOWED[forward]}
    assert reasons(plan) == expected
    assert all(torch.equal(t, folded.state_dict()[name]) for name, t in model.state_dict().items())
    assert all(skip.detail for skip in plan.skips)


def test_instance_norm_is_no_batchnorm() -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    _, plan = fold(Functional(instance, conv=nn.Conv2d(4, 4, 3), norm=norm).double().eval(), image())
    assert reasons(plan) == {}


def test_batchnorm_without_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).double().eval()
    assert reasons(fold(model, image())[1]) == {"1": "NO_STATISTICS"}


@pytest.mark.parametrize(
    ("role", "value", "reason"), [("running_var", -1.0, "NEGATIVE_VARIANCE"), ("bias", float("nan"), "NOT_FINITE")]
)
def test_broken_statistics(role: str, value: float, reason: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double())
    with torch.no_grad():
        getattr(model[1], role)[1] = value
    assert reasons(fold(model, image())[1]) == {"1": reason}


def test_eps_of_zero() -> None:
    """As FrozenBatchNorm2d of torchvision had it before 0.8: nothing is wrong while every variance is positive."""

    def forward(self, x):
        bn = self.bn
        return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=0.0)

    model = randomise(Functional(forward, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)).double())
    folded, plan = fold(model, image(), layout=Layout.SAME_KEYS)
    assert len(plan.folds) == 1
    assert largest_difference(model, folded, image()) < EXACT
    model.bn.running_var[1] = 0
    assert reasons(fold(model, image(), layout=Layout.SAME_KEYS)[1]) == {"bn": "NEGATIVE_VARIANCE"}


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1e-5])
def test_an_eps_that_is_none_is_refused(eps: float) -> None:
    state_dict = read_state(nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "bn": nn.BatchNorm2d(6)}))
    with pytest.raises(UsageError, match="--eps"):
        plan_fold(state_dict, declare(state_dict, {"bn": "conv"}), FoldOptions(eps=eps))


def test_linear_that_writes_another_axis_than_batchnorm_reads() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).double())
    _, plan = fold(model, torch.randn(4, 6, 5, dtype=torch.float64))
    assert reasons(plan) == {"1": "AXIS_MISMATCH"}


def test_axes_that_are_brought_back_are_followed() -> None:
    def tokens(self, x):
        y = self.linear(x)
        return self.bn(y.transpose(1, 2)).transpose(1, 2)

    def flattened(self, x):
        y = self.linear(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)

    inputs = torch.randn(4, 6, 5, dtype=torch.float64)
    for forward in (tokens, flattened):
        model = randomise(Functional(forward, linear=nn.Linear(5, 6), bn=nn.BatchNorm1d(6)).double())
        folded, plan = fold(model, inputs)
        assert len(plan.folds) == 1
        assert largest_difference(model, folded, inputs) < EXACT


def test_conv_flattened_into_batchnorm_of_pixels() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 2, 3), nn.Flatten(), nn.BatchNorm1d(50)).double())
    assert reasons(fold(model, image())[1]) == {"2": "AXIS_MISMATCH"}


def test_a_parameter_of_two_modules() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    model[3].weight = model[0].weight
    assert reasons(fold(randomise(model), image())[1]) == {"1": "REUSED"}


def test_one_module_under_two_names_is_folded_under_both() -> None:
    conv, bn = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
    model = randomise(Functional(lambda self, x: self.bn(self.conv(x)), conv=conv, bn=bn, also=conv, norm=bn).double())
    folded, plan = fold(model, image())
    assert len(plan.folds) == 1
    assert not plan.skips
    assert set(folded.state_dict()) == {"conv.weight", "conv.bias", "also.weight", "also.bias"}
    assert folded.also is folded.conv
    assert largest_difference(model, folded, image()) < EXACT


# exact beyond the direct neighbour


def pyramid(self, x):
    return [self.bn(self.conv(x)), self.bn(self.conv(x[:, :, ::2, ::2]))]


def concatenated(self, x):
    return self.bn8(torch.cat([self.conv(x), self.other(x)], 1))


def split(self, x):
    first, second = self.wide(x).chunk(2, 1)
    return self.bn(first) + F.relu(second)


def added(self, x):
    return self.bn(self.conv(x) + self.other(x))


def averaged(self, x):
    return self.bn(F.interpolate(F.avg_pool2d(self.conv(x), 2), scale_factor=2, mode="bilinear"))


def shuffled(self, x):
    return self.bn8(F.channel_shuffle(torch.cat([self.conv(x), self.other(x)], 1), 2))


def in_place_sum(self, x):
    y = self.conv(x)
    y += self.other(x)
    return self.bn(y)


def norm_on_norm(self, x):
    return self.bn2(self.bn(self.conv(x)))


def norm_on_norm_alone(self, x):
    return F.relu(self.bn2(self.bn(F.relu(x))))


def forward_into_conv(self, x):
    return self.unpadded(self.bn(F.relu(x)))


def forward_through_pool(self, x):
    return self.linear(torch.flatten(F.adaptive_avg_pool2d(self.bn(F.relu(x)), 1), 1))


def forward_flattened(self, x):
    return self.pixels(self.bn(F.relu(x)).flatten(1))


def forward_into_two(self, x):
    y = self.bn(F.relu(x))
    return self.unpadded(y) + self.unpadded2(y)


def forward_grouped(self, x):
    return self.grouped(torch.cat([self.bn(F.relu(x)), x], 1))


DEEPER = {
    pyramid: Level.DIRECT,
    concatenated: Level.THROUGH,
    split: Level.THROUGH,
    added: Level.THROUGH,
    averaged: Level.THROUGH,
    shuffled: Level.THROUGH,
    in_place_sum: Level.THROUGH,
    norm_on_norm: Level.DIRECT,
    norm_on_norm_alone: Level.BATCHNORM,
    forward_into_conv: Level.FORWARD,
    forward_through_pool: Level.FORWARD,
    forward_flattened: Level.FORWARD,
    forward_into_two: Level.FORWARD,
    forward_grouped: Level.FORWARD,
}


@pytest.mark.parametrize("forward", DEEPER, ids=lambda forward: forward.__name__)
def test_deeper_levels_are_exact(forward) -> None:
    modules = {
        "conv": nn.Conv2d(4, 4, 3, padding=1),
        "other": nn.Conv2d(4, 4, 3, padding=1, bias=False),
        "wide": nn.Conv2d(4, 8, 3, padding=1),
        "unpadded": nn.Conv2d(4, 5, 3),
        "unpadded2": nn.Conv2d(4, 5, 3, bias=False),
        "grouped": nn.Conv2d(8, 6, 3, groups=2),
        "linear": nn.Linear(4, 3),
        "pixels": nn.Linear(4 * 64, 3),
        "bn": nn.BatchNorm2d(4),
        "bn2": nn.BatchNorm2d(4),
        "bn8": nn.BatchNorm2d(8),
    }
    used = {name: module for name, module in modules.items() if name in forward.__code__.co_names}
    model = randomise(Functional(forward, **used).double())
    folded, plan = fold(model, image(size=8))
    assert DEEPER[forward] in [f.level for f in plan.folds]
    expected = 0 if forward is not norm_on_norm_alone else 1
    assert len(plan.skips) == expected
    assert largest_difference(model, folded, image(size=8)) < EXACT


def test_max_pool_needs_positive_scales() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(3, padding=1), nn.BatchNorm2d(4)).double())
    with torch.no_grad():
        model[2].weight[1] = -0.5
    assert reasons(fold(model, image())[1]) == {"2": "NOT_ADJACENT"}
    with torch.no_grad():
        model[2].weight.abs_()
    folded, plan = fold(model, image())
    assert [f.level for f in plan.folds] == [Level.THROUGH]
    assert largest_difference(model, folded, image()) < EXACT


def test_zero_padding_in_the_consumer_is_refused() -> None:
    model = randomise(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)).double())
    assert reasons(fold(model, image())[1]) == {"0": "PADDED_CONSUMER"}


def test_functional_batchnorm_stays_and_adds_its_shift() -> None:
    def functional(self, x):
        bn = self.bn
        return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-3)

    model = randomise(Functional(functional, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)).double())
    folded, plan = fold(model, image())
    assert [f.stays for f in plan.folds] == [True]
    assert largest_difference(model, folded, image()) < EXACT


def test_combined_module_keeps_its_activation() -> None:
    class BatchNormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.PReLU(channels)

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), BatchNormAct(4)).double())
    folded, plan = fold(model, image())
    assert [f.stays for f in plan.folds] == [False]
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "1.act.weight"]
    assert largest_difference(model, folded, image()) < EXACT


def test_frozen_batchnorm_that_computes_by_itself() -> None:
    class FrozenBatchNorm2d(nn.Module):  # as torchvision writes it
        def __init__(self, channels: int, eps: float = 1e-5) -> None:
            super().__init__()
            self.eps = eps
            self.register_buffer("weight", torch.ones(channels))
            self.register_buffer("bias", torch.zeros(channels))
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

        def forward(self, x):
            w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
            rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
            scale = w * (rv + self.eps).rsqrt()
            return x * scale + (b - rm * scale)

    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4, eps=1e-3), nn.ReLU()).double())
    for layout in LAYOUTS:
        folded, plan = fold(model, image(), layout=layout)
        assert len(plan.folds) == 1
        assert not plan.skips
        assert largest_difference(model, folded, image()) < EXACT


def test_layers_are_selected_by_globs() -> None:
    layers = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    model = randomise(nn.Sequential(*layers).double())
    _, plan = fold(model, image(), layers=["3"])
    assert plan.layers == ("3",)
    assert reasons(plan) == {"1": "NOT_SELECTED"}


def test_live_state_reads_as_a_state_dict() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).half()
    state = read_state(model)
    assert list(state.tensors) == list(model.state_dict())
    assert b"".join(state.tensor("0.weight").chunks()) == model[0].weight.detach().numpy().tobytes()


def test_linear_that_adds_its_bias_in_a_second_operation() -> None:
    def strided(self, x):
        return self.bn(self.linear(x.flatten(2).transpose(1, 2)).transpose(1, 2))

    model = randomise(Functional(strided, linear=nn.Linear(4, 6), bn=nn.BatchNorm1d(6)).double())
    folded, plan = fold(model, image())
    assert [f.stays for f in plan.folds] == [False]
    assert largest_difference(model, folded, image()) < EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_a_batchnorm_that_stays_adds_its_shift_and_no_scale(dtype: torch.dtype, eps: float) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6, eps=eps)).to(dtype))
    folded, _ = fold(model, image().to(dtype), layout=Layout.SAME_KEYS)
    exact, given = model.double(), folded.double()  # what is stored, judged without further rounding
    unit = torch.finfo(dtype).eps
    assert largest_difference(exact, given, image()) < 4 * unit
    remaining = given[1].weight / torch.sqrt(given[1].running_var + eps)
    if dtype in (torch.float64, torch.float32):
        assert torch.equal(remaining.to(dtype), torch.ones(6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 2e-3, 1e-2, 0.1])
def test_what_stays_of_a_batchnorm_changes_no_bit(dtype: torch.dtype, eps: float) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6, eps=eps)).to(dtype))
    folded, _ = fold(model, image().to(dtype), layout=Layout.SAME_KEYS)
    remaining = folded[1]
    with torch.no_grad():
        remaining.bias.zero_()
        x = torch.randn(64, 6, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(remaining(x), x)


def test_same_keys_holds_folds_into_producers_only() -> None:
    """One into a reader would leave a BatchNorm that does nothing, and two BatchNorms cannot share a shift."""
    for forward in (forward_into_conv, norm_on_norm_alone):
        modules = {"bn": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4), "unpadded": nn.Conv2d(4, 5, 3)}
        used = {name: module for name, module in modules.items() if name in forward.__code__.co_names}
        model = randomise(Functional(forward, **used).double())
        folded, plan = fold(model, image(), layout=Layout.SAME_KEYS)
        assert not plan.folds
        assert set(reasons(plan).values()) == {"NOT_ADJACENT"}
        assert largest_difference(model, folded, image()) == 0


@pytest.mark.parametrize("is_first", [True, False])
def test_calls_with_different_eps_are_left_alone(is_first: bool) -> None:
    """One set of tensors, normalised with the module's own eps and with another one."""

    def normalised_twice(self, x):
        norm = self.bn
        for functional in (is_first, not is_first):
            x = self.conv(x)
            vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            x = F.batch_norm(x, *vectors, eps=1e-3) if functional else norm(x)
        return x

    model = randomise(Functional(normalised_twice, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)).double())
    folded, plan = fold(model, image())
    assert [skip.detail for skip in plan.skips] == ["its calls normalise with different eps: 1e-05 and 0.001"]
    assert largest_difference(model, folded, image()) == 0


@pytest.mark.parametrize("returned", [lambda weight: weight, torch.sum], ids=["the weight", "its sum"])
def test_a_weight_that_is_an_output_is_left_alone(returned) -> None:
    """Also by what is computed from it without the input."""

    def with_weight(self, x):
        return self.bn(self.conv(x)), returned(self.conv.weight)

    model = randomise(Functional(with_weight, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)).double())
    _, plan = fold(model, image())
    (skip,) = plan.skips
    assert skip.reason.name == "REUSED"
    assert "the weight of convolution (conv) is also used elsewhere: the model's output" in skip.detail
