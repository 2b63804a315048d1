"""Errors layer by layer: where outputs must stay they do, and a layer that is wrong is found."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bntool
from bntool.folding.unchanged_outputs import find_points
from bntool.graphs.traced.tracing import trace
from bntool.verification.layer_agreement import compare_layers, watch
from tests.folding.folding_networks import Functional, fold, randomise


def chain(self, x):
    return self.bn2(self.conv2(F.relu(self.bn(self.conv(x)))))


def norm_on_norm(self, x):
    return self.bn2(self.bn(self.conv(x)))


def through_a_sum(self, x):
    return self.bn2(self.bn(self.conv(x)) + self.conv2(x))


def forward_into_conv(self, x):
    return self.conv2(self.bn(F.relu(x)))


def forward_into_conv_that_is_folded(self, x):
    return self.bn2(self.conv2(self.bn(F.relu(x))))


def called_as_function(self, x):
    bn = self.bn
    return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)


POINTS = {
    chain: {"bn": "bn", "bn2": "bn2"},
    norm_on_norm: {"bn2": "bn2"},
    through_a_sum: {"bn2": "bn2"},
    forward_into_conv: {"bn": "conv2"},
    forward_into_conv_that_is_folded: {"bn2": "bn2"},
    called_as_function: {"bn": "bn"},  # but its module is never called, so nothing is compared
}


@pytest.mark.parametrize("forward", POINTS, ids=lambda forward: forward.__name__)
def test_outputs_stay_where_they_are_said_to(forward) -> None:
    modules = {"conv": nn.Conv2d(4, 4, 3), "conv2": nn.Conv2d(4, 4, 3), "bn": nn.BatchNorm2d(4)}
    used = {n: m for n, m in {**modules, "bn2": nn.BatchNorm2d(4)}.items() if n in forward.__code__.co_names}
    model = randomise(Functional(forward, **used))
    x = torch.randn(2, 4, 9, 9)
    _, plan = fold(model, x)
    assert find_points(trace(model, x), plan) == POINTS[forward]
    layers = bntool.fold(model, x).report.layers
    expected = [] if forward is called_as_function else list(POINTS[forward].items())
    assert [(layer.layer, layer.at) for layer in layers] == expected
    assert all(layer.exact < 1e-13 and layer.stored < 1e-5 for layer in layers)


def test_a_layer_that_is_wrong_is_found() -> None:
    layers = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    model = nn.DataParallel(randomise(nn.Sequential(*layers)))
    folded = copy.deepcopy(model)
    with torch.no_grad():
        folded.module[3].weight[1] *= 1.5
    x = torch.randn(2, 4, 5, 5)
    found = []
    for each in (model, folded):
        with watch(each, ["1", "4"]) as seen:
            each(x)
        found.append(seen)
        assert not any(module._forward_hooks for module in each.modules())
    first, second = compare_layers({"1": "1", "4": "4"}, None, tuple(found))
    assert first.stored == 0
    assert second.stored > 0.01
