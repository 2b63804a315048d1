"""The zip archives of torch.save since torch 1.6: a pickle and one record for each storage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bntool.checkpoints.checkpoint import Checkpoint, Format
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.pickles.nodes import as_mapping, is_mapping
from bntool.checkpoints.pickles.reading import read_pickle_bytes
from bntool.checkpoints.pickles.trust import list_globals
from bntool.checkpoints.pickles.writing import write_pickle
from bntool.checkpoints.tensors import Storage, count_elements
from bntool.checkpoints.torch_changes import TorchChanges, collect_changes
from bntool.checkpoints.torch_objects import TorchContent, as_history, find_state_dicts, read_records
from bntool.checkpoints.torch_patches import patch_storage, storage_bytes
from bntool.checkpoints.torch_tensors import StorageReference, TensorReader
from bntool.checkpoints.zips.reading import LOCAL_MAGIC, InflatedRecord, ZipArchive, ZipRecord, read_archive
from bntool.checkpoints.zips.writing import ZipWriter, copy_with_patches, patched_chunks
from bntool.errors import CorruptFileError, UnknownFormatError, UnsafeFileError

MAX_PICKLE = 1 << 29


@dataclass(frozen=True)
class ArchiveLayout:
    """The archive and the folder in it that holds everything.

    Attributes:
        record_name: where in the folder bntool leaves a record for which the pickle has no place.
    """

    archive: ZipArchive
    root: str
    big_endian: bool
    record_name: str = "bntool.json"

    def storage_record(self, key: str) -> ZipRecord | None:
        return self.archive.records.get(f"{self.root}data/{key}")


class TorchZip(Format):
    """See the module."""

    name = "torch-zip"
    title = "torch (zip)"

    def recognises(self, path: Path, head: bytes) -> bool:  # noqa: ARG002 (names say nothing)
        return head.startswith(LOCAL_MAGIC)

    def read(self, file: SourceFile) -> Checkpoint:
        archive = read_archive(file)
        layout = find_layout(archive)
        record = archive.records[f"{layout.root}data.pkl"]
        if record.size > MAX_PICKLE:
            raise UnsafeFileError(f"the pickle has {record.size} bytes")
        pickle = read_pickle_bytes(archive.read(record))
        reader = TensorReader(lambda reference: resolve_storage(layout, reference))
        state_dicts = find_state_dicts(pickle.root, reader)
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=state_dicts,
            entries=as_mapping(pickle.root) if is_mapping(pickle.root) else {},
            globals=list_globals(pickle),
            records={**read_loose_records(layout), **read_records(state_dicts)},
            content=TorchContent(pickle, reader, layout),
        )

    def write(self, checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
        write_archive(checkpoint, collect_changes(checkpoint), output.open(path))

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        layout: ArchiveLayout = checkpoint.content.container
        return layout.archive.check_records()


def read_loose_records(layout: ArchiveLayout) -> dict[str, tuple[Mapping[str, Any], ...]]:
    """The histories in a record of the archive, by key of the state dict; anything else counts as none."""
    record = layout.archive.records.get(f"{layout.root}{layout.record_name}")
    try:
        found = json.loads(layout.archive.read(record)) if record is not None else {}
    except (ValueError, RecursionError):
        return {}
    histories = {key: as_history(entries) for key, entries in found.items()} if isinstance(found, dict) else {}
    return {key: history for key, history in histories.items() if history}


def find_layout(archive: ZipArchive) -> ArchiveLayout:
    pickles = [name for name in archive.records if name == "data.pkl" or name.endswith("/data.pkl")]
    top = [name for name in pickles if name.count("/") <= 1]
    if not top:
        raise UnknownFormatError("this zip archive was not written by torch.save: it has no data.pkl")
    if len(top) > 1:
        raise CorruptFileError("the zip archive holds more than one data.pkl")
    root = top[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in archive.records:
        raise UnknownFormatError("this is a TorchScript archive")
    return ArchiveLayout(archive, root, big_endian=is_big_endian(archive, root))


def is_big_endian(archive: ZipArchive, root: str) -> bool:
    """The byte order of the storages, which newer archives name."""
    order = archive.records.get(f"{root}byteorder")
    return order is not None and archive.read(order) == b"big"


def resolve_storage(layout: ArchiveLayout, reference: StorageReference) -> Storage:
    record = layout.storage_record(reference.key)
    if record is None:
        raise CorruptFileError(f"the storage {reference.key!r:.80} is missing from the archive")
    if record.size < reference.nbytes:
        raise CorruptFileError(
            f"storage {reference.key!r:.80} has {record.size} bytes, but {reference.nbytes} are announced"
        )
    return Storage(
        source=InflatedRecord(layout.archive, record) if record.is_deflated else layout.archive.file,
        offset=0 if record.is_deflated else record.data_offset,
        nbytes=reference.nbytes,
        key=reference.key,
        big_endian=layout.big_endian,
        device=reference.device,
    )


def write_archive(checkpoint: Checkpoint, changes: TorchChanges, stream: IO[bytes]) -> None:
    """Write an edited archive: bytes patched where that is enough, else record by record."""
    layout: ArchiveLayout = checkpoint.content.container
    if changes.changes_pickle or changes.loose_record is not None or _patches_deflated(layout, changes):
        _rewrite(checkpoint, changes, ZipWriter(stream, has_checksums=layout.archive.has_checksums))
        return
    patches = {}
    for key, patch in changes.patches.items():
        record = layout.storage_record(key)
        assert record is not None
        patches[record.name] = patch_storage(patch, base=record.data_offset)
    copy_with_patches(layout.archive, stream, patches)


def _patches_deflated(layout: ArchiveLayout, changes: TorchChanges) -> bool:
    records = [layout.storage_record(key) for key in changes.patches]
    return any(record is not None and record.is_deflated for record in records)


def _rewrite(checkpoint: Checkpoint, changes: TorchChanges, writer: ZipWriter) -> None:  # noqa: C901 (one branch for each fate of a record)
    """Write a new archive: the pickle anew if it changes, storages patched, added and dropped, all else copied."""
    layout: ArchiveLayout = checkpoint.content.container
    archive, root = layout.archive, layout.root
    dropped = {f"{root}data/{key}" for key in changes.dropped}
    patches = {f"{root}data/{key}": patch for key, patch in changes.patches.items()}
    last_storage = max(
        (r.header_offset for r in archive.records.values() if r.name.startswith(f"{root}data/")), default=0
    )
    added = False

    def add_new_storages() -> None:
        for key, tensor in changes.new_storages.items():
            size = tensor.dtype.byte_count(count_elements(tensor.shape))
            writer.add(f"{root}data/{key}", storage_bytes(tensor, big_endian=layout.big_endian), size=size)

    for record in archive.records.values():
        if record.name == f"{root}data.pkl" and changes.changes_pickle:
            data = _emit_pickle(checkpoint, changes)
            writer.add(record.name, iter((data,)), size=len(data))
        elif record.name == f"{root}{layout.record_name}" and changes.loose_record is not None:
            continue
        elif record.name in patches:
            base = 0 if record.is_deflated else record.data_offset
            chunks = patched_chunks(archive, record, patch_storage(patches[record.name], base=base))
            writer.add(record.name, chunks, size=record.size)
        elif record.name in dropped:
            archive.check_record(record)
        else:
            writer.add(record.name, patched_chunks(archive, record, iter(())), size=record.size)
        if record.header_offset == last_storage and not added:
            add_new_storages()
            added = True
    if not added:
        add_new_storages()
    if changes.loose_record is not None:
        data = changes.loose_record.encode()
        writer.add(f"{root}{layout.record_name}", iter((data,)), size=len(data))
    writer.close()


def _emit_pickle(checkpoint: Checkpoint, changes: TorchChanges) -> bytes:
    parts: list[bytes] = []
    pickle = checkpoint.content.pickle
    write_pickle(parts.append, pickle.root, protocol=pickle.protocol, replacements=changes.replacements)
    return b"".join(parts)
