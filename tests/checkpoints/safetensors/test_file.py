"""The safetensors format, held against the safetensors library: it and bntool accept and refuse the same files."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.errors import BntoolError, RefusedError
from bntool.plan import AddTensor, Operation, Plan, Record, RemoveEntry, RemoveTensor, SetAttribute, SetTensor, Values
from tests.checkpoints.foreign import write_safetensors
from tests.checkpoints.samples import STATE_DICTS, assert_holds, tiny_net


def _plan(*steps: Any) -> Plan:
    return Plan(Operation.FOLD, steps=steps)


def test_only_planned_bytes_change(tmp_path: Path) -> None:
    source = write_safetensors(tiny_net().state_dict(), tmp_path)
    checkpoint = open_checkpoint(source)
    storage = checkpoint.state_dict("").tensors["1.running_var"].storage  # type: ignore[attr-defined]
    edited = apply_plan(checkpoint, _plan(SetTensor("1.running_var", Values((9, 8, 7, 6), (4,)))))
    save_checkpoint(edited, tmp_path / "out.safetensors")
    old, new = source.read_bytes(), (tmp_path / "out.safetensors").read_bytes()
    assert len(old) == len(new)
    changed = {index for index, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]}
    assert changed <= set(range(storage.offset, storage.offset + 16))
    assert safetensors.torch.load(new)["1.running_var"].tolist() == [9, 8, 7, 6]


def test_metadata_and_order_survive(tmp_path: Path) -> None:
    source = write_safetensors(tiny_net().state_dict(), tmp_path)
    before = [key for key in _header(source) if key != "__metadata__"]
    steps = (
        AddTensor("0.bias", Values((1, 2, 3, 4), (4,)), dtype="float64", after="0.weight"),
        RemoveTensor("1.weight"),
        Record({"x": "é"}),
    )
    save_checkpoint(apply_plan(open_checkpoint(source), _plan(*steps)), tmp_path / "out.safetensors")
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as written:
        metadata = written.metadata()
        assert json.loads(metadata.pop("bntool")) == [{"x": "é"}]
        assert metadata == {"format": "pt", "note": "größe"}
        assert written.get_tensor("0.bias").tolist() == [1, 2, 3, 4]
    after = [key for key in _header(tmp_path / "out.safetensors") if key != "__metadata__"]
    before.insert(before.index("0.weight") + 1, "0.bias")
    before.remove("1.weight")
    assert after == before
    for entry in _header(tmp_path / "out.safetensors").values():
        if "dtype" in entry:  # every element lies at a multiple of its size
            assert entry["data_offsets"][0] % (8 if entry["dtype"] in ("F64", "I64") else 4) == 0


def _header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


@pytest.mark.parametrize("case", ["tied", "views", "transposed", "odd_names", "nan_payloads", "float8_e5m2"])
def test_the_library_reads_what_is_written(case: str, tmp_path: Path) -> None:
    source = write_safetensors(STATE_DICTS[case](), tmp_path)
    save_checkpoint(apply_plan(open_checkpoint(source), _plan(Record({}))), tmp_path / "out.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "out.safetensors")
    with open_checkpoint(source) as checkpoint:
        assert_holds(checkpoint, loaded)


def test_other_entries_and_modules_are_refused(tmp_path: Path) -> None:
    source = write_safetensors(tiny_net().state_dict(), tmp_path)
    for step in (SetAttribute("1", "training", False), RemoveEntry(("format",))):
        with pytest.raises(RefusedError, match="tensors only"):
            save_checkpoint(apply_plan(open_checkpoint(source), _plan(step)), tmp_path / "out.safetensors")


def test_a_file_without_tensors_is_copied(tmp_path: Path) -> None:
    safetensors.torch.save_file({}, tmp_path / "in.safetensors", metadata={"a": "b"})
    checkpoint = open_checkpoint(tmp_path / "in.safetensors")
    assert checkpoint.state_dicts == ()
    assert checkpoint.entries == {"a": "b"}
    save_checkpoint(checkpoint, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


def _library_accepts(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "np") as opened:
            list(opened.keys())
    except Exception:
        return False
    return True


def _accepts(path: Path) -> bool:
    try:
        open_checkpoint(path).close()
    except BntoolError:
        return False
    return True


HEADERS = [
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}   \n',
    b' {"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[12],"data_offsets":[4,16]}}',
    b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"b":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}}',
    b'{"b":{"dtype":"U8","shape":[8],"data_offsets":[8,16]},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
    b'{"a":{"dtype":"F4","shape":[32],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F4","shape":[31],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"__metadata__":{"a":"b"}}',
    b'{"__metadata__":{},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    b'{"__metadata__":{"a":null},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"f32","shape":[4],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4,1,1],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16,16]}}',
    b'{"a":{"dtype":"F32","shape":4,"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":["4"],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4e0],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","data_offsets":[0,16]}}',
    b'{"\\u00e9":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    b'{"\\ud83d\\ude00":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    b"{}", b"null", b"[]", b'""', b"", b"{", b'{"a":1}', b'{"a":{}}',
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("size", [0, 15, 16, 17])
def test_accepts_what_the_library_accepts(header: bytes, size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    assert _accepts(path) == _library_accepts(path)


def test_accepts_what_the_library_accepts_of_mutants(tmp_path: Path) -> None:
    rng = random.Random(3)
    path = tmp_path / "x.safetensors"
    for _ in range(1500):
        header = bytearray(rng.choice(HEADERS[:10]))
        for _ in range(rng.randrange(1, 3)):
            header[rng.randrange(len(header))] = rng.choice(b'0123456789{}[],":aF U')
        path.write_bytes(struct.pack("<Q", len(header)) + bytes(header) + bytes(16))
        assert _accepts(path) == _library_accepts(path), bytes(header)
