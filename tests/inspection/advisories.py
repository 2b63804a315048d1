"""Public advisories on loading model files: a file of ours for each, and what bntool says of it."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.inspection.attacks import ATTACKS, payload, pickled


@dataclass(frozen=True)
class Advisory:
    """One advisory.

    Attributes:
        number: of CVE.
        affected: the library, and the last version that it is of.
        what: the file does.
        build: makes one in a folder; its payload would make another folder.
        says: the verdict, or the code of the error by which it is refused.
    """

    number: str
    affected: str
    what: str
    build: Callable[[Path, Path], Path]
    says: str


def script(folder: Path, canary: Path) -> Path:
    """A TorchScript archive, whose code runs when it is called."""
    del canary
    torch.jit.script(torch.nn.BatchNorm1d(2)).save(folder / "script.pt")
    return folder / "script.pt"


def setitem_on_tensor(folder: Path, canary: Path) -> Path:
    """A pickle that sets elements of a tensor that it just made."""
    del canary
    buffer = io.BytesIO()
    torch.save(torch.ones(3), buffer)
    path = folder / "items.pt"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, data[:-1] + b"K\x00G?\xf0\0\0\0\0\0\0s." if name.endswith("data.pkl") else data)
    return path


def storage_of_false_size(folder: Path, canary: Path) -> Path:
    """A storage whose reference counts more elements than its record holds."""
    del canary
    buffer = io.BytesIO()
    torch.save(torch.ones(3), buffer)
    path = folder / "size.pt"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, re.sub(rb"(cpuq.)K\x03", rb"\1Kc", data) if "data.pkl" in name else data)
    return path


def plain_pickle(folder: Path, canary: Path) -> Path:
    """A pickle under the name of another format."""
    (folder / "model.bin").write_bytes(payload(canary) + b"}.")
    return folder / "model.bin"


def wrong_checksum(folder: Path, canary: Path) -> Path:
    """A zip archive whose pickle has another checksum than the archive says, which torch does not mind."""
    path = pickled(lambda canary: payload(canary) + b"}.")(folder, canary)
    data = path.read_bytes()
    crc = zipfile.ZipFile(path).getinfo("archive/data.pkl").CRC.to_bytes(4, "little")
    path.write_bytes(data.replace(crc, bytes(4)))
    return path


def by_submodule(folder: Path, canary: Path) -> Path:
    """A function of a submodule of a module that a list of dangerous ones has."""
    call = b"casyncio.unix_events\n_UnixSubprocessTransport._start\n(I0\nNtR0"
    return pickled(lambda _: b"\x80\x02" + call + b"}.")(folder, canary)


_TORCH_2025 = ("CVE-2025-32434", "torch 2.5.1")
_TORCH_2026 = ("CVE-2026-24747", "torch 2.9.1")
_PICKLESCAN = "picklescan 0.0.30"
ADVISORIES = [
    Advisory(*_TORCH_2025, "a tar file of torch 0.1, under `weights_only`", ATTACKS["tar of type 7"][0], "unsafe"),
    Advisory(*_TORCH_2025, "a TorchScript archive, under `weights_only`", script, "unknown"),
    Advisory(*_TORCH_2026, "SETITEM on a tensor, under `weights_only`", setitem_on_tensor, "unsafe"),
    Advisory(*_TORCH_2026, "a storage that claims more than it has", storage_of_false_size, "corrupt"),
    Advisory("CVE-2025-10155", _PICKLESCAN, "a pickle named `.bin`", plain_pickle, "unknown-format"),
    Advisory("CVE-2025-10156", _PICKLESCAN, "a record with a wrong checksum", wrong_checksum, "corrupt"),
    Advisory("CVE-2025-10157", _PICKLESCAN, "`asyncio.unix_events`, of a listed module", by_submodule, "suspicious"),
]
