"""Deploy forms: parallel branches become the convolution that the model's own code makes of them, or not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import bntool
from bntool.checkpoints.application import change_state_dict
from bntool.errors import RefusedError, UsageError
from bntool.folding.deploy.planning import plan_deploy
from bntool.folding.folds import Level
from bntool.folding.options import FoldOptions
from bntool.folding.planning import plan_fold
from bntool.graphs.architectures.recognition import recognise
from bntool.graphs.architectures.structure import assume
from bntool.plan import SkipReason
from tests.folding.folding_networks import randomise
from tests.graphs.architectures.drawn_tensors import draw_state_dict


def make_branch(inputs: int, outputs: int, kernel: int, *, stride: int, groups: int, padding: int | None = None):
    branch = nn.Sequential()
    padding = kernel // 2 if padding is None else padding
    branch.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False))
    branch.add_module("bn", nn.BatchNorm2d(outputs))
    return branch


def merge_in_torch(branch: nn.Module, kernel: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel and bias of one branch, by running it on impulses rather than by a formula."""
    if isinstance(branch, nn.BatchNorm2d):
        norm, weight = branch, torch.zeros(branch.num_features, branch.num_features // groups, kernel, kernel)
        for channel in range(branch.num_features):
            weight[channel, channel % weight.shape[1], kernel // 2, kernel // 2] = 1
    else:
        norm, weight = branch.bn, branch.conv.weight
        weight = nn.functional.pad(weight, [(kernel - weight.shape[-1]) // 2] * 4)
    with torch.no_grad():
        zero = torch.zeros(1, norm.num_features, 1, 1, dtype=norm.weight.dtype)
        bias = norm.eval()(zero).flatten()
        scale = norm(zero + 1).flatten() - bias
        return weight.to(scale.dtype) * scale[:, None, None, None], bias


class Block(nn.Module):
    """As in github.com/DingXiaoH/RepVGG: the same names, and a switch to the deploy form."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.rbr_dense = make_branch(inputs, outputs, 3, stride=stride, groups=groups)
        self.rbr_1x1 = make_branch(inputs, outputs, 1, stride=stride, groups=groups)
        same = inputs == outputs and stride == 1
        self.rbr_identity = nn.BatchNorm2d(inputs) if same else None

    def forward(self, x):
        if hasattr(self, "rbr_reparam"):
            return torch.relu(self.rbr_reparam(x))
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return torch.relu(self.rbr_dense(x) + self.rbr_1x1(x) + identity)

    def switch_to_deploy(self) -> None:
        branches = [b for b in (self.rbr_dense, self.rbr_1x1, self.rbr_identity) if b is not None]
        parts = [merge_in_torch(branch, 3, self.groups) for branch in branches]
        conv = self.rbr_dense.conv
        merged = nn.Conv2d(
            conv.in_channels, conv.out_channels, 3, conv.stride, conv.padding, groups=conv.groups, bias=True
        )
        merged.weight.data = sum(weight for weight, _ in parts)
        merged.bias.data = sum(bias for _, bias in parts)
        self.rbr_reparam = merged
        del self.rbr_dense, self.rbr_1x1, self.rbr_identity


class Network(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.stages(x).mean((2, 3)))


def make_network() -> nn.Module:
    return randomise(Network(Block(3, 8, stride=2), Block(8, 8), Block(8, 8, groups=2), Block(8, 8, stride=2)))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 13, 11, generator=torch.Generator().manual_seed(1))


def test_a_live_model_takes_the_form_that_its_code_makes() -> None:
    model = make_network()
    result = bntool.fold(model, image(), layout="deploy")
    assert len(result.plan.folds) == 10
    assert {fold.level for fold in result.plan.folds} == {Level.MERGED}
    assert result.report is not None
    assert result.report.exact < 1e-13
    expected = copy.deepcopy(model)
    for block in expected.stages:
        block.switch_to_deploy()
    assert result.model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_file_fits_the_deploy_model_and_loads_by_its_record(tmp_path) -> None:
    model, path, output = make_network(), tmp_path / "net.pt", tmp_path / "deploy.pt"
    torch.save({"state_dict": model.state_dict(), "optimizer": {"state": {}, "param_groups": []}}, path)
    (tmp_path / "net.py").write_text(
        "from tests.folding.deploy.test_deploy_forms import make_network as build\n", encoding="utf-8"
    )
    spec = f"{tmp_path / 'net.py'}:build"
    result = bntool.fold_checkpoint(path, output, model=spec, layout="deploy", input_shape=(2, 3, 13, 11))
    assert result.agreement is not None
    deploy = make_network()
    for block in deploy.stages:
        block.switch_to_deploy()
    deploy.load_state_dict(torch.load(output, weights_only=True)["state_dict"])
    loaded = bntool.load_folded(make_network(), output)
    with torch.no_grad():
        expected = model.eval()(image())
        torch.testing.assert_close(deploy.eval()(image()), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded.eval()(image()), expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_a_bare_file_are_assumed_by_their_names(tmp_path) -> None:
    """RepVGG's, as YOLOv6 and YOLOv7 have them beside other layers; no architecture is recognised."""
    network = Network(Block(3, 8, stride=2), Block(8, 8), Block(8, 8, groups=2), nn.BatchNorm2d(8))
    model, path, output = randomise(network), tmp_path / "net.pt", tmp_path / "deploy.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(UsageError, match="eps is not known"):
        bntool.fold_checkpoint(path, output, layout="deploy")
    with pytest.raises(RefusedError, match=r"this would be assumed: stages\.0 and 2 more are blocks of RepVGG"):
        bntool.fold_checkpoint(path, output, layout="deploy", eps=1e-5, strict=True)
    result = bntool.fold_checkpoint(path, output, layout="deploy", eps=1e-5)
    assert len(result.plan.folds) == 8
    assert [skip.layer for skip in result.plan.skips] == ["stages.3"]
    deploy = copy.deepcopy(model)
    for block in deploy.stages[:3]:
        block.switch_to_deploy()
        nn.init.zeros_(block.rbr_reparam.weight)
    deploy.load_state_dict(torch.load(output, weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(deploy(image()), model(image()), rtol=1e-4, atol=1e-5)


def test_biases_of_convolutions_in_assumed_blocks_count(tmp_path) -> None:
    """RepVGG has none there; forks have."""
    model, path, output = Network(Block(3, 8, stride=2), Block(8, 8)), tmp_path / "net.pt", tmp_path / "deploy.pt"
    for block in model.stages:
        for branch in (block.rbr_dense, block.rbr_1x1):
            branch.conv.bias = nn.Parameter(torch.zeros(8))
    randomise(model)
    assert model.stages[1].rbr_1x1.conv.bias.abs().max() > 0.1
    torch.save(model.state_dict(), path)
    bntool.fold_checkpoint(path, output, layout="deploy", eps=1e-5)
    folded, tensors = copy.deepcopy(model), torch.load(output, weights_only=True)
    for block in folded.stages:
        block.switch_to_deploy()
    folded.load_state_dict(tensors)
    with torch.no_grad():
        torch.testing.assert_close(folded(image()), model(image()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["pruned", "parametrized", "scaled"])
def test_blocks_of_which_something_is_computed_are_not_assumed(how: str, tmp_path) -> None:
    model = randomise(Network(Block(3, 8, stride=2), Block(8, 8)))
    norm = model.stages[1].rbr_1x1.bn
    if how == "pruned":
        prune.l1_unstructured(norm, "weight", 0.5)
    elif how == "scaled":  # by a parameter of the block
        model.stages[1].alpha = nn.Parameter(torch.full((1,), 0.5))
    else:
        parametrize.register_parametrization(norm, "weight", nn.Softplus())
    torch.save(model.state_dict(), tmp_path / "net.pt")
    with pytest.raises(RefusedError, match="no known architecture"):
        bntool.fold_checkpoint(tmp_path / "net.pt", tmp_path / "deploy.pt", layout="deploy", eps=1e-5)


def test_other_shapes_under_these_names_are_no_such_block(tmp_path) -> None:
    model = randomise(Network(Block(3, 8), OtherDilation(8, 8)))  # a second kernel of more than one tap
    torch.save(model.state_dict(), tmp_path / "net.pt")
    with pytest.raises(RefusedError, match="no known architecture"):
        bntool.fold_checkpoint(tmp_path / "net.pt", tmp_path / "deploy.pt", layout="deploy", eps=1e-5)


class ReadTwice(Block):
    def forward(self, x):
        return super().forward(x) if hasattr(self, "rbr_reparam") else self.read(x)

    def read(self, x):
        wide = self.rbr_dense(x)
        return torch.relu(wide + self.rbr_1x1(x) + self.rbr_identity(x)) + wide


class OtherPadding(Block):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.rbr_1x1 = make_branch(8, 8, 3, stride=1, groups=1)
        self.rbr_dense = make_branch(8, 8, 5, stride=1, groups=1, padding=0)

    def forward(self, x):
        return torch.relu(self.rbr_dense(nn.functional.pad(x, (3, 1, 3, 1))) + self.rbr_1x1(x) + self.rbr_identity(x))


class OtherDilation(Block):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.rbr_1x1.conv = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)


class BothSigns(Block):
    """Of a branch the half: still a sum, with another factor."""

    def forward(self, x):
        if hasattr(self, "rbr_reparam"):
            return torch.relu(self.rbr_reparam(x))
        return torch.relu(self.rbr_dense(x) - self.rbr_1x1(x) * 0.5 + self.rbr_identity(x))


class OtherOrder(Block):
    def forward(self, x):
        return torch.relu(self.rbr_dense(self.rbr_1x1(x)) + self.rbr_identity(x))


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (ReadTwice, "is read outside of them"),
        (OtherPadding, "read different channels of"),
        (OtherDilation, "lie differently on what they read"),
        (OtherOrder, "reads another branch"),
    ],
)
def test_what_is_no_sum_of_branches_is_refused(block, why) -> None:
    model = randomise(Network(Block(3, 8), block(8, 8)))
    with pytest.raises(RefusedError, match=why):
        bntool.fold(model, image(), layout="deploy")


def test_factors_of_branches_count() -> None:
    """What the code's own form forgets: its outputs would be others."""
    model = randomise(Network(Block(3, 8), BothSigns(8, 8)))
    result = bntool.fold(model, image(), layout="deploy")
    assert result.report is not None
    assert result.report.exact < 1e-13
    forgetful = copy.deepcopy(model)
    forgetful.stages[1].switch_to_deploy()
    with torch.no_grad():
        assert not torch.allclose(forgetful(image()), model(image()), rtol=0.1)


def test_batchnorms_outside_of_blocks_stay_as_in_the_deploy_model() -> None:
    model = randomise(Network(Block(3, 8), nn.BatchNorm2d(8)))
    result = bntool.fold(model, image(), layout="deploy")
    assert [(skip.layer, skip.reason) for skip in result.plan.skips] == [("stages.1", SkipReason.NOT_SELECTED)]
    state = result.model.state_dict()
    for name, tensor in model.stages[1].state_dict().items():
        assert torch.equal(state[f"stages.1.{name}"], tensor)


def test_other_networks_have_no_deploy_form() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    with pytest.raises(RefusedError, match="no module of the model has a deploy form"):
        bntool.fold(model, image(), layout="deploy")
    with pytest.raises(UsageError, match="takes all layers"):
        bntool.fold(make_network(), image(), layout="deploy", layers=["stages.0.*"])


def list_shapes_of_repvgg_a0() -> dict[str, tuple[int, ...]]:
    """Of timm 1.0: a stem and four stages of 2, 4, 14 and 1 blocks, the first of each with stride 2."""
    shapes: dict[str, tuple[int, ...]] = {}
    before = 3
    stages = [("stem", 48), *((f"stages.{i}.{j}", width) for i, (depth, width) in enumerate(
        ((2, 48), (4, 96), (14, 192), (1, 1280))) for j in range(depth))]  # fmt: skip
    for name, width in stages:
        norms = ["conv_kxk.bn", "conv_1x1.bn"]
        if before == width and not name.endswith(".0"):
            norms.append("identity")
        shapes[f"{name}.conv_kxk.conv.weight"] = (width, before, 3, 3)
        shapes[f"{name}.conv_1x1.conv.weight"] = (width, before, 1, 1)
        for norm in norms:
            roles = ("weight", "bias", "running_mean", "running_var")
            shapes |= {f"{name}.{norm}.{role}": (width,) for role in roles}
        before = width
    return {**shapes, "head.fc.weight": (1000, 1280), "head.fc.bias": (1000,)}


def test_what_lies_between_is_assumed_with_the_forward() -> None:
    """A direct fold holds for every activation; others only for what the catalogue has."""
    state_dict = draw_state_dict(list_shapes_of_repvgg_a0())
    graph = assume(state_dict, recognise(state_dict))
    plan = plan_fold(state_dict, graph)
    further = [fold.layer for fold in plan.folds if fold.level is not Level.DIRECT]
    assert {fold.level for fold in plan.folds} == {Level.DIRECT, Level.BRANCH}
    said = f"{len(further)} of the folds go past ({', '.join(further[:3])} and {len(further) - 3} more)"
    assert [said in one for one in plan.assumptions] == [False, True, False]
    direct = plan_fold(state_dict, graph, FoldOptions(direct_only=True))
    assert {fold.level for fold in direct.folds} == {Level.DIRECT}
    assert len(direct.assumptions) == 2


def test_the_catalogue_knows_the_branches_of_a_bare_file() -> None:
    shapes = list_shapes_of_repvgg_a0()
    state_dict = draw_state_dict(shapes)
    (architecture,) = recognise(state_dict)
    assert architecture.names[0] == "timm:repvgg_a0"
    plan = plan_deploy(state_dict, assume(state_dict, (architecture,)))
    assert len(plan.folds) == 61
    assert plan.assumptions[0].startswith("the forward is that of timm:repvgg_a0")
    changed = change_state_dict(state_dict, plan.steps)
    assert sum(name.endswith(".weight") for name in changed.tensors) == 23  # a convolution for each block, and the head
    assert changed.tensors["stages.0.1.reparam_conv.weight"].shape == (48, 48, 3, 3)


class Pair(nn.Sequential):
    """A convolution and its BatchNorm, or a BatchNorm and its linear, with a form that takes its place."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def fuse(self) -> nn.Module:
        """As a linear map: its answers to zero and to impulses."""
        first, second = self
        if isinstance(second, nn.Linear):
            zero = self(torch.zeros(1, second.in_features))
            merged = nn.Linear(second.in_features, second.out_features)
            merged.weight.data = (self(torch.eye(second.in_features)) - zero).T.contiguous()
            merged.bias.data = zero[0]
            return merged
        weight, bias = merge_in_torch(nn.ModuleDict({"conv": first, "bn": second}), first.kernel_size[0], first.groups)
        options = {"stride": first.stride, "padding": first.padding, "groups": first.groups}
        merged = nn.Conv2d(first.in_channels, first.out_channels, first.kernel_size, **options)
        merged.weight.data, merged.bias.data = weight, bias
        return merged


class Depthwise(nn.Module):
    """As the token mixers of RepViT: two kernels and the tensor itself, then a BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Pair(
            c=nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False), bn=nn.BatchNorm2d(channels)
        )
        self.conv1 = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.bn(self.conv(x) + self.conv1(x) + x)

    def fuse(self) -> nn.Module:
        merged, small = self.conv.fuse(), nn.functional.pad(self.conv1.weight.data, [1, 1, 1, 1])
        merged.weight.data += small
        merged.weight.data[:, :, 1, 1] += 1
        merged.bias.data += self.conv1.bias.data
        zero = torch.zeros(1, self.bn.num_features, 1, 1)
        scale = (self.bn(zero + 1) - self.bn(zero)).flatten()
        merged.bias.data = self.bn(merged.bias.data.reshape(1, -1, 1, 1)).flatten()
        merged.weight.data *= scale[:, None, None, None]
        return merged


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Pair(bn=nn.BatchNorm1d(8), l=nn.Linear(8, 3))
        self.head_dist = Pair(bn=nn.BatchNorm1d(8), l=nn.Linear(8, 3))

    def forward(self, x):
        return (self.head(x) + self.head_dist(x)) / 2

    def fuse(self) -> nn.Module:
        one, other = self.head.fuse(), self.head_dist.fuse()
        one.weight.data = (one.weight.data + other.weight.data) / 2
        one.bias.data = (one.bias.data + other.bias.data) / 2
        return one


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Pair(c=nn.Conv2d(3, 8, 3, 2, 1, bias=False), bn=nn.BatchNorm2d(8))
        self.mixer = Depthwise(8)
        self.last = Pair(c=nn.Conv2d(8, 8, 1, bias=False), bn=nn.BatchNorm2d(8))
        self.classify = TwoHeads()

    def forward(self, x):
        x = torch.relu(self.mixer(torch.relu(self.stem(x))))
        return self.classify(torch.relu(self.last(x)).mean((2, 3)))


def test_pairs_sums_of_kernels_and_two_heads_take_the_place_of_their_modules() -> None:
    """As in timm's RepViT, LeViT, TinyViT, EfficientViT-M and SHViT."""
    model = randomise(Fused())
    result = bntool.fold(model, image(), layout="deploy")
    assert len(result.plan.folds) == 6
    assert result.report is not None
    assert result.report.exact < 1e-13
    names = ["stem", "mixer", "last", "classify"]
    assert list(result.model.state_dict()) == [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            setattr(expected, name, getattr(expected, name).fuse())
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
