"""Files of MXNet, read by bntool and by MXNet; recorded in tests/fixtures/interop/mxnet.

Without an argument it holds the recorded files against MXNet; with --record it makes them, and writes down what MXNet
reads from them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

np.bool = bool  # MXNet asks numpy for a name that is gone
import mxnet as mx  # noqa: E402
from mxnet import autograd, gluon, nd  # noqa: E402
from mxnet.gluon import nn  # noqa: E402

from bntool.checkpoints.formats import open_checkpoint  # noqa: E402
from bntool.checkpoints.tensors import read_bytes  # noqa: E402
from tests.places import INTEROP  # noqa: E402

REQUIREMENTS = ["mxnet==1.9.1", "numpy==1.23.5", "requests", "graphviz"]
RECORDED = INTEROP / "mxnet"


def make_net() -> Any:
    mx.random.seed(0)
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Conv2D(4, 3, use_bias=False, in_channels=3), nn.BatchNorm(in_channels=4), nn.Dense(2, in_units=64))
    net.initialize()
    net.hybridize()
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
    for _ in range(3):
        with autograd.record():
            loss = (net(nd.random.normal(1, 2, shape=(8, 3, 6, 6))) ** 2).mean()
        loss.backward()
        trainer.step(8)
    nd.waitall()
    return net


def record() -> None:
    RECORDED.mkdir(parents=True, exist_ok=True)
    net = make_net()
    net.save_parameters(str(RECORDED / "gluon.params"))
    with tempfile.TemporaryDirectory() as folder:
        net.export(f"{folder}/net", epoch=3)
        (RECORDED / "net-0003.params").write_bytes((Path(folder) / "net-0003.params").read_bytes())
    nd.save(str(RECORDED / "dtypes.params"), {name: nd.array([1, 2], dtype=name) for name in (
        "float64", "float16", "uint8", "int32", "int8", "int64")})  # fmt: skip
    mx.npx.set_np()
    mx.npx.save(str(RECORDED / "numpy.params"), {"scalar": mx.np.array(2.5), "empty": mx.np.ones((0, 3))})
    mx.npx.reset_np()
    facts = {path.name: {name: array.tolist() for name, array in read_by_mxnet(path).items()}
             for path in sorted(RECORDED.glob("*.params"))}  # fmt: skip
    (RECORDED / "index.json").write_text(json.dumps(facts) + "\n")


def read_by_mxnet(path: Path) -> dict[str, np.ndarray]:
    if path.name == "numpy.params":
        mx.npx.set_np()
    found = {name: array.asnumpy() for name, array in nd.load(str(path)).items()}
    mx.npx.reset_np()
    return found


def check() -> None:
    facts = json.loads((RECORDED / "index.json").read_text())
    for name, wanted in facts.items():
        found = read_by_mxnet(RECORDED / name)
        assert {key: array.tolist() for key, array in found.items()} == wanted
        with open_checkpoint(RECORDED / name) as checkpoint:
            (state_dict,) = checkpoint.state_dicts
            assert state_dict.renamed.keys() == found.keys()
            for old, new in state_dict.renamed.items():
                assert read_bytes(state_dict.tensors[new]) == found[old].tobytes(), old
        print(f"{name}: {len(found)} arrays as MXNet has them")
    layer = nn.BatchNorm()
    assert (layer._kwargs["eps"], layer._kwargs["momentum"], layer._kwargs["fix_gamma"]) == (1e-5, 0.9, False)
    operator = nd.BatchNorm.__doc__
    assert "eps : double, optional, default=0.001" in operator
    assert "fix_gamma : boolean, optional, default=1" in operator
    print(f"mxnet {mx.__version__}: eps 1e-5 in Gluon and 1e-3 in the operator, which takes gamma for 1 by default")


if __name__ == "__main__":
    record() if sys.argv[1:2] == ["--record"] else None
    check()
