"""Files of flax.serialization, read by bntool and by Flax; recorded in tests/fixtures/interop/flax.

Without an argument it holds the recorded files against Flax; with --record it makes them, and writes down what Flax
holds in them. Flax's BatchNorm is compared with PyTorch's formula at Flax's default eps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization, traverse_util
from flax.training import train_state

from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_bytes
from tests.checkpoints.flax.msgpack_files import pack_variables
from tests.places import INTEROP

REQUIREMENTS = ["flax==0.12.8", "jax==0.10.2", "optax==0.2.8", "msgpack==1.2.4", "numpy"]
RECORDED = INTEROP / "flax"
ROLES = {
    ("params", "scale"): "weight", ("params", "kernel"): "weight", ("params", "embedding"): "weight",
    ("batch_stats", "mean"): "running_mean", ("batch_stats", "var"): "running_var",
}  # fmt: skip


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        x = nn.Dense(5, name="head")(nn.relu(x))
        x = nn.BatchNorm(use_running_average=not train, use_scale=False, name="bare")(x)
        return nn.LayerNorm(name="norm")(x)


class State(train_state.TrainState):
    batch_stats: Any


def make_variables() -> Any:
    net = Net()
    variables = net.init(jax.random.PRNGKey(1), jnp.zeros((1, 6, 6, 3)))
    for seed in range(5):
        batch = jax.random.normal(jax.random.PRNGKey(seed), (8, 6, 6, 3)) * 2 + 1
        _, updates = net.apply(variables, batch, train=True, mutable=["batch_stats"])
        variables = {**variables, **updates}
    return variables


def record() -> None:
    RECORDED.mkdir(parents=True, exist_ok=True)
    variables = make_variables()
    (RECORDED / "flax_model.msgpack").write_bytes(serialization.to_bytes(variables))
    state = State.create(
        apply_fn=None, params=variables["params"], tx=optax.adam(1e-3), batch_stats=variables["batch_stats"]
    )
    (RECORDED / "train_state.msgpack").write_bytes(serialization.to_bytes(state))
    serialization.MAX_CHUNK_SIZE = 64  # bytes, so that a small array is cut as one above a gigabyte is
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), variables)
    (RECORDED / "chunked.msgpack").write_bytes(serialization.to_bytes(half))
    facts = {}
    for path in sorted(RECORDED.glob("*.msgpack")):
        facts[path.name] = {name: array.astype("f4").tolist() for name, array in read_by_flax(path).items()}
    (RECORDED / "index.json").write_text(json.dumps(facts) + "\n")


def read_by_flax(path: Path) -> dict[str, np.ndarray]:
    """Arrays by PyTorch's names."""
    restored = serialization.msgpack_restore(path.read_bytes())
    found = {}
    for collection in ("params", "batch_stats"):
        for place, array in traverse_util.flatten_dict(restored[collection]).items():
            found[".".join((*place[:-1], ROLES.get((collection, place[-1]), place[-1])))] = np.asarray(array)
    return found


def check() -> None:
    facts = json.loads((RECORDED / "index.json").read_text())
    for name, wanted in facts.items():
        found = read_by_flax(RECORDED / name)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[key].astype("f4"), np.asarray(wanted[key], "f4")) for key in wanted), name
        with open_checkpoint(RECORDED / name) as checkpoint:
            tensors = checkpoint.state_dict("").tensors
            assert tensors.keys() == found.keys()
            assert all(read_bytes(tensors[key]) == found[key].tobytes() for key in found), name
        print(f"{name}: {len(found)} arrays as Flax has them")
    variables = serialization.msgpack_restore((RECORDED / "flax_model.msgpack").read_bytes())
    packed = serialization.msgpack_restore(pack_variables({"a": {"b": ("float32", (2,), np.ones(2, "f4").tobytes())}}))
    assert np.array_equal(packed["a"]["b"], np.ones(2, "f4"))  # what the tests write is what Flax reads
    layer = nn.BatchNorm(use_running_average=True)
    own = {c: variables[c]["bn"] for c in ("params", "batch_stats")}
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("f4")
    mean, var = own["batch_stats"]["mean"], own["batch_stats"]["var"]
    expected = (x - mean) / np.sqrt(var + 1e-5) * own["params"]["scale"] + own["params"]["bias"]
    assert np.allclose(layer.apply(own, x), expected, rtol=1e-6, atol=1e-6)
    assert (layer.epsilon, layer.momentum) == (1e-5, 0.99)
    print(f"flax {flax.__version__}: eps 1e-5 inside of the root, momentum 0.99 is the share that is kept")


if __name__ == "__main__":
    record() if sys.argv[1:2] == ["--record"] else None
    check()
