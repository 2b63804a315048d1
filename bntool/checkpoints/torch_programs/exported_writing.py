"""Writing an edited ``.pt2`` archive of torch.export: by bytes only."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.zips.writing import ZipWriter, copy_with_patches, patched_chunks, patches_of_nested
from bntool.checkpoints.files import Chunk
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.torch.patches import Patches, collect_value_patches, patch_storage
from bntool.checkpoints.torch.zip import ArchiveLayout
from bntool.checkpoints.torch_programs.exported_before_2_8 import ExportLayout
from bntool.errors import RefusedError
from bntool.plan import Record

_ADVICE = "change the model before torch.export.export, or take its tensors out with bntool convert CKPT --to torch"


def write(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write an archive of torch 2.8 or later with other elements.

    Raises:
        RefusedError: something else than elements is to change.
    """
    layout = ArchiveLayout.of(checkpoint)
    patches = collect_value_patches(checkpoint, advice=_ADVICE)
    _write_archive(checkpoint, layout, _patch_records(layout, patches), output.open(path))


def write_before_2_8(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write an archive of torch 2.1 to 2.7 with other elements.

    Raises:
        RefusedError: something else than elements is to change, or the state dict in it is compressed.
    """
    layout = ExportLayout.of(checkpoint)
    patches = collect_value_patches(checkpoint, advice=_ADVICE)
    changes = {}
    if patches:
        assert layout.inner is not None
        assert layout.record is not None
        if any(record.is_deflated for record in layout.inner.archive.records.values()):
            raise RefusedError("the state dict in this .pt2 archive is compressed, so that no elements can change")
        changes[layout.record.name] = _patch_nested(layout.inner, patches)
    _write_archive(checkpoint, layout.outer, changes, output.open(path))


def _write_archive(
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


def _patch_records(layout: ArchiveLayout, patches: Patches) -> dict[str, Iterator[tuple[int, Chunk]]]:
    """Return the bytes to put over the records of an archive, whose storages have the names of records."""
    records = layout.archive.records
    return {
        name: patch_storage(patch, base=0 if records[name].is_deflated else records[name].data_offset)
        for name, patch in patches.items()
    }


def _patch_nested(layout: ArchiveLayout, patches: Patches) -> Iterator[tuple[int, Chunk]]:
    """Yield the bytes to put over an archive of torch.save that is a record of another one; its storages are not
    deflated.
    """
    by_record = {}
    for key, patch in patches.items():
        record = layout.storage_record(key)
        assert record is not None
        by_record[record.name] = functools.partial(patch_storage, patch, base=0)
    return patches_of_nested(layout.archive, by_record)
