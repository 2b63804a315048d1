"""What every format promises, held for each of them."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import h5py
import pytest
import safetensors.torch
import torch

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.formats import FORMATS, open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.errors import UnknownFormatError, UnreadableFileError
from bntool.plan import AddTensor, Operation, Plan, Record, RemoveTensor, Scaled, SetTensor, Values
from tests import programs
from tests.checkpoints.samples import (
    STATE_DICTS,
    TORCH_FORMATS,
    WRITERS,
    assert_holds,
    tiny_net,
    to_torch,
)
from tests.places import INTEROP

# their tensors belong to layers of a graph, so that they cannot hold just any; see the test file of each
OF_GRAPHS = {"onnx", "caffe", "caffe-hdf5", "keras", "keras-hdf5"}
OF_GRAPHS |= {"darknet", "torchscript", "exported-program", "exported-program-legacy"}
NAMES = [format_.name for format_ in FORMATS if format_.name not in OF_GRAPHS]
WRITTEN = [format_.name for format_ in FORMATS if format_.name in NAMES and not format_.read_only]
REWRITTEN = [
    format_.name for format_ in FORMATS if format_.name in WRITTEN and format_.has_records and not format_.only_values
]
CASES = [(name, case) for name, build in WRITERS.items() for case in STATE_DICTS if case not in build.cannot_hold]


def test_every_format_has_a_writer_here() -> None:
    assert set(WRITERS) == set(NAMES)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_reads_what_was_written(name: str, case: str, tmp_path: Path) -> None:
    tensors = STATE_DICTS[case]()
    with open_checkpoint(WRITERS[name](tensors, tmp_path)) as checkpoint:
        assert checkpoint.format.name == name
        assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("name", WRITTEN)
def test_copies_what_is_not_edited(name: str, tmp_path: Path) -> None:
    source = WRITERS[name](tiny_net().state_dict(), tmp_path)
    (tmp_path / "out").mkdir()
    save_checkpoint(open_checkpoint(source), tmp_path / "out" / source.name)
    for written in (tmp_path / "out").iterdir():
        if written.name != source.name or name != "sharded":
            assert written.read_bytes() == (tmp_path / written.name).read_bytes()


def _edit(path: Path) -> tuple[Plan, dict[str, torch.Tensor]]:
    """A plan of every tensor step, and what torch says that it gives."""
    tensors = tiny_net().state_dict()
    weight = tensors["0.weight"]
    factors = (0.5, -2.0, 3.0, 1e-3)
    plan = Plan(
        Operation.FOLD,
        steps=(
            SetTensor("0.weight", Scaled("0.weight", (4, 27), factors, (4, 1))),
            AddTensor("0.bias", Values((1.0, 2.0, 3.0, 4.0), (4,)), dtype="float32", after="0.weight"),
            SetTensor("1.running_mean", Values((0.1, 0.2, 0.3, 0.4), (4,))),
            SetTensor("1.num_batches_tracked", Values((12,), ())),
            RemoveTensor("1.weight"),
            Record({"command": "fold", "layers": ["1"]}),
        ),
    )
    scaled = (weight.double().reshape(4, 27) * torch.tensor(factors, dtype=torch.float64)[:, None]).float()
    expected = {
        "0.weight": scaled.reshape(weight.shape),
        "0.bias": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "1.bias": tensors["1.bias"],
        "1.running_mean": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "1.running_var": tensors["1.running_var"],
        "1.num_batches_tracked": torch.tensor(12),
        "3.weight": tensors["3.weight"],
        "3.bias": tensors["3.bias"],
    }
    return plan, expected


@pytest.mark.parametrize("name", REWRITTEN)
def test_carries_out_a_plan(name: str, tmp_path: Path) -> None:
    source = WRITERS[name](tiny_net().state_dict(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / source.name
    plan, expected = _edit(source)
    edited = apply_plan(open_checkpoint(source), plan)
    assert_holds(edited, expected)
    save_checkpoint(edited, target)
    with open_checkpoint(target) as written:
        assert_holds(written, expected)
        assert written.records == {"": ({"command": "fold", "layers": ["1"]},)}
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    if name in TORCH_FORMATS:
        loaded = torch.load(target, weights_only=True, mmap=name == "torch-zip")
        assert list(loaded) == list(expected)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
        assert loaded._metadata["1"] == {"version": 2}
    if name == "safetensors":
        loaded = safetensors.torch.load_file(target)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", WRITTEN)
def test_sets_elements(name: str, tmp_path: Path) -> None:
    tensors = dict(tiny_net().state_dict())
    source = WRITERS[name](tensors, tmp_path)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / source.name
    steps = (
        SetTensor("1.running_var", Values((1.5, 2.5, 3.5, 4.5), (4,))),
        SetTensor("0.weight", Scaled("0.weight", (4, 27), (2.0, 2.0, 0.5, 0.5), (4, 1))),
    )
    save_checkpoint(apply_plan(open_checkpoint(source), Plan(Operation.RECALIBRATE, steps=steps)), target)
    tensors["1.running_var"] = torch.tensor([1.5, 2.5, 3.5, 4.5])
    tensors["0.weight"] = tensors["0.weight"] * torch.tensor([2.0, 2.0, 0.5, 0.5])[:, None, None, None]
    with open_checkpoint(target) as written:
        assert_holds(written, tensors)


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_second_plan_adds_to_the_history(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tiny_net().state_dict(), tmp_path)
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_checkpoint(
            apply_plan(open_checkpoint(path), Plan(Operation.FREEZE, steps=(Record({"n": number, "pair": (1, 2)}),))),
            folder / path.name,
        )
        path = folder / path.name
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.records == {"": ({"n": 1, "pair": [1, 2]}, {"n": 2, "pair": [1, 2]})}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.95, 0.999])
def test_a_truncated_file_is_an_error_of_ours(name: str, share: float, tmp_path: Path) -> None:
    from bntool.errors import FileError

    path = WRITERS[name](tiny_net().state_dict(), tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileError) as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("name", NAMES)
def test_opening_reads_no_tensor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = WRITERS[name]({"a.weight": torch.zeros(1_000_000), "b.weight": torch.zeros(1_000_000)}, tmp_path)
    count = _count_bytes_read(monkeypatch)
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.state_dict("").tensors) == 2
    assert count[0] < 500_000


def _count_bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count, read = [0], SourceFile.read

    def counting(self: SourceFile, offset: int, length: int) -> bytes:
        count[0] += length
        return read(self, offset, length)

    monkeypatch.setattr(SourceFile, "read", counting)
    return count


def test_opening_ten_gigabytes_reads_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = b'{"a.weight":{"dtype":"F32","shape":[2500000000],"data_offsets":[0,10000000000]}}'
    path = tmp_path / "big.safetensors"
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 10_000_000_000)
    count = _count_bytes_read(monkeypatch)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.state_dict("").tensors["a.weight"].shape == (2_500_000_000,)
    assert count[0] < 10_000


@pytest.mark.parametrize("name", NAMES)
def test_listing_a_file_imports_neither_torch_nor_numpy(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tiny_net().state_dict(), tmp_path)
    heavy = {"torch", "numpy", "safetensors", "rich", "typer", "zipfile", "pickle", "tempfile"}
    assert not heavy & set(programs.run("reading_numbers", path).stdout.split())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x1f\x8b" + bytes(100), "gzip"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x80\x02}q\x00.", "torch.save did not write"),
        (b"hello, world", "a text, not a checkpoint"),
        (b"\xfe\xed\xfa\xce", "not known"),
    ],
)
def test_an_unknown_format_is_named_where_it_can_be(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(data)
    with pytest.raises(UnknownFormatError, match=words):
        open_checkpoint(path)


def test_what_holds_no_known_format_is_called_by_its_container(tmp_path: Path) -> None:
    for order in (("a.txt", "b.txt"), ("config.json", "version")):  # what one of the formats looks for, or nothing
        with zipfile.ZipFile(tmp_path / "file.zip", "w") as archive:
            for name in order:
                archive.writestr(name, "{}")
        with pytest.raises(UnknownFormatError, match=r"this is a zip archive, .* none of the formats"):
            open_checkpoint(tmp_path / "file.zip")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["data"] = [1.0]
    with pytest.raises(UnknownFormatError, match=r"this is an HDF5 file, .* none of the formats that bntool reads"):
        open_checkpoint(tmp_path / "other.h5")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "file.zip", "file.zip")
    with pytest.raises(UnknownFormatError, match=r"this is a tar archive, .* unpack it first"):
        open_checkpoint(tmp_path / "other.tar")


def test_an_empty_file_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    with pytest.raises(UnreadableFileError, match="empty"):
        open_checkpoint(tmp_path / "empty.pt")


def test_to_torch_is_what_it_says(tmp_path: Path) -> None:
    with open_checkpoint(WRITERS["torch-zip"]({"a.weight": torch.arange(6.0).reshape(2, 3)}, tmp_path)) as checkpoint:
        assert torch.equal(to_torch(checkpoint.state_dict("").tensors["a.weight"]), torch.arange(6.0).reshape(2, 3))


def test_a_pickle_of_joblib_is_called_that() -> None:
    """Made by joblib 1.6 of a dict with an array of 40 numbers."""
    with pytest.raises(UnknownFormatError, match="a file of joblib"):
        open_checkpoint(INTEROP / "joblib" / "arrays.joblib")
