"""Folds by storing tensors as a (x + b): exact, or refused with what stands in the way and on which channels."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import bntool
from bntool.errors import UsageError
from bntool.folding.folds import Level
from bntool.folding.options import Layout
from bntool.folding.planning import plan_fold
from bntool.folding.producers import read_producer
from bntool.folding.transforms import channel_transforms, operations, storing_otherwise
from bntool.folding.transforms.channel_transforms import ChannelTransforms
from bntool.folding.transforms.scales import Scales
from bntool.folding.transforms.shifts import Shifts
from bntool.folding.transforms.storing_otherwise import StoringOtherwise, _Removal
from bntool.folding.transforms.targets import Targets
from bntool.graphs.graph import NodeKind
from bntool.graphs.traced.tracing import trace
from bntool.modules.application import apply_plan, read_state
from tests.folding.folding_networks import Functional, fold, largest_difference, randomise, reasons

EXACT = 1e-12


def image(channels: int = 4, size: int = 7) -> torch.Tensor:
    return torch.randn(3, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(forward, **modules: nn.Module) -> nn.Module:
    """A network of the modules that a forward names; scales of both signs, none of them tiny."""
    known = {
        "stem": nn.Conv2d(4, 6, 3, padding=1),
        "conv": nn.Conv2d(6, 6, 3, padding=1, bias=False),
        "other": nn.Conv2d(6, 6, 1),
        "unpadded": nn.Conv2d(6, 5, 3),
        "strided": nn.Conv2d(6, 6, 3, padding=1, stride=2, bias=False),
        "transposed": nn.ConvTranspose2d(6, 4, 3, groups=2),
        "squeeze": nn.Conv2d(6, 2, 1),
        "excite": nn.Conv2d(2, 6, 1),
        "head": nn.Linear(6, 3),
        "around": nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
        "prelu": nn.PReLU(6),
        **{name: nn.BatchNorm2d(6) for name in ("bn", "bn2", "bn3")},
        **modules,
    }
    used = {name: module for name, module in known.items() if name in forward.__code__.co_names}
    model = randomise(Functional(forward, **used).double())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            with torch.no_grad():
                module.weight.copy_(module.weight.sign() * module.weight.abs().clamp(min=0.1))
    return model


def make_positive(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.abs_()
    return model


# whatever the signs


def padded_reader(self, x):
    x = self.stem(x)
    return self.conv(self.bn(x)) + x.relu()


def padded_reader_alone(self, x):
    x = self.stem(x)
    return self.head((x + self.conv(self.bn(x))).mean((2, 3)))


def own_bias(self, x):
    return torch.sigmoid(self.bn(self.stem(x) + self.bias))


def low_rank_beside(self, x):
    return torch.sigmoid(self.bn(self.stem(x) + self.excite(self.squeeze(self.other(self.stem2(x)))) * 4.0))


def difference(self, x):
    x = self.stem(x)
    return torch.sigmoid(self.bn(torch.sub(self.other(x), self.conv(x), alpha=2)))


def counted_average(self, x):
    return torch.sigmoid(self.bn(F.avg_pool2d(self.stem(x) - self.other(self.stem2(x)), 3, padding=1)))


def blurred(self, x):
    weight = self.filter.expand(6, 1, 3, 3)
    return torch.sigmoid(self.conv(self.bn(F.conv2d(self.stem(x), weight, padding=1, groups=6))))


def two_norms_on_one(self, x):
    x = self.stem(x)
    return torch.sigmoid(self.bn(x)) + torch.sigmoid(self.bn2(x))


def reflected(self, x):
    return self.unpadded(F.pad(self.bn(F.relu(self.stem(x))), (1, 1, 1, 1), mode="reflect"))


def replicated(self, x):
    return self.unpadded(F.pad(self.bn(F.relu(self.stem(x))), (1, 1, 1, 1), mode="replicate"))


def circular(self, x):
    return self.unpadded(F.pad(self.bn(F.relu(self.stem(x))), (1, 1, 1, 1), mode="circular"))


def circular_module(self, x):
    return self.around(self.bn(F.relu(self.stem(x))))


def into_a_transposed(self, x):
    x = self.stem(x)
    return self.transposed(self.bn(x)), self.head(x.mean((2, 3)))


def cropped(self, x):
    x = F.pad(self.stem(x), (-1, 0, -2, -1), value=3.0)
    return self.bn(x).sigmoid()


def cropped_after(self, x):
    x = self.stem(x).sigmoid()
    return self.unpadded(F.pad(self.bn(x), (0, -1, 0, 0)))


def cropped_channels(self, x):
    x = self.stem(x).sigmoid()
    x = F.pad(self.bn(x), (0, 0, 0, 0, -1, -3))
    return self.excite(x)


def cropped_and_padded(self, x):
    x = self.stem(x).sigmoid()
    return self.unpadded(F.pad(self.bn(x), (-1, 1, 0, 0)))


ANY_SIGN = {
    cropped: 1,
    cropped_after: 1,
    cropped_channels: 1,
    cropped_and_padded: 0,
    padded_reader_alone: 1,
    own_bias: 1,
    low_rank_beside: 1,
    difference: 1,
    counted_average: 0,
    blurred: 0,
    two_norms_on_one: 1,
    reflected: 1,
    replicated: 1,
    circular: 1,
    circular_module: 1,
    into_a_transposed: 1,
    padded_reader: 0,
}


def product_added(self, x):
    return torch.sigmoid(self.bn(torch.addcmul(self.bias, self.stem(x), self.weight, value=2)))


def quotient_added(self, x):
    return torch.sigmoid(self.bn(torch.addcdiv(self.bias, self.stem(x), self.weight)))


def product_added_in_place(self, x):
    y = self.stem(x)
    return torch.sigmoid(self.bn(y.addcmul_(self.other(self.stem2(x)), self.weight, value=-1)))


def interpolated(self, x):
    x = self.stem(x)
    return torch.sigmoid(self.bn(torch.lerp(self.conv(x), self.other(x), 0.3)))


def interpolated_by_a_gate(self, x):
    x = self.stem(x)
    gate = torch.sigmoid(self.stem3(x))
    return torch.sigmoid(self.bn(torch.lerp(self.conv(x), self.other(x), gate))), x


def constant_product_added(self, x):
    return torch.sigmoid(self.bn(torch.addcmul(self.stem(x), self.bias, self.weight)))


COMPOSITE = {
    product_added: 1,
    quotient_added: 1,
    product_added_in_place: 1,
    interpolated: 1,
    interpolated_by_a_gate: 1,
    constant_product_added: 0,
}


@pytest.mark.parametrize("forward", COMPOSITE, ids=lambda forward: forward.__name__)
def test_operations_that_consist_of_several_pass_what_these_pass(forward) -> None:
    more = {"stem3": nn.Conv2d(6, 6, 1)} if "stem3" in forward.__code__.co_names else {}
    model = build(forward, **extras(forward), **more)
    for name in ("bias", "weight"):
        if name in forward.__code__.co_names:
            setattr(model, name, nn.Parameter(torch.randn(6, 1, 1, dtype=torch.float64)))
    folded, plan = fold(model, image())
    assert len(plan.folds) == COMPOSITE[forward], plan.skips
    assert largest_difference(model, folded, image()) < EXACT
    assert all(skip.detail.startswith("addcmul lies between") for skip in plan.skips)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_where_a_factor_is_zero_that_channel_alone_lets_no_shift_pass(
    zero: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self, x):
        x = self.stem(x)
        return torch.sigmoid(self.bn(x)) + torch.sigmoid(self.other(x * self.p))

    model = build(forward)
    model.p = nn.Parameter(torch.ones(6, 1, 1, dtype=torch.float64) * 3)
    with torch.no_grad():
        model.p[2] = zero
    folded, plan = fold(model, image())
    assert [one.layer for one in plan.folds] == ["bn"]
    assert largest_difference(model, folded, image()) < EXACT

    def forward_without_a_reader(self, x):
        return torch.sigmoid(self.bn(self.stem(x) * self.p))

    model._forward = forward_without_a_reader
    folded, plan = fold(model, image())
    assert "mul and sigmoid do not let it pass in 1 of 6 channels" in plan.skips[0].detail

    def pass_anyway(self, given, read, factors, origin):
        some = factors != 0
        self.shifts.link(given[some], read[some], factor=factors[some], offset=0 * factors[some], origin=origin)

    monkeypatch.setattr(ChannelTransforms, "_scale_shifts", pass_anyway)
    folded, plan = fold(model, image())
    assert plan.folds
    assert largest_difference(model, folded, image()) > 1e-6


def extras(forward) -> dict[str, nn.Module]:
    names = forward.__code__.co_names
    return {"stem2": nn.Conv2d(4, 6, 3, padding=1)} if "stem2" in names else {}


@pytest.mark.parametrize("forward", ANY_SIGN, ids=lambda forward: forward.__name__)
def test_what_passes_scales_of_any_sign(forward) -> None:
    model = build(forward, **extras(forward))
    if "bias" in forward.__code__.co_names:
        model.bias = nn.Parameter(torch.randn(6, 1, 1, dtype=torch.float64))
    if "filter" in forward.__code__.co_names:
        model.register_buffer("filter", torch.rand(1, 1, 3, 3, dtype=torch.float64))
    folded, plan = fold(model, image())
    assert len(plan.folds) == ANY_SIGN[forward], plan.skips
    assert all(fold.into and (fold.scale_into or fold.shift_into) for fold in plan.folds)
    assert all(skip.detail for skip in plan.skips)
    assert largest_difference(model, folded, image()) < EXACT


# a product with a parameter


def times_implicit(self, x):
    return torch.sigmoid(self.bn(self.p * self.stem(x)))


def divided(self, x):
    return torch.sigmoid(self.bn(self.stem(x) / self.p))


def channels_last(self, x):
    return torch.sigmoid(self.bn((self.stem(x).permute(0, 2, 3, 1) * self.p.flatten()).permute(0, 3, 1, 2)))


def times_twice(self, x):
    return torch.sigmoid(self.bn(self.stem(x) * self.p)) + torch.sigmoid(self.bn2(self.stem2(x) * self.p))


def times_and_plus(self, x):
    return torch.sigmoid(self.bn(self.stem(x) * self.p + self.p))


def read_otherwise(self, x):
    return torch.sigmoid(self.bn(self.stem(x) * self.p)) * self.p.softmax(1)


def written_before(self, x):
    self.p.clamp_(min=-1.5)
    return torch.sigmoid(self.bn(self.stem(x) * self.p))


def written_by_data(self, x):
    y = self.stem(x) * self.p
    self.p.mul_(self.stem2(x).mean((0, 2, 3), keepdim=True) * 0 + 1)  # for the next call
    return torch.sigmoid(self.bn(y))


def multiplied(forward, shape=(1, 6, 1, 1)) -> nn.Module:
    model = build(forward, **extras(forward))
    p = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model.p = nn.Parameter(p.sign() * (p.abs() + 0.1))
    return model


@pytest.mark.parametrize(
    ("forward", "shape", "folds"),
    [
        (times_implicit, (1, 6, 1, 1), 1),
        (times_implicit, (6, 1, 1), 1),
        (times_implicit, (1,), 1),
        (times_implicit, (), 1),
        (divided, (1, 6, 1, 1), 1),
        (channels_last, (1, 6, 1, 1), 1),
        (times_twice, (6, 1, 1), 2),
        (times_implicit, (6, 7, 7), 0),
        (times_implicit, (3, 1, 1, 1), 0),
        (times_and_plus, (6, 1, 1), 0),
        (read_otherwise, (1, 6, 1, 1), 0),
        (written_before, (1, 6, 1, 1), 0),
        (written_by_data, (1, 6, 1, 1), 0),
    ],
)
def test_a_shift_passes_a_product_with_a_parameter_divided_by_it(forward, shape, folds: int) -> None:
    model = multiplied(forward, shape)
    if forward is written_by_data:
        model.p.requires_grad_(False)
    folded, plan = fold(model, image())
    assert len(plan.folds) == folds, plan.skips
    assert largest_difference(model, folded, image()) < EXACT
    if folds:
        bntool.fold(model, image())  # also layer by layer, modulo how outputs are stored
    assert not fold(model, image(), layout=Layout.SAME_KEYS)[1].folds


def test_the_factors_of_a_product_are_those_of_the_file_and_not_of_the_model_that_was_traced() -> None:
    model, other = multiplied(times_implicit), multiplied(times_implicit)
    other.p.data.mul_(-3).add_(0.01)
    plan = plan_fold(read_state(other), trace(model, image()))
    folded = copy.deepcopy(other)
    apply_plan(folded, plan)
    assert len(plan.folds) == 1
    assert largest_difference(other, folded, image()) < EXACT


def test_a_file_folds_over_a_product_with_a_parameter_and_is_loaded(tmp_path) -> None:
    model, path, output = multiplied(times_implicit).float(), tmp_path / "net.pt", tmp_path / "folded.pt"
    torch.save(model.state_dict(), path)
    result = bntool.fold_checkpoint(path, output, model=copy.deepcopy(model), input_shape=(3, 4, 7, 7))
    assert [(fold.layer, fold.into) for fold in result.plan.folds] == [("bn", ("stem",))]
    loaded = bntool.load_folded(multiplied(times_implicit).float(), output)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())
    assert torch.equal(loaded.p, model.p)
    assert largest_difference(model, loaded, image().float()) < 1e-5


@pytest.mark.parametrize("change", ["zero", "infinite", "tied", "computed", "not stored"])
def test_a_product_with_a_parameter_whose_factors_are_not_known_lets_no_shift_pass(change: str) -> None:
    model = multiplied(times_implicit)
    with torch.no_grad():
        if change == "zero":
            model.p[0, 2] = 0
        elif change == "infinite":
            model.stem.weight[2], model.stem.bias[2], model.p[0, 2] = 0, 1, torch.inf
        elif change == "tied":
            model.other = nn.Module()
            model.other.q = model.p
        elif change == "computed":
            parametrize.register_parametrization(model, "p", nn.Tanh())
        else:
            p = model.p.detach()
            del model.p
            model.register_buffer("p", p, persistent=False)
    folded, plan = fold(model, image())
    assert not plan.folds
    assert "mul and sigmoid do not let it pass" in plan.skips[0].detail
    if change != "infinite":
        assert largest_difference(model, folded, image()) < EXACT


# BatchNorms called on slices of their tensors


def call_slice(x, bn, first, end):
    part = slice(first, end)
    weight, bias = (None, None) if bn.weight is None else (bn.weight[part], bn.bias[part])
    return F.batch_norm(x, bn.running_mean[part], bn.running_var[part], weight, bias, False, 0.0, bn.eps)


def in_two_calls(self, x):
    x = self.stem(x)
    return torch.sigmoid(torch.cat([call_slice(x[:, :2], self.bn, 0, 2), call_slice(x[:, 2:], self.bn, 2, 6)], 1))


def of_two_convolutions(self, x):
    return torch.sigmoid(call_slice(self.stem(x)[:, 1:4], self.bn, 0, 3)), torch.sigmoid(
        call_slice(self.stem2(x)[:, :3], self.bn, 3, 6)
    )


def first_channels_alone(self, x):
    return torch.sigmoid(call_slice(self.stem(x)[:, :4], self.bn, 0, 4))


def last_channels_alone(self, x):
    return torch.sigmoid(self.squeezed(call_slice(self.stem(x)[:, :4], self.bn, 2, 6)))


def on_two_tensors(self, x):
    return torch.sigmoid(call_slice(self.stem(x)[:, :4], self.bn, 0, 4)), torch.sigmoid(
        call_slice(self.stem2(x)[:, :4], self.bn, 2, 6)
    )


def beside_a_whole_call(self, x):
    return torch.sigmoid(self.bn(self.stem(x))), torch.sigmoid(call_slice(self.stem2(x)[:, :4], self.bn, 0, 4))


def one_channel_twice(self, x):
    x = self.stem(x)
    return torch.sigmoid(call_slice(x[:, :3], self.bn, 0, 3)), torch.sigmoid(call_slice(x[:, 2:5], self.bn, 2, 5))


def of_other_places(self, x):
    x, bn = self.stem(x)[:, :3], self.bn
    return torch.sigmoid(F.batch_norm(x, bn.running_mean[:3], bn.running_var[3:], bn.weight[:3], bn.bias[:3]))


def every_second(self, x):
    x, bn = self.stem(x)[:, :3], self.bn
    return torch.sigmoid(F.batch_norm(x, bn.running_mean[::2], bn.running_var[::2], bn.weight[::2], bn.bias[::2]))


def of_two_norms(self, x):
    x, bn = self.stem(x)[:, :3], self.bn
    other = self.bn2
    return torch.sigmoid(F.batch_norm(x, bn.running_mean[:3], bn.running_var[:3], other.weight[:3], other.bias[:3]))


def with_a_norm_behind(self, x):
    return torch.sigmoid(self.bn2(call_slice(self.stem(x).relu()[:, :4], self.bn, 0, 4)))


SLICED = {
    in_two_calls: (1, range(6)),
    of_two_convolutions: (1, range(6)),
    first_channels_alone: (1, range(4)),
    last_channels_alone: (1, range(2, 6)),
    on_two_tensors: (1, range(6)),
    beside_a_whole_call: (1, range(6)),
    one_channel_twice: (0, ()),
    of_other_places: (0, ()),
    every_second: (0, ()),
    of_two_norms: (0, ()),
    with_a_norm_behind: (0, ()),
}


@pytest.mark.parametrize("layout", [Layout.FOLDED, Layout.SAME_KEYS])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("forward", SLICED, ids=lambda forward: forward.__name__)
def test_slices_of_a_batchnorm(forward, affine: bool, layout: Layout) -> None:
    own = {"bn": nn.BatchNorm2d(6, affine=affine)}
    if forward is with_a_norm_behind:
        own["bn2"] = nn.BatchNorm2d(4)
    if not affine and "weight" in forward.__code__.co_names:
        return
    model = build(forward, squeezed=nn.Conv2d(4, 5, 3), **own, **extras(forward))
    folded, plan = fold(model, image(), layout=layout)
    folds, used = SLICED[forward]
    assert [fold.layer for fold in plan.folds if fold.layer == "bn"] == ["bn"] * folds, plan.skips
    assert largest_difference(model, folded, image()) < EXACT
    unused = [channel for channel in range(6) if channel not in used]
    for name, tensor in model.bn.state_dict().items():
        after = folded.bn.state_dict()[name]
        if name != "num_batches_tracked":
            assert torch.equal(tensor[unused], after[unused])
            assert not folds or name == "bias" or not torch.equal(tensor[list(used)], after[list(used)])
    if folds:
        bntool.fold(model, image(), layout=layout)


class SlimBatchNorm(nn.BatchNorm2d):
    """As in slimmable networks: it normalises by as many of its channels as there are."""

    def forward(self, x):
        return call_slice(x, self, 0, x.shape[1])


def test_a_slim_batchnorm_folds_in_the_channels_that_ran_and_the_others_compute_the_same(tmp_path) -> None:
    def forward(self, x):
        return torch.sigmoid(self.bn(self.stem(x)[:, : self.width]))

    def build_slim(width: int) -> nn.Module:
        model = build(forward, bn=SlimBatchNorm(6)).float()
        model.width = width
        return model

    model, path = build_slim(4), tmp_path / "net.pt"
    torch.save(model.state_dict(), path)
    for layout in (Layout.FOLDED, Layout.SAME_KEYS):
        output = tmp_path / f"{layout.value}.pt"
        result = bntool.fold_checkpoint(path, output, model=build_slim(4), input_shape=(3, 4, 7, 7), layout=layout)
        assert [(fold.layer, fold.stays) for fold in result.plan.folds] == [("bn", True)]
        for width in (6, 4, 3):
            loaded = bntool.load_folded(build_slim(width), output)
            assert largest_difference(build_slim(width), loaded, image().float()) < 1e-5
    assert fold(build_slim(6).double(), image())[1].folds[0].stays is False  # all of it: a plain BatchNorm


# where every scale is positive


def residual(self, x):
    x = self.stem(x)
    x = x + self.conv(F.relu(self.bn(x)))
    x = x + self.other(F.relu(self.bn2(x)))
    return self.head(F.relu(self.bn3(x)).mean((2, 3)))


def residual_in_place(self, x):
    """What takes the place of a BatchNorm hands on its input, which the stream still needs."""
    x = self.stem(x)
    x = x + self.conv(F.relu_(self.bn(x)))
    return self.head(F.leaky_relu_(self.bn2(x)).mean((2, 3)))


def gated(self, x):
    x = self.stem(x)
    x = x + self.conv(F.relu(self.bn(x)))
    gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
    return self.head((F.relu(self.bn2(x)) * gate).mean((2, 3)))


def pooled(self, x):
    x = self.stem(x)
    return self.conv(F.max_pool2d(self.prelu(self.bn(x)), 3)).sum(), self.other(x)


def padded_stream(self, x):
    x = self.stem(x)
    return self.conv(F.relu(self.bn(x))).sum(), self.unpadded(F.pad(x, (1, 1, 0, 0)))


def border(self, x):
    return self.conv(self.bn(torch.sigmoid(self.stem(x))))


POSITIVE = {residual: 3, residual_in_place: 2, gated: 2, pooled: 1}


@pytest.mark.parametrize("forward", POSITIVE, ids=lambda forward: forward.__name__)
def test_what_passes_positive_scales(forward) -> None:
    model = make_positive(build(forward))
    folded, plan = fold(model, image())
    assert (len(plan.folds), plan.skips) == (POSITIVE[forward], ())
    assert {fold.level for fold in plan.folds} == {Level.TRANSFORM}
    assert largest_difference(model, folded, image()) < EXACT
    result = bntool.fold(model, image())  # also layer by layer, modulo how outputs are stored
    assert len(result.report.layers) == POSITIVE[forward]
    assert all(layer.exact < EXACT for layer in result.report.layers)


def test_a_skip_names_the_operation_and_counts_the_channels() -> None:
    model = make_positive(build(residual))
    with torch.no_grad():
        model.bn2.weight[:2] *= -1
    folded, plan = fold(model, image())
    assert [fold.layer for fold in plan.folds] == ["bn", "bn3"]
    (skip,) = plan.skips
    assert "negative scale in 2 of 6 channels: relu passes positive ones only" in skip.detail
    assert largest_difference(model, folded, image()) < EXACT


def test_each_fold_says_what_took_its_scale_and_its_shift() -> None:
    model = make_positive(build(residual))
    with torch.no_grad():
        for bn, scale in ((model.bn, 2.0), (model.bn2, 1.0), (model.bn3, 1.0)):  # near to each other
            bn.weight.copy_((bn.running_var + bn.eps).sqrt() * scale)
    _, plan = fold(model, image())
    first, second, _ = plan.folds
    assert (first.scale_into, first.shift_into) == (("conv",), ("stem",))
    assert second.shift_into == ("conv",)


@pytest.mark.parametrize(("factors", "expected"), [((900, 1, 1), (30, 1 / 30, 1 / 30)), ((5, 1, 1), (5, 1, 1))])
def test_scales_far_from_one_are_spread_over_both_sides(factors, expected) -> None:
    """The first unknown is so many times the two others, of which none is known."""
    scales = Scales(3)
    for other in (1, 2):
        ratio = np.array([factors[0] / factors[other]])
        scales.link(np.array([0]), np.array([other]), factor=ratio, offset=np.zeros(1), origin=0)
    scales.add_noted()
    assert scales.choose() == pytest.approx(expected)


def test_direct_folds_alone_change_no_other_weight() -> None:
    model = make_positive(build(residual))
    _, plan = fold(model, image(), direct_only=True)
    assert {fold.level for fold in plan.folds} <= {Level.DIRECT}
    assert len(plan.folds) < 3

    def both(self, x):
        x = self.stem(x)
        return torch.sigmoid(self.bn(self.other(x) + self.conv(x)))

    model = build(both)
    assert len(fold(model, image())[1].folds) == 1
    _, plan = fold(model, image(), direct_only=True)
    (skip,) = plan.skips
    assert skip.detail == "other and conv could take it, and only direct folds are asked for"
    assert not plan.steps
    with pytest.raises(UsageError, match="another padding changes other layers"):
        bntool.fold(model, image(), direct_only=True, change_padding=True)


def test_a_scale_of_zero_is_refused() -> None:
    model = make_positive(build(residual))
    model.bn.weight.data[3] = 0
    folded, plan = fold(model, image())
    assert "its scale is zero in 1 of 6 channels" in plan.skips[0].detail
    assert largest_difference(model, folded, image()) < EXACT


def test_shifts_beyond_the_spread_do_not_have_all_solved_again_without_each(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []
    real = StoringOtherwise._solve
    monkeypatch.setattr(StoringOtherwise, "_solve", lambda self, *rest: (solved.append(rest), real(self, *rest))[1])
    model = make_positive(build(residual)).float()
    with torch.no_grad():
        for norm in (model.bn, model.bn2, model.bn3):
            norm.weight[1], norm.bias[1] = 1e-6, 1.0
    folded, plan = fold(model, image().float())
    assert all("times the spread of what it reads, in 1 of 6 channels" in skip.detail for skip in plan.skips)
    assert len(plan.skips) == 3
    assert len(solved) == 1
    assert largest_difference(model, folded, image().float()) < 1e-5


def mixed_three_times(self, x):
    x = self.stem(x)
    for norm, conv, mix in zip((self.bn, self.bn2, self.bn3), self.convs, self.mixes, strict=True):
        x = norm(conv(x) + x)
        x = x + mix(x)
    return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("tiny", [("bn",), ("bn2",), ("bn", "bn3"), ("bn", "bn2", "bn3")])
def test_folds_that_are_given_up_are_taken_back_and_the_others_stay(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(3))
    mixes = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 9, 1), nn.GELU(), nn.Conv2d(9, 6, 1)) for _ in range(3))
    model = build(mixed_three_times, convs=convs, mixes=mixes).float()
    with torch.no_grad():
        for name in tiny:
            getattr(model, name).weight[1], getattr(model, name).bias[1] = 1e-6, 1.0
    others = tuple(name for name in ("bn", "bn2", "bn3") if name not in tiny)
    built = []
    real = ChannelTransforms.__post_init__
    monkeypatch.setattr(ChannelTransforms, "__post_init__", lambda self: (built.append(self), real(self))[1])
    folded, plan = fold(model, image().float())
    assert len(built) == 1
    assert {skip.layer for skip in plan.skips} == set(tiny)
    assert tuple(one.layer for one in plan.folds) == others
    assert largest_difference(model.double(), folded.double(), image()) < 1e-5
    monkeypatch.setattr(_Removal, "without", lambda *_: None)  # all is solved anew without each
    _, anew = fold(model.float(), image().float())
    assert len(built) > 2
    assert (anew.folds, anew.skips, anew.steps) == (plan.folds, plan.skips, plan.steps)


@pytest.mark.parametrize(("dtype", "folds"), [(torch.float64, 3), (torch.float32, 2)])
def test_a_shift_far_beyond_the_spread_is_refused_where_rounding_would_show(dtype: torch.dtype, folds: int) -> None:
    model = make_positive(build(residual)).to(dtype)
    with torch.no_grad():
        model.bn2.weight[1], model.bn2.bias[1] = 1e-5, 1.0
    folded, plan = fold(model, image().to(dtype))
    assert len(plan.folds) == folds
    if dtype is torch.float32:
        assert "times the spread" in plan.skips[0].detail
    assert largest_difference(model.double(), folded.double(), image()) < 1e-5


def test_same_keys_leaves_what_no_single_neighbour_takes() -> None:
    _, plan = fold(make_positive(build(residual)), image(), layout=Layout.SAME_KEYS)
    assert not plan.folds


def test_an_input_that_is_written_to_later_is_copied() -> None:
    def forward(self, x):
        x = torch.sigmoid(self.stem(x))
        y = self.bn(x)
        return F.relu_(x).sum() + self.unpadded(y)

    model = build(forward)
    folded, plan = fold(model, image())
    assert [step.module for step in plan.steps if getattr(step, "copies", False)] == ["bn"]
    assert largest_difference(model, folded, image()) < EXACT


def test_loading_a_file_whose_activations_write_in_place(tmp_path) -> None:
    model = make_positive(build(residual_in_place))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    result = bntool.fold(model, image())
    assert [step.module for step in result.plan.steps if getattr(step, "copies", False)] == ["bn"]
    assert largest_difference(model, result.model, image()) < EXACT


# branches beside a convolution


def repvgg(self, x):
    x = F.relu(self.stem(x))
    return F.relu(self.bn2(self.conv(x)) + self.bn3(self.other(x)) + self.bn(x))


def turned(self, x):
    x = F.relu(self.stem(x))
    return F.relu(self.bn(x) - self.bn2(self.conv(x)))


def deeper(self, x):
    x = F.relu(self.stem(x))
    return F.relu(x + 0.5 * x + (self.bn(x) + (self.other(x) + self.bn2(self.conv(x)))))


def strided_beside(self, x):
    x = F.relu(self.stem(x))
    return F.relu(self.strided(x)) + F.relu(self.bn(x))[:, :, ::2, ::2]


def sum_of_a_sibling_that_others_read(self, x):
    x = F.relu(self.stem(x))
    y = self.conv(x)
    return F.relu(self.bn(x) + y), y


BRANCHES = {repvgg: 3, turned: 2, deeper: 2, strided_beside: 0, sum_of_a_sibling_that_others_read: 0}


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("forward", BRANCHES, ids=lambda forward: forward.__name__)
def test_identity_branches(forward, groups: int) -> None:
    model = build(forward, conv=nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=groups, bias=False))
    folded, plan = fold(model, image())
    assert len(plan.folds) == BRANCHES[forward]
    assert largest_difference(model, folded, image()) < EXACT
    for fold_ in plan.folds:
        if fold_.layer == "bn":
            assert (fold_.level, fold_.into) == (Level.BRANCH, ("conv" if forward is not deeper else fold_.into[0],))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_merged_kernel_is_rounded_once(dtype: torch.dtype) -> None:
    model = build(repvgg).to(dtype)
    folded, _ = fold(model, image().to(dtype))
    exact, _ = fold(model.double(), image())
    for name, tensor in folded.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].to(dtype))


def test_a_branch_beside_a_convolution_that_is_used_twice() -> None:
    def forward(self, x):
        x = F.relu(self.stem(x))
        return F.relu(self.conv(x) + self.bn(x)) + self.conv(x * x)

    _, plan = fold(build(forward), image())
    assert reasons(plan) == {"bn": "PARALLEL_BRANCH"}


def called_on_the_input(self, x):
    return torch.sigmoid(self.wide(self.bn(torch.sigmoid(self.stem(x))))), torch.sigmoid(self.wide(x[:, [0, 1] * 3]))


def called_on_repeated_channels(self, x):
    y = torch.sigmoid(self.stem(x))
    return torch.sigmoid(self.wide(self.bn(y))), torch.sigmoid(self.wide(y.flip(1).sigmoid()))


def called_on_the_input_first(self, x):
    first = self.wide(x.repeat(1, 2, 1, 1)[:, :6])
    return torch.sigmoid(self.wide(self.bn(torch.sigmoid(self.stem(x))))), torch.sigmoid(first)


def called_after_a_look_at_values(self, x):
    y = torch.sigmoid(self.wide(self.bn(torch.sigmoid(self.stem(x)))))
    return y, torch.sigmoid(self.wide(x[:, [0, 1] * 3])) if y.mean() > 0 else y


CALLED = (called_on_the_input, called_on_repeated_channels, called_on_the_input_first, called_after_a_look_at_values)


@pytest.mark.parametrize("forward", CALLED, ids=lambda forward: forward.__name__)
def test_a_weight_that_is_called_on_what_stays_as_it_is_takes_nothing(forward) -> None:
    model = build(forward, wide=nn.Conv2d(6, 5, 1))
    folded, plan = fold(model, image())
    assert not plan.folds
    assert largest_difference(model, folded, image()) < EXACT


# a rule that lets too much pass is noticed


def _loosen(kind: NodeKind, **fields: object):
    return {**operations.RULES, kind: dataclasses.replace(operations.RULES[kind], **fields)}


def max_pooled(self, x):
    return torch.sigmoid(self.bn(F.max_pool2d(self.stem(x), 3)))


def activated(self, x):
    x = self.stem(x)
    return torch.sigmoid(self.bn(F.relu(x))), torch.sigmoid(self.bn2(x))


def gated_alone(self, x):
    x = self.stem(x)
    return torch.sigmoid(self.bn(x * torch.sigmoid(self.other(x))))


def constant_added(self, x):
    return torch.sigmoid(self.bn(self.stem(x) + 1))


MUTANTS = {
    "a sign check dropped": (_loosen(NodeKind.ACTIVATION, positive=False), residual, False),
    "the sign check of a pool dropped": (_loosen(NodeKind.MAX_POOL, positive=False), max_pooled, False),
    "an activation that passes shifts": (_loosen(NodeKind.ACTIVATION, shift=operations.Shift.SAME), activated, True),
    "a padding that passes shifts": (_loosen(NodeKind.CHANNELWISE, shift=operations.Shift.SAME), padded_stream, True),
    "a gate that passes shifts": (_loosen(NodeKind.GATE, shift=operations.Shift.SAME), gated_alone, True),
    "a sum that passes shifts as they are": (_loosen(NodeKind.ADD, shift=operations.Shift.SAME), difference, True),
    "a constant that passes scales": (_loosen(NodeKind.CONSTANT_SUM, unscaled=False), constant_added, True),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_loosened_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules, forward, positive = MUTANTS[name]
    model = make_positive(build(forward)) if positive else build(forward)
    folded, _ = fold(model, image())
    assert largest_difference(model, folded, image()) < EXACT
    monkeypatch.setattr(operations, "RULES", rules)
    folded, _ = fold(model, image())
    assert largest_difference(model, folded, image()) > 1e-6


def test_a_border_that_is_overlooked_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(border)
    assert reasons(fold(model, image())[1]) == {"bn": "PADDED_CONSUMER"}
    before = channel_transforms.ChannelTransforms._add_absorber

    def overlook(self, node):
        before(self, dataclasses.replace(node, padded=False))

    monkeypatch.setattr(channel_transforms.ChannelTransforms, "_add_absorber", overlook)
    folded, _ = fold(model, image())
    assert largest_difference(model, folded, image()) > 1e-6


def read_elsewhere(self, x):
    x = self.stem(x)
    return torch.sigmoid(x), torch.sigmoid(self.bn(F.max_pool2d(x, 3, stride=1)))


def gated_by_a_norm(self, x):
    x = torch.sigmoid(self.stem(x))
    y = self.bn(x)
    return torch.sigmoid(self.conv(x) * y), torch.sigmoid(self.other(y))


def sum_of_what_others_read(self, x):
    x = torch.sigmoid(self.stem(x))
    y, z = self.other(x), self.conv(x)
    return torch.sigmoid(self.bn(y - z)), torch.sigmoid(self.bn2(y)), torch.sigmoid(self.bn3(z))


def without_a_place_for_a_bias(self, x):
    x = F.conv2d(x, self.kernel)
    return torch.sigmoid(self.bn(x)), torch.sigmoid(self.bn2(x))


def weight_read_elsewhere(self, x):
    return torch.sigmoid(self.bn(self.other(self.stem(x)))) + self.other.weight.sum()


def called_on_two_tensors(self, x):
    x = self.stem(x)
    return torch.sigmoid(self.bn(self.other(x)) + self.bn2(self.other(x))), torch.sigmoid(self.other(self.bn3(x)))


def ignore(*_: object, **__: object) -> None:
    """In place of an equation."""


def always(*_: object) -> bool:
    return True


def absorb_anyway(self, node):
    if node.kind is NodeKind.BATCH_NORM or node.kind is NodeKind.BIAS:
        return REAL_READ(self, node)
    return self.producers.get(node.parameters.get("weight", "")) or read_producer(node, self.state_dict)


def halves_meet_swapped(self, x):
    x = self.stem(x)
    first, second = x.chunk(2, 1)
    return self.head((torch.cat([second, first], 1) + self.conv(self.bn(x))).mean((2, 3)))


def pin_all_but_gates(self, node, port):
    if node.kind is not NodeKind.GATE:
        REAL_PIN(self, node, port)


REAL_READ, REAL_PIN = Targets.read, ChannelTransforms._pin
GUARDS = {
    "scales of one": (Scales, "fix", ignore, constant_added),
    "shifts of zero": (Shifts, "fix", ignore, border),
    "equal scales where channels meet in another order": (Scales, "equate", ignore, halves_meet_swapped),
    "positive scales": (Scales, "require_positive", ignore, max_pooled),
    "sums of shifts": (Shifts, "add_sums", ignore, sum_of_what_others_read),
    "sums that a layer holds": (Shifts, "hold_sums", ignore, padded_reader_alone),
    "a layer that is read by the sum alone": (ChannelTransforms, "_is_made_for", always, padded_reader_alone),
    "what is needed as it is": (ChannelTransforms, "_pin", ignore, read_elsewhere),
    "the other side of a gate": (ChannelTransforms, "_pin", pin_all_but_gates, gated_by_a_norm),
    "a place for a bias": (Targets, "takes_shift", always, without_a_place_for_a_bias),
    "a weight that nothing else uses": (Targets, "read", absorb_anyway, weight_read_elsewhere),
    "calls of one weight": (ChannelTransforms, "_equate", ignore, called_on_two_tensors),
}


@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_that_is_dropped_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, guard, mutant, forward = GUARDS[name]
    more = {}
    if "kernel" in forward.__code__.co_names:
        more["kernel"] = nn.Parameter(torch.ones(6, 4, 3, 3))
    model = make_positive(build(forward, **more)) if name != "positive scales" else build(forward, **more)
    folded, _ = fold(model, image())
    assert largest_difference(model, folded, image()) < EXACT
    monkeypatch.setattr(owner, guard, mutant)
    monkeypatch.setattr(storing_otherwise, "_SURE", math.inf)  # it would notice some of them at the end
    try:
        folded, _ = fold(model, image())
    except AssertionError:
        return
    assert largest_difference(model, folded, image()) > 1e-6


def test_scales_that_differ_where_two_streams_meet_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(padded_reader_alone)
    folded, plan = fold(model, image())
    assert len(plan.folds) == 1
    assert largest_difference(model, folded, image()) < EXACT
    real = ChannelTransforms._hands_on
    monkeypatch.setattr(
        ChannelTransforms, "_hands_on", lambda self, node, shifts: real(self, node, shifts=shifts)[: 1 + shifts]
    )
    monkeypatch.setattr(Scales, "equate", lambda self, left, right, origin: None)
    folded, _ = fold(model, image())
    assert largest_difference(model, folded, image()) > 1e-6


TRANSPOSED = {  # kernel, stride, padding, output padding, dilation, groups: whether a shift becomes a shift
    (1, 1, 0, 0, 1, 1): True,
    (1, 1, 1, 0, 1, 2): True,
    (1, 1, 1, 1, 2, 1): True,
    (3, 1, 2, 0, 1, 2): True,
    (2, 1, 3, 0, 3, 1): True,
    (1, 1, 0, 1, 2, 1): False,
    (3, 1, 1, 0, 1, 1): False,
    (3, 1, 4, 1, 2, 1): False,
    (1, 2, 0, 0, 1, 1): False,
    (2, 2, 0, 0, 1, 1): False,
    (2, 2, 0, 1, 1, 2): False,
    (3, 3, 0, 0, 1, 1): False,
    (3, 2, 4, 0, 1, 1): False,
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_shift_passes_a_transposed_convolution_where_all_taps_meet_all_positions(case: tuple[int, ...]) -> None:
    kernel, stride, padding, more, dilation, groups = case
    layer = nn.ConvTranspose2d(6, 4, kernel, stride, padding, more, groups, dilation=dilation)

    def forward(self, x):
        return self.up(self.bn(self.stem(x).sigmoid()))

    model, x = build(forward, up=layer), image()
    with torch.no_grad():  # by torch itself: what a constant becomes
        ones = F.conv_transpose2d(
            torch.ones(1, 6, 7, 7, dtype=x.dtype), model.up.weight, None, stride, padding, more, groups, dilation
        )
    is_constant = bool((ones - ones[..., :1, :1]).abs().max() < EXACT)
    assert is_constant is TRANSPOSED[case]
    folded, plan = fold(model, x)
    assert largest_difference(model, folded, x) < EXACT
    assert len(plan.folds) == is_constant
    if not is_constant:
        assert (
            "transposed convolution (up), not all of whose taps meet every position, does not" in plan.skips[0].detail
        )
