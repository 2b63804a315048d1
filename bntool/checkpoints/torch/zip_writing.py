"""Writing an edited zip archive of torch.save, or of TorchScript."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.pickles.writing import write_pickle
from bntool.checkpoints.containers.zips.writing import ZipWriter, copy_with_patches, patched_chunks
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.tensors import count_elements
from bntool.checkpoints.torch.changes import TorchChanges, collect_changes
from bntool.checkpoints.torch.patches import patch_storage, storage_bytes
from bntool.checkpoints.torch.zip import ArchiveContent, ArchiveLayout
from bntool.errors import RefusedError


def write(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write an archive of torch.save; see :meth:`bntool.checkpoints.checkpoint.Format.write`."""
    _write_archive(checkpoint, collect_changes(checkpoint), output.open(path))


def write_torchscript(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write a TorchScript archive with other elements.

    Raises:
        RefusedError: keys or attributes change.
    """
    changes = collect_changes(checkpoint)
    if changes.changes_pickle or changes.new_storages:
        raise RefusedError(
            "in a TorchScript file elements of tensors can change, but neither keys nor attributes: the compiled "
            "code relies on them. Change the model before torch.jit.script or torch.jit.trace"
        )
    _write_archive(checkpoint, changes, output.open(path))


def _write_archive(checkpoint: Checkpoint, changes: TorchChanges, stream: IO[bytes]) -> None:
    """Patch the bytes where that is enough; else write the archive record by record."""
    layout = ArchiveContent.of(checkpoint).layout
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
    layout = ArchiveContent.of(checkpoint).layout
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
        elif record.is_deflated:
            writer.add(record.name, iter((archive.read(record),)), size=record.size)
        else:
            writer.copy(archive, record)
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
    pickle = ArchiveContent.of(checkpoint).pickle
    write_pickle(parts.append, pickle.root, protocol=pickle.protocol, replacements=changes.replacements)
    return b"".join(parts)
