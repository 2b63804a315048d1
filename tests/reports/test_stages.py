"""Stages of networks as their authors name them."""

from __future__ import annotations

import pytest

from bntool.reports.stages import find_stages

NETWORKS = {
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


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_of_a_stage_are_together(name: str) -> None:
    stages = NETWORKS[name]
    names = [layer for layers in stages.values() for layer in layers]
    found = {stage: [names[index] for index in positions] for stage, positions in find_stages(names).items()}
    assert found == stages
