"""A network of PyTorch and what torch.onnx exports of it: named alike, equal bit for bit, and running alike.

With --record it trains the network a little and writes tests/fixtures/interop/exported.{pt,onnx}.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
import onnxruntime
import torch
from torch import nn

from bntool.checkpoints.formats import open_checkpoint
from bntool.comparison.checkpoint import diff, find_violations
from bntool.comparison.options import Expectation
from tests.places import INTEROP

REQUIREMENTS = ["torch==2.13.0", "onnx==1.23.2", "onnxruntime==1.31.1", "numpy"]
FOLDER = INTEROP


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )


def record() -> None:
    torch.manual_seed(0)
    net = make_net()
    with torch.no_grad():
        for shift in (0, 1):
            net(torch.randn(8, 3, 8, 8) + shift)
        for layer in (net[1], net[4]):
            layer.weight.uniform_(0.5, 2)
            layer.bias.normal_()
    net.eval()
    torch.save(net.state_dict(), FOLDER / "exported.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is the old exporter; the new one folds BatchNorm
        kept = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
        torch.onnx.export(net, (torch.randn(1, 3, 8, 8),), str(FOLDER / "exported.onnx"), dynamo=False, **kept)


def main() -> int:
    """Hold the two files against each other."""
    if "--record" in sys.argv:
        record()
    with open_checkpoint(FOLDER / "exported.pt") as a, open_checkpoint(FOLDER / "exported.onnx") as b:
        assert not find_violations(diff(a, b), Expectation.IDENTICAL)
    net = make_net()
    net.load_state_dict(torch.load(FOLDER / "exported.pt", weights_only=True))
    x = torch.randn(1, 3, 8, 8)
    session = onnxruntime.InferenceSession(FOLDER / "exported.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    error = float(np.abs(net.eval()(x).detach().numpy() - found).max())
    print(f"outputs of torch and onnxruntime agree to {error:.1e}")
    assert error < 1e-5
    return 0


if __name__ == "__main__":
    sys.exit(main())
