"""Writing an edited ``.pt2`` archive of torch.export: by bytes only."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import IO

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.zips.writing import ZipWriter, copy_with_patches, patched_chunks, patches_of_nested
from bntool.checkpoints.files import Chunk
from bntool.checkpoints.torch.patches import patch_storage
from bntool.checkpoints.torch.zip import ArchiveLayout
from bntool.checkpoints.value_patches import Patches
from bntool.plan import Record


def write_archive(
    checkpoint: Checkpoint, layout: ArchiveLayout, patches: Mapping[str, Iterable[tuple[int, Chunk]]], stream: IO[bytes]
) -> None:
    """Write the archive with other bytes of its weights, and the record of what bntool did.

    Args:
        patches: by name of a record, (offset in it, bytes) in ascending order.
    """
    archive = layout.archive
    recorded = any(isinstance(edit.step, Record) for edit in checkpoint.edits)
    deflated = any(archive.records[name].is_deflated for name in patches)
    if not recorded and not deflated:
        copy_with_patches(archive, stream, patches)
        return
    writer = ZipWriter(stream, has_checksums=archive.has_checksums)
    place = f"{layout.root}{layout.record_name}"
    for record in archive.records.values():
        if record.name != place or not recorded:
            writer.add(record.name, patched_chunks(archive, record, patches.get(record.name, ())), size=record.size)
    if recorded:
        data = json.dumps(dict(checkpoint.records), separators=(",", ":")).encode()
        writer.add(place, iter((data,)), size=len(data))
    writer.close()


def patch_records(layout: ArchiveLayout, patches: Patches) -> dict[str, Iterator[tuple[int, Chunk]]]:
    """The bytes to put over the records of an archive, whose storages have the names of records."""
    records = layout.archive.records
    return {
        name: patch_storage(patch, base=0 if records[name].is_deflated else records[name].data_offset)
        for name, patch in patches.items()
    }


def patch_nested(layout: ArchiveLayout, patches: Patches) -> Iterator[tuple[int, Chunk]]:
    """The bytes to put over an archive of torch.save that is a record of another one; its storages are not deflated."""
    by_record = {}
    for key, patch in patches.items():
        record = layout.storage_record(key)
        assert record is not None
        by_record[record.name] = functools.partial(patch_storage, patch, base=0)
    return patches_of_nested(layout.archive, by_record)
