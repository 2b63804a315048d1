"""Writing safetensors files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.records import RECORD_KEY
from bntool.checkpoints.safetensors.file import METADATA, Header
from bntool.checkpoints.tensors import StoredTensor, Tensor, count_elements, named_chunks
from bntool.errors import RefusedError
from bntool.plan import Record, RemoveEntry, RenameTensor, SetAttribute

_PAGE = 4096


def write(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write a safetensors file: its header anew where keys or the record change, the tensors without gaps.

    Raises:
        RefusedError: something else than tensors is to change.
    """
    for edit in checkpoint.edits:
        if isinstance(edit.step, SetAttribute | RemoveEntry):
            raise RefusedError("a safetensors file holds tensors only, no modules and no other entries")
    stream = output.open(path)
    content = Header.of(checkpoint)
    if not checkpoint.state_dicts:  # a file without tensors
        checkpoint.file.copy_to(stream, offset=0, length=checkpoint.file.size)
        return
    (state_dict,) = checkpoint.state_dicts
    metadata = dict(content.metadata)
    recorded = (
        any(isinstance(edit.step, Record | RenameTensor) for edit in checkpoint.edits) and "" in checkpoint.records
    )
    if recorded:
        metadata[RECORD_KEY] = json.dumps(checkpoint.records[""], separators=(",", ":"))
    original = {state_dict.renamed.get(name, name): tensor for name, tensor in state_dict.stored.items()}
    order = _data_order(original, state_dict.tensors)
    if not state_dict.renamed and not content.holes and original.keys() == state_dict.tensors.keys() and not recorded:
        checkpoint.file.copy_to(stream, offset=0, length=content.data_start)
    else:
        stream.write(make_header(state_dict.tensors, metadata, order, like=content.data_start))
    start = end = 0  # neighbours in the source are copied in one call
    for name in order:
        tensor = state_dict.tensors[name]
        if isinstance(tensor, StoredTensor) and tensor.storage is not None:
            if tensor.storage.offset != end:
                checkpoint.file.copy_to(stream, offset=start, length=end - start)
                start = tensor.storage.offset
            end = tensor.storage.offset + tensor.nbytes
        else:
            checkpoint.file.copy_to(stream, offset=start, length=end - start)
            start = end = 0
            for chunk in named_chunks(name, tensor):
                stream.write(chunk)
    checkpoint.file.copy_to(stream, offset=start, length=end - start)


def _data_order(original: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the order of the bytes: as in the source where the keys are the same, else widest first, for alignment."""
    if original.keys() == tensors.keys():
        return sorted(tensors, key=lambda name: _offset(original[name]))
    return sorted(tensors, key=lambda name: -tensors[name].dtype.bits)


def _offset(tensor: Tensor) -> int:
    return tensor.storage.offset if isinstance(tensor, StoredTensor) and tensor.storage is not None else 0


def make_header(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], order: list[str], *, like: int = 0
) -> bytes:
    """Return the length and the JSON of a file whose tensors follow without gaps, in this order.

    Args:
        like: where the tensors begin in the file that they come from: blanks bring them to the same place in a page of
            memory, which halves what copying them inside the kernel costs.

    Raises:
        RefusedError: a name is no text of Unicode, as JSON has it.
    """
    for name in tensors:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise RefusedError(
                "half of a surrogate pair in its name is no text of Unicode, which safetensors asks for: give it "
                "another name first",
                tensor=name,
            )
    offsets, position = {}, 0
    for name in order:
        size = tensors[name].dtype.byte_count(count_elements(tensors[name].shape))
        offsets[name] = [position, position + size]
        position += size
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype.safetensors,
            "shape": list(tensor.shape),
            "data_offsets": offsets[name],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
    text += b" " * ((like - 8 - len(text)) % _PAGE if like and like % 8 == 0 else -len(text) % 8)
    return struct.pack("<Q", len(text)) + text
