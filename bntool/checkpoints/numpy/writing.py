"""Writing a ``.npz`` archive with what changed; arrays that were compressed are written without that."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.zips.writing import ZipWriter, patched_chunks
from bntool.checkpoints.files import Chunk
from bntool.checkpoints.numpy.archive import ArraysContent
from bntool.checkpoints.numpy.header import CODE_OF, write_header
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.tensors import Tensor, count_elements, named_chunks
from bntool.errors import RefusedError


def write(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write the archive.

    Raises:
        RefusedError: numpy has no such dtype.
    """
    content, stream = ArraysContent.of(checkpoint), output.open(path)
    if not checkpoint.edits:
        checkpoint.file.copy_to(stream, offset=0, length=checkpoint.file.size)
        return
    (state_dict,) = checkpoint.state_dicts
    writer = ZipWriter(stream)
    arrays = {record.name for record in content.records.values()}
    for record in content.archive.records.values():
        if record.name not in arrays:
            writer.add(record.name, patched_chunks(content.archive, record, ()), size=record.size)
    objects = content.records.keys() - state_dict.stored.keys()
    for name in itertools.chain(objects, state_dict.tensors):
        tensor = state_dict.tensors.get(name)
        if tensor is state_dict.stored.get(name):
            record = content.records[name]
            writer.add(record.name, patched_chunks(content.archive, record, ()), size=record.size)
        elif tensor is not None:
            _add(writer, name, tensor)
    writer.close()


def _add(writer: ZipWriter, name: str, tensor: Tensor) -> None:
    if tensor.dtype.name not in CODE_OF:
        raise RefusedError(f"numpy has no {tensor.dtype}", tensor=name)
    header = write_header(tensor.dtype, tuple(tensor.shape))
    size = len(header) + tensor.dtype.byte_count(count_elements(tensor.shape))

    def chunks() -> Iterator[Chunk]:
        yield header
        yield from named_chunks(name, tensor)

    writer.add(f"{name}.npy", chunks(), size=size)
