"""Writing an edited ``.pt2`` archive of torch.export: by bytes only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.tensors import StoredTensor, Tensor
from bntool.checkpoints.torch_patches import patch_storage
from bntool.checkpoints.torch_zip import ArchiveLayout
from bntool.checkpoints.value_patches import Patches
from bntool.checkpoints.zips.reading import ZipRecord
from bntool.checkpoints.zips.writing import ZipWriter, copy_with_patches, patched_chunks
from bntool.plan import Record


def write_archive(checkpoint: Checkpoint, patches: Patches, stream: IO[bytes]) -> None:
    """Write the archive with other bytes of its weights, and the record of what bntool did."""
    layout: ArchiveLayout = checkpoint.content
    archive = layout.archive
    recorded = any(isinstance(edit.step, Record) for edit in checkpoint.edits)
    deflated = any(archive.records[name].is_deflated for name in patches)
    if not recorded and not deflated:
        copy_with_patches(archive, stream, {name: _patch(archive.records[name], patches[name]) for name in patches})
        return
    writer = ZipWriter(stream, has_checksums=archive.has_checksums)
    place = f"{layout.root}{layout.record_name}"
    for record in archive.records.values():
        if record.name != place or not recorded:
            patch = _patch(record, patches.get(record.name, []))
            writer.add(record.name, patched_chunks(archive, record, patch), size=record.size)
    if recorded:
        data = json.dumps(dict(checkpoint.records), separators=(",", ":")).encode()
        writer.add(place, iter((data,)), size=len(data))
    writer.close()


def _patch(record: ZipRecord, patches: list[tuple[StoredTensor, Tensor]]) -> Iterator[tuple[int, bytes]]:
    return patch_storage(patches, base=0 if record.is_deflated else record.data_offset)
