"""Folders of torch.distributed.checkpoint, judged by torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import read_bytes
from bntool.errors import CorruptFileError, FileError, RefusedError, UnreadableFileError, UnsafeFileError
from tests.checkpoints.foreign import bits, save_distributed
from tests.checkpoints.samples import assert_holds, tiny_net
from tests.places import FIXTURES

RECORDED = FIXTURES / "layouts" / "distributed"


def test_the_nesting_comes_back_and_optimizers_are_passed_over(tmp_path: Path) -> None:
    net = tiny_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = {"model": net.state_dict(), "optim": optimizer.state_dict(), "ema": {"net": net.state_dict()}, "epoch": 3}
    save_distributed(state, tmp_path / "folder")
    with open_checkpoint(tmp_path / "folder") as checkpoint:
        assert [s.key for s in checkpoint.state_dicts] == ["model", "ema.net"]
        assert list(checkpoint.entries) == ["model", "optim", "ema", "epoch"]
        assert_holds(checkpoint, net.state_dict(), "model")
        assert_holds(checkpoint, net.state_dict(), "ema.net")


def test_pieces_of_two_processes_are_put_together() -> None:
    """Cut along the first dimension, and along the second; test_recorded_layouts compares the bytes."""
    with open_checkpoint(RECORDED) as checkpoint:
        tensors = checkpoint.state_dict("model").tensors
        assert tensors["0.weight"].shape == (4, 1, 3, 3)
        assert tensors["5.weight"].shape == (2, 4)
        for tensor in tensors.values():
            whole = read_bytes(tensor)
            source = tensor.storage.source  # type: ignore[attr-defined]
            parts = [source.read(place, 3) for place in range(0, len(whole), 3) if place + 3 <= len(whole)]
            assert whole.startswith(b"".join(parts))


def test_objects_are_looked_through_for_what_they_would_call(tmp_path: Path) -> None:
    save_distributed({"model": tiny_net().state_dict(), "when": Path("x")}, tmp_path / "folder")
    with open_checkpoint(tmp_path / "folder") as checkpoint:
        assert any(name.path.startswith("pathlib.") for name in checkpoint.globals)


def test_it_is_not_written(tmp_path: Path) -> None:
    with open_checkpoint(RECORDED) as checkpoint, pytest.raises(RefusedError, match="bntool convert"):
        save_checkpoint(checkpoint, tmp_path / "new.pt")
    assert list(tmp_path.iterdir()) == []


def test_converting_makes_one_file(tmp_path: Path) -> None:
    from bntool.cli.main import main

    target = tmp_path / "new.pt"
    assert main(["convert", str(RECORDED), "--to", "torch", "-o", str(target)]) == 0
    loaded = torch.load(target, weights_only=True)
    with open_checkpoint(RECORDED) as checkpoint:
        for name, tensor in checkpoint.state_dict("model").tensors.items():
            assert bits(loaded[name]) == read_bytes(tensor)


def _copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDED, tmp_path / "copy"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(UnreadableFileError, match="no such file"):
        open_checkpoint(folder)


def test_a_truncated_file_is_corrupt(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-100])
    with pytest.raises(CorruptFileError, match="truncated"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", [b"/etc/passwd.", b"../secret.dc", b"a/b/c.distcp"])
def test_a_name_outside_of_the_folder_is_unsafe(name: bytes, tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data.replace(b"__0_0.distcp", name))
    with pytest.raises(UnsafeFileError):
        open_checkpoint(folder)


def test_a_link_out_of_the_folder_is_unsafe(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError):
        open_checkpoint(folder)


def test_a_folder_without_metadata_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="folder"):
        open_checkpoint(tmp_path)
