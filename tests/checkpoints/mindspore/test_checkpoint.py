"""Checkpoints of MindSpore, recorded from it (tests/oracles/mindspore_files.py), and changed where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import bntool
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_numbers
from bntool.errors import CorruptFileError, RefusedError, UnknownFormatError
from tests.checkpoints.tensorflow.bundle_files import field, varint
from tests.places import INTEROP

FOLDER = INTEROP / "mindspore"
FACTS = json.loads((FOLDER / "index.json").read_text())


@pytest.mark.parametrize("name", FACTS)
def test_parameters_are_those_that_mindspore_reads(name: str) -> None:
    with open_checkpoint(FOLDER / name) as checkpoint:
        (state_dict,) = checkpoint.state_dicts
        assert len(state_dict.renamed) == {"net.ckpt": 7, "training.ckpt": 8}[name]  # and a learning rate
        for old, new in state_dict.renamed.items():
            values, tensor = np.asarray(FACTS[name][old], "f4"), state_dict.tensors[new]
            assert tensor.shape == values.shape, old
            assert list(read_numbers(tensor)) == values.ravel().tolist(), old


def test_a_layer_has_its_roles_and_the_optimizer_is_left_out(tmp_path: Path) -> None:
    for name in FACTS:
        (found,) = bntool.inspect(FOLDER / name).state_dicts[0].layers
        assert found.layer.name.endswith("bn")
        assert set(found.layer.tensors) == {"weight", "bias", "running_mean", "running_var"}
        assert found.layer.eps is None
    with open_checkpoint(FOLDER / "training.ckpt") as checkpoint:
        assert checkpoint.entries["optimizer"] == "left out"
    with open_checkpoint(FOLDER / "net.ckpt") as checkpoint:
        assert checkpoint.entries["epoch"] == 3
    with pytest.raises(RefusedError, match="without the graph"):
        bntool.fold_checkpoint(FOLDER / "net.ckpt", tmp_path / "o.ckpt", pairs={"bn": "conv"}, eps=1e-5)


def test_the_checksum_behind_the_message_is_held_against_it(tmp_path: Path) -> None:
    data = bytearray((FOLDER / "training.ckpt").read_bytes())
    assert bntool.inspect(FOLDER / "training.ckpt", verify_checksums=True).checksums == 1
    place = data.index(b"Float32") + 20
    data[place] ^= 1
    (tmp_path / "a.ckpt").write_bytes(data)
    with pytest.raises(CorruptFileError, match="checksum of the file differs"):
        bntool.inspect(tmp_path / "a.ckpt", verify_checksums=True)


def value(name: str = "w", *, shape: tuple[int, ...] = (1,), kind: str = "Float32", data: bytes = bytes(4)) -> bytes:
    dims = b"".join(b"\x08" + varint(extent) for extent in shape)
    return field(1, field(1, name.encode()) + field(2, dims + field(2, kind.encode()) + field(3, data)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (value(data=bytes(8)), "4 bytes has 8"),
        (value(shape=(1 << 62,)), "bytes has 4"),
        (value(shape=(1,) * 65), "impossible shape"),
        (value(kind="Float99"), "unknown type"),
        (value() + value("v") + value(), "two parameters have this name"),
        (value(shape=(2,)) + value(shape=(1,)), "pieces of a parameter differ"),
        (value()[:-2], "truncated"),
    ],
)
def test_a_lying_file_is_one_error(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(data)
    with pytest.raises(CorruptFileError, match=words):
        open_checkpoint(tmp_path / "a.ckpt")


def test_texts_and_numbers_are_no_parameters(tmp_path: Path) -> None:
    parts = value("w.x"), value("note", shape=(), kind="str", data=b"h\0\0\0"), value("lr", shape=(0,))
    (tmp_path / "a.ckpt").write_bytes(b"".join(parts))
    with open_checkpoint(tmp_path / "a.ckpt") as checkpoint:
        assert list(checkpoint.state_dict("").tensors) == ["w.x"]
        assert checkpoint.entries == {"note": "a text", "lr": "a number"}


def test_another_message_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(field(1, field(1, b"name") + field(2, b"something")))
    with pytest.raises(UnknownFormatError):
        open_checkpoint(tmp_path / "a.ckpt")
