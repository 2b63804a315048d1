"""Pickles of known names alone that make numpy take bytes of the file for pointers to objects."""

from __future__ import annotations

import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bntool.checkpoints.checkpoint import GlobalTrust
from bntool.checkpoints.formats import open_checkpoint

_OBJECTS = b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R"
_MEMORY = b"cbuiltins\nbytearray\nC\x08AAAAAAAA\x85R"
_EMPTY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"


def _pair(flags: int) -> bytes:
    """A type of two objects."""
    fields = b"}(X\x01\x00\x00\x00x" + _OBJECTS + b"K\x00\x86X\x01\x00\x00\x00y" + _OBJECTS + b"K\x08\x86u"
    names = b"(X\x01\x00\x00\x00xX\x01\x00\x00\x00yt"
    state = b"(K\x03X\x01\x00\x00\x00|N" + names + fields + b"K\x10K\x01K" + bytes([flags]) + b"tb"
    return b"cnumpy\ndtype\nX\x03\x00\x00\x00V16\x89\x88\x87R" + state


_UNMARKED = _OBJECTS + b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
_ARRAYS = {
    "over a buffer": b"cbuiltins\nlist\ncnumpy\nndarray\nK\x01\x85" + _OBJECTS + _MEMORY + b"\x87R\x85R",
    "over a buffer, by __new__": b"cbuiltins\nlist\ncnumpy\nndarray\nK\x01\x85" + _OBJECTS + _MEMORY + b"\x87\x81\x85R",
    "fields without a flag": b"cbuiltins\ndict\n"
    + _EMPTY
    + b"(K\x01K\x01\x85"
    + _pair(0)
    + b"\x89C\x10AAAAAAAABBBBBBBBtb\x85R",
    "type without a flag": b"cbuiltins\nlist\n" + _EMPTY + b"(K\x01K\x01\x85" + _UNMARKED + b"\x89C\x08AAAAAAAAtb\x85R",
}


def _save(path: Path, opcodes: bytes) -> Path:
    """A file of torch whose pickle does something, drops the result, and holds a state dict as before."""
    torch.save({"bn.weight": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            changed = b"\x80\x04" + opcodes + b"0" + data[2:] if name.endswith("/data.pkl") else data
            archive.writestr(name, changed)
    return path


def _trust(path: Path) -> GlobalTrust:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.globals[0].trust


@pytest.mark.parametrize("name", _ARRAYS)
def test_bytes_of_a_file_that_become_pointers(name: str, tmp_path: Path) -> None:
    data = b"\x80\x04" + _ARRAYS[name] + b"."
    done = subprocess.run(
        [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"], check=False, input=data
    )
    assert done.returncode == -signal.SIGSEGV  # numpy followed one
    assert _trust(_save(tmp_path / "model.pt", _ARRAYS[name])) is GlobalTrust.SUSPICIOUS


def test_arrays_as_numpy_pickles_them_stay_data(tmp_path: Path) -> None:
    arrays = [
        np.array([(1, "a")], dtype=[("x", "i4"), ("y", "O")]),
        np.array([(["a"],)], dtype=[("x", [("y", "O")])]),
        np.array(["x", None], dtype=object),
        np.zeros(3, dtype=[("x", "f4"), ("y", "i2", (2,))]),
        np.zeros(2, dtype=[("O", "f4"), ("object", "i8")]),
        np.array(["2020"], dtype="M8[s]"),
        np.array(["O8", "O"]),
        np.float64(3),
    ]
    for protocol in (2, 4):
        torch.save({"bn.weight": torch.ones(2), "more": arrays}, tmp_path / "model.pt", pickle_protocol=protocol)
        assert _trust(tmp_path / "model.pt") is GlobalTrust.KNOWN
