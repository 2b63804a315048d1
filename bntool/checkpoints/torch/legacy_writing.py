"""Writing an edited file of torch.save before 1.6."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.pickles.writing import write_pickle
from bntool.checkpoints.files import Chunk, SourceFile
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.tensors import count_elements
from bntool.checkpoints.torch.changes import collect_changes
from bntool.checkpoints.torch.legacy import LegacyContent, StoredRun
from bntool.checkpoints.torch.patches import patch_storage, storage_bytes
from bntool.errors import RefusedError


def write(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write a file: bytes patched in a copy where that is enough, else the pickle and the storages anew.

    Raises:
        RefusedError: the file has no place for a record.
    """
    changes = collect_changes(checkpoint)
    if changes.loose_record is not None:
        raise RefusedError(
            "this file has no place for a record: its state dict has no _metadata. "
            "Load it and save it again with torch.save, or leave the record out"
        )
    stream = output.open(path)
    content = LegacyContent.of(checkpoint)
    layout = content.layout
    stream.writelines(layout.file.chunks(0, content.pickle.start))
    if changes.changes_pickle:
        protocol = content.pickle.protocol
        write_pickle(stream.write, content.pickle.root, protocol=protocol, replacements=changes.replacements)
        keys = [key for key in layout.runs if key not in changes.dropped]
        write_pickle(stream.write, [*keys, *changes.new_storages], protocol=protocol)
    else:
        stream.writelines(layout.file.chunks(content.pickle.start, layout.keys.end - content.pickle.start))
    for run in layout.runs.values():
        if run.key not in changes.dropped:
            stream.write(struct.pack("<q", run.count))
            patches = patch_storage(changes.patches.get(run.key, []), base=run.offset)
            _copy_run(layout.file, run, patches, stream)
    for tensor in changes.new_storages.values():
        stream.write(struct.pack("<q", count_elements(tensor.shape)))
        stream.writelines(storage_bytes(tensor, big_endian=layout.big_endian))
    if not changes.changes_pickle:
        end = max((run.offset + run.nbytes for run in layout.runs.values()), default=layout.keys.end)
        stream.writelines(layout.file.chunks(end, layout.file.size - end))  # whatever follows is not ours to drop


def _copy_run(file: SourceFile, run: StoredRun, patches: Iterator[tuple[int, Chunk]], stream: IO[bytes]) -> None:
    position = 0
    for offset, data in patches:
        stream.writelines(file.chunks(run.offset + position, offset - position))
        stream.write(data)
        position = offset + len(data)
    stream.writelines(file.chunks(run.offset + position, run.nbytes - position))
