"""The tar files of torch.save before torch 0.1.2: members pickle, tensors and storages."""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Format, LoadingCode
from bntool.checkpoints.containers.pickles.nodes import (
    Global,
    Node,
    PersistentId,
    as_mapping,
    is_mapping,
    text_of,
)
from bntool.checkpoints.containers.pickles.reading import OpcodeBudget, Pickle, read_pickle
from bntool.checkpoints.containers.pickles.trust import list_globals
from bntool.checkpoints.containers.tar_headers import read_tar_headers
from bntool.checkpoints.dtypes import BY_STORAGE, DType
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.tensors import MAX_DIMENSIONS, Storage, StoredTensor
from bntool.checkpoints.torch.state_dicts import find_state_dicts
from bntool.checkpoints.torch.tensors import StorageReference, TensorReader
from bntool.errors import CorruptFileError, OtherFormatError

_MEMBERS = ("pickle", "tensors", "storages")
MAX_MEMBERS = 1000
MAX_TENSORS = 1_000_000  # storages, views and tensors, each


class TorchTar(Format):
    """A tar file of torch.save from before torch 0.1.2."""

    name = "torch-tar"
    title = "torch (tar, before 0.1.2)"
    only_values = True
    has_records = False
    writer = "torch.patches:write_over_copy"
    loading = LoadingCode(
        ("import torch", "checkpoint = torch.load({path}, weights_only=False)  # runs code of the file")
    )

    def recognises(self, path: Location, head: bytes) -> bool:  # noqa: ARG002 (names say nothing)
        return head[257:262] == b"ustar" and head[:1] != b"\0"

    def read(self, file: SourceFile) -> Checkpoint:
        members = _read_members(file)
        if not all(name in members for name in _MEMBERS):
            raise OtherFormatError("the archive lacks a member that torch.save wrote")
        pickles = _Pickles()
        storages = _read_storages(members["storages"], pickles)
        tensors = _read_tensors(members["tensors"], storages, pickles)
        main = pickles.read(members["pickle"], members["pickle"].start)
        found = find_state_dicts(main.root, _TarReader(tensors))
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=found.state_dicts,
            entries=as_mapping(main.root) if is_mapping(main.root) else {},
            globals=list_globals(*pickles.found),
            not_understood=found.not_understood,
        )


class _Member:
    """One member of the archive, read by position in the file."""

    def __init__(self, file: SourceFile, start: int, length: int) -> None:
        self.file = file
        self.start = start
        self.size = start + length  # where it ends: a byte source has no other beginning than 0

    def read(self, offset: int, length: int) -> bytes:
        if offset < self.start or offset + length > self.size:
            raise CorruptFileError("a member of the tar archive is truncated")
        return self.file.read(offset, length)


class _Pickles:
    """The pickles of a file, there may be millions: all are kept for what they name, and share one budget."""

    def __init__(self) -> None:
        self.found: list[Pickle] = []
        self._budget = OpcodeBudget()

    def read(self, member: _Member, position: int) -> Pickle:
        self.found.append(read_pickle(member, offset=position, budget=self._budget))
        return self.found[-1]


def _read_members(file: SourceFile) -> dict[str, _Member]:
    """Return the regular files of the archive, by name."""
    members: dict[str, _Member] = {}
    for header in read_tar_headers(file, limit=MAX_MEMBERS):
        if header.is_file:
            if header.name in members:
                raise CorruptFileError(f"two members of the tar archive are named {quote(header.name)}")
            members[header.name] = _Member(file, header.offset, header.size)
    return members


def _read_count(member: _Member, position: int, pickles: _Pickles) -> tuple[int, int]:
    count = pickles.read(member, position)
    if type(count.root) is not int or not 0 <= count.root <= MAX_TENSORS:
        raise CorruptFileError("the number of storages or tensors is malformed")
    return count.root, count.end


@dataclass(frozen=True, slots=True)
class _TypedStorage:
    storage: Storage
    dtype: DType


def _read_storages(member: _Member, pickles: _Pickles) -> dict[int, _TypedStorage]:
    """Return the storages by number: how many, then a pickle of facts, a length and the elements of each, then the
    views.
    """
    storages: dict[int, _TypedStorage] = {}
    count, position = _read_count(member, member.start, pickles)
    for _ in range(count):
        facts = pickles.read(member, position)
        key, location, kind = facts.root if isinstance(facts.root, tuple) and len(facts.root) == 3 else (None,) * 3
        dtype = BY_STORAGE.get(kind.name) if isinstance(kind, Global) else None
        if type(key) is not int or dtype is None or key in storages:
            raise CorruptFileError("a storage of the tar archive is malformed")
        (elements,) = struct.unpack("<q", member.read(facts.end, 8))
        nbytes = dtype.byte_count(elements)
        if elements < 0 or facts.end + 8 + nbytes > member.size:
            raise CorruptFileError(f"a storage of {elements} elements does not fit in the file: it is truncated")
        device = text_of(location) or "cpu"
        storages[key] = _TypedStorage(Storage(member.file, facts.end + 8, nbytes, str(key), device=device), dtype)
        position = facts.end + 8 + nbytes
    views = pickles.read(member, position)
    for view in views.root if isinstance(views.root, list) else ():
        if not isinstance(view, tuple) or len(view) != 4 or not all(type(value) is int for value in view):
            raise CorruptFileError("a view of a storage is malformed")
        key, root, offset, elements = view
        whole = storages.get(root)
        if whole is None or offset < 0 or elements < 0:
            raise CorruptFileError("a view of a storage is malformed")
        start, nbytes = whole.dtype.byte_count(offset), whole.dtype.byte_count(elements)
        if start + nbytes > whole.storage.nbytes:
            raise CorruptFileError("a view of a storage reaches outside of it")
        part = dataclasses.replace(whole.storage, offset=whole.storage.offset + start, nbytes=nbytes)
        storages[key] = _TypedStorage(part, whole.dtype)
    return storages


def _read_tensors(member: _Member, storages: dict[int, _TypedStorage], pickles: _Pickles) -> dict[int, StoredTensor]:
    """Return the tensors by number: how many, then a pickle of facts and the binary geometry of each."""
    tensors: dict[int, StoredTensor] = {}
    count, position = _read_count(member, member.start, pickles)
    for _ in range(count):
        facts = pickles.read(member, position)
        key, storage_key = facts.root[:2] if isinstance(facts.root, tuple) and len(facts.root) == 3 else (None, None)
        storage = storages.get(storage_key) if type(storage_key) is int else None
        (dimensions,) = struct.unpack("<i", member.read(facts.end, 4))
        if type(key) is not int or storage is None or not 0 <= dimensions <= MAX_DIMENSIONS:
            raise CorruptFileError("a tensor of the tar archive is malformed")
        # the four bytes after the number of dimensions are padding
        numbers = struct.unpack(f"<{2 * dimensions + 1}q", member.read(facts.end + 8, 16 * dimensions + 8))
        tensors[key] = StoredTensor(
            dtype=storage.dtype,
            shape=numbers[:dimensions],
            strides=numbers[dimensions : 2 * dimensions],
            storage_offset=numbers[-1],
            storage=storage.storage,
        )
        tensors[key].check_bounds("")
        position = facts.end + 8 + 16 * dimensions + 8
    return tensors


class _TarReader(TensorReader):
    """Tensors are references to the outside of the pickle, bare or as the data of a parameter."""

    def __init__(self, tensors: dict[int, StoredTensor]) -> None:
        super().__init__(_no_storage)
        self._tensors = tensors

    def read(self, node: Node) -> StoredTensor | None:
        if isinstance(node, PersistentId):
            number = str(node.value) if type(node.value) is int else text_of(node.value)
            if number is None or not number.isdecimal():
                return None  # a class with its source code
            tensor = self._tensors.get(int(number)) if len(number) < 20 else None
            if tensor is None:
                raise CorruptFileError("a tensor is missing from the tar archive")
            return tensor
        return super().read(node)


def _no_storage(reference: StorageReference) -> Storage:
    raise CorruptFileError(f"storage {quote(reference.key)} is not where those of tar files are")
