"""Broken and hostile files, named by their defect, each with the error that it must give."""

from __future__ import annotations

import io
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import read_bytes
from bntool.errors import BntoolError, CorruptFileError, UnsafeFileError
from tests.checkpoints.broken_files import (
    BROKEN,
    make_archive,
    make_entry,
    make_index,
    make_legacy,
    make_legacy_tensor,
    make_safetensors,
    make_tensor,
)
from tests.checkpoints.foreign import rezip, write_zip
from tests.checkpoints.samples import tiny_net


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_gives_one_error_of_ours(name: str, tmp_path: Path) -> None:
    make, error, words = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(make())
    started = time.process_time()
    if error is None:
        _use(path)
    else:
        with pytest.raises(error, match=words) as caught:
            _use(path)
        assert caught.value.path is not None
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 500
    assert time.process_time() - started < 60  # what is not refused goes on for hours


def _use(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        for state_dict in checkpoint.state_dicts:
            for name, tensor in state_dict.tensors.items():
                try:
                    read_bytes(tensor)
                except BntoolError as error:
                    error.tensor = name
                    raise error.about(path) from None
        save_checkpoint(checkpoint, path.with_name("copy.pt"))


def test_the_valid_forms_of_these_builders_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(make_archive(make_tensor()))
    (tmp_path / "a.pth").write_bytes(make_legacy(make_legacy_tensor()))
    (tmp_path / "a.safetensors").write_bytes(make_safetensors({"a": make_entry()}))
    for path in tmp_path.iterdir():
        with open_checkpoint(path) as checkpoint:
            assert [len(s.tensors) for s in checkpoint.state_dicts] == [1]
    assert torch.load(tmp_path / "a.pth", weights_only=True)["a.weight"].tolist() == [0] * 4


def test_a_flipped_bit_in_a_tensor_is_found_when_asked_for(tmp_path: Path) -> None:
    data = bytearray(make_archive(make_tensor()))
    data[data.rfind(b"m/data/0", 0, data.find(b"PK\x01\x02")) + 8] ^= 1
    (tmp_path / "flipped.pt").write_bytes(data)
    with open_checkpoint(tmp_path / "flipped.pt") as checkpoint, pytest.raises(CorruptFileError, match="checksum"):
        checkpoint.format.verify_checksums(checkpoint)


def test_shards_behind_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(make_safetensors({"a": make_entry()}))
    (tmp_path / "in" / "x.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (tmp_path / "in" / "m.index.json").write_bytes(make_index({"a": "x.safetensors"}))
    with pytest.raises(UnsafeFileError, match="link"):
        open_checkpoint(tmp_path / "in" / "m.index.json")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [({"b": "x.safetensors"}, "lacks it"), ({"a": "x.safetensors", "b": "x.safetensors"}, "lacks it")],
)
def test_an_index_that_does_not_fit_its_shards(weight_map: dict[str, str], words: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(make_safetensors({"a": make_entry()}))
    (tmp_path / "m.index.json").write_bytes(make_index(weight_map))
    with pytest.raises(CorruptFileError, match=words):
        open_checkpoint(tmp_path / "m.index.json")


def test_a_shard_with_more_than_the_index_says(tmp_path: Path) -> None:
    entries = {"a": make_entry(shape=[2], offsets=[0, 8]), "b": make_entry(shape=[2], offsets=[8, 16])}
    (tmp_path / "x.safetensors").write_bytes(make_safetensors(entries))
    (tmp_path / "m.index.json").write_bytes(make_index({"a": "x.safetensors"}))
    with pytest.raises(CorruptFileError, match="does not say so"):
        open_checkpoint(tmp_path / "m.index.json")


def test_a_shard_must_be_a_bare_state_dict(tmp_path: Path) -> None:
    torch.save({"model": {"a.weight": torch.ones(2)}, "b.weight": torch.ones(1)}, tmp_path / "x.bin")
    (tmp_path / "m.index.json").write_bytes(make_index({"b.weight": "x.bin"}))
    with pytest.raises(CorruptFileError, match="one bare state dict"):
        open_checkpoint(tmp_path / "m.index.json")


def test_rezip_keeps_checksums(tmp_path: Path) -> None:
    data = rezip(write_zip(tiny_net().state_dict(), tmp_path))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert all(zlib.crc32(archive.read(info)) == info.CRC for info in archive.infolist())
