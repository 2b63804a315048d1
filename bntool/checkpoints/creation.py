"""New files of tensors, from the tensors of others: safetensors, and the zip archive of torch.save."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO, Any

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.containers.pickles.nodes import Construction, Dict, Global, Instance, Node, PersistentId, Update
from bntool.checkpoints.containers.pickles.writing import write_pickle
from bntool.checkpoints.containers.zips.writing import ZipWriter
from bntool.checkpoints.files import Chunk, SourceFile
from bntool.checkpoints.outputs import OutputFiles, check_output_differs
from bntool.checkpoints.records import RECORD_KEY
from bntool.checkpoints.safetensors.file import Safetensors
from bntool.checkpoints.safetensors.file_writing import make_header
from bntool.checkpoints.tensors import (
    Storage,
    StoredTensor,
    Tensor,
    contiguous_strides,
    count_elements,
    equal_streams,
    has_elements,
    named_chunks,
)
from bntool.checkpoints.torch.zip import TorchZip
from bntool.errors import BntoolError, RefusedError, VerificationError
from bntool.representation import short_repr


class NewFormat(Enum):
    """The formats that a new file can have."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"


@dataclass(frozen=True)
class NewFile:
    """The contents of a new file.

    Attributes:
        tensors: by full name, in order.
        versions: of modules, for ``_metadata``; None leaves that out, and safetensors has no place for it.
        metadata: texts for safetensors; torch has no place for them.
        history: what bntool recorded.
        mode: permission bits; None for the process's default.
    """

    tensors: Mapping[str, Tensor]
    versions: Mapping[str, int | None] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    mode: int | None = None

    __repr__ = short_repr


def find_unwritable(tensors: Mapping[str, Tensor], kind: NewFormat) -> dict[str, str]:
    """Return the tensors that a format cannot hold, with the reason."""
    found = {}
    for name, tensor in tensors.items():
        if not has_elements(tensor):
            found[name] = f"it is {getattr(tensor, 'wrapper', None) or 'without elements'}"
        elif kind is NewFormat.SAFETENSORS and tensor.dtype.safetensors is None:
            found[name] = f"safetensors has no {tensor.dtype}"
    return found


def create_file(
    new: NewFile, kind: NewFormat, path: str | os.PathLike[str], *, source: Checkpoint, force: bool = False
) -> None:
    """Write a new file; it appears whole or not at all, and only after every tensor of it was read back and compared.

    Args:
        source: where the tensors come from; never written to.
        force: replace a file that exists.

    Raises:
        RefusedError: the format cannot hold a tensor.
        UsageError: ``path`` is the source.
        UnwritableFileError: it exists and ``force`` is not given, or the system refuses.
        CorruptFileError: elements of the source do not match its checksums, which the new file would hide.
        VerificationError: the written file does not hold what it should.
    """
    target = Path(path)
    unwritable = find_unwritable(new.tensors, kind)
    if unwritable:
        name, reason = next(iter(unwritable.items()))
        raise RefusedError(f"this tensor cannot be written to a {kind.value} file: {reason}", tensor=name)
    check_output_differs(source.file, target)
    try:
        source.format.verify_checksums(source)
    except BntoolError as error:
        raise error.about(source.path) from error.__cause__
    with OutputFiles(force=force, mode=new.mode) as output:
        stream = output.open(target)
        try:
            _WRITERS[kind](new, stream)
            output.flush()
            with _FORMATS[kind].read(SourceFile(output.temporary(target), is_own=True)) as written:
                _compare(new, written, target)
            _FORMATS[kind].judge(output.temporary(target))
            source.format.check_unchanged(source)
        except BntoolError as error:
            raise error.about(source.path) from error.__cause__


def _compare(new: NewFile, written: Checkpoint, path: Path) -> None:
    state_dict: StateDict | None = written.state_dicts[0] if written.state_dicts else None
    found = state_dict.tensors if state_dict is not None else {}
    if list(found) != list(new.tensors):
        raise VerificationError("the written file holds other keys than it should", path=path)
    for name, tensor in new.tensors.items():
        other = found[name]
        if (tensor.dtype, tuple(tensor.shape)) != (other.dtype, tuple(other.shape)):
            raise VerificationError("dtype or shape of a written tensor differ", path=path, tensor=name)
        if not equal_streams(tensor.chunks(), other.chunks()):
            raise VerificationError("a written tensor holds other elements than it should", path=path, tensor=name)
    if list(written.records.get("", ())) != list(new.history):
        raise VerificationError("the written file does not hold the record that it should", path=path)


def _write_safetensors(new: NewFile, stream: IO[bytes]) -> None:
    metadata = {"format": "pt", **new.metadata}
    if new.history:
        metadata[RECORD_KEY] = json.dumps(list(new.history), separators=(",", ":"))
    order = sorted(new.tensors, key=lambda name: -new.tensors[name].dtype.bits)  # widest first, for alignment
    stream.write(make_header(new.tensors, metadata, order))
    for name in order:
        for chunk in named_chunks(name, new.tensors[name]):
            stream.write(chunk)


def _write_torch(new: NewFile, stream: IO[bytes]) -> None:
    storages = _Storages(new.tensors)
    pairs: list[tuple[Node, Node]] = [(name, _tensor_node(name, t, storages)) for name, t in new.tensors.items()]
    root = _ordered_dict(pairs)
    history = json.dumps(list(new.history), separators=(",", ":"))
    if new.versions is not None:
        versions: dict[str, list[tuple[Node, Node]]] = {
            name: [("version", version)] for name, version in new.versions.items()
        }
        if new.history:
            versions.setdefault("", []).append((RECORD_KEY, history))
        metadata = _ordered_dict([(name, Dict(entry)) for name, entry in versions.items()])
        root.updates.append((Update.STATE, Dict([("_metadata", metadata)])))
    parts: list[bytes] = []
    write_pickle(parts.append, root, protocol=2)
    writer = ZipWriter(stream)
    small = {"data.pkl": b"".join(parts), ".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
    for name, data in small.items():
        writer.add(f"archive/{name}", iter((data,)), size=len(data))
    for key, (size, chunks) in enumerate(storages.contents()):
        writer.add(f"archive/data/{key}", chunks, size=size)
    writer.add("archive/version", iter((b"3\n",)), size=2)
    if new.versions is None and new.history:
        data = json.dumps({"": list(new.history)}, separators=(",", ":")).encode()
        writer.add("archive/bntool.json", iter((data,)), size=len(data))
    writer.close()


class _Storages:
    """The storages of a new file: tensors that share memory go on sharing it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        users: dict[tuple[int, int, int], list[StoredTensor]] = {}
        for tensor in tensors.values():
            if isinstance(tensor, StoredTensor) and tensor.storage is not None:
                users.setdefault(_identity(tensor.storage), []).append(tensor)
        # views of bytes in another order, or of another width, cannot go on sharing what is swapped
        self._shared = {
            identity: views
            for identity, views in users.items()
            if len(views) > 1 and len({view.dtype for view in views}) == 1 and not _is_swapped(views[0])
        }
        self._keys: dict[tuple[int, int, int], int] = {}
        self._contents: list[tuple[int, Iterator[Chunk]]] = []

    def place(self, name: str, tensor: Tensor) -> tuple[int, int, int, tuple[int, ...]]:
        """Return key of the storage of a tensor, its elements, and the offset and strides of the tensor in it."""
        count = count_elements(tensor.shape)
        if isinstance(tensor, StoredTensor) and tensor.storage is not None:
            identity = _identity(tensor.storage)
            if identity in self._shared:
                size = tensor.storage.nbytes
                if identity not in self._keys:
                    self._keys[identity] = self._add(size, _raw(tensor.storage))
                return self._keys[identity], size // tensor.dtype.itemsize, tensor.storage_offset, tensor.strides
        key = self._add(tensor.dtype.byte_count(count), named_chunks(name, tensor))
        return key, count, 0, contiguous_strides(tensor.shape)

    def _add(self, size: int, chunks: Iterator[Chunk]) -> int:
        self._contents.append((size, chunks))
        return len(self._contents) - 1

    def contents(self) -> list[tuple[int, Iterator[Chunk]]]:
        """Return size and bytes of each storage, in the order of their keys."""
        return self._contents


def _identity(storage: Storage) -> tuple[int, int, int]:
    return id(storage.source), storage.offset, storage.nbytes


def _is_swapped(tensor: StoredTensor) -> bool:
    return tensor.storage is not None and tensor.storage.big_endian and tensor.dtype.itemsize > 1


def _raw(storage: Storage) -> Iterator[Chunk]:
    step = 1 << 20
    for position in range(0, storage.nbytes, step):
        yield storage.source.read(storage.offset + position, min(step, storage.nbytes - position))


def _ordered_dict(pairs: list[tuple[Node, Node]]) -> Instance:
    node = Instance(Global("collections", "OrderedDict"), (), construction=Construction.REDUCE)
    if pairs:
        node.updates.append((Update.ITEMS, pairs))
    return node


def _tensor_node(name: str, tensor: Tensor, storages: _Storages) -> Node:
    key, count, offset, strides = storages.place(name, tensor)
    hooks = _ordered_dict([])
    if tensor.dtype.storage is not None:
        kind = Global("torch", tensor.dtype.storage)
        arguments: tuple[Node, ...] = (offset, tuple(tensor.shape), tuple(strides), False, hooks)
        rebuild = "_rebuild_tensor_v2"
    else:  # dtypes without a storage class of their own
        kind, count = Global("torch.storage", "UntypedStorage"), count * tensor.dtype.itemsize
        dtype = Global("torch", tensor.dtype.name)
        arguments = (offset, tuple(tensor.shape), tuple(strides), False, hooks, dtype)
        rebuild = "_rebuild_tensor_v3"
    reference = PersistentId(("storage", kind, str(key), "cpu", count))
    return Instance(Global("torch._utils", rebuild), (reference, *arguments), construction=Construction.REDUCE)


_WRITERS = {NewFormat.SAFETENSORS: _write_safetensors, NewFormat.TORCH: _write_torch}
_FORMATS = {NewFormat.SAFETENSORS: Safetensors(), NewFormat.TORCH: TorchZip()}
