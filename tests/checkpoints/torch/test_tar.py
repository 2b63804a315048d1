"""Tar files from before torch 0.1.2, judged by the loader that torch still has for them."""

from __future__ import annotations

import io
import pickle
import tarfile
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.errors import BntoolError, CorruptFileError, RefusedError, UnknownFormatError
from bntool.plan import Operation, Plan, Record, RemoveTensor, SetTensor, Step, Values
from tests.checkpoints.foreign import save_tar
from tests.checkpoints.samples import STATE_DICTS, assert_holds, assert_same, tiny_net


def _load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=False)


@pytest.mark.parametrize("case", ["net", "transposed", "sliced", "tied", "views", "scalars", "bool", "float16"])
def test_torch_and_bntool_read_the_same(case: str, tmp_path: Path) -> None:
    save_tar(OrderedDict(STATE_DICTS[case]()), tmp_path / "old.pth")
    with open_checkpoint(tmp_path / "old.pth") as checkpoint:
        assert_holds(checkpoint, _load(tmp_path / "old.pth"))


def test_only_the_elements_differ_after_a_change(tmp_path: Path) -> None:
    root = {"epoch": 3, "state_dict": OrderedDict(tiny_net().state_dict()), "views": STATE_DICTS["views"]()}
    save_tar(root, tmp_path / "old.pth")
    steps = (SetTensor("1.running_mean", Values((1.0, 2.0, 3.0, 4.0), (4,))),)
    with open_checkpoint(tmp_path / "old.pth") as checkpoint:
        assert [s.key for s in checkpoint.state_dicts] == ["state_dict", "views"]
        edited = apply_plan(checkpoint, Plan(Operation.RECALIBRATE, state_dict="state_dict", steps=steps))
        save_checkpoint(edited, tmp_path / "new.pth")
    expected = _load(tmp_path / "old.pth")
    expected["state_dict"]["1.running_mean"].copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert_same(_load(tmp_path / "new.pth"), expected)
    before, after = (tmp_path / "old.pth").read_bytes(), (tmp_path / "new.pth").read_bytes()
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 16


@pytest.mark.parametrize("step", [RemoveTensor("1.weight"), Record({"n": 1})])
def test_what_has_no_place_is_refused(step: Step, tmp_path: Path) -> None:
    save_tar(OrderedDict(tiny_net().state_dict()), tmp_path / "old.pth")
    with open_checkpoint(tmp_path / "old.pth") as checkpoint, pytest.raises(RefusedError, match="convert"):
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=(step,))), tmp_path / "new.pth")
    assert not (tmp_path / "new.pth").exists()


@pytest.mark.parametrize("order", [
    ("pickle", "tensors", "storages"), ("tensors", "README", "storages", "pickle"),
    ("folder", "storages", "pickle", "tensors", "folder/pickle"),
])  # fmt: skip
def test_members_in_any_order_and_among_others(order: tuple[str, ...], tmp_path: Path) -> None:
    save_tar(OrderedDict(tiny_net().state_dict()), tmp_path / "plain.pth")
    with tarfile.open(tmp_path / "plain.pth") as plain, tarfile.open(tmp_path / "old.pth", "w") as archive:
        for name in order:
            member = tarfile.TarInfo(name)
            content = plain.extractfile(name).read() if name in plain.getnames() else b"something else"
            member.type = tarfile.DIRTYPE if name == "folder" else tarfile.REGTYPE
            member.size = 0 if name == "folder" else len(content)
            archive.addfile(member, io.BytesIO(content))
    with open_checkpoint(tmp_path / "old.pth") as checkpoint:
        assert_holds(checkpoint, _load(tmp_path / "old.pth"))
        (count,) = checkpoint.state_dict("").tensors["1.bias"].shape
        steps = (SetTensor("1.bias", Values(tuple(map(float, range(count))), (count,))),)
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=steps)), tmp_path / "new.pth")
    before, after = _load(tmp_path / "old.pth"), _load(tmp_path / "new.pth")
    assert after.pop("1.bias").tolist() == list(range(count))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_tensor_that_shares_bytes_with_another_is_refused(tmp_path: Path) -> None:
    save_tar(OrderedDict(STATE_DICTS["views"]()), tmp_path / "old.pth")
    step = SetTensor("b.weight", Values(tuple(range(6)), (2, 3)))
    with open_checkpoint(tmp_path / "old.pth") as checkpoint, pytest.raises(RefusedError, match="shares its memory"):
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=(step,))), tmp_path / "new.pth")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda data: data.replace(b"tensors", b"tensorz", 1), CorruptFileError),  # the header's sum disagrees
        (lambda data: data[:-600], CorruptFileError),
        (lambda data: data.replace(b"FloatStorage", b"BloatStorage"), CorruptFileError),
        (lambda data: data.replace(pickle.dumps(6, protocol=2), pickle.dumps(5, protocol=2)), CorruptFileError),
    ],
)
def test_a_damaged_file_is_an_error_of_ours(damage: Any, error: type[BntoolError], tmp_path: Path) -> None:
    save_tar(OrderedDict(list(tiny_net().state_dict().items())[:6]), tmp_path / "old.pth")
    data = (tmp_path / "old.pth").read_bytes()
    assert damage(data) != data
    (tmp_path / "old.pth").write_bytes(damage(data))
    with pytest.raises(error):
        open_checkpoint(tmp_path / "old.pth")


def test_another_tar_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    with tarfile.open(tmp_path / "model.nemo", "w") as archive:
        archive.add(tmp_path / "weights.bin", "weights.bin")
    with pytest.raises(UnknownFormatError, match="unpack it"):
        open_checkpoint(tmp_path / "model.nemo")
