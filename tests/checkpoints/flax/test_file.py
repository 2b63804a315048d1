"""Flax files, recorded from Flax (tests/oracles/flax_files.py), and made by hand where they lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bntool
from bntool.checkpoints.containers import msgpack
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_numbers
from bntool.errors import BntoolError, CorruptFileError, RefusedError, UnknownFormatError, UnsafeFileError
from bntool.inspection.safety import SafetyVerdict
from tests.checkpoints.flax.msgpack_files import pack, pack_variables
from tests.places import INTEROP

FACTS = json.loads((INTEROP / "flax" / "index.json").read_text())
ONES = ("float32", (2,), np.ones(2, "f4").tobytes())
LAYER = {"params": {"bn": {"scale": ONES, "bias": ONES}}, "batch_stats": {"bn": {"mean": ONES, "var": ONES}}}


@pytest.mark.parametrize("name", FACTS)
def test_arrays_are_those_that_flax_reads(name: str) -> None:
    with open_checkpoint(INTEROP / "flax" / name) as checkpoint:
        tensors = checkpoint.state_dict("").tensors
        assert tensors.keys() == FACTS[name].keys()
        for key, wanted in FACTS[name].items():
            values = np.asarray(wanted, "f4")
            assert tensors[key].shape == values.shape, key
            assert list(read_numbers(tensors[key])) == values.ravel().tolist(), key


def test_layers_bring_their_statistics_together() -> None:
    found = bntool.inspect(INTEROP / "flax" / "train_state.msgpack")
    layers = {one.layer.name: one.layer for one in found.state_dicts[0].layers}
    assert list(layers) == ["bn", "bare"]
    assert set(layers["bn"].tensors) == {"weight", "bias", "running_mean", "running_var"}
    assert set(layers["bare"].tensors) == {"bias", "running_mean", "running_var"}  # use_scale=False
    assert layers["bn"].eps is None
    assert found.safety.verdict is SafetyVerdict.HARMLESS
    assert not [finding for finding in found.state_dicts[0].layers[0].findings if finding.code.value == "no-counter"]
    with open_checkpoint(INTEROP / "flax" / "train_state.msgpack") as checkpoint:
        assert checkpoint.entries["optimizer"] == "left out"


def test_two_files_are_compared() -> None:
    same = bntool.diff(INTEROP / "flax" / "flax_model.msgpack", INTEROP / "flax" / "train_state.msgpack")
    assert not [layer for layer in same.layers if layer.changed]
    half = bntool.diff(INTEROP / "flax" / "flax_model.msgpack", INTEROP / "flax" / "chunked.msgpack")
    assert len([layer for layer in half.layers if layer.changed]) == 2


def test_what_needs_more_is_refused(tmp_path: Path) -> None:
    path = INTEROP / "flax" / "flax_model.msgpack"
    with pytest.raises(RefusedError, match="without the graph that uses them"):
        bntool.fold_checkpoint(path, tmp_path / "o.msgpack", pairs={"bn": "conv"}, eps=1e-5)


def write(root: dict[str, Any], folder: Path, name: str = "a.msgpack") -> Path:
    (folder / name).write_bytes(pack_variables(root))
    return folder / name


@pytest.mark.parametrize(
    ("root", "keys"),
    [
        (LAYER, [""]),
        ({"step": 7, "target": LAYER}, ["target"]),
        ({"encoder": {"bn": {"scale": ONES, "bias": ONES, "mean": ONES, "var": ONES}}}, [""]),  # as nnx keeps it
        ({**LAYER, "ema_params": {"bn": {"scale": ONES}}, "opt_state": {"0": {"mu": {"params": LAYER}}}},
         ["", "ema_params"]),
    ],
)  # fmt: skip
def test_models_are_found_where_they_lie(root: dict[str, Any], keys: list[str], tmp_path: Path) -> None:
    found = bntool.inspect(write(root, tmp_path))
    assert [one.state_dict.key for one in found.state_dicts] == keys
    assert len(found.state_dicts[0].layers) == 1


def test_a_file_of_another_name_is_known_by_its_bytes(tmp_path: Path) -> None:
    """flax.training.checkpoints calls its files checkpoint_1000."""
    assert bntool.inspect(write(LAYER, tmp_path, "checkpoint_1000")).checkpoint.format.name == "flax"


@pytest.mark.parametrize("data", [b"\x81\xa1\x61\xc1", b"\x8f" + b"hello" * 9, b"\xde\x00\x01\xa1a\x01"])
def test_other_bytes_are_not_taken_for_msgpack(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(UnknownFormatError):
        open_checkpoint(tmp_path / "a.bin")


def array(*parts: Any) -> bytes:
    inner = pack(list(parts))
    return b"\x81\xa1w\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner


def chunked(**changes: Any) -> bytes:
    node = {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {"0": ONES, "1": ONES}}
    return pack_variables({"w": {**node, **changes}})


def test_an_array_in_chunks_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.msgpack").write_bytes(chunked())
    with open_checkpoint(tmp_path / "a.msgpack") as checkpoint:
        assert list(read_numbers(checkpoint.state_dict("").tensors["w"])) == [1.0] * 4


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"\xdf\xff\xff\xff\xff\xa1a", CorruptFileError, "before 4294967295 values"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", CorruptFileError, "before 4294967295 values"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", CorruptFileError, "before 4294967295 bytes"),
        (b"\x81\xa1a\xdb\xff\xff\xff\xff", UnsafeFileError, "text of 4294967295 bytes"),
        (b"\x81\xa1a" + b"\x91" * 200 + b"\x01", UnsafeFileError, "100 levels"),
        (b"\x82\xa1a\x01\xa1a\x02", CorruptFileError, "comes twice"),
        (b"\x81\xa1a\x01\x00", CorruptFileError, "1 bytes stand behind"),
        (b"\x81\xa1\xff\x01", CorruptFileError, "no UTF-8"),
        (b"\x81\xa1a\xc1", CorruptFileError, "begins no msgpack value"),
        (b"\x81\x90\x01", CorruptFileError, "neither a text nor a number"),
        (array([2], "float32", bytes(4)), CorruptFileError, "of 8 bytes has 4"),
        (array([-2], "float32", bytes(4)), CorruptFileError, "impossible shape"),
        (array([2**62, 8], "float32", b""), CorruptFileError, "bytes has 0"),
        (array([1], "object", bytes(4)), CorruptFileError, "unknown type"),
        (array([1], "float32"), CorruptFileError, "malformed"),
        (array([[1]], "float32", bytes(4)), CorruptFileError, "impossible shape"),
        (array([0] * 65, "float32", b""), CorruptFileError, "impossible shape"),
        (chunked(shape={"0": 5}), CorruptFileError, "of 20 bytes has 16"),
        (chunked(shape={"1": 4}), CorruptFileError, "in chunks is malformed"),
        (chunked(chunks={"0": ONES, "2": ONES}), CorruptFileError, "in chunks is malformed"),
        (chunked(chunks={"0": ONES, "1": 1}), CorruptFileError, "in chunks is malformed"),
    ],
)
def test_a_lying_file_is_one_error(data: bytes, error: type[BntoolError], words: str, tmp_path: Path) -> None:
    (tmp_path / "a.msgpack").write_bytes(data)
    with pytest.raises(error, match=words):
        open_checkpoint(tmp_path / "a.msgpack")


def test_too_many_values_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack, "MAX_VALUES", 100)
    (tmp_path / "a.msgpack").write_bytes(pack_variables({"a": [0] * 200}))
    with pytest.raises(UnsafeFileError, match="more than 100 values"):
        open_checkpoint(tmp_path / "a.msgpack")
