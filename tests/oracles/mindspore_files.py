"""Checkpoints of MindSpore, read by bntool and by MindSpore; recorded in tests/fixtures/interop/mindspore.

Without an argument it holds the recorded files against MindSpore; with --record it makes them, and writes down what
MindSpore reads from them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.train import serialization

from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_bytes
from tests.places import INTEROP

REQUIREMENTS = ["mindspore==2.10.0", "numpy"]
RECORDED = INTEROP / "mindspore"


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.head = nn.Dense(12, 2)

    def construct(self, x: Any) -> Any:
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


def record() -> None:
    RECORDED.mkdir(parents=True, exist_ok=True)
    net, random = Net(), np.random.default_rng(0)
    for _, parameter in net.parameters_and_names():
        parameter.set_data(Tensor(random.uniform(0.5, 1.5, parameter.shape).astype("f4")))
    ms.save_checkpoint(net, str(RECORDED / "net.ckpt"), append_dict={"epoch_num": 3, "lr": 0.1})
    trained = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.Momentum(net.trainable_params(), 0.1, 0.9))
    serialization.SLICE_SIZE = 1  # kilobyte, so that a small parameter is cut as one above 512 megabytes is
    ms.save_checkpoint(trained, str(RECORDED / "training.ckpt"), crc_check=True)
    facts = {}
    for path in sorted(RECORDED.glob("*.ckpt")):
        path.chmod(0o644)
        facts[path.name] = {name: array.tolist() for name, array in read_by_mindspore(path).items()}
    (RECORDED / "index.json").write_text(json.dumps(facts) + "\n")


def read_by_mindspore(path: Path) -> dict[str, np.ndarray]:
    found = ms.load_checkpoint(str(path), crc_check=path.name == "training.ckpt")
    return {name: parameter.asnumpy() for name, parameter in found.items() if parameter.shape}


def check() -> None:
    for name, wanted in json.loads((RECORDED / "index.json").read_text()).items():
        found = read_by_mindspore(RECORDED / name)
        assert {key: array.tolist() for key, array in found.items()} == wanted
        with open_checkpoint(RECORDED / name) as checkpoint:
            (state_dict,) = checkpoint.state_dicts
            for old, new in state_dict.renamed.items():
                assert read_bytes(state_dict.tensors[new]) == found[old].tobytes(), old
            left = [key for key in found if key not in state_dict.renamed]
        print(f"{name}: {len(state_dict.renamed)} parameters as MindSpore has them, left out {left}")
    layer = nn.BatchNorm2d(1)
    assert (layer.eps, round(layer.momentum, 6)) == (1e-5, 0.1)  # the argument, 0.9, is the share that is kept
    print(f"mindspore {ms.__version__}: eps 1e-5, momentum 0.9 is the share that is kept")


if __name__ == "__main__":
    record() if sys.argv[1:2] == ["--record"] else None
    check()
