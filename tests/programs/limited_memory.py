"""Recalibrate exactly where a quarter of the batches fits: refused, and then by those that do."""

import resource
import sys
from pathlib import Path

import torch
from torch import nn

from bntool.errors import RefusedError
from bntool.recalibration.live import recalibrate

widths = ((1, 64), (64, 64))
layers = [layer for i, o in widths for layer in (nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU())]
model = nn.Sequential(*layers[:-1])
recalibrate(model, [torch.randn(4, 1, 64, 64)], method="exact")
assert "torch._dynamo" not in sys.modules  # a second to import, of no use here
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)


def draw_batches():
    return (torch.randn(25, 1, 64, 64) for _ in range(80))  # 2 GB on their way


try:
    recalibrate(model, draw_batches(), method="exact")
except RefusedError as error:
    print(error)
print("done with", recalibrate(model, draw_batches(), method="exact", fit_memory=True).samples)
