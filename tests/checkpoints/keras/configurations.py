"""Keras files with a configuration of one's own: layers that reach other code, and what looks like them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import torch

from tests.checkpoints.foreign import rezip
from tests.places import INTEROP


class Runs:
    """What a torch pickle would call."""

    def __reduce__(self) -> Any:
        return print, ("ran",)


def torch_pickle() -> str:
    stream = io.BytesIO()
    torch.save(Runs(), stream)
    return base64.b64encode(stream.getvalue()).decode()


def function(module: str | None, name: str, **more: Any) -> dict[str, Any]:
    return {"module": module, "class_name": "function", "config": name, "registered_name": "function", **more}


def layer(class_name: str, *, module: str | None = "keras.layers", **config: Any) -> dict[str, Any]:
    entry = {"module": module, "class_name": class_name, "config": {"name": "x", **config}, "registered_name": None}
    return {**entry, "name": "x", "inbound_nodes": []}


def lambda_layer(module: str, name: str) -> dict[str, Any]:
    return layer("Lambda", function=function(module, name))


CODE = {"class_name": "__lambda__", "config": {"code": "4wEAAAA=", "defaults": None, "closure": None}}
OLD_CODE = ["4wEAAAA=", None, None]
ADAM = {
    "module": "keras.optimizers",
    "class_name": "Adam",
    "config": {"learning_rate": 1e-3},
    "registered_name": "Adam",
}


def archive(path: Path, change: Callable[[Any], None]) -> Path:
    def rewrite(name: str, data: bytes) -> tuple[str, bytes]:
        if name != "config.json":
            return name, data
        config = json.loads(data)
        change(config)
        return name, json.dumps(config).encode()

    path.write_bytes(rezip(INTEROP / "keras_tiny.keras", rewrite))
    return path


def hdf5(path: Path, change: Callable[[Any], None], *, attribute: str = "model_config") -> Path:
    path.write_bytes((INTEROP / "keras_tiny.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs[attribute]) if attribute in file.attrs else {}
        change(config)
        file.attrs[attribute] = json.dumps(config)
    return path
