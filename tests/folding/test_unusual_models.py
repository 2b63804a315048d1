"""Live models that are folded rightly, or refused with a reason that is true."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.ao.quantization import HistogramObserver
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from torch.nn.utils import prune

import bntool
from bntool.errors import BntoolError, RefusedError
from bntool.plan import SkipReason
from tests.folding.folding_networks import Functional, fold, largest_difference


def randomise(model):
    """Uneven statistics and weights, in eval mode and float64."""
    torch.manual_seed(0)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.double().eval()


def image(*shape):
    return torch.randn(*shape or (2, 3, 9, 9), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reasons(result):
    return {skip.layer: (skip.reason.name, skip.detail) for skip in result.plan.skips}


def folded(result):
    return [fold.layer for fold in result.plan.folds]


class Chosen(nn.Module):
    """Several BatchNorms behind one convolution, of which an argument or an attribute chooses one."""

    def __init__(self, norms=None):
        super().__init__()
        self.conv, self.clean, self.adversarial = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x, clean=True):
        return (self.clean if clean else self.adversarial)(self.conv(x))


class ByDomain(nn.Module):
    """As domain-specific BatchNorm: a list of them, and the domain as an attribute."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms, self.domain = nn.Conv2d(3, 8, 3, bias=False), nn.ModuleList(), 0
        self.norms.extend(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        return self.norms[self.domain](self.conv(x)).relu()


class Residual(nn.Module):
    """Chosen behind a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.norms = nn.ModuleDict({"one": nn.BatchNorm2d(8), "two": nn.BatchNorm2d(8)})

    def forward(self, x, norm="one"):
        return self.norms[norm](self.a(x) + self.b(x))


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
@pytest.mark.parametrize(("model", "ran"), [(Chosen, "clean"), (ByDomain, "norms.0"), (Residual, "norms.one")], ids=str)
def test_what_did_not_run_but_may_read_the_same_stops_the_fold(model, ran, layout):
    net, x = randomise(model()), image()
    before = copy.deepcopy(net.state_dict())
    result = bntool.fold(net, x, layout=layout)
    assert folded(result) == []
    assert reasons(result)[ran][0] == "SHARED_OUTPUT"
    assert "may also be read by BatchNorm2d" in reasons(result)[ran][1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.model.state_dict().items())


class TwoConvolutions(nn.Module):
    """Two convolutions in front of one BatchNorm."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x, first=True):
        return self.norm((self.one if first else self.two)(x)).relu()


class TwoLinears(nn.Module):
    """The same, and the choice is an attribute of a module inside."""

    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.kinds, self.active = nn.ModuleList([nn.Linear(9, 4), nn.Linear(9, 4)]), 0

        def forward(self, x):
            return self.kinds[self.active](x)

    def __init__(self):
        super().__init__()
        self.choice, self.norm = self.Choice(), nn.BatchNorm2d(3)
        self.last = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.last(self.choice(self.norm(x).mean((1, 2))))


class NormsInFront(nn.Module):
    """Two BatchNorms in front of one convolution: folding one forward would scale it for the other, too."""

    def __init__(self):
        super().__init__()
        self.norms, self.conv = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]), nn.Conv2d(3, 4, 1)

    def forward(self, x, which=0):
        return self.conv(self.norms[which](x))


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
@pytest.mark.parametrize(
    ("model", "ran", "idle"),
    [(TwoConvolutions, "norm", "two"), (TwoLinears, "last", "choice.kinds.1"), (NormsInFront, "norms.0", "norms.1")],
)
def test_what_did_not_run_but_may_feed_the_same_stops_the_fold(model, ran, idle, layout):
    result = bntool.fold(randomise(model()), image(), layout=layout)
    assert folded(result) == []
    if (model, layout) != (NormsInFront, "same-keys"):
        assert f"({idle}) did not run here and may feed" in reasons(result)[ran][1]


class Branches(nn.Module):
    """Each domain has its own convolution and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.two = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x, first=True):
        return self.one(x) if first else self.two(x)


def test_whole_branches_are_folded():
    net, x = randomise(Branches()), image()
    result = bntool.fold(net, x)
    assert folded(result) == ["one.1"]
    for first in (True, False):
        torch.testing.assert_close(result.model(x, first), net(x, first), atol=1e-9, rtol=1e-9)


class ForwardChoice(nn.Module):
    """A BatchNorm that is folded forward, into what one of two readers takes."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x, first=True):
        x = self.norm(x)
        return self.one(x) if first else self.two(x)


def test_a_reader_that_did_not_run_stops_a_fold_forward():
    result = bntool.fold(randomise(ForwardChoice()), image())
    assert folded(result) == []
    assert "Conv2d (two) did not run here and may read its output" in reasons(result)["norm"][1]


class WithAuxiliaryHead(nn.Module):
    """A head that runs in training only has a convolution of its own: nothing else hangs on the others."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head_conv, self.head_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.deep = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        return (y, self.head_norm(self.head_conv(y)), self.deep(y)) if self.training else y


def test_a_branch_that_did_not_run_with_its_own_convolution_stops_nothing():
    net, x = randomise(WithAuxiliaryHead()), image()
    result = bntool.fold(net, x)
    assert folded(result) == ["norm"]
    torch.testing.assert_close(result.model(x), net(x), atol=1e-9, rtol=1e-9)


class Frozen(nn.Module):
    """As in DETR: eps is a variable of the forward."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        self.weight.uniform_(0.5, 1.5)
        self.constants = (eps,)

    def forward(self, x):
        weight, bias, variance, mean = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = weight * (variance + self.constants[0]).rsqrt()
        return x * scale + (bias - mean * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 2e-5, 1e-6, 0.0])
def test_a_frozen_batchnorm_whose_eps_is_a_variable_is_folded(eps, dtype):
    net, x = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8, eps), nn.ReLU())).to(dtype), image().to(dtype)
    net[1].running_var[2] = 1e-4
    result = bntool.fold(net, x)
    assert folded(result) == ["1"]
    torch.testing.assert_close(result.model(x), net(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("used", [0.0, 1e-5, 1e-3])
def test_an_eps_that_the_forward_does_not_read_tells_nothing(used):
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8, used), nn.ReLU())).double()
    net[1].eps = 1e-5
    result = bntool.fold(net, image())
    assert folded(result) == ["1"]
    torch.testing.assert_close(result.model(image()), net(image()), atol=1e-12, rtol=1e-12)


class FrozenWithBuffer(Frozen):
    """As above, with an eps that is saved."""

    def __init__(self, channels, eps):
        super().__init__(channels)
        self.register_buffer("eps", torch.tensor(eps))
        self.constants = (self.eps,)


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
@pytest.mark.parametrize("eps", [1e-3, 0.0123456])
def test_an_eps_in_a_buffer_is_read_and_goes_with_its_layer(eps, layout):
    net, x = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), FrozenWithBuffer(8, eps), nn.ReLU())), image()
    result = bntool.fold(net, x, layout=layout)
    assert folded(result) == ["1"]
    assert ("1.eps" in result.model.state_dict()) is (layout == "same-keys")
    torch.testing.assert_close(result.model(x), net(x), atol=1e-4, rtol=1e-4)


def by_mean_first(x, m, v, w, b, eps):
    return (x - m) / torch.sqrt(v + eps) * w + b


def by_scale_first(x, m, v, w, b, eps):
    return w * ((x - m) * torch.rsqrt(v + eps)) + b


def by_one_factor(x, m, v, w, b, eps):
    return (x - m) * (w / (v + eps).sqrt()) + b


def by_addcmul(x, m, v, w, b, eps):
    return torch.addcmul(b, x - m, w * torch.rsqrt(v + eps))


def by_addcmul_last(x, m, v, w, b, eps):
    return torch.addcmul(b, w, (x - m) / (v + eps) ** 0.5)


def reads_between(x, m, v, w, b, eps):
    centred = x - m
    return centred / torch.sqrt(v + eps) * w + b + centred.relu()


def reads_later(x, m, v, w, b, eps):
    scaled = (x - m) / torch.sqrt(v + eps)
    return scaled * w + b + scaled.relu()


def wrong_order(x, m, v, w, b, eps):
    return (m - x) / torch.sqrt(v + eps) * w + b


def variance_alone(x, m, v, w, b, eps):
    return (x - m) / (v + eps) * w + b


def twice_the_bias(x, m, v, w, b, eps):
    return torch.add((x - m) / torch.sqrt(v + eps) * w, b, alpha=2)


def weighted(x, m, v, w, b, eps):
    return torch.addcmul(b, x - m, w * torch.rsqrt(v + eps), value=0.5)


class Written(Frozen):
    def __init__(self, rule):
        super().__init__(8)
        self.rule, self.eps = rule, 1e-5

    def forward(self, x):
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.rule(x, *(tensor.view(1, -1, 1, 1) for tensor in own), self.eps)


@pytest.mark.parametrize(("rule", "folds"), [
    *((rule, True) for rule in (by_mean_first, by_scale_first, by_one_factor, by_addcmul, by_addcmul_last)),
    *((rule, False) for rule in (reads_between, reads_later, wrong_order, variance_alone, twice_the_bias, weighted)),
])  # fmt: skip
def test_batch_normalisation_written_by_hand(rule, folds):
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), Written(rule), nn.Conv2d(8, 4, 3))).double()
    x = image().double()
    result = bntool.fold(net, x)
    assert folded(result) == ["1"] * folds
    assert reasons(result).get("1", ("",))[0] == ("" if folds else "NOT_RECOGNISED")
    torch.testing.assert_close(result.model(x), net(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("rule", [by_mean_first, by_addcmul])
def test_one_along_another_axis_of_the_same_length_is_left_alone(rule):
    class AlongColumns(Written):
        def forward(self, x):
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)

    class Broadcast(Written):
        def forward(self, x):
            own = (self.running_mean, self.running_var, self.weight, self.bias)
            return self.rule(x, *own, self.eps)

    for kind in (AlongColumns, Broadcast):
        net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), kind(rule))).double()
        assert folded(bntool.fold(net, torch.randn(2, 3, 9, 10, dtype=torch.float64))) == []


def test_one_whose_eps_cannot_be_told_did_run():
    result = bntool.fold(randomise(nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8, 0.0123456))), image())
    assert folded(result) == []
    assert reasons(result)["1"][0] == "NOT_RECOGNISED"
    assert reasons(result)["1"][1].startswith("it ran")


class FoldedOnTheFly(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)
        return functional.conv2d(x, weight, self.norm.bias - self.norm.running_mean * scale)


class LogsOnly(FoldedOnTheFly):
    def forward(self, x):
        self.seen = self.norm.running_var.mean() * x.mean()
        return self.conv(x)


@pytest.mark.parametrize("kind", [FoldedOnTheFly, LogsOnly])
def test_one_whose_tensors_are_read_by_others(kind):
    result = bntool.fold(randomise(kind()), image())
    assert reasons(result)["norm"] == ("NOT_RECOGNISED", "it did not run: other code of the forward reads its tensors")


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(8, track_running_stats=True)],
    ids=["plain", "affine", "tracking"],
)
def test_instance_norm_is_not_counted(norm):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    result = bntool.fold(randomise(net), image())
    assert (folded(result), reasons(result)) == (["4"], {})


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))
        self.register_buffer("mask", (torch.rand(6, 5) > 0.3).float())
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(functional.linear(x, self.weight * self.mask, self.bias))


class Standardised(nn.Linear):
    def forward(self, x):
        weight = (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.std(1, keepdim=True)
        return functional.linear(x, weight)


@pytest.mark.parametrize(
    ("model", "layer"), [(Masked(), "norm"), (nn.Sequential(Standardised(5, 6), nn.BatchNorm1d(6)), "1")]
)
def test_a_linear_whose_weight_is_computed(model, layer):
    result = bntool.fold(randomise(model), image(3, 5))
    assert reasons(result)[layer][0] == "COMPUTED_WEIGHT"


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 5, 3, padding=1), nn.BatchNorm1d(5)

    def forward(self, x, mask):
        if mask.all():
            mask = None
        return self.norm(self.conv(x))


class ReadsNumber(Looks):
    def forward(self, x, mask):
        del mask
        return self.norm(self.conv(x)) if float(x.sum()) > 1e9 else self.norm(self.conv(x) * 2)


class ReadsArray(Looks):
    def forward(self, x, mask):
        self.length = int(mask.sum(1).max().numpy())
        return self.norm(self.conv(x))


@pytest.mark.parametrize("kind", [Looks, ReadsNumber, ReadsArray])
def test_where_a_forward_looks_at_its_data_is_said(kind):
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    result = bntool.fold(randomise(kind()), (image(2, 4, 7), mask))
    reason, detail = reasons(result)["norm"]
    line = kind.forward.__code__.co_firstlineno
    assert reason == "DATA_DEPENDENT"
    assert any(f"test_unusual_models.py:{line + offset}" in detail for offset in (1, 2))


def conv_nets(parametrise):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)
    )
    net = randomise(net)
    parametrise(net[0])
    return net


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "parametrise",
    [
        lambda conv: prune.ln_structured(conv, "weight", 0.5, n=2, dim=0),
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
    ],
    ids=["structured", "unstructured", "weight_norm", "spectral_norm", "parametrization"],
)
def test_weights_that_are_computed_before_each_forward(parametrise):
    net, x = conv_nets(parametrise), image()
    net(x)  # with gradients: what it keeps cannot be copied by torch
    result = bntool.fold(net, x)
    assert folded(result) == ["4"]
    assert reasons(result)["1"][0] == "COMPUTED_WEIGHT"
    torch.testing.assert_close(result.model(x), net(x), atol=1e-9, rtol=1e-9)


class Outputs(dict):
    """As transformers has them."""

    def __init__(self, logits):
        super().__init__(logits=logits)


class Pair(tuple):
    __slots__ = ()

    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))


class Boxes(list):
    def __init__(self, items, kind):
        super().__init__(items)
        self.kind = kind


class Answer:
    def __init__(self, logits):
        self.logits = logits


@dataclass(slots=True)
class Slotted:
    logits: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        Slotted,
        Outputs,
        lambda y: Pair(y, y + 1),
        lambda y: Boxes([y], "boxes"),
        Answer,
        lambda y: [Outputs(y), {"a": (y,)}],
    ],
    ids=["slots", "dict", "tuple", "list", "object", "nest"],
)
def test_outputs_of_classes_of_their_own(wrap):
    class Net(nn.Sequential):
        def forward(self, x):
            return wrap(super().forward(x))

    result = bntool.fold(randomise(Net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), image())
    assert folded(result) == ["1"]
    assert result.report.outputs >= 1


class Detector(nn.Module):
    def __init__(self, threshold):
        super().__init__()
        self.conv, self.norm, self.box, self.threshold = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 1),
            threshold,
        )

    def forward(self, x):
        boxes = self.box(self.norm(self.conv(x)).relu()).flatten(2).transpose(1, 2).reshape(-1, 4)
        boxes = boxes[boxes.sigmoid().amin(1) > self.threshold]
        return [{"boxes": boxes, "scores": boxes[:, 0]}]


def test_a_detector_that_finds_nothing():
    with pytest.raises(BntoolError, match="outputs are empty: it finds nothing"):
        bntool.fold(randomise(Detector(2.0)), image())
    assert folded(bntool.fold(randomise(Detector(0.0)), image())) == ["norm"]


class AsksDtype(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x).to(self.norm.weight.dtype)).relu()


class AsksFeatures(AsksDtype):
    def forward(self, x):
        x = self.conv(x)
        assert x.shape[1] == self.norm.num_features
        return self.norm(x)


class AsksEps(AsksDtype):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm.eps


@pytest.mark.parametrize("kind", [AsksDtype, AsksFeatures, AsksEps])
def test_a_forward_that_asks_the_batchnorm(kind):
    net, x = randomise(kind()), image()
    if kind is AsksFeatures:
        with pytest.raises(BntoolError, match=r"norm: the forward reads num_features of this BatchNorm.*same-keys"):
            bntool.fold(net, x)
    for layout in ("same-keys",) if kind is AsksFeatures else ("same-keys", "folded"):
        result = bntool.fold(net, x, layout=layout)
        assert folded(result) == ["norm"]
        torch.testing.assert_close(result.model(x), net(x), atol=1e-9, rtol=1e-9)


class AsksParameters(AsksDtype):
    def forward(self, x):
        return self.norm(self.conv(x).to(next(self.norm.parameters()).dtype)).relu()


class AsksClass(AsksDtype):
    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) if isinstance(self.norm, nn.BatchNorm2d) else x * 100


@pytest.mark.parametrize("kind", [AsksParameters, AsksClass])
def test_a_forward_that_looks_for_the_batchnorm(kind):
    net, x = randomise(kind()), image()
    with pytest.raises(BntoolError, match=r"(which|that) a fold takes away.*same-keys"):
        bntool.fold(net, x)
    result = bntool.fold(net, x, layout="same-keys")
    torch.testing.assert_close(result.model(x), net(x), atol=1e-9, rtol=1e-9)


class CallsCond(AsksDtype):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: self.norm(self.conv(y)), self.conv, (x,))


def test_an_operator_that_runs_functions_is_named():
    with pytest.raises(RefusedError, match="the forward calls cond, which runs functions of its own"):
        bntool.fold(randomise(CallsCond()), image())


class Slimmable(nn.Module):
    """BatchNorms for several widths of one convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms, self.width = nn.Conv2d(3, 8, 3), nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(8)]), 1

    def forward(self, x):
        return self.norms[self.width](self.conv(x)[:, : (4, 8)[self.width]])


class WithAuxiliary(nn.BatchNorm2d):
    """A BatchNorm that holds others for other data, as timm's SplitBatchNorm2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.others = nn.ModuleList([nn.BatchNorm2d(channels)])

    def forward(self, x):
        return self.others[0](x) if self.training else super().forward(x)


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
def test_batchnorms_among_which_one_is_chosen_keep_their_input(layout):
    net, x = randomise(Slimmable()), image()
    result = bntool.fold(net, x, layout=layout)
    assert folded(result) == []
    assert "(norms.0), which did not run here" in reasons(result)["norms.1"][1]
    split = nn.Sequential(nn.Conv2d(3, 8, 3), WithAuxiliary(8), nn.ReLU(), nn.Conv2d(8, 8, 3), WithAuxiliary(8))
    result = bntool.fold(randomise(split), x, layout=layout)
    assert folded(result) == []
    assert "(4.others.0), which did not run here" in reasons(result)["4"][1]


class Giving(nn.Module):
    """What comes out of a small net, given back in a form of its own."""

    def __init__(self, give):
        super().__init__()
        self.conv, self.norm, self.give = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), give

    def forward(self, x):
        return self.give(self.norm(self.conv(x)))


@pytest.mark.parametrize(
    "give",
    [
        lambda y: y.numpy(),
        lambda y: float(y.mean()),
        lambda y: {"numbers": [y.numpy()], "count": 3},
        lambda y: torch.complex(y, y + 1),
        lambda y: torch.distributions.Normal(y, y.exp()),
    ],
)
def test_outputs_that_are_no_plain_tensors_are_compared(give):
    result = bntool.fold(randomise(Giving(give)), image())
    assert folded(result) == ["norm"]
    assert 0 < result.report.rounded < 1e-5 or 0 < result.report.exact < 1e-9


@pytest.mark.parametrize(
    ("give", "reason"),
    [
        (lambda y: y.argmax(1), "no floating output"),
        (lambda y: {"boxes": y[:, :0], "scale": torch.ones(3)}, "the same for all inputs"),
        (lambda y: {"boxes": y[:, :0], "scale": torch.ones(len(y))}, "the same for all inputs"),
        (lambda y: y * 0, "the same for all inputs|all zero"),
        (lambda y: y.to_sparse(), "_to_sparse in the forward gives a sparse tensor"),
        (lambda y: torch.nested.as_nested_tensor(list(y)), "gives a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_outputs_that_prove_nothing_are_refused(give, reason):
    with pytest.raises(BntoolError, match=reason):
        bntool.fold(randomise(Giving(give)), image())


class PassesItsInputOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return {"image": x, "boxes": self.norm(self.conv(x))[:, :0]}


class AtTheBrink(nn.Module):
    """A detector that finds more in float64 than in float32."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y[:, : 2 if y.dtype == torch.float64 else 3]


def test_outputs_without_the_parameters_in_them_prove_nothing():
    with pytest.raises(BntoolError, match="do not depend on the parameters"):
        bntool.fold(randomise(PassesItsInputOn()), image())


def test_outputs_whose_shapes_hang_on_rounding_are_called_so():
    with pytest.raises(BntoolError, match="of the original model's outputs hang on rounding"):
        bntool.fold(randomise(AtTheBrink()).float(), image().float())


class RawHead(nn.Module):
    """Another path, which a flag chooses, reads the convolution before its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.head, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(5, 6, 1)

    def forward(self, x, raw=False):
        y = self.conv(x)
        return self.head(y) if raw else self.out(self.bn(y).relu())


def test_a_module_that_did_not_run_and_may_read_what_a_fold_changed_is_named():
    model, x = randomise(RawHead()), image()
    result = bntool.fold(model, x)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-10)
    assert (result.model(x, raw=True) - model(x, raw=True)).abs().max() > 0.1  # which no trace of the other path tells
    assumed, measured = result.plan.assumptions
    assert measured.startswith("raw=True is not given")
    assert assumed.startswith("head, not run")  # not other, which reads five channels
    del model.head
    assert bntool.fold(model, x).plan.assumptions == ()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x):
        return x * self.factor


class OtherNorm(nn.Module):
    """Another normalisation takes the place of the BatchNorm, as an attribute says."""

    def __init__(self, other):
        super().__init__()
        self.conv, self.bn, self.other, self.use_bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), other, True

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if self.use_bn else self.other(y)


@pytest.mark.parametrize(
    "other",
    [
        nn.GroupNorm(2, 8),
        nn.GroupNorm(2, 8, affine=False),
        nn.InstanceNorm2d(8, track_running_stats=True),
        nn.LayerNorm([8, 7, 7]),
        nn.PReLU(8),
        nn.Conv2d(8, 8, 1),
        Scale(),
    ],
    ids=repr,
)
def test_a_module_in_the_place_of_a_batchnorm_is_named(other):
    model, x = randomise(OtherNorm(other)), image()
    result = bntool.fold(model, x)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-10)
    assert [text.partition(": with")[0] for text in result.plan.assumptions] == [
        "other, not run in the forward that was observed, reads nothing that a fold changed",
        "use_bn is True",
    ]


def test_a_module_that_reads_other_channels_is_not_named():
    model, x = randomise(OtherNorm(nn.GroupNorm(2, 6))), image()
    assert bntool.fold(model, x).plan.assumptions == ()


class Switched(nn.Module):
    """A convolution whose BatchNorm another argument goes round; other switches change nothing that a fold does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x, normalise=True, *, raw: bool | None = None, both=False, broken=False, scale=2.0):
        if broken:
            raise ValueError("not for this model")
        y = self.conv(x)
        if raw:
            return y
        y = self.out(self.bn(y) if normalise else y)
        return (y, y * scale) if both else y


def test_a_switch_that_goes_round_a_batchnorm_is_named():
    model, x = randomise(Switched()), image()
    result = bntool.fold(model, x)
    for off in ({"normalise": False}, {"raw": True}):
        assert (result.model(x, **off) - model(x, **off)).abs().max() > 0.1
    torch.testing.assert_close(result.model(x, both=True), model(x, both=True), rtol=1e-10, atol=1e-10)
    assert [text.partition(" is not given")[0] for text in result.plan.assumptions] == ["normalise=False", "raw=True"]
    given = {"x": x, "normalise": True, "raw": False}  # by the caller, who knows
    assert bntool.fold(model, given).plan.assumptions == ()


def test_what_a_recorder_cannot_follow_is_not_called_the_models_fault(monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise IndexError("ours")

    monkeypatch.setattr("bntool.graphs.traced.tracing._Recorder.record_node", fail)
    with pytest.raises(RefusedError, match=r"cannot be followed \(IndexError: ours.*--pair"):
        bntool.fold(randomise(Switched()), image())


class UnevenNorm(nn.Module):
    """As e3nn's: vectors have a factor and a variance, and no mean and no bias."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-5
        self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x):
        scalars, rest = x[:, :4] - self.running_mean, x[:, 4:]
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return torch.cat([scalars * scale[:4] + self.bias, rest * scale[4:]], 1)


class UnevenProduct(UnevenNorm):
    def forward(self, x):
        y = x * (self.weight / (self.running_var + self.eps).sqrt())
        return torch.cat([y[:, :4] + self.bias, y[:, 4:]], 1)


@pytest.mark.parametrize("kind", [UnevenNorm, UnevenProduct])
def test_a_norm_with_vectors_of_several_lengths_is_no_batchnorm(kind):
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), kind()).eval()
    result = bntool.fold(randomise(model), torch.randn(4, 5, dtype=torch.float64))
    assert folded(result) == ["1"]


def test_hooks_that_know_the_original_do_not_change_it():
    model, kept = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))), []
    model.kept = kept
    model[2].register_forward_hook(lambda _module, _inputs, output: model.kept.append(output))
    assert folded(bntool.fold(model, image())) == ["1"]
    assert model.kept is kept
    assert kept == []


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(5, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        parts = torch.nested.nested_tensor([x[:1], x[1:]])
        return self.bn(self.linear(parts.to_padded_tensor(0.0).flatten(0, 1)))


def test_what_cannot_be_followed_is_no_fault_of_the_model():
    with pytest.raises(RefusedError, match=r"^aten.* in the forward gives a nested tensor"):
        bntool.fold(randomise(Nested()), image(3, 5))


class WithOwnBias(nn.Module):
    """A producer, a parameter that is added to what it gives, and a BatchNorm."""

    def __init__(self, producer, add, *shape):
        super().__init__()
        norms = {nn.Linear: nn.BatchNorm1d, nn.ConvTranspose3d: nn.BatchNorm3d}
        self.producer, self.offset = producer, nn.Parameter(torch.randn(shape))
        self.norm, self.add = norms.get(type(producer), nn.BatchNorm2d)(6), add

    def forward(self, x):
        return self.norm(self.add(self.producer(x), self.offset)).relu()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (WithOwnBias(nn.Conv2d(3, 6, 3), lambda y, b: b + y, 6, 1, 1), (2, 3, 9, 9)),
        (WithOwnBias(nn.Conv2d(3, 6, 3, groups=3), lambda y, b: y - b, 1, 6, 1, 1), (2, 3, 9, 9)),
        (WithOwnBias(nn.Conv2d(3, 6, 3), lambda y, b: y + b.view(1, -1, 1, 1), 6), (2, 3, 9, 9)),
        (WithOwnBias(nn.ConvTranspose3d(3, 6, 3), lambda y, b: y.sub_(b[:, None, None, None]), 6), (2, 3, 4, 4, 4)),
        (WithOwnBias(nn.Linear(5, 6), lambda y, b: y - b.squeeze(), 1, 6), (4, 5)),
    ],
)
def test_a_bias_that_is_added_by_itself(model, shape):
    x = image(*shape)
    result = bntool.fold(randomise(model), x)
    assert folded(result) == ["norm"]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "model",
    [
        WithOwnBias(nn.Linear(5, 6), lambda y, b: torch.add(y, b, alpha=2), 6),
        WithOwnBias(nn.Linear(5, 6), lambda y, b: torch.add(b, y, alpha=2), 6),
        WithOwnBias(nn.Linear(5, 6), lambda y, b: y + b + b, 6),
        WithOwnBias(nn.Linear(5, 6), lambda y, b: y + b.tanh(), 6),
    ],
)
def test_one_that_is_added_otherwise_stays(model):
    assert folded(bntool.fold(randomise(model), image(4, 5))) == []


class Product(nn.Module):
    """A BatchNorm of a product with a parameter."""

    def __init__(self, multiply, *shape):
        super().__init__()
        self.weight, self.norm, self.multiply = nn.Parameter(torch.randn(shape)), nn.BatchNorm1d(6), multiply

    def forward(self, x):
        return self.norm(self.multiply(x, self.weight)).relu()


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
@pytest.mark.parametrize(
    "model",
    [
        Product(lambda x, w: torch.einsum("ni,io->no", x, w), 5, 6),
        Product(lambda x, w: torch.einsum("ni,oi->no", x, w), 6, 5),
        Product(lambda x, w: torch.bmm(x[None], w[None])[0], 5, 6),
        Product(lambda x, w: torch.mm(x, w.view(5, 6)), 1, 1, 5, 6),  # a convolution of one voxel of spconv
        Product(lambda x, w: functional.linear(x, w.squeeze()), 6, 5, 1, 1),
        Product(lambda x, w: functional.conv1d(x[:, :, None], w[:, :, None])[:, :, 0], 6, 5),
        Product(lambda x, w: x[:, :1] @ w.t(), 6, 1),
    ],
)
def test_products_with_a_view_of_a_parameter(model, layout):
    x = image(4, 5)
    result = bntool.fold(randomise(model), x, layout=layout)
    assert folded(result) == ["norm"]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "model",
    [
        Product(lambda x, w: x @ (w * w.sign()) + w[0], 5, 6),
        Product(lambda x, w: torch.einsum("ni,oi->no", x, w.abs()), 6, 5),
    ],
)
def test_products_with_what_is_computed(model):
    result = bntool.fold(randomise(model), image(4, 5))
    assert folded(result) == []


def test_a_masked_product_with_its_own_bias_is_a_computed_weight():
    class MaskedProduct(Masked):
        def forward(self, x):
            return self.norm(x @ (self.weight * self.mask).t() + self.bias)

    assert reasons(bntool.fold(randomise(MaskedProduct()), image(4, 5)))["norm"][0] == "COMPUTED_WEIGHT"


class LeavesTheBiasOut(nn.Module):
    """Takes the weight of a convolution, and gives its bias or not."""

    def __init__(self, with_bias):
        super().__init__()
        self.first, self.before = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv, self.norm, self.with_bias = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), with_bias

    def forward(self, x):
        x = self.before(self.first(x)).sigmoid()
        bias = (self.conv.bias,) if self.with_bias else ()
        return self.norm(functional.conv2d(x, self.conv.weight, *bias)).sigmoid()


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_bias_that_the_forward_would_not_read_is_not_added(with_bias):
    model, x = randomise(LeavesTheBiasOut(with_bias)), image()
    original = nn.Module.__getattr__
    result = bntool.fold(model, x)
    assert nn.Module.__getattr__ is original
    assert [fold.stays for fold in result.plan.folds] == [False, not with_bias]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)


class InAList(nn.Module):
    """Keeps a layer where torch does not look for it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 4, 3), [randomise(nn.BatchNorm2d(4))]

    def forward(self, x):
        return self.norms[0](self.conv(x))


class MadeAtFirst(nn.Module):
    """Makes a layer in its first forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), None

    def forward(self, x):
        if self.norm is None:
            self.norm = randomise(nn.BatchNorm2d(4))
        return self.norm(self.conv(x))


@pytest.mark.parametrize("kind", [InAList, MadeAtFirst])
def test_layers_that_are_no_part_of_the_model_are_said_to_be_none(kind):
    result = bntool.fold(randomise(kind()), image())
    assert folded(result) == []
    ((reason, detail),) = reasons(result).values()
    assert (reason, detail) == (
        "COMPUTED_WEIGHT",
        "its weight is no parameter or buffer that the model has before this forward",
    )


def test_models_that_compute_nothing_yet_are_refused():
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(RefusedError, match=r"^0: this lazy layer has no weights yet: run the model once"):
        bntool.fold(lazy, image().float())
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(RefusedError, match=r"^0: the model is on the meta device, which computes nothing"):
        bntool.fold(model, image().float().to("meta"))


def test_a_wrapper_that_changes_the_names_in_the_state_dict_is_not_said_to_keep_layers_from_running():
    inner = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    result = bntool.fold(nn.Sequential(checkpoint_wrapper(inner)).eval(), image())
    assert folded(result) == []
    said = reasons(result)
    assert said.keys() == {"0._checkpoint_wrapped_module.1", "0.1"}
    assert said["0._checkpoint_wrapped_module.1"][1] == "0._checkpoint_wrapped_module.1.weight is not in the state dict"
    assert said["0.1"][0] == "NOT_RECOGNISED"
    assert "the model has no module of that name: fold before wrapping" in said["0.1"][1]


def test_looking_at_values_in_code_of_torch_is_not_said_of_the_line_that_calls_bntool():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), HistogramObserver(), nn.BatchNorm2d(4)).eval()
    (reason, detail) = reasons(bntool.fold(model, torch.randn(2, 3, 9, 9)))["2"]
    assert reason == "DATA_DEPENDENT"
    assert "observer.py:" in detail
    assert "test_unusual_models" not in detail


@pytest.mark.parametrize("is_before", [True, False])
def test_a_fold_past_a_max_pool_says_what_makes_it_exact(is_before):
    norm = nn.BatchNorm2d(4)
    inner = [norm, nn.MaxPool2d(2)] if is_before else [nn.MaxPool2d(2), norm, nn.ReLU()]
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) if is_before else nn.Conv2d(3, 4, 3)
    model, x = randomise(nn.Sequential(first, *inner, nn.Conv2d(4, 5, 1))), image()
    result = bntool.fold(model, x)
    (fold,) = result.plan.folds
    assert fold.how == f"{fold.level.value}, past a max-pool (every scale is positive)"
    assert fold.describe()["pooled"] is True
    torch.testing.assert_close(result.model(x), model(x))
    norm.weight.data[1] *= -1
    skipped = bntool.fold(model, x)
    assert folded(skipped) == []
    assert "not every scale is positive" in skipped.plan.skips[0].detail


def taken_out_of_torch(self, x):
    return self.bn(self.conv(torch.from_numpy(x.numpy() * 2)))


def changed_by_python(self, x):
    return self.bn(self.conv(x).apply_(lambda element: min(element, 100.0)))


def looked_at_in_its_storage(self, x):
    y = self.conv(x)
    return self.bn(y) if len(bytes(y.untyped_storage())) > 1 else y


def given_to_another_thread(self, x):
    y = self.conv(x)
    with ThreadPoolExecutor(1) as pool:
        largest = pool.submit(lambda: float(y.max())).result()
    return self.bn(y) if largest < 100 else y


def computed_by_another_thread(self, x):
    with ThreadPoolExecutor(1) as pool:
        return self.bn(pool.submit(self.conv, x).result())


def copied_deeply(self, x):
    return self.bn(copy.deepcopy(self.conv(copy.deepcopy(x))))


def copied_deeply_and_kept(self, x):
    y = self.conv(x)
    return self.bn(y), copy.deepcopy(y)


@pytest.mark.parametrize(
    ("forward", "folds", "why"),
    [
        (taken_out_of_torch, 0, f"(Tensor.numpy in {__file__}:"),
        (changed_by_python, 0, f"(Tensor.apply_ in {__file__}:"),
        (looked_at_in_its_storage, 0, f"(Tensor.untyped_storage in {__file__}:"),
        (given_to_another_thread, 0, f"(another thread in {__file__}:"),
        (
            computed_by_another_thread,
            0,
            f"the forward hands values of its data to Python (another thread in {__file__}:",
        ),
        (copied_deeply, 1, ""),
        (copied_deeply_and_kept, 0, "the model's output does not let it pass"),
    ],
)
def test_data_that_leaves_torch_and_copies_of_it(forward, folds: int, why: str) -> None:
    model = randomise(Functional(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    after, plan = fold(model, x)
    assert len(plan.folds) == folds
    assert largest_difference(model, after, x) < 1e-12
    assert all(why in skip.detail for skip in plan.skips)


def its_largest_element(self, x):
    return self.bn(self.conv(x)) * self.conv.weight.max().item()


def its_elements_in_a_list(self, x):
    return self.bn(self.conv(x)), torch.tensor(self.conv.weight.tolist())


def a_copy_of_its_module(self, x):
    return self.bn(self.conv(x)) + copy.deepcopy(self.conv)(x)


def its_elements_out_of_sight(self, x):
    return self.bn(self.conv(x)) * (self.conv.weight * 2).data.sum()


@pytest.mark.parametrize(
    ("forward", "reader"),
    [
        (its_largest_element, "_local_scalar_dense"),
        (its_elements_in_a_list, "Tensor.tolist"),
        (a_copy_of_its_module, "convolution"),
        (its_elements_out_of_sight, "mul"),
    ],
)
def test_a_weight_whose_elements_something_else_reads(forward, reader: str) -> None:
    model = randomise(Functional(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    (skip,) = bntool.fold(model, torch.randn(2, 3, 7, 7, dtype=torch.float64)).plan.skips
    assert skip.reason is SkipReason.REUSED
    assert f"the weight of convolution (conv) is also used elsewhere: {reader}" in skip.detail


class OfInferenceAlone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 2)

    @torch.inference_mode()
    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.out(functional.adaptive_avg_pool2d(x, 2).flatten(1))


def test_a_forward_in_inference_mode_is_followed():
    model, x = randomise(OfInferenceAlone()), image()
    result = bntool.fold(model, x)
    assert result.plan.layers == ("bn",)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        assert bntool.fold(model, x).plan.layers == ("bn",)


class OnParts(nn.Module):
    """As ghost batch normalisation: on one part of the batch after the other."""

    def __init__(self, functionally):
        super().__init__()
        self.bn, self.functionally = nn.BatchNorm1d(6), functionally

    def norm(self, x):
        if not self.functionally:
            return self.bn(x)
        bn = self.bn
        return functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)

    def forward(self, x):
        return torch.cat([self.norm(part) for part in x.split(4)])


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
@pytest.mark.parametrize("functionally", [False, True])
def test_one_batchnorm_on_each_part_of_the_batch_folds(functionally, layout):
    model = randomise(nn.Sequential(nn.Linear(5, 6), OnParts(functionally), nn.ReLU()))
    x = image(9, 5)
    result = bntool.fold(model, x, layout=layout)
    assert [(one.layer, one.level.value) for one in result.plan.folds] == [("1.bn", "direct")]
    torch.testing.assert_close(result.model(x), model(x))


class OnOneOfTwo(nn.Module):
    """Two calls on one convolution, of which another BatchNorm reads the first alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.second = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x):
        x = self.conv(x)
        one, other = self.bn(x), self.bn(x)
        return self.second(one) * 2 + other


def test_what_reads_one_of_two_calls_stays():
    model, x = randomise(OnOneOfTwo()), image()
    result = bntool.fold(model, x)
    assert folded(result) == ["bn"]
    torch.testing.assert_close(result.model(x), model(x))


@pytest.mark.parametrize("reader", [[nn.Conv2d(6, 4, 1)], [nn.Flatten(), nn.Linear(6, 4)]])
def test_an_average_over_all_positions_passes_in_channels_last_too(reader):
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), *reader))
    x = image()
    result = bntool.fold(model, x)
    assert folded(result) == ["2"]
    torch.testing.assert_close(result.model(x), model(x))


class Sparse(nn.Module):
    """A sparse convolution in plain torch, as spconv 1 and MinkowskiEngine compute it: for each tap a product of the
    rows that it reads, added to the rows that it gives.
    """

    def __init__(self, how, bias):
        super().__init__()
        self.how, self.weight, self.bn = how, nn.Parameter(torch.randn(9, 5, 6)), nn.BatchNorm1d(6)
        self.bias = nn.Parameter(torch.randn(6)) if bias else None
        generator = torch.Generator().manual_seed(0)
        for name in ("read", "given"):
            self.register_buffer(name, torch.randint(0, 7, (9, 4), generator=generator))

    def forward(self, x):
        out = x.new_zeros(7, 6)
        if self.how == "all at once":
            out.index_add_(0, self.given.flatten(), torch.bmm(x[self.read], self.weight).flatten(0, 1))
        for tap in range(9) if self.how != "all at once" else ():
            rows, to = x[self.read[tap]] @ self.weight.view(3, 3, 5, 6)[tap // 3, tap % 3], self.given[tap]
            if self.how == "index_add_":
                out.index_add_(0, to, rows)
            elif self.how == "scatter_add":
                out = out.scatter_add(0, to[:, None].expand_as(rows), rows)
            else:
                out = out.index_put((to,), rows, accumulate=True)
        return self.bn(out if self.bias is None else out + self.bias)


@pytest.mark.parametrize("how", ["index_add_", "scatter_add", "index_put", "all at once"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_sparse_convolution_of_gathered_products(how, bias):
    torch.manual_seed(0)
    model, x = randomise(Sparse(how, bias)), image(7, 5)
    result = bntool.fold(model, x)
    assert [(one.layer, one.stays) for one in result.plan.folds] == [("bn", not bias)]  # the shift needs a place
    torch.testing.assert_close(result.model(x), model(x))


class Scattered(nn.Module):
    """Rows of which something else decides where they go, or that are not added to zeros."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear, self.bn = how, nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        rows, out = self.linear(x), x.new_ones(7, 6)
        if self.how == "to other channels":
            places = torch.arange(6).roll(1).expand(7, 6)
            return self.bn(torch.zeros_like(rows).scatter_add(1, places, rows))
        if self.how == "chosen by the data":
            return self.bn(rows.index_select(1, x.new_tensor([5, 4, 3, 2, 1, 0]).long() + (x.sum() > 1e9).long()))
        if self.how == "written":
            return self.bn(torch.index_put(x.new_zeros(7, 6), (torch.tensor([1, 2, 0]),), rows[:3]) + rows)
        return self.bn(out.index_add_(0, torch.tensor([1, 1, 2, 3, 4, 5, 6]), rows))


@pytest.mark.parametrize("how", ["to other channels", "chosen by the data", "written", "to ones"])
def test_rows_that_no_scale_passes_stay(how):
    model, x = randomise(Scattered(how)), image(7, 5)
    result = bntool.fold(model, x)
    assert folded(result) == []
    torch.testing.assert_close(result.model(x), model(x))


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.bn = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.one(x) + self.other(x))


def test_a_fold_says_what_takes_its_shift_alone():
    result = bntool.fold(randomise(Summed()), image())
    assert [one.how for one in result.plan.folds] == ["through, shift into one"]
    result = bntool.fold(randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))), image())
    assert [one.how for one in result.plan.folds] == ["direct"]


class WithStatisticsOfParts(nn.BatchNorm2d):
    """As ghost batch normalisation that keeps statistics for each part of a batch, and takes the first in eval."""

    def __init__(self, channels, parts):
        super().__init__(channels)
        self.register_buffer("running_mean", torch.zeros(channels * parts))
        self.register_buffer("running_var", torch.ones(channels * parts))

    def forward(self, x):
        mean, variance = (one[: self.num_features] for one in (self.running_mean, self.running_var))
        return functional.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
def test_statistics_of_parts_of_which_eval_takes_the_first(layout):
    model, x = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), WithStatisticsOfParts(6, 4), nn.ReLU())), image()
    result = bntool.fold(model, x, layout=layout)
    assert folded(result) == ["1"]
    torch.testing.assert_close(result.model(x), model(x))
    if layout == "same-keys":
        torch.testing.assert_close(result.model[1].running_mean[6:], model[1].running_mean[6:], rtol=0, atol=0)


class Tied(nn.Module):
    """One weight in two calls, which take it in different ways."""

    def __init__(self, again, channels, *, linear=False):
        super().__init__()
        self.again = again
        self.layer = nn.Linear(channels, 8, bias=False) if linear else nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        kind = nn.BatchNorm1d if linear else nn.BatchNorm2d
        self.first, self.second = kind(8), kind(channels)

    def forward(self, x):
        return self.second(self.again(functional.relu(self.first(self.layer(x))), self.layer.weight))


def transposed(x, weight):
    return functional.conv_transpose2d(x, weight, padding=1)


@pytest.mark.parametrize(
    ("again", "channels", "linear"),
    [
        (transposed, 3, False),
        (transposed, 8, False),
        (lambda x, weight: functional.conv2d(x, weight, padding=1), 8, False),  # it would not add a bias
        (lambda x, weight: functional.conv2d(x, weight[:, :], padding=1), 8, False),
        (lambda x, weight: x @ weight, 3, True),
        (lambda x, weight: x @ weight, 8, True),
        (lambda x, weight: functional.linear(x, weight.t()), 3, True),
        (functional.linear, 8, True),
    ],
)
def test_a_weight_that_calls_take_in_different_ways_is_left_alone(again, channels, linear):
    model = randomise(Tied(again, channels, linear=linear))
    result = bntool.fold(model, image(5, channels) if linear else image(2, channels, 9, 9))
    assert not result.plan.folds
    assert "is also used elsewhere" in reasons(result)["first"][1]


def test_a_weight_that_each_call_takes_with_its_own_bias_is_folded():
    model = Functional(
        lambda self, x: self.second(self.layer(functional.relu(self.first(self.layer(x))))),
        layer=nn.Conv2d(8, 8, 3, padding=1, bias=False),
        first=nn.BatchNorm2d(8),
        second=nn.BatchNorm2d(8),
    )
    result = bntool.fold(randomise(model), image(2, 8, 9, 9))
    assert [one.layer for one in result.plan.folds] == ["first"]
