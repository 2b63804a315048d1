"""Which layers stand where, and what their pictures count; judged by torch."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import bntool
from bntool.inspection.findings import Severity
from bntool.reports.inspection import show_inspection
from bntool.reports.layers import arrange_rows, find_stages, list_scales, picture_scales, picture_variances
from bntool.reports.plain import draw as draw_plain
from tests.reports.test_terminal import show, visible

# of networks as their authors name them
STAGES = {
    "resnet": {
        "": ["bn1", "neck_bn"],
        "layer1": ["layer1.0.bn1", "layer1.0.downsample.1", "layer1.1.bn1"],
        "layer2": ["layer2.0.bn1"],
    },
    "detr": {
        "backbone.0.body": ["backbone.0.body.bn1"],
        "backbone.0.body.layer1": ["backbone.0.body.layer1.0.bn1"],
        "backbone.0.body.layer2": ["backbone.0.body.layer2.0.bn1"],
    },
    "detector": {
        "backbone": ["backbone.bn1"],
        "backbone.layer1": ["backbone.layer1.0.bn1"],
        "neck.fpn_convs.0": ["neck.fpn_convs.0.bn"],
        "head": ["head.cls.bn"],
    },
    "mobilenet": {"features.0": ["features.0.1"], "features.1": ["features.1.conv.0.1", "features.1.conv.2"]},
    "vgg": {"features": ["features.1", "features.4"]},
    "densenet": {
        "features": ["features.norm0", "features.norm5"],
        "features.denseblock1": ["features.denseblock1.denselayer1.norm1"],
        "features.transition1": ["features.transition1.norm"],
    },
    "inception": {
        "Conv2d_1a_3x3": ["Conv2d_1a_3x3.bn"],
        "Mixed_5b": ["Mixed_5b.branch1x1.bn", "Mixed_5b.branch_pool.bn"],
    },
    "pointpillars": {
        "backbone2d.blocks.0": ["backbone2d.blocks.0.1"],
        "backbone2d.deblocks.0": ["backbone2d.deblocks.0.1"],
        "head3d": ["head3d.conv.1"],
    },
    "sequential": {"": ["1", "4"]},
    "layer alone": {"": [""]},
}  # fmt: skip


def make_network(*, depth: int = 7) -> nn.Module:
    """Four stages, trained as it seems."""
    torch.manual_seed(0)
    model = nn.Module()
    for stage in range(1, 5):
        blocks = [nn.ModuleDict({"bn1": nn.BatchNorm2d(8), "bn2": nn.BatchNorm2d(8)}) for _ in range(depth)]
        model.add_module(f"layer{stage}", nn.Sequential(*blocks))
    model.add_module("bn1", nn.BatchNorm2d(8))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_()
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.num_batches_tracked.fill_(900)
    return model


@pytest.fixture
def model() -> nn.Module:
    return make_network()


def damage(model: nn.Module) -> None:
    model.get_submodule("layer3.2.bn1").running_var[5] = math.nan
    model.get_submodule("layer2.4.bn2").weight.data[:] = 0
    model.get_submodule("layer2.4.bn2").weight.data[3] = 1


def test_what_is_wrong_comes_first_and_the_rest_is_put_together_by_stage(model: nn.Module) -> None:
    damage(model)
    (state_dict,) = bntool.inspect(model.state_dict()).state_dicts
    rows = arrange_rows(state_dict, every=False)
    assert [(row.name, len(row.layers), row.worst) for row in rows] == [
        ("layer3.2.bn1", 1, Severity.ERROR),
        ("layer2.4.bn2", 1, Severity.WARNING),
        ("layer1", 14, None),
        ("layer2", 13, None),
        ("layer3", 13, None),
        ("layer4", 14, None),
        ("bn1", 1, None),
    ]
    every = arrange_rows(state_dict, every=True)
    assert sorted(row.name for row in every) == sorted(layer.name for layer in state_dict.layers)
    assert [row.name for row in every[:2]] == ["layer3.2.bn1", "layer2.4.bn2"]


def test_many_layers_that_are_wrong_are_put_together_too() -> None:
    (state_dict,) = bntool.inspect(make_network(depth=4).apply(reset).state_dict()).state_dicts
    rows = arrange_rows(state_dict, every=False)
    assert [(row.name, len(row.layers)) for row in rows] == [(f"layer{i}", 8) for i in (1, 2, 3, 4)] + [("bn1", 1)]
    assert {row.worst for row in rows} == {Severity.WARNING}


def reset(layer: nn.Module) -> None:
    if isinstance(layer, nn.BatchNorm2d):
        layer.reset_running_stats()


def test_pictures_count_every_channel(model: nn.Module) -> None:
    damage(model)
    (state_dict,) = bntool.inspect(model.state_dict()).state_dicts
    rows = arrange_rows(state_dict, every=False)
    for pictures, lost in ((picture_variances(rows), 1), (picture_scales(rows), 1)):  # NaN lies nowhere
        assert sum(sum(counts or ()) for counts in pictures.counts) == 57 * 8 - lost


def test_scales_are_what_eval_mode_multiplies_by(model: nn.Module) -> None:
    layer = model.get_submodule("layer1.0.bn1").eval().double()
    layer.weight.data.uniform_(-2, 2)
    zero, one = torch.zeros(1, 8, 1, 1).double(), torch.ones(1, 8, 1, 1).double()
    expected = (layer(one) - layer(zero)).abs().flatten().tolist()
    found = bntool.inspect({"bn." + name: value for name, value in layer.state_dict().items()}).state_dicts[0].layers[0]
    assert list_scales(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_screen_shows_the_verdict_first_then_what_is_wrong(model: nn.Module, width: int) -> None:
    damage(model)
    inspection = bntool.inspect(model.state_dict())
    blocks = list(show_inspection("model.pt", inspection, every_layer=False, every_tensor=False, pictures=True))
    text = visible(show(blocks, width))
    assert text.splitlines()[0].rstrip() == "model.pt: 1 layer sick, 1 suspicious"
    order = ["X  layer3.2.bn1", "!  layer2.4.bn2", "X error non-finite in layer3.2.bn1 (channel 5)", "to do:"]
    order += ["layer1  ", "layer4  ", "   bn1"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert len(text.splitlines()) < 30
    assert re.search(r"layer1 +14 ", text)


def test_a_pipe_gives_each_layer_a_line(model: nn.Module) -> None:
    damage(model)
    inspection = bntool.inspect(model.state_dict())
    lines = draw_plain(
        show_inspection("model.pt", inspection, every_layer=True, every_tensor=False, pictures=False)
    ).splitlines()
    names = [line.split()[0] for line in lines if re.match(r"(layer\d\.\d\.bn\d|bn1) ", line)]
    assert sorted(names) == sorted(layer.name for layer in inspection.state_dicts[0].layers)


def test_names_that_differ_in_the_middle_differ_on_a_terminal_of_80_columns() -> None:
    tensors = {
        f"net.encoder.layer{i}.0.downsample.1.{key}": value
        for i in (1, 2, 3, 4)
        for key, value in nn.BatchNorm2d(4).state_dict().items()
    }
    for count, value in enumerate(tensors.values()):
        value.copy_(torch.rand(4) * 3) if value.ndim else value.fill_(count)
    inspection = bntool.inspect(tensors)
    text = visible(
        show(list(show_inspection("n.pt", inspection, every_layer=False, every_tensor=False, pictures=True)), 80)
    )
    shown = [line.split()[1] for line in text.splitlines() if "downsample" in line and line[:3] in ("!  ", "   ")]
    assert len(shown) == len(set(shown)) == 4


@pytest.mark.parametrize("name", STAGES)
def test_layers_of_a_stage_are_together(name: str) -> None:
    stages = STAGES[name]
    names = [layer for layers in stages.values() for layer in layers]
    found = {stage: [names[index] for index in positions] for stage, positions in find_stages(names).items()}
    assert found == stages
