"""Multiply-adds, counted by hand for one network."""

from __future__ import annotations

import torch
from torch import nn

from bntool.folding.multiply_adds import count_cost
from bntool.graphs.traced.tracing import trace
from tests.folding.folding_networks import Functional


def build() -> nn.Module:
    def forward(self, x):
        x = self.bn(self.conv(x))
        x = self.bn2(self.up(self.bn3(x.relu())))
        return self.linear(x.mean((2, 3)))

    return Functional(
        forward,
        conv=nn.Conv2d(4, 8, 3, groups=2, bias=False),
        bn=nn.BatchNorm2d(8),
        bn3=nn.BatchNorm2d(8),
        up=nn.ConvTranspose2d(8, 6, 2, stride=2),
        bn2=nn.BatchNorm2d(6),
        linear=nn.Linear(6, 5),
    )


def test_counted_by_hand() -> None:
    model, x = build().train(), torch.randn(2, 4, 7, 7)
    cost = count_cost(model, x, trace(model, x), gone=["bn", "bn2"])
    conv, up, linear = 2 * 8 * 25 * (2 * 9), 2 * 8 * 25 * (6 * 4), 2 * 6 * 5
    norms = {"bn": 2 * 8 * 25, "bn3": 2 * 8 * 25, "bn2": 2 * 6 * 100}
    assert cost.shapes == ((2, 4, 7, 7),)
    assert cost.before == conv + up + linear + sum(norms.values())
    assert cost.removed == norms["bn"] + norms["bn2"]
    assert model.training


def test_each_call_counts() -> None:
    model = Functional(lambda self, x: self.bn(self.bn(x)), bn=nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4)
    assert count_cost(model, x, trace(model, x), gone=["bn"]).removed == 2 * x.numel()
