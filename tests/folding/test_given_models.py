"""Models as users have them: layers of their own, declared pairs, and other code that runs afterwards."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bntool
from bntool.errors import RefusedError, UsageError
from bntool.folding.options import FoldOptions, Layout
from bntool.folding.planning import plan_fold
from bntool.graphs.declared import declare
from bntool.modules.application import apply_plan, read_state
from bntool.modules.finding import find_batchnorm_modules
from tests.folding.folding_networks import LAYOUTS, Functional, fold, largest_difference, randomise

EXACT = 1e-12


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Product(nn.Module):
    """A 1x1 convolution of sparse voxels: a matrix product with a weight (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bn = nn.Parameter(torch.randn(5, 6)), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn(torch.mm(x, self.weight)).relu()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_matrix_product_with_a_parameter(layout: Layout) -> None:
    model = randomise(Product().double())
    folded, plan = fold(model, image(7, 5), layout=layout)
    (one,) = plan.folds
    assert one.stays  # its module has no place for a bias
    assert not plan.skips
    assert largest_difference(model, folded, image(7, 5)) < EXACT


def test_forward_into_a_matrix_product() -> None:
    model = randomise(Functional(lambda self, x: self.product(self.bn(x)), bn=nn.BatchNorm1d(5), product=Product()))
    folded, plan = fold(model.double(), image(7, 5))
    assert {one.layer for one in plan.folds} == {"product.bn"}  # no place for a shift of its input
    assert largest_difference(model, folded, image(7, 5)) < EXACT


def test_a_deformable_convolution() -> None:
    torchvision = pytest.importorskip("torchvision")

    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offsets = nn.Conv2d(3, 18, 3, padding=1)
            self.conv = torchvision.ops.DeformConv2d(3, 8, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(self.conv(x, self.offsets(x)))

    model = randomise(Deformable().double())
    folded, plan = fold(model, image(2, 3, 7, 7))
    assert len(plan.folds) == 1
    assert largest_difference(model, folded, image(2, 3, 7, 7)) < EXACT


LIBRARIES: list[torch.library.Library] = []  # an operator goes with its library


def find_deformable_convolution():
    """torchvision's operator; where it is not installed, one with its name and schema that knows no offsets."""
    if find_spec("torchvision") is not None:
        import torchvision  # noqa: F401
    else:
        sizes = ", ".join(f"int {name}_{axis}" for name in ("stride", "pad", "dilation") for axis in "hw")
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(
            "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
            f"{sizes}, int groups, int offset_groups, bool use_mask) -> Tensor"
        )
        library.impl("deform_conv2d", lambda x, weight, _offset, _mask, bias, *_: F.conv2d(x, weight, bias), "CPU")
        LIBRARIES.append(library)
    return torch.ops.torchvision.deform_conv2d


def test_the_operator_of_a_deformable_convolution() -> None:
    convolve = find_deformable_convolution()

    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            offsets, mask = x.new_zeros(2, 18, 5, 5), x.new_zeros(2, 1)
            sizes = (1, 1, 0, 0, 1, 1, 1, 1, False)
            return self.bn(convolve(x, self.weight, offsets, mask, self.bias, *sizes))

    model = randomise(Deformable().double())
    folded, plan = fold(model, image(2, 3, 7, 7))
    assert [one.layer for one in plan.folds] == ["bn"]
    assert largest_difference(model, folded, image(2, 3, 7, 7)) < EXACT


def test_a_variance_that_rounding_made_negative_is_folded_with_a_warning() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double())
    with torch.no_grad():
        model[1].running_var[0], model[1].weight[0] = -9.9998997e-06, 1e-6
    result = bntool.fold(model, image(2, 3, 6, 6))
    assert result.plan.below_zero == ("1",)
    assert largest_difference(model, result.model, image(2, 3, 6, 6)) < 1e-9
    model[1].running_var[0] = -1.1e-5
    assert [skip.reason.value for skip in bntool.fold(model, image(2, 3, 6, 6)).plan.skips] == ["negative variance"]


class Looks(nn.Module):
    """Its forward looks at its data, so that a trace proves nothing after that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6)

    def forward(self, x, mask):
        return self.bn(self.conv(x if bool(mask.any()) else -x))


def test_declared_pairs_that_are_no_text_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(UsageError, match="no text of the form PRODUCER=BATCHNORM"):
        bntool.fold(model, torch.ones(2, 3), pairs=[("0", "1")])


@pytest.mark.parametrize("pairs", [["conv=bn"], {"bn": "conv"}])
def test_declared_pairs_in_the_library(pairs) -> None:
    model, inputs = randomise(Looks().double()), (image(1, 4, 7), torch.tensor([True]))
    assert not bntool.fold(model, inputs).plan.folds
    result = bntool.fold(model, inputs, pairs=pairs)
    assert [one.layer for one in result.plan.folds] == ["bn"]
    assert largest_difference(model, result.model, inputs) < EXACT
    with pytest.raises(UsageError, match="eps"):
        bntool.fold(model, inputs, pairs=pairs, eps=1e-3)


@pytest.mark.parametrize(
    "producer",
    [nn.ConvTranspose2d(3, 6, 3), nn.ConvTranspose2d(6, 6, 3), nn.ConvTranspose2d(6, 6, 2, groups=3)],
    ids=str,
)
def test_a_declared_transposed_convolution_in_the_library(producer) -> None:
    model, inputs = randomise(nn.Sequential(producer, nn.BatchNorm2d(6)).double()), image(2, producer.in_channels, 5, 5)
    result = bntool.fold(model, inputs, pairs=["0=1"])
    assert [one.layer for one in result.plan.folds] == ["1"]
    assert largest_difference(model, result.model, inputs) < EXACT


def test_a_declared_weight_with_channels_last() -> None:
    model = nn.ModuleDict({"conv": nn.Module(), "bn": nn.BatchNorm1d(16)}).double()
    model["conv"].weight = nn.Parameter(image(3, 3, 3, 8, 16))
    randomise(model)
    before = model["conv"].weight.clone()
    state = read_state(model)
    plan = plan_fold(state, declare(state, {"bn": "conv"}), FoldOptions(eps=1e-5))
    norm = model["bn"]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    apply_plan(model, plan)
    torch.testing.assert_close(model["conv"].weight, before * scale, rtol=1e-13, atol=0)
    assert model["conv"].bias.shape == (16,)


@pytest.mark.parametrize(("shape", "said"), [((16, 3, 3, 3, 16), True), ((16, 3, 3, 3, 3), False)])
def test_which_axis_holds_the_channels_is_assumed_where_both_ends_fit(shape, said) -> None:
    model = nn.ModuleDict({"conv": nn.Module(), "bn": nn.BatchNorm1d(16)}).double()
    model["conv"].weight = nn.Parameter(image(*shape))
    state = read_state(randomise(model))
    plan = plan_fold(state, declare(state, {"bn": "conv"}), FoldOptions(eps=1e-5))
    assert ("conv has its output channels first: its weight is [16, 3, 3, 3, 16]" in plan.assumptions) is said


class Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, out, 3, bias=False), nn.BatchNorm2d(out)

    def forward(self, x):
        return F.silu(self.bn(self.conv(x)))


def fuse(block: Block) -> None:
    """As ultralytics and YOLOX do it."""
    conv, norm = block.conv, block.bn
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = torch.zeros(conv.out_channels).to(scale) if conv.bias is None else conv.bias
    with torch.no_grad():
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(scale * bias + norm.bias - norm.running_mean * scale)
    block.bn = nn.Identity()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_code_that_fuses_by_itself_afterwards_computes_the_same(layout: Layout) -> None:
    model = randomise(nn.Sequential(Block(3, 8), Block(8, 4)).double())
    folded = bntool.fold(model, image(2, 3, 8, 8), layout=layout).model
    if layout is Layout.FOLDED:
        assert not find_batchnorm_modules(folded)
        assert not [key for key in folded.state_dict() if ".bn." in key]
    for block in folded:
        fuse(block)
    assert largest_difference(model, folded, image(2, 3, 8, 8)) < EXACT


class FusingBlock(Block):
    """With a method of its own that fuses, as a library calls it on each part of a model."""

    def fuse(self) -> nn.Module:
        fuse(self)
        return self


class ForgetfulBlock(Block):
    """As LeViT's authors and timm do it: a bias that the convolution has already is left out."""

    def fuse(self) -> nn.Module:
        scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
        fused = nn.Conv2d(self.conv.in_channels, self.conv.out_channels, 3)
        fused.weight.data = self.conv.weight * scale.view(-1, 1, 1, 1)
        fused.bias.data = self.bn.bias - self.bn.running_mean * scale
        return nn.Sequential(fused, nn.SiLU())


class GradientlessBlock(ForgetfulBlock):
    """As YOLOv7 does it, which is called without gradients: in place."""

    def fuse(self) -> nn.Module:
        self.conv.weight *= 1
        return super().fuse()


class AskingBlock(Block):
    """It asks for the class of its BatchNorm."""

    def switch_to_deploy(self) -> None:
        assert isinstance(self.bn, nn.BatchNorm2d), "no BatchNorm"
        fuse(self)


@pytest.mark.parametrize(
    ("block", "layout", "said"),
    [
        (FusingBlock, Layout.FOLDED, ""),
        (
            ForgetfulBlock,
            Layout.FOLDED,
            r"^ForgetfulBlock.fuse\(\) .* computes something else .*same-keys, or deploy",
        ),
        (ForgetfulBlock, Layout.SAME_KEYS, ""),
        (GradientlessBlock, Layout.FOLDED, r"^GradientlessBlock.fuse\(\) .* computes something else"),
        (
            AskingBlock,
            Layout.FOLDED,
            r"^AskingBlock.switch_to_deploy\(\) .* raises .*no BatchNorm.*same-keys, or deploy",
        ),
        (AskingBlock, Layout.SAME_KEYS, ""),
    ],
)
def test_own_fusing_that_is_wrong_after_a_fold_is_named(block: type[Block], layout: Layout, said: str) -> None:
    model = randomise(nn.Sequential(block(3, 8), block(8, 4)).double())
    assumed = bntool.fold(model, image(2, 3, 8, 8), layout=layout).plan.assumptions
    assert [bool(re.match(said, text)) for text in assumed] == [True] * bool(said)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "change"),
    [("0.weight", lambda weight: weight.flip(0)), ("1.running_var", lambda var: var - 1e-5), ("2.bias", torch.abs)],
)
def test_what_a_model_changes_when_it_loads_it_is_not_folded_as_the_file_has_it(
    name: str, change, layout: Layout, tmp_path
) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))).float()
    path, output = tmp_path / "net.pt", tmp_path / "folded.pt"
    torch.save(model.state_dict(), path)

    def upgrade(state, prefix, *_) -> None:
        state[prefix + name] = change(state[prefix + name])

    model.register_load_state_dict_pre_hook(lambda _module, *given: upgrade(*given))
    given = {"model": model, "input_shape": (2, 3, 5, 5), "layout": layout}
    if name == "2.bias":  # which no fold touches
        bntool.fold_checkpoint(path, output, **given)
        assert output.exists()
        return
    with pytest.raises(RefusedError, match=f"{name}: the model changes this tensor when it loads it"):
        bntool.fold_checkpoint(path, output, **given, tolerance=1.0)
    assert not output.exists()
