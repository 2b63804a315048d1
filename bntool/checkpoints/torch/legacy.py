"""The files of torch.save before torch 1.6: pickles one after the other, then the storages."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Format, StateDict
from bntool.checkpoints.containers.pickles.nodes import as_mapping, is_mapping, text_of
from bntool.checkpoints.containers.pickles.reading import OpcodeBudget, Pickle, read_pickle
from bntool.checkpoints.containers.pickles.trust import list_globals
from bntool.checkpoints.containers.tar_headers import TAR_BLOCK, is_tar_header
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.tensors import Storage
from bntool.checkpoints.torch.arrays import ArrayReader
from bntool.checkpoints.torch.state_dicts import (
    TorchContent,
    describe_root,
    find_state_dicts,
    metadata_node,
    read_records,
)
from bntool.checkpoints.torch.tensors import StorageReference, read_storage_reference
from bntool.errors import CorruptFileError, UnsafeFileError

_MAGIC = 0x1950A86A20F9469CFC6C
_HEAD = b"\x8a\x0a" + _MAGIC.to_bytes(10, "little")
_PROTOCOL = 1001


@dataclass(frozen=True, slots=True)
class StoredRun:
    """One storage of the file: its number of elements and where its bytes lie."""

    key: str
    count: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class LegacyLayout:
    """The file, its list of storages, and where each lies."""

    file: SourceFile
    keys: Pickle
    runs: dict[str, StoredRun]
    big_endian: bool


@dataclass(frozen=True)
class LegacyContent(TorchContent):
    """The pickle, and the places of its storages."""

    layout: LegacyLayout


class TorchLegacy(Format):
    """A file of torch.save from before torch 1.6: five pickles, then the storages."""

    name = "torch-legacy"
    title = "torch (legacy, before 1.6)"
    writer = "torch.legacy_writing:write"

    def recognises(self, path: Location, head: bytes) -> bool:  # noqa: ARG002 (names say nothing)
        return starts_as_legacy(head)

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:
        return describe_root(checkpoint)

    def read(self, file: SourceFile) -> Checkpoint:
        _, _, system, pickle, keys = pickles = read_pickles(file)
        big_endian = as_mapping(system.root).get("little_endian") is False
        layout = LegacyLayout(file, keys, _locate_storages(file, pickle, keys), big_endian)
        reader = ArrayReader(lambda reference: _resolve(layout, reference))
        found = find_state_dicts(pickle.root, reader)
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=found.state_dicts,
            entries=as_mapping(pickle.root) if is_mapping(pickle.root) else {},
            globals=list_globals(*pickles),
            records=read_records(found.sources),
            not_understood=found.not_understood,
            content=LegacyContent(pickle, reader, found.sources, layout),
        )

    def can_record(self, checkpoint: Checkpoint, state_dict: StateDict) -> bool:
        return is_mapping(metadata_node(LegacyContent.of(checkpoint).sources[state_dict.key].node))


def starts_as_legacy(head: bytes) -> bool:
    """Return whether a file that begins so is read as one of this format."""
    return head[:1] == b"\x80" and _HEAD in head[2:32]  # protocols 4 and 5 put a frame before it


def read_pickles(file: SourceFile, *, budget: OpcodeBudget | None = None) -> tuple[Pickle, ...]:
    """Return the five pickles of a file, all of which torch.load unpickles: magic, protocol, system, object, storage
    keys.

    Raises:
        CorruptFileError: it is of no version that is known.
        UnsafeFileError: it is a tar archive, too.
    """
    if is_tar_header(file.read(0, min(file.size, TAR_BLOCK))):
        raise UnsafeFileError(
            "this file can be read in two ways: as a tar archive, which torch.load tries first, and as pickles"
        )
    magic = read_pickle(file)
    protocol = read_pickle(file, offset=magic.end)
    if magic.root != _MAGIC or protocol.root != _PROTOCOL:
        raise CorruptFileError("this is torch's legacy format, but in no version of it that is known")
    budget = budget or OpcodeBudget()
    found = [magic, protocol]
    for _ in ("system", "object", "keys"):
        found.append(read_pickle(file, offset=found[-1].end, budget=budget))
    return tuple(found)


def _locate_storages(file: SourceFile, pickle: Pickle, keys: Pickle) -> dict[str, StoredRun]:
    """Find where each storage lies: they follow in the order of the list of keys, each after its element count."""
    references = {
        reference.key: reference
        for reference in map(read_storage_reference, pickle.persistent_ids)
        if reference is not None
    }
    if not isinstance(keys.root, list):
        raise CorruptFileError("the list of storages is malformed")
    _announce_counts(file, [references.get(text_of(node) or "") for node in keys.root], keys.end)
    runs: dict[str, StoredRun] = {}
    position = keys.end
    for node in keys.root:
        key = text_of(node)
        reference = references.get(key or "")
        if key is None or reference is None or key in runs:
            raise CorruptFileError("the list of storages names one that no tensor uses, or one twice")
        (count,) = struct.unpack("<q", file.read(position, 8))
        nbytes = reference.dtype.byte_count(count)
        if count < reference.elements:
            raise CorruptFileError(f"storage {quote(key)} has {count} elements, but {reference.elements} are needed")
        if position + 8 + nbytes > file.size:
            raise CorruptFileError(
                f"storage {quote(key)} of {count} elements does not fit in the file, which is truncated"
            )
        runs[key] = StoredRun(key, count, position + 8, nbytes)
        position += 8 + nbytes
    return runs


def _announce_counts(file: SourceFile, references: Sequence[StorageReference | None], start: int) -> None:
    """Say where the element counts of storages will be, if each has as many as its tensors say."""
    places, position = [], start
    for reference in references:
        if reference is None:
            break
        places.append((position, 8))
        position += 8 + reference.dtype.byte_count(reference.elements)
    file.announce(places)


def _resolve(layout: LegacyLayout, reference: StorageReference) -> Storage:
    run = layout.runs.get(reference.key)
    if run is None:
        raise CorruptFileError(f"the storage {quote(reference.key)} is missing from the file")
    offset, nbytes = run.offset, run.nbytes
    if reference.view is not None:
        _, start, count = reference.view
        if reference.dtype.byte_count(start + count) > nbytes:
            raise CorruptFileError("a view of a storage reaches outside of it")
        offset, nbytes = offset + reference.dtype.byte_count(start), reference.dtype.byte_count(count)
    return Storage(
        source=layout.file,
        offset=offset,
        nbytes=nbytes,
        key=reference.key,
        big_endian=layout.big_endian,
        device=reference.device,
    )
