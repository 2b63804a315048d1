"""What a file's own loader would run is never called harmless: each file is really loaded, and the code really runs."""

from __future__ import annotations

import contextlib
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from bntool.checkpoints.formats import open_checkpoint
from bntool.errors import CorruptFileError, UnknownFormatError, UnsafeFileError
from bntool.inspection.safety import SafetyVerdict, judge_safety
from tests.inspection.attacks import ATTACKS, STATE_DICT, add_member, pickled, tar


def judge(path: Path) -> str:
    """The verdict, or the error by which the file is refused."""
    try:
        with open_checkpoint(path) as checkpoint:
            return judge_safety(checkpoint).verdict.value
    except (CorruptFileError, UnknownFormatError, UnsafeFileError) as error:
        return error.code


@pytest.mark.parametrize("name", ATTACKS)
def test_what_runs_code_is_never_harmless(name: str, tmp_path: Path) -> None:
    build, load = ATTACKS[name]
    canary = tmp_path / "canary"
    path = build(tmp_path, canary)
    verdict = judge(path)
    assert not canary.exists()
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        load(path)
    assert canary.exists(), "the attack does not work, and proves nothing"
    assert verdict in ("suspicious", "corrupt", "unknown-format", "unsafe")


def _memory(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def _nested_key(depth: int) -> bytes:
    return b"\x80\x02}" + b"K\x01" + b"\x85" + b"2\x86" * depth + b"K\x00s."


@pytest.mark.parametrize(
    "opcodes",
    [
        pytest.param(_memory(b"c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R"), id="bytearray"),
        pytest.param(_memory(b"c__builtin__\nbytes\n\x8a\x06\0\0\0\0\0\x01\x85R"), id="bytes"),
        pytest.param(_memory(b"c__builtin__\nlist\nc__builtin__\nxrange\n\x8a\x06\0\0\0\0\0\x01\x85R\x85R"), id="list"),
        pytest.param(
            _memory(b"ccollections\ndeque\nc__builtin__\nxrange\n\x8a\x06\0\0\0\0\0\x01\x85R\x85R"), id="deque"
        ),
        pytest.param(
            _memory(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\0\0\0\x20\x85U\x01d\x87R"), id="array"
        ),
        pytest.param(
            _memory(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x02\x85U\x0aS999999999\x87R"),
            id="wide text",
        ),
        pytest.param(_memory(b"ctorch\nFloatStorage\nJ\0\0\0\x40\x85R"), id="storage"),
        pytest.param(_memory(b"ctorch\nFloatTensor\nJ\0\0\x01\0J\0\0\x01\0\x86R"), id="tensor"),
        pytest.param(_memory(b"ctorch.nn.modules.linear\nLinear\nJ\0\0\x01\0J\0\0\x01\0\x86R"), id="module"),
        pytest.param(_memory(b"]" + b"c__builtin__\nbytearray\nJ\0\0\0\x08\x85Ra" * 3), id="many that are small"),
        pytest.param(
            _memory(
                b"ctorch._utils\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\nctorch\nTensor\nJ\0\0\0\x40\x85}tR"
            ),
            id="of a tensor of a class",
        ),
        pytest.param(
            _memory(b"ccopyreg\n_reconstructor\nc__builtin__\nbytes\nc__builtin__\nbytes\nJ\0\0\0\x40\x87R"),
            id="of an object of an old protocol",
        ),
        pytest.param(
            _memory(
                b"cargparse\nNamespace\n)R}U\x06appendc__builtin__\nbytearray\nsbJ\0\0\0\x40a",
            ),
            id="by a method that is an attribute",
        ),
        pytest.param(
            _memory(b"cnumpy\nndarray\nM\xe8\x03\x85cnumpy\ndtype\nU\x0aS999999999\x85R\x86\x81"), id="wide dtype"
        ),
        pytest.param(_nested_key(60), id="a key that takes forever to hash"),
    ],
)
def test_what_only_eats_memory_or_time_is_never_harmless(opcodes: bytes, tmp_path: Path) -> None:
    assert judge(pickled(lambda _: opcodes)(tmp_path, tmp_path)) in ("suspicious", "unsafe")


def test_an_archive_of_two_libraries_is_refused(tmp_path: Path) -> None:
    torch.save(STATE_DICT, tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras", "a") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("metadata.json", "{}")
    assert judge(tmp_path / "model.keras") == "unsafe"


@pytest.mark.parametrize("place", [512, 1024, 4096])
def test_an_hdf5_file_behind_another_one_is_refused(place: int, tmp_path: Path) -> None:
    """h5py finds it there: the first bytes of a file are the user's by the standard of HDF5."""
    torch.save(STATE_DICT, tmp_path / "first", _use_new_zipfile_serialization=False)
    first = (tmp_path / "first").read_bytes()[:place].ljust(place, b"\0")
    (tmp_path / "model.h5").write_bytes(first)
    with h5py.File(tmp_path / "inner.h5", "w", userblock_size=place) as file:
        file["layer"] = [1.0]
    data = (tmp_path / "inner.h5").read_bytes()
    (tmp_path / "model.h5").write_bytes(first + data[place:])
    with h5py.File(tmp_path / "model.h5") as file:
        assert "layer" in file
    assert judge(tmp_path / "model.h5") == "unsafe"


@pytest.mark.parametrize("ending", [".keras", ".pt2"])
def test_a_zip_archive_behind_another_file_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    torch.save(STATE_DICT, path, _use_new_zipfile_serialization=False)
    assert judge(path) == "harmless"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("config.json", "{}")
    assert zipfile.is_zipfile(path)
    assert judge(path) == "unsafe"


def _with_times(archive: Any, evil: bytes) -> None:
    del evil
    add_member(archive, "notes", b"nothing", mtime=1234567.5)  # an extended header, as torch 0.1 wrote them


class Plain:
    pass


@pytest.mark.parametrize(
    "value",
    [
        range(3),
        [range(1000), range(10**12)],
        (slice(1, 2), {1, 2}, frozenset({3}), bytearray(100), b"12", complex(1, 2)),
        {(1, (2, 3)): 4},
        NotImplementedError("a"),
        np.zeros((100, 100)),
        np.float64(3),
        np.array(["text"]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_only_looks_like_it_stays_harmless(value: object, protocol: int, tmp_path: Path) -> None:
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pt"
        torch.save(
            {**STATE_DICT, "more": value}, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol
        )
        assert judge(path) == SafetyVerdict.HARMLESS.value


def test_a_module_with_its_source_code_stays_harmless(tmp_path: Path) -> None:
    """Files before 1.6 put the class of each module outside of the pickle, with its source."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6))
    torch.save(net, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    assert b"class BatchNorm1d" in (tmp_path / "net.pth").read_bytes()
    assert judge(tmp_path / "net.pth") == "harmless"


def test_a_tar_file_with_times_stays_harmless(tmp_path: Path) -> None:
    path = tar(_with_times)(tmp_path, tmp_path / "canary")
    torch.load(path, weights_only=False)
    assert judge(path) == SafetyVerdict.HARMLESS.value
    with pytest.raises(pickle.UnpicklingError):  # and it is data: nothing in it is a payload
        pickle.loads(path.read_bytes())


def test_every_kind_of_call_is_looked_at(tmp_path: Path) -> None:
    """A partial that is only kept is data, and one that is called is not."""
    import functools

    kept = tmp_path / "kept.pt"
    torch.save({**STATE_DICT, "layer": functools.partial(torch.nn.BatchNorm2d, eps=1e-3)}, kept)
    assert judge(kept) == SafetyVerdict.HARMLESS.value
    build: Callable[[Path, Path], Path] = ATTACKS["partial called"][0]
    with open_checkpoint(build(tmp_path, tmp_path / "canary")) as checkpoint:
        assert "functools.partial(...)()" in judge_safety(checkpoint).suspicious
