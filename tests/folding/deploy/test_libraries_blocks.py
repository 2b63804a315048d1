"""Blocks as libraries build them, small: timm's FastViT, RepGhost, GhostNetV3, PP-LCNetV2, iFormer; ultralytics' YOLO.

The structure, the names and the order of calls are theirs. What their code makes in place of the branches has its shape
here, and elements of its own: the outputs are right only with those that the fold gives.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bntool
from bntool.errors import RefusedError, VerificationError
from bntool.folding.deploy.forms import find_blocks
from tests.folding.folding_networks import randomise

_CHANNELS = 6


class ConvNorm(nn.Module):
    """A convolution and its BatchNorm, which timm's ConvNormAct calls ``bn``."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn(self.conv(x))


def make_convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)


class MobileOneBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, *, branches: int = 1, scale: bool = True) -> None:
        super().__init__()
        self.kernel = kernel
        self.reparam_conv = None
        self.identity = nn.BatchNorm2d(channels)
        convolutions = [ConvNorm(channels, channels, kernel, groups=channels) for _ in range(branches)]
        self.conv_kxk = nn.ModuleList(convolutions) if branches else None
        self.conv_scale = ConvNorm(channels, channels, 1, groups=channels) if scale else None

    def forward(self, x):
        out = (0 if self.conv_scale is None else self.conv_scale(x)) + self.identity(x)
        for branch in self.conv_kxk or ():
            out += branch(x)
        return out


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 2, channels).reshape(channels, 1, 1))

    def forward(self, x):
        return x * self.gamma


class RepMixer(nn.Module):
    """FastViT: x + gamma (mixer(x) - norm(x))."""

    def __init__(self, channels: int = _CHANNELS) -> None:
        super().__init__()
        self.channels = channels
        self.reparam_conv = None
        self.norm = MobileOneBlock(channels, 3, branches=0, scale=False)
        self.mixer = MobileOneBlock(channels, 3)
        self.layer_scale = LayerScale(channels)

    def forward(self, x):
        if self.reparam_conv is not None:
            return self.reparam_conv(x)
        return x + self.layer_scale(self.mixer(x) - self.norm(x))

    def reparameterize(self) -> None:
        self.reparam_conv = make_convolution(self.channels, self.channels, 3, groups=self.channels)
        del self.norm, self.mixer, self.layer_scale


class LargeKernel(nn.Module):
    """FastViT: two kernels of one stride."""

    def __init__(self, channels: int = _CHANNELS) -> None:
        super().__init__()
        self.reparam_conv = None
        self.large_conv = ConvNorm(channels, 2 * channels, 7, stride=2, groups=channels)
        self.small_conv = ConvNorm(channels, 2 * channels, 3, stride=2, groups=channels)

    def forward(self, x):
        return self.large_conv(x) + self.small_conv(x) if self.reparam_conv is None else self.reparam_conv(x)

    def reparameterize(self) -> None:
        channels = self.large_conv.conv.in_channels
        self.reparam_conv = make_convolution(channels, 2 * channels, 7, stride=2, groups=channels)
        del self.large_conv, self.small_conv


class PositionalEncoding(nn.Module):
    """FastViT: a convolution with a bias, and no BatchNorm."""

    def __init__(self, channels: int = _CHANNELS) -> None:
        super().__init__()
        self.reparam_conv = None
        self.pos_enc = make_convolution(channels, channels, 7, groups=channels)

    def forward(self, x):
        return self.pos_enc(x) + x if self.reparam_conv is None else self.reparam_conv(x)

    def reparameterize(self) -> None:
        self.reparam_conv = make_convolution(_CHANNELS, _CHANNELS, 7, groups=_CHANNELS)
        del self.pos_enc


class RepGhost(nn.Module):
    """The sum takes the place of one of its branches; the BatchNorm of the first convolution stays."""

    def __init__(self, channels: int = _CHANNELS) -> None:
        super().__init__()
        self.primary_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.fusion_conv = nn.Sequential(nn.Identity())
        self.fusion_bn = nn.Sequential(nn.BatchNorm2d(channels))
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x):
        first = self.primary_conv(x)
        second = self.cheap_operation(first)
        for conv, norm in zip(self.fusion_conv, self.fusion_bn, strict=True):
            second = second + norm(conv(first))
        return torch.relu(second)

    def switch_to_deploy(self) -> None:
        self.cheap_operation = make_convolution(_CHANNELS, _CHANNELS, 3, groups=_CHANNELS)
        del self.fusion_conv, self.fusion_bn
        self.fusion_conv, self.fusion_bn = [], []


class GhostV3(nn.Module):
    """Two sums in one module, the second of which reads the first right away where nothing activates it."""

    def __init__(self, inputs: int = _CHANNELS, channels: int = _CHANNELS) -> None:
        super().__init__()
        self.sizes = inputs, channels
        self.infer_mode = False
        self.primary_rpr_conv = nn.ModuleList([ConvNorm(inputs, channels, 1) for _ in range(3)])
        self.primary_rpr_skip = None
        self.cheap_rpr_skip = nn.BatchNorm2d(channels)
        self.cheap_rpr_conv = nn.ModuleList([ConvNorm(channels, channels, 3, groups=channels) for _ in range(3)])
        self.cheap_rpr_scale = ConvNorm(channels, channels, 1, groups=channels)

    def forward(self, x):
        if self.infer_mode:
            first = self.primary_conv(x)
            return torch.cat([first, self.cheap_operation(first)], dim=1)
        first = 0
        for branch in self.primary_rpr_conv:
            first += branch(x)
        second = self.cheap_rpr_scale(first) + self.cheap_rpr_skip(first)
        for branch in self.cheap_rpr_conv:
            second += branch(first)
        return torch.cat([first, second], dim=1)

    def switch_to_deploy(self) -> None:
        inputs, channels = self.sizes
        self.primary_conv = nn.Sequential(make_convolution(inputs, channels, 1), nn.Identity())
        self.cheap_operation = nn.Sequential(make_convolution(channels, channels, 3, groups=channels), nn.Identity())
        del self.primary_rpr_conv, self.primary_rpr_skip
        del self.cheap_rpr_conv, self.cheap_rpr_scale, self.cheap_rpr_skip
        self.infer_mode = True


class GhostBottleneckV3(nn.Module):
    """Branches that read a concatenation, beside modules with forms of their own; what it adds up is no branch."""

    def __init__(self) -> None:
        super().__init__()
        wide = 2 * _CHANNELS
        self.ghost1 = GhostV3()
        self.dw_rpr_conv = nn.ModuleList([ConvNorm(wide, wide, 3, stride=2, groups=wide) for _ in range(2)])
        self.dw_rpr_scale = ConvNorm(wide, wide, 1, stride=2, groups=wide)
        self.conv_dw, self.bn_dw = nn.Identity(), nn.Identity()
        self.ghost2 = GhostV3(wide, 4)
        self.shortcut = nn.Sequential(nn.Conv2d(_CHANNELS, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.infer_mode = False

    def forward(self, x):
        out = self.ghost1(x)
        if self.infer_mode:
            out = self.bn_dw(self.conv_dw(out))
        else:
            joined = self.dw_rpr_scale(out)
            for branch in self.dw_rpr_conv:
                joined += branch(out)
            out = joined
        out = self.ghost2(torch.relu(out))
        out += self.shortcut(x)
        return out

    def reparameterize(self) -> None:
        wide = 2 * _CHANNELS
        self.conv_dw = make_convolution(wide, wide, 3, stride=2, groups=wide)
        del self.dw_rpr_conv, self.dw_rpr_scale
        self.infer_mode = True


class MultiScale(nn.Module):
    """PP-LCNetV2: kernels of several sizes, and a residual around something else."""

    def __init__(self) -> None:
        super().__init__()
        self.dw_conv = None
        self.dw_conv_list = nn.ModuleList(
            [ConvNorm(_CHANNELS, _CHANNELS, size, groups=_CHANNELS) for size in (5, 3, 1)]
        )
        self.pw_conv = ConvNorm(_CHANNELS, _CHANNELS, 1)

    def forward(self, x):
        if self.dw_conv is None:
            out = self.dw_conv_list[0](x)
            for branch in self.dw_conv_list[1:]:
                out = out + branch(x)
        else:
            out = self.dw_conv(x)
        return self.pw_conv(torch.relu(out)) + x

    def reparameterize(self) -> None:
        self.dw_conv = make_convolution(_CHANNELS, _CHANNELS, 5, groups=_CHANNELS)
        del self.dw_conv_list
        self.dw_conv_list = None


class Network(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = ConvNorm(3, _CHANNELS, 3)
        self.block = block

    def forward(self, x):
        return self.block(torch.relu(self.stem(x)))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))


def fold_to_deploy(model: nn.Module) -> bntool.FoldResult:
    """The fold, held against the original and against the names that the own code gives."""
    result = bntool.fold(model, image(), layout="deploy")
    with torch.no_grad():
        torch.testing.assert_close(result.model(image()), model(image()), rtol=1e-4, atol=1e-5)
    assert result.report is not None
    assert result.report.exact < 1e-13
    return result


def list_modules(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name in model.state_dict()}


@pytest.mark.parametrize(
    ("block", "modules", "folds"),
    [
        (RepMixer, ["reparam_conv"], 4),
        (LargeKernel, ["reparam_conv"], 2),
        (PositionalEncoding, ["reparam_conv"], 0),
        (RepGhost, ["primary_conv.0", "primary_conv.1", "cheap_operation"], 2),
        (GhostV3, ["primary_conv.0", "cheap_operation.0"], 8),
        (MultiScale, ["dw_conv", "pw_conv.conv", "pw_conv.bn"], 3),
    ],
)
def test_branches_become_the_convolution_of_their_code(block, modules, folds) -> None:
    model = randomise(Network(block()))
    result = fold_to_deploy(model)
    assert list_modules(result.model) == {"stem.conv", "stem.bn", *(f"block.{module}" for module in modules)}
    assert len(result.plan.folds) == folds
    kept = [layer for layer in ("stem.bn", "block.primary_conv.1", "block.pw_conv.bn") if layer in list_modules(model)]
    assert [skip.layer for skip in result.plan.skips] == kept


def test_branches_of_nested_blocks_may_read_a_concatenation() -> None:
    result = fold_to_deploy(randomise(Network(GhostBottleneckV3())))
    ghosts = [f"{ghost}.{part}.0" for ghost in ("ghost1", "ghost2") for part in ("primary_conv", "cheap_operation")]
    own = [*ghosts, "conv_dw", "shortcut.0", "shortcut.1"]
    assert list_modules(result.model) == {"stem.conv", "stem.bn", *(f"block.{module}" for module in own)}
    assert len(result.plan.folds) == 19


class YoloConv(ConvNorm):
    """As ultralytics' Conv: the model's fuse() takes its BatchNorm away."""

    def forward(self, x):
        out = self.conv(x)
        return out if self.bn is None else self.bn(out)


class YoloRepConv(nn.Module):
    def __init__(self, channels: int = _CHANNELS) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = YoloConv(channels, channels, 3), YoloConv(channels, channels, 1)

    def forward(self, x):
        if hasattr(self, "conv"):
            return torch.relu(self.conv(x))
        return torch.relu(self.conv1(x) + self.conv2(x) + self.bn(x))


class Yolo(nn.Module):
    """The whole model has the method, with an argument that says how much it prints."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(YoloConv(3, _CHANNELS, 3), YoloRepConv(), YoloConv(_CHANNELS, 4, 1))

    def forward(self, x):
        return self.model(x)

    def fuse(self, verbose: bool = True):
        assert not verbose
        for module in self.model.modules():
            if isinstance(module, YoloConv):
                conv = module.conv
                module.conv = make_convolution(conv.in_channels, conv.out_channels, conv.kernel_size[0])
                module.bn = None
            elif isinstance(module, YoloRepConv):
                module.conv = make_convolution(_CHANNELS, _CHANNELS, 3)
                del module.conv1, module.conv2, module.bn
        return self


def test_the_method_of_the_whole_model_folds_what_has_no_branches_too() -> None:
    result = fold_to_deploy(randomise(Yolo()))
    assert list_modules(result.model) == {"model.0.conv", "model.1.conv", "model.2.conv"}
    assert len(result.plan.folds) == 5


def test_common_names_make_no_block_of_a_bare_file() -> None:
    """TinyViT's stem: one convolution after the other."""
    children = [f"patch_embed.{child}.{leaf}" for child in ("conv1", "conv2") for leaf in ("conv.weight", "bn.weight")]
    assert not find_blocks(children, ["timm:tiny_vit_5m_224"])
    assert not find_blocks(children, deployed=["patch_embed.conv1.weight", "patch_embed.conv2.weight"])
    assert find_blocks(children, deployed=["patch_embed.conv.weight"])


class ScalesInPlace(nn.Module):
    """As timm's NextViT: weights are scaled where they are, and the names of the linear stay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(_CHANNELS)
        self.fc1 = nn.Conv2d(_CHANNELS, 4, 1)

    def forward(self, x):
        return self.fc1(self.norm(x))

    def reparameterize(self) -> None:
        self.fc1.weight.data.mul_(3)
        self.norm = nn.Identity()


def test_own_code_may_scale_the_weights_that_are_there() -> None:
    result = fold_to_deploy(randomise(Network(ScalesInPlace())))
    assert list_modules(result.model) == {"stem.conv", "stem.bn", "block.fc1"}


class Gated(nn.Module):
    """As timm's EfficientViM: more than its BatchNorm goes into the convolution, and the names do not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv = ConvNorm(_CHANNELS, _CHANNELS, 3, groups=_CHANNELS)
        self.fused = False

    def forward(self, x):
        return self.dwconv(x) if self.fused else x + 0.25 * (self.dwconv(x) - x)

    def fuse(self) -> nn.Module:
        self.dwconv.conv = make_convolution(_CHANNELS, _CHANNELS, 3, groups=_CHANNELS)
        self.dwconv.bn = nn.Identity()
        self.fused = True
        return self


class Renaming(RepMixer):
    def reparameterize(self) -> None:
        super().reparameterize()
        self.other_conv, self.reparam_conv = self.reparam_conv, None


def test_what_the_own_code_merges_otherwise_is_refused() -> None:
    with pytest.raises(VerificationError, match="may merge more in its deploy form than parallel"):
        bntool.fold(randomise(Network(Gated())), image(), layout="deploy")
    with pytest.raises(RefusedError, match=r"has tensors .* that are not made \(block.other_conv.bias"):
        bntool.fold(randomise(Network(Renaming())), image(), layout="deploy")


def test_the_mode_of_a_model_that_is_loaded_stays(tmp_path) -> None:
    model, path, output = randomise(Network(RepMixer())), tmp_path / "net.pt", tmp_path / "deploy.pt"
    torch.save(model.state_dict(), path)
    bntool.fold_checkpoint(path, output, model=copy.deepcopy(model), layout="deploy", input_shape=(2, 3, 12, 10))
    fresh = Network(RepMixer()).train()
    fresh.stem.eval()
    loaded = bntool.load_folded(fresh, output)
    assert (loaded.training, loaded.stem.bn.training) == (True, False)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(image()), model(image()), rtol=1e-4, atol=1e-5)
