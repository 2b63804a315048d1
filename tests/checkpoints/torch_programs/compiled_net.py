"""A network as torch compiles it: scripted, traced and exported, and how torch loads each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, affine=False))
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.bn(self.conv(x)))
        return y * self.scale


def make_net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net(torch.randn(4, 3, 6, 6))
    return net.eval()


INPUT = torch.linspace(-1, 1, 216).reshape(2, 3, 6, 6)


def script(path: Path) -> None:
    torch.jit.script(make_net()).save(path)


def trace(path: Path) -> None:
    torch.jit.trace(make_net(), INPUT).save(path)


def export(path: Path) -> None:
    torch.export.save(torch.export.export(make_net(), (INPUT,)), path)


def load_script(path: Path) -> tuple[dict[str, torch.Tensor], Callable[..., Any]]:
    module = torch.jit.load(path)
    return module.state_dict(), module


def load_export(path: Path) -> tuple[dict[str, torch.Tensor], Callable[..., Any]]:
    program = torch.export.load(path)
    return dict(program.state_dict), program.module()


MAKERS: dict[str, tuple[Callable[[Path], None], Any]] = {
    "script.pt": (script, load_script),
    "trace.pt": (trace, load_script),
    "export.pt2": (export, load_export),
}
