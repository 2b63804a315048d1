"""Models that keep something of their first call, take other arguments, slice or compute their statistics."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

import bntool
from bntool import freeze, recalibrate
from bntool.errors import RefusedError, UsageError, UserCodeError
from bntool.recalibration.live import plan_recalibration

METHODS = pytest.mark.parametrize("method", ["pooled", "exact", "paper"])


def assert_stores(layer, values, channels=slice(None)):
    """A layer holds mean and unbiased variance of values, (N, C, ...)."""
    flat = values.detach().double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.running_mean[channels].double(), flat.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.running_var[channels].double(), flat.var(1), atol=1e-5, rtol=1e-5)


class HooksItself(nn.Module):
    """As transformers' Segformer: the first call registers hooks, and a flag says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fuse = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.kept = []

    def features(self, x):
        a = self.a(x)
        return self.fuse(torch.cat([a, self.b(a)], 1))

    def forward(self, x):
        if not getattr(self, "_hooked", False):
            for module in (self.a, self.b):
                module.register_forward_hook(lambda _m, _a, out: self.kept.append(out))
            self._hooked = True
        self.kept.clear()
        self.b(self.a(x))
        return self.norm(self.fuse(torch.cat(self.kept[:2], 1)))


@METHODS
@pytest.mark.parametrize("called", [False, True])
def test_a_model_that_registers_hooks_at_its_first_call(method, called):
    model, x = HooksItself().eval(), torch.randn(32, 3, 5, 5) * 2 + 1
    if called:
        model(x)
    reference = HooksItself()
    hooks = len(model.a._forward_hooks)
    recalibrate(model, list(x.split(8)), method=method)
    if method == "paper":
        parts = [reference.features(part) for part in x.split(8)]
        mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
        torch.testing.assert_close(model.norm.running_mean, mean)
    else:
        assert_stores(model.norm, reference.features(x))
    assert len(model.a._forward_hooks) == hooks
    assert getattr(model, "_hooked", False) is called


class Domains(nn.Module):
    """One convolution, two BatchNorms, of which an argument or an attribute chooses one."""

    def __init__(self):
        super().__init__()
        self.conv, self.clean, self.adversarial = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x, clean=True, scale=1.0):
        return (self.clean if clean else self.adversarial)(self.conv(x) * scale)


@METHODS
@pytest.mark.parametrize("key", ["x", "image"])  # the name that forward gives it, and another
def test_arguments_without_tensors_reach_the_forward(method, key):
    model, x = Domains(), torch.randn(32, 3, 9, 9) * 3 + 1
    batches = [{key: part, "clean": False, "scale": 2.0, "path": ["a.png"] * len(part)} for part in x.split(8)]
    recalibrate(model, batches, method=method)
    assert (model.clean.num_batches_tracked, model.adversarial.num_batches_tracked) == (0, 4)
    if method != "paper":
        assert_stores(model.adversarial, model.conv(x) * 2)


class HandsOn(nn.Module):
    """As wrappers do that know nothing of the model inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("key", ["x", "image"])
def test_arguments_without_tensors_reach_the_model_in_a_wrapper(key):
    model, x = Domains(), torch.randn(32, 3, 9, 9) * 3 + 1
    wrapped = nn.DataParallel(HandsOn(HandsOn(model)))
    recalibrate(wrapped, [{key: part, "clean": False, "path": ["a.png"] * len(part)} for part in x.split(8)])
    assert (model.clean.num_batches_tracked, model.adversarial.num_batches_tracked) == (0, 4)
    assert_stores(model.adversarial, model.conv(x))


def test_an_argument_by_position_only_is_not_lost():
    class ByPosition(Domains):
        def forward(self, image, /, clean=True):
            return super().forward(image, clean=clean)

    with pytest.raises(UsageError, match="takes image by position only"):
        recalibrate(ByPosition(), [{"image": torch.randn(8, 3, 9, 9), "clean": False}])
    model, x = ByPosition(), torch.randn(8, 3, 9, 9)
    recalibrate(model, [{"image": x, "path": ["a.png"] * 8}])
    assert_stores(model.clean, model.conv(x))


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False)
        self.embedding, self.last = nn.Embedding(5, 8), nn.BatchNorm1d(8)

    def forward(self, z, y):
        return self.last(self.norm(self.linear(z)) * self.embedding(y))


class GeneratorWithDefault(Generator):
    def forward(self, z, y=None):
        return super().forward(z, torch.zeros(len(z), dtype=torch.long) if y is None else y)


class NeedsLabels(Generator):
    def forward(self, z, labels):
        return super().forward(z, labels)


class Keywords(Generator):
    def forward(self, **inputs):
        return super().forward(inputs["z"], inputs["classes"])


@pytest.mark.parametrize(
    ("kind", "name"), [(Generator, "y"), (GeneratorWithDefault, "y"), (NeedsLabels, "labels"), (Keywords, "classes")]
)
def test_a_label_that_the_forward_needs_reaches_it(kind, name):
    model, z, y = kind(), torch.randn(240, 6), torch.randint(5, (240,))
    reference = copy.deepcopy(model).train()
    recalibrate(model, [{"z": a, name: b} for a, b in zip(z.split(40), y.split(40), strict=True)], method="exact")
    assert_stores(model.norm, reference.linear(z))
    normalised = functional.batch_norm(reference.linear(z), model.norm.running_mean, model.norm.running_var)
    assert_stores(model.last, normalised * reference.embedding(y))


class TakesBatch(Domains):
    """The one argument is the batch itself."""

    def forward(self, batch):
        return super().forward(batch["image"], clean=bool(batch["mask"].any()))


class TakesAnything(Domains):
    def forward(self, *inputs, **options):
        assert not options
        return super().forward(*inputs)


class TakesKeywords(Domains):
    def forward(self, **options):
        return super().forward(options["image"])


class TakesKeyword(Domains):
    def forward(self, *, image):
        return super().forward(image)


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        (TakesBatch, {"mask": torch.ones(16, 1), "label": torch.ones(16)}),
        (TakesAnything, {"path": ["a.png"] * 16}),
        (TakesKeywords, {}),
        (TakesKeywords, {"path": ["a.png"] * 16}),
        (TakesKeyword, {"path": ["a.png"] * 16}),
        (nn.Sequential, {"path": ["a.png"] * 16, "label": torch.ones(16)}),
    ],
)
def test_forwards_of_any_signature_take_a_dict(kind, others):
    x = torch.randn(16, 3, 9, 9) + 2
    model = kind(Domains()) if kind is nn.Sequential else kind()
    recalibrate(model, [{"image": x, **others}])
    inner = model[0] if kind is nn.Sequential else model
    assert_stores(inner.clean, inner.conv(x))


class Sliced(nn.BatchNorm2d):
    """As in slimmable and once-for-all networks: a narrower network uses the first channels."""

    def forward(self, x):
        c = x.shape[1]
        mean, variance = self.running_mean[:c], self.running_var[:c]
        return functional.batch_norm(x, mean, variance, self.weight[:c], self.bias[:c], self.training, 0.1, self.eps)


class OneForAll(nn.BatchNorm2d):
    """One mean and variance for all channels."""

    def forward(self, x):
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        return functional.batch_norm(x, *(tensor.expand(x.shape[1]) for tensor in own), False, 0.1, self.eps)


def test_one_statistic_for_all_channels_is_not_called_a_part_of_the_model():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), OneForAll(1))
    with pytest.raises(RefusedError, match="normalises 5 channels by one mean and variance for all of them"):
        recalibrate(model, [torch.randn(8, 3, 9, 9)])


@METHODS
def test_sliced_statistics_are_refused_and_whole_ones_are_not(method):
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3), Sliced(8)), torch.randn(64, 3, 9, 9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RefusedError, match="normalises 5 channels and keeps statistics of 8"):
        recalibrate(model, list(x.split(16)), method=method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    whole = nn.Sequential(nn.Conv2d(3, 8, 3), Sliced(8))
    recalibrate(whole, [x], method=method)
    assert_stores(whole[1], whole[0](x))


class Abn(nn.Module):
    """A class of one's own around torch's function, whose name says nothing."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        y = functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return functional.leaky_relu(y, 0.01)


class Normaliser(nn.Module):
    """Arithmetic of its own, without weight and bias."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        mean, variance = self.running_mean.view(1, -1, 1, 1), self.running_var.view(1, -1, 1, 1)
        return (x - mean) / (variance + 1e-5).sqrt()


@METHODS
@pytest.mark.parametrize("kind", [Abn, Normaliser])
def test_classes_of_ones_own(method, kind):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8)), torch.randn(64, 3, 9, 9) * 2 + 1
    recalibrate(model, [x], method=method)
    assert_stores(model[1], model[0](x))


def test_classes_of_ones_own_are_frozen():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Abn(8))
    assert freeze(model).layers == ("1",)
    before = model[1].running_mean.clone()
    model.train()(torch.randn(4, 3, 9, 9) + 3)
    assert torch.equal(model[1].running_mean, before)


class FusedInEval(nn.Module):
    """As mmcv's ConvModule: in eval mode the BatchNorm is folded on the fly, and does not run."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        if self.norm.training:
            return self.norm(self.conv(x)).relu()
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)
        return functional.conv2d(x, weight, self.norm.bias - self.norm.running_mean * scale).relu()


class FusedWithOthers(FusedInEval):
    """Beside a layer that runs in both modes."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.first = nn.BatchNorm2d(inputs)

    def forward(self, x):
        return super().forward(self.first(x))


@pytest.mark.parametrize("kind", [FusedInEval, FusedWithOthers])
def test_layers_that_run_in_train_mode_only(kind):
    model, x = nn.Sequential(kind(3, 8), kind(8, 4)), torch.randn(64, 3, 11, 11) * 2 + 1
    reference = copy.deepcopy(model).train()
    recalibrate(model, [x])
    reference(x)
    for norm, other in zip(model.modules(), reference.modules(), strict=True):
        if isinstance(norm, nn.BatchNorm2d):
            torch.testing.assert_close(norm.running_mean, other.running_mean * 10)
            torch.testing.assert_close(norm.running_var, (other.running_var - 0.9) * 10, atol=1e-4, rtol=1e-4)
            assert norm.training
    with pytest.raises(RefusedError, match="not recognised") if kind is FusedInEval else contextlib.nullcontext():
        result = recalibrate(model, [x], method="exact")
        assert {skip.reason.name for skip in result.plan.skips} == {"NOT_RECOGNISED"}
        assert all("reads its statistics" in skip.detail for skip in result.plan.skips)


class ByName(nn.Module):
    """Everything lives in one attribute, as in ultralytics' models."""

    def __init__(self):
        super().__init__()
        first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.model = nn.Sequential(
            nn.Sequential(first, nn.BatchNorm2d(4)), nn.ReLU(), nn.Sequential(second, nn.BatchNorm2d(4))
        )

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_live_layers_are_called_as_named_modules_calls_them(wrap):
    model, x = wrap(ByName().eval()), torch.randn(8, 3, 9, 9)
    assert [fold.layer for fold in bntool.fold(model, x, layers=["model.0.*"]).plan.folds] == ["model.0.1"]
    assert recalibrate(model, [x], layers=["model.2.*"]).plan.layers == ("model.2.1",)
    assert freeze(model, layers="model.2.*").layers == ("model.2.1",)
    assert [layer.name for layer in bntool.inspect(model).state_dicts[0].layers] == ["model.0.1", "model.2.1"]
    assert {layer.name for layer in bntool.diff(model, ByName()).layers} == {"model.0.1", "model.2.1"}


@pytest.mark.parametrize(
    ("glob", "meant"),
    [("model.0", "model.0.*"), ("0.*", "*.0.*"), ("model.0.bn", "model.0.1"), ("xyz", None), ("2.1", "*.2.1")],
)
def test_a_glob_that_selects_nothing(glob, meant):
    model, x = ByName(), torch.randn(8, 3, 9, 9)
    calls = [
        lambda: bntool.fold(model, x, layers=["model.2.*", glob]),
        lambda: recalibrate(model, [x], layers=["model.2.*", glob]),
        lambda: freeze(model, layers=["model.2.*", glob]),
    ]
    for call in calls:
        with pytest.raises(UsageError) as error:
            call()
        assert f"'{glob}' selects none of the 2 BatchNorm layers" in str(error.value)
        assert "there are: model.0.1, model.2.1" in str(error.value)
        assert (f"'{meant}' would select" in str(error.value)) is (meant is not None), str(error.value)


def test_prior_does_not_change_what_is_said_of_the_data():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    x = torch.randn(256, 3, 9, 9) * 2 + 1
    recalibrate(model, [x])
    weaker = list((x * 0.7).split(64))
    alone, blended = (plan_recalibration(model, weaker, prior=prior) for prior in (0.0, 20000.0))
    assert alone.drifts == blended.drifts
    assert blended.drifts[0].has_parted
    assert blended.drifts[0].variance_ratio == pytest.approx(0.49, rel=0.02)
    share = 20000 / (20000 + 256)
    expected = share * model[1].running_var.double().numpy() + (1 - share) * alone.statistics["1"].variance
    np.testing.assert_allclose(blended.statistics["1"].variance, expected, rtol=1e-12)


@pytest.mark.parametrize("value", [1e-79, 1e-40, 1e-12])
@METHODS
def test_channels_that_are_dead(method, value):
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)).double()
    with torch.no_grad():
        model[0].weight[2] = value**0.5
    model[1].float()
    model[1].running_mean.zero_()

    class Mixed(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).float())

    mixed, x = Mixed(*model), torch.randn(64, 3, 5, 5, dtype=torch.float64)
    result = recalibrate(mixed, [x], method=method)
    assert result.statistics["1"].variance[2] < 4 * value
    assert mixed[1].running_var[2] <= 4 * value


class Positive(nn.Module):
    def forward(self, variance):
        return variance.abs() + 0.1


def test_statistics_that_are_computed_are_not_called_absent():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[1], "running_var", Positive())
    skips = plan_recalibration(model, [torch.randn(8, 3, 5, 5)], method="pooled").plan.skips
    assert [(skip.layer, skip.reason.value) for skip in skips] == [("1", "computed weight")]
    before = model[1].running_mean.clone()
    assert freeze(model).layers == ("1", "2")
    model.train()(torch.randn(8, 3, 5, 5))
    assert torch.equal(model[1].running_mean, before)


@METHODS
def test_a_layer_that_runs_under_vmap_is_refused(method):
    class Mapped(nn.Sequential):
        def forward(self, x):
            return torch.vmap(super().forward)(x.unsqueeze(1))

    with pytest.raises(RefusedError, match="runs inside of torch"):
        recalibrate(Mapped(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), [torch.randn(8, 3, 5, 5)], method=method)


def test_a_whole_model_in_eval_mode_in_a_wrapper_is_not_frozen():
    model, x = HandsOn(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()), torch.randn(8, 3, 5, 5)
    assert model.training
    recalibrate(model, [x])
    assert_stores(model.inner[1], model.inner[0](x))
    assert model.training
    assert not model.inner[1].training


def test_a_second_argument_that_was_taken_for_the_label_is_said():
    z, y = torch.randn(8, 6), torch.randint(5, (8,))
    for batch, said in (
        ((z, y), r"b is the label, which no model gets: \(\(a, b\),\)"),
        ({"z": z, "y": y}, "by position"),
    ):
        kind = TakesAll if isinstance(batch, dict) else NeedsLabels
        with pytest.raises(UserCodeError, match=said):
            recalibrate(kind(), [batch])
    recalibrate(TakesAll(), [((z, y),)])


class TakesAll(Generator):
    def forward(self, *inputs):
        return super().forward(*inputs)


def test_statistics_under_other_names_are_named():
    class OtherNames(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("moving_mean", torch.zeros(3))
            self.register_buffer("moving_var", torch.ones(3))

        def forward(self, x):
            return functional.batch_norm(x, self.moving_mean, self.moving_var, training=self.training)

    with pytest.raises(RefusedError, match=r"0: not recognised \(OtherNames has moving_mean and moving_var"):
        recalibrate(nn.Sequential(OtherNames()), [torch.randn(4, 3, 5, 5)])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
def test_programs_are_refused_and_parts_that_are_one_are_named():
    block, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval(), torch.randn(8, 3, 5, 5)
    program = torch.jit.script(block)
    with pytest.raises(RefusedError, match="is a TorchScript program, whose layers cannot be watched"):
        recalibrate(program, [x])
    with pytest.raises(RefusedError, match="is an exported program, whose layers cannot be watched"):
        recalibrate(torch.export.export(block, (x,)).module(), [x])
    model = nn.Sequential(program, nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    result = recalibrate(model, [x])
    assert_stores(model[2], model[1](program(x)))
    assert [(skip.layer, skip.detail) for skip in result.plan.skips] == [("0.1", "it is part of a TorchScript program")]
    with pytest.raises(RefusedError, match="0: this part of the model is a TorchScript program"):
        bntool.fold(model, x)


class MergesInEval(nn.Module):
    """As deploy forms that merge the BatchNorm into a weight of their own when the mode changes, and keep that."""

    def __init__(self, merge):
        super().__init__()
        self.conv, self.bn, self.weight, self.merge = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), None, merge

    def train(self, mode=True):
        super().train(mode)
        self.weight = self.merged() if self.merge and not mode else None
        return self

    def merged(self):
        scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
        return (self.conv.weight * scale[:, None, None, None]).detach()

    def forward(self, x):
        return self.bn(self.conv(x)) if self.weight is None else functional.conv2d(x, self.weight)


class Auxiliary(nn.Module):
    """A head that runs in train mode alone, beside a BatchNorm that never runs."""

    def __init__(self):
        super().__init__()
        self.bn, self.head, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.bn(x)
        return (x, self.head(x)) if self.training else x


@METHODS
def test_layers_that_only_train_mode_runs_are_said_to_be(method):
    x = torch.randn(8, 3, 5, 5)
    model = nn.Sequential(MergesInEval(True), nn.BatchNorm2d(4))
    before = copy.deepcopy(model.state_dict())
    (skip,) = recalibrate(model, [x], method=method).plan.skips
    assert (skip.layer, skip.reason.value) == ("0.bn", "never reached")
    assert "in eval mode, in which statistics are measured; in train mode one does" in skip.detail
    assert model.training
    assert model[0].weight is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if key.startswith("0."))
    assert not recalibrate(nn.Sequential(MergesInEval(False), nn.BatchNorm2d(4)), [x], method=method).plan.skips

    head, unused = recalibrate(Auxiliary(), [x], method=method).plan.skips
    assert (head.layer, unused.layer) == ("head", "unused")
    assert "in train mode one does" in head.detail
    assert unused.detail == "no batch came through it"


def test_statistics_under_other_names_beside_batchnorms_are_named():
    class Moving(nn.Module):
        def __init__(self, mean="moving_mean", var="moving_var"):
            super().__init__()
            self.register_buffer(mean, torch.zeros(3))
            self.register_buffer(var, torch.ones(3))

        def forward(self, x):
            mean, var = self._buffers.values()
            return functional.batch_norm(x, mean, var)

    # what is called mean and var alone may be that of the data, which no training changes
    model = nn.Sequential(Moving("mean", "var"), nn.BatchNorm2d(3), Moving())
    (skip,) = recalibrate(model, [torch.randn(4, 3, 5, 5)]).plan.skips
    assert (skip.layer, skip.reason.value) == ("2", "not recognised")
    assert skip.detail.startswith("Moving has moving_mean and moving_var, and only running_mean")


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_image, self.of_mask = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, image, mask=None):
        return self.of_image(image) if mask is None else self.of_image(image) + self.of_mask(mask)


class Fields(NamedTuple):
    mask: torch.Tensor
    image: torch.Tensor


class Labelled(NamedTuple):
    image: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


@dataclass
class Scan:
    mask: torch.Tensor
    image: torch.Tensor
    path: str = "scan.png"


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


@METHODS
@pytest.mark.parametrize("kind", [Fields, Scan, lambda **both: (Fields(**both), torch.zeros(8)),
                                  lambda **both: (Scan(**both).__dict__ | {"path": "x"})])  # fmt: skip
def test_values_with_names_of_arguments_go_where_they_belong(kind, method):
    image, mask = torch.randn(8, 3, 5, 5) * 2 + 1, torch.randn(8, 3, 5, 5) - 4
    model = TwoInputs()
    batches = [kind(image=i, mask=m) for i, m in zip(image.split(4), mask.split(4), strict=True)]
    assert not recalibrate(model, batches, method=method).plan.skips
    if method != "paper":
        assert_stores(model.of_image, image)
        assert_stores(model.of_mask, mask)
    assert torch.allclose(model.of_mask.running_mean, mask.mean((0, 2, 3)), atol=1e-5)


def test_a_named_tuple_with_another_name_is_a_tuple():
    image, mask = torch.randn(8, 3, 5, 5) * 2 + 1, torch.full((8, 3, 5, 5), torch.nan)
    model = TwoInputs()
    (skip,) = recalibrate(model, [Labelled(image, mask, torch.zeros(8))]).plan.skips
    assert skip.layer == "of_mask"
    assert_stores(model.of_image, image)


def test_values_whose_names_do_not_fit_are_refused_with_a_way_out():
    x = torch.randn(8, 3, 5, 5)
    with pytest.raises(UserCodeError, match=r"unexpected keyword argument 'left'; a dict passes .* give \(\(a, b\),\)"):
        recalibrate(TwoInputs(), [Pair(x, x)])
    with pytest.raises(UsageError, match="holds no tensor but Pair: give tensors, tuples or dicts of them"):
        recalibrate(TwoInputs(), [Pair("a", "b")])
