"""Files whose structure is damaged behind right lengths and checksums: each is a sentence, or read."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from bntool.checkpoints.containers.protobufs.writing import embed
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.cli.main import main
from bntool.errors import RefusedError
from bntool.graphs.sources import read_stored_graph
from tests.checkpoints.foreign import rezip
from tests.checkpoints.keras.configurations import archive
from tests.places import FIXTURES, INTEROP
from tests.structured_mutants import mutate_protobuf, mutate_structure


@pytest.mark.parametrize("nodes", [1, "bn1", {"a": 1}, [1], [[1]], [{"args": 1}], [None], True])
def test_calls_of_keras_layers_that_are_no_lists(nodes: Any, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.keras", lambda c: c["config"]["layers"][1].update(inbound_nodes=nodes))
    assert main(["inspect", str(path), "--quiet"]) in (0, 3)
    assert main(["fold", str(path), "--dry-run", "--quiet"]) in (0, 3, 4)


@pytest.mark.parametrize("name", [[1], {"a": 1}, None, 1, [[]]])
def test_names_in_an_exported_program_that_are_no_texts(name: Any, tmp_path: Path) -> None:
    def change(record: str, data: bytes) -> tuple[str, bytes]:
        if record != "serialized_exported_program.json":
            return record, data
        program = json.loads(data)
        for node in program["graph_module"]["graph"]["nodes"]:
            if "batch_norm" in node["target"]:
                node["inputs"][0]["name"] = name
        return record, json.dumps(program).encode()

    path = tmp_path / "a.pt2"
    path.write_bytes(rezip(FIXTURES / "exported" / "torch_2.7.1.pt2", change))
    assert main(["inspect", str(path), "--quiet"]) == 0


@pytest.mark.parametrize("second", ["bn1", ""])
def test_caffe_layers_that_cannot_be_told_apart_are_not_folded(second: str, tmp_path: Path) -> None:
    """The name of one would become that of the other, or of its place, when one is gone."""
    with open_checkpoint(INTEROP / "caffe_tiny_std.caffemodel") as checkpoint:
        net = checkpoint.content.net
        layers = [net.message_of(one) for one in net.all(100)]
        (batchnorm,) = (one for one in layers if one.text(2) == "BatchNorm")
        data = net.buffer.read(0, net.end)
        copied = data[batchnorm.start : batchnorm.end]
    assert copied.startswith(b"\x0a\x03bn1")
    layer = b"".join(piece for piece in embed(100, bytes((10, len(second))) + second.encode() + copied[5:]))  # type: ignore[misc]
    (tmp_path / "a.caffemodel").write_bytes(data + layer)
    with open_checkpoint(tmp_path / "a.caffemodel") as checkpoint, pytest.raises(RefusedError, match="by name"):
        read_stored_graph(checkpoint)


@pytest.mark.parametrize("dtype", ["S3", np.dtype([("a", "f4")]), h5py.string_dtype()])
def test_elements_that_are_no_numbers_are_copied(dtype: Any, tmp_path: Path) -> None:
    data = io.BytesIO((INTEROP / "keras_tiny.h5").read_bytes())
    with h5py.File(data, "r+") as file:
        name = "model_weights/fc/fc/bias"
        del file[name]
        file.create_dataset(name, shape=(7,), dtype=dtype)
    (tmp_path / "a.h5").write_bytes(data.getvalue())
    with open_checkpoint(tmp_path / "a.h5") as checkpoint:
        save_checkpoint(checkpoint, tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_the_damage_is_done() -> None:
    """Mutants of protobufs and HDF5 files differ from the file, and are still opened by others."""
    rng = random.Random(0)
    keras, caffe = (INTEROP / name for name in ("keras_tiny.h5", "caffe_tiny_std.caffemodel"))
    changed = 0
    for _ in range(50):
        mutant = mutate_structure(keras.read_bytes(), rng)
        assert mutant is not None
        with h5py.File(io.BytesIO(mutant)) as file:
            file.visit(lambda name: None)
        changed += mutate_protobuf(caffe.read_bytes(), rng) != caffe.read_bytes()
    assert changed > 40
