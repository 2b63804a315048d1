""".pt2 files that torch.export wrote before torch 2.8; tests/oracles/exported_programs.py made them with real ones.

The judges: what those versions of torch found in the files, this torch where it still loads them, zipfile and
torch.load for what is inside. That the older ones run what bntool writes is held by the oracle.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import read_bytes
from bntool.errors import CorruptFileError, FileError, RefusedError, UnknownFormatError, UnsafeFileError
from bntool.inspection.safety import SafetyVerdict, judge_safety
from bntool.plan import Operation, Plan, Record, RemoveTensor, Scaled, SetAttribute, SetTensor, Step, Values
from tests.checkpoints.foreign import rezip
from tests.places import FIXTURES

FOLDER = FIXTURES / "exported"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
STATE = ("serialized_state_dict.pt", "serialized_state_dict.json")
INPUT = torch.linspace(-1, 1, 72).reshape(2, 1, 6, 6)
MEAN = (0.5, -1.0, 2.0, 0.25)
NEWEST = "torch_2.7.1.pt2"


def _inner(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        (name,) = set(STATE) & set(archive.namelist())
        return archive.read(name)


def _load_inner(path: Path) -> Any:
    data = _inner(path)
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    return torch.load(io.BytesIO(data), weights_only=True)


def _replaced(name: str, data: bytes | None) -> Callable[[str, bytes], tuple[str, bytes] | None]:
    """A change of one record, or of the state dict."""

    def change(record: str, content: bytes) -> tuple[str, bytes] | None:
        if record == name or (name == "state" and record in STATE):
            return (record, data) if data is not None else None
        return record, content

    return change


def _steps(path: Path) -> tuple[SetTensor, SetTensor]:
    with open_checkpoint(path) as checkpoint:
        (norm,) = find_batchnorms(checkpoint.state_dict(""))
        weight = next(name for name in checkpoint.state_dict("").tensors if name.endswith("conv.weight"))
    return (
        SetTensor(f"{norm.name}.running_mean", Values(MEAN, (4,))),
        SetTensor(weight, Scaled(weight, (4, 9), (2.0, 0.5, 4.0, 1.0), (4, 1))),
    )


def _rewrite(source: Path, target: Path, *steps: Step) -> None:
    with open_checkpoint(source) as checkpoint:
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=steps)), target)


@pytest.mark.parametrize("name", EXPECTED)
def test_reads_what_the_torch_of_its_time_found(name: str) -> None:
    with open_checkpoint(FOLDER / name) as checkpoint:
        assert checkpoint.format.name == "exported-program-legacy"
        tensors: dict[str, Any] = dict(checkpoint.state_dict("").tensors)
        found = {
            key: [t.dtype.name, list(t.shape), t.is_parameter, hashlib.sha256(read_bytes(t)).hexdigest()[:16]]
            for key, t in tensors.items()
        }
        assert found == EXPECTED[name]["tensors"]
        assert list(found) == list(EXPECTED[name]["tensors"])
        (norm,) = find_batchnorms(checkpoint.state_dict(""))
        assert (norm.name.endswith("bn"), norm.eps, norm.momentum) == (True, 1e-3, 0.03)
        assert norm.class_path == "torch.nn.modules.batchnorm.BatchNorm2d"
        assert checkpoint.format.verify_checksums(checkpoint)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("with_record", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_new_values_are_where_torch_finds_them(name: str, with_record: bool, deflate: bool, tmp_path: Path) -> None:
    source, target = tmp_path / "in.pt2", tmp_path / "out.pt2"
    source.write_bytes(rezip(FOLDER / name, deflate=True) if deflate else (FOLDER / name).read_bytes())
    mean, weight = _steps(source)
    _rewrite(source, target, mean, weight, *((Record({"n": 1}),) if with_record else ()))
    expected = _load_inner(source)
    expected[mean.name] = torch.tensor(MEAN)
    factors = torch.tensor([2.0, 0.5, 4.0, 1.0]).reshape(4, 1, 1, 1)
    expected[weight.name] = expected[weight.name].detach() * factors
    found = _load_inner(target)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target) as new:
        added = ["extra_files/bntool.json"] if with_record else []
        assert new.namelist() == [*old.namelist(), *added]
        assert all(old.read(n) == new.read(n) for n in old.namelist() if n not in STATE)
        assert not with_record or json.loads(new.read("extra_files/bntool.json")) == {"": [{"n": 1}]}
    with open_checkpoint(target) as written:
        assert written.records == ({"": ({"n": 1},)} if with_record else {})
        assert written.format.verify_checksums(written)


@pytest.mark.parametrize("name", EXPECTED)
def test_only_the_bytes_of_the_values_and_of_checksums_change(name: str, tmp_path: Path) -> None:
    """Four checksums of four bytes beside the values: of the storage and of the inner archive, each in two places."""
    source, target = FOLDER / name, tmp_path / "out.pt2"
    _rewrite(source, target, _steps(source)[0])
    before, after = source.read_bytes(), target.read_bytes()
    assert len(before) == len(after)
    assert 0 < sum(a != b for a, b in zip(before, after, strict=True)) <= 16 + 4 * 4 + 4  # and a data descriptor


@pytest.mark.parametrize("with_record", [False, True])
def test_this_torch_runs_what_was_written(with_record: bool, tmp_path: Path) -> None:
    source, target = FOLDER / NEWEST, tmp_path / "out.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.load(source)
        except (RuntimeError, AssertionError):
            pytest.skip("this torch takes no file of torch 2.7")
        _rewrite(source, target, _steps(source)[0], *((Record({"n": 1}),) if with_record else ()))
        extra = {"bntool.json": ""} if with_record else {}
        written = torch.export.load(target, extra_files=extra)
    program.state_dict["bn.running_mean"].copy_(torch.tensor(MEAN))
    with torch.no_grad():
        torch.testing.assert_close(written.module()(INPUT), program.module()(INPUT))
    assert not with_record or json.loads(extra["bntool.json"]) == {"": [{"n": 1}]}


@pytest.mark.parametrize("step", [RemoveTensor("bn.weight"), SetAttribute("bn", "training", value=True)])
def test_other_changes_are_refused(step: Step, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"before torch\.export\.export"):
        _rewrite(FOLDER / NEWEST, tmp_path / "out.pt2", step)
    assert list(tmp_path.iterdir()) == []


def test_a_state_dict_that_was_compressed_is_read_only(tmp_path: Path) -> None:
    """Nobody's torch wrote it so: whoever unpacks everything and packs it again."""
    (tmp_path / "inner.pt").write_bytes(_inner(FOLDER / NEWEST))
    deflated = rezip(tmp_path / "inner.pt", deflate=True)
    source = tmp_path / "in.pt2"
    source.write_bytes(rezip(FOLDER / NEWEST, _replaced("state", deflated)))
    with open_checkpoint(source) as checkpoint, open_checkpoint(FOLDER / NEWEST) as plain:
        for key, tensor in plain.state_dict("").tensors.items():
            assert read_bytes(checkpoint.state_dict("").tensors[key]) == read_bytes(tensor)
    with pytest.raises(RefusedError, match="is compressed"):
        _rewrite(source, tmp_path / "out.pt2", _steps(source)[0])


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    _rewrite(FOLDER / NEWEST, tmp_path / "out.pt2")
    assert (tmp_path / "out.pt2").read_bytes() == (FOLDER / NEWEST).read_bytes()


@pytest.mark.parametrize("data", [b"", None])
def test_a_program_without_tensors_has_no_state_dict(data: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "in.pt2").write_bytes(rezip(FOLDER / NEWEST, _replaced("state", data)))
    with open_checkpoint(tmp_path / "in.pt2") as checkpoint:
        assert (checkpoint.format.name, checkpoint.state_dicts) == ("exported-program-legacy", ())


def test_two_state_dicts_are_one_too_many(tmp_path: Path) -> None:
    path = tmp_path / "in.pt2"
    path.write_bytes((FOLDER / NEWEST).read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(STATE[1], _inner(FOLDER / NEWEST))
    with pytest.raises(CorruptFileError, match="two state dicts"):
        open_checkpoint(path)


def test_tied_weights_part_nowhere(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    buffer = io.BytesIO()
    torch.save({"a.weight": weight, "b.weight": weight}, buffer)
    source = tmp_path / "in.pt2"
    source.write_bytes(rezip(FOLDER / NEWEST, _replaced("state", buffer.getvalue())))
    with pytest.raises(RefusedError, match="shares its memory"):
        _rewrite(source, tmp_path / "out.pt2", SetTensor("a.weight", Values((2.0,) * 9, (3, 3))))


class Evil:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch canary",)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("record", ["state", "serialized_constants.pt", "serialized_example_inputs.pt"])
def test_what_loading_would_run_is_named(record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = _saved({"a.weight": torch.ones(2), "evil": Evil()})
    (tmp_path / "in.pt2").write_bytes(rezip(FOLDER / NEWEST, _replaced(record, data)))
    with open_checkpoint(tmp_path / "in.pt2") as checkpoint:
        safety = judge_safety(checkpoint)
    assert safety.verdict is SafetyVerdict.SUSPICIOUS
    assert any(name.endswith(".system") for name in safety.suspicious)
    assert not (tmp_path / "canary").exists()


def _bomb() -> bytes:
    """A file of torch.save whose storage inflates to two hundred million bytes."""
    tensor, buffer = torch.zeros(4), io.BytesIO()
    torch.save({"a.weight": tensor}, buffer)
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, bytes(200_000_000) if name.endswith("data/0") else source.read(name))
    return packed.getvalue()


def _moved_directory(by: int) -> bytes:
    """The inner archive with another place for its directory."""
    data = bytearray(_inner(FOLDER / NEWEST))
    for magic, field, width in ((b"PK\6\6", 48, "<Q"), (b"PK\5\6", 16, "<I")):
        place = data.rindex(magic) + field
        (value,) = struct.unpack_from(width, data, place)
        struct.pack_into(width, data, place, value + by)
    return bytes(data)


@pytest.mark.parametrize(
    ("record", "data", "error"),
    [
        ("state", _bomb, UnsafeFileError),
        ("state", lambda: b"{}", CorruptFileError),
        ("state", lambda: b"PK\3\4", CorruptFileError),
        ("state", lambda: _inner(FOLDER / NEWEST)[:-30], CorruptFileError),
        ("state", lambda: _moved_directory(7), CorruptFileError),
        ("state", lambda: _moved_directory(1 << 20), CorruptFileError),
        ("state", lambda: _inner(FOLDER / NEWEST).replace(b"K\x24", b"M\xff\x7f"), CorruptFileError),
        ("state", (FOLDER / NEWEST).read_bytes, CorruptFileError),
        ("serialized_constants.pt", lambda: pickle.dumps(1), CorruptFileError),
        ("serialized_exported_program.json", lambda: b'{"graph_module": ', CorruptFileError),
        ("serialized_exported_program.json", lambda: b"[" * 100_000, CorruptFileError),
        ("serialized_exported_program.json", lambda: b'{"a": 1, "a": 2}', CorruptFileError),
    ],
)
@pytest.mark.parametrize("deflate", [False, True])
def test_hostile_and_broken_parts(
    record: str, data: Callable[[], bytes], error: type[FileError], deflate: bool, tmp_path: Path
) -> None:
    path = tmp_path / "in.pt2"
    path.write_bytes(rezip(FOLDER / NEWEST, _replaced(record, data()), deflate=deflate))
    with pytest.raises(error):
        _read_everything(path)


def _read_everything(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        for tensor in checkpoint.state_dicts[0].tensors.values():
            read_bytes(tensor)


@pytest.mark.parametrize("program", [b"{}", b"[1, 2]", b"null", b'{"graph_module": {"graph": {"nodes": [null, 3]}}}'])
def test_a_graph_that_says_nothing_leaves_eps_unknown(program: bytes, tmp_path: Path) -> None:
    path = tmp_path / "in.pt2"
    path.write_bytes(rezip(FOLDER / NEWEST, _replaced("serialized_exported_program.json", program)))
    with open_checkpoint(path) as checkpoint:
        (norm,) = find_batchnorms(checkpoint.state_dict(""))
        assert (norm.name, norm.eps) == ("bn", None)


def test_a_damaged_inner_archive_is_noticed_on_rewriting(tmp_path: Path) -> None:
    """The outer checksum is that of the damaged bytes: only the inner one tells."""
    data = bytearray(_inner(FOLDER / NEWEST))
    with open_checkpoint(FOLDER / NEWEST) as checkpoint:
        tensor: Any = checkpoint.state_dict("").tensors["bn.running_mean"]
        data[tensor.storage.offset] ^= 1
    path = tmp_path / "in.pt2"
    path.write_bytes(rezip(FOLDER / NEWEST, _replaced("state", bytes(data))))
    with open_checkpoint(path) as checkpoint, pytest.raises(CorruptFileError, match="checksum"):
        checkpoint.format.verify_checksums(checkpoint)
    with pytest.raises(CorruptFileError, match="checksum"):
        _rewrite(path, tmp_path / "out.pt2", SetTensor("bn.running_mean", Values(MEAN, (4,))))


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_truncated_file_is_an_error_of_ours(name: str, share: float, tmp_path: Path) -> None:
    data = (FOLDER / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileError):
        open_checkpoint(tmp_path / name)


def test_another_zip_is_still_unknown(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("version", "8.7")
    with pytest.raises(UnknownFormatError, match="none of the formats"):
        open_checkpoint(tmp_path / "other.zip")
