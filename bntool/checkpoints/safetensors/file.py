"""The safetensors format: a JSON header, then the tensors without gaps."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Content, Format, LoadingCode, StateDict
from bntool.checkpoints.containers.json_texts import read_json
from bntool.checkpoints.dtypes import BY_SAFETENSORS
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.records import RECORD_KEY, parse_record
from bntool.checkpoints.safetensors.partial import PARTIAL_KEY, make_partial
from bntool.checkpoints.state_dicts import find_prefix
from bntool.checkpoints.tensors import (
    MAX_DIMENSIONS,
    Storage,
    StoredTensor,
    Tensor,
    contiguous_strides,
    count_elements,
    describe_shape,
)
from bntool.errors import CorruptFileError, VerificationError

MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
METADATA = "__metadata__"


@dataclass(frozen=True)
class Header(Content):
    """The metadata, where the tensors begin, and how many bytes between them belong to none."""

    metadata: dict[str, str]
    data_start: int
    holes: int = 0


class Safetensors(Format):
    """A file of the safetensors library."""

    name = "safetensors"
    title = "safetensors"
    writer = "safetensors.file_writing:write"
    loading = LoadingCode(("from safetensors.torch import load_file",), state_dict="load_file({path})")
    entries_are_texts = True

    def recognises(self, path: Location, head: bytes) -> bool:
        looks_right = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER
        return looks_right or path.suffix == ".safetensors"

    def read(self, file: SourceFile) -> Checkpoint:
        header, data_start = _read_header(file)
        metadata = _check_metadata(header.pop(METADATA, {}))
        tensors, holes = _read_tensors(file, header, data_start)
        if PARTIAL_KEY in metadata:
            return make_partial(file, metadata[PARTIAL_KEY], tensors, self)
        history = parse_record(metadata.get(RECORD_KEY))
        state_dict = StateDict(key="", prefix=find_prefix(list(tensors)), tensors=tensors)
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=(state_dict,) if tensors else (),
            entries={name: text for name, text in metadata.items() if name != RECORD_KEY},
            records={"": history} if history else {},
            content=Header(metadata, data_start, holes),
        )

    def judge(self, path: Path) -> None:
        """Open a written file with the library that others will read it with.

        Raises:
            VerificationError: it refuses the file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as opened:
                opened.keys()
        except SafetensorError as error:
            raise VerificationError(f"the safetensors library refuses the written file: {error}", path=path) from error

    def describe_losses(self, checkpoint: Checkpoint) -> Sequence[str]:
        holes = Header.of(checkpoint).holes
        if not holes:
            return ()
        return (f"{holes} bytes between the tensors that belong to none, for which the safetensors library refuses it",)


def _read_header(file: SourceFile) -> tuple[dict[str, Any], int]:
    if file.size < 8:
        raise CorruptFileError("the file is too short for a safetensors header")
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > min(MAX_HEADER, file.size - 8):
        raise CorruptFileError(f"the safetensors header claims {length} bytes; the file has {file.size}")
    header = read_json(file.read(8, length), what="the safetensors header")
    if not isinstance(header, dict):
        raise CorruptFileError("the safetensors header is not a JSON object")
    return header, 8 + length


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError("the metadata of the safetensors header is not a map of texts")
    return metadata


def _read_tensors(file: SourceFile, header: Mapping[str, Any], data_start: int) -> tuple[dict[str, Tensor], int]:
    """Return the tensors, and how many bytes between them belong to none."""
    tensors: dict[str, Tensor] = {}
    runs: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        tensor, begin, end = _read_entry(file, name, entry, data_start)
        tensors[name] = tensor
        runs.append((begin, end, name))
    position = holes = 0
    for begin, end, name in sorted(runs):
        if begin < position:
            raise CorruptFileError(f"its data overlaps that of another tensor, from byte {begin}", tensor=name)
        holes += begin - position
        position = end
    described = data_start + position
    if described != file.size:
        what = "the file is truncated" if described > file.size else "other data follow the last tensor"
        raise CorruptFileError(f"the header describes {described} bytes, but the file has {file.size}: {what}")
    return tensors, holes


def _read_entry(file: SourceFile, name: str, entry: Any, data_start: int) -> tuple[StoredTensor, int, int]:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype = BY_SAFETENSORS.get(str(fields.get("dtype")))
    shape, offsets = fields.get("shape", ()), fields.get("data_offsets", ())
    if "dtype" not in fields:
        raise CorruptFileError("its entry in the header has no dtype", tensor=name)
    if dtype is None:
        raise CorruptFileError(f"unknown dtype {quote(str(fields.get('dtype')))}", tensor=name)
    if not _are_counts(shape) or not _are_counts(offsets) or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise CorruptFileError("its shape or data_offsets are malformed", tensor=name)
    begin, end = offsets
    if end < begin:
        raise CorruptFileError(f"its data_offsets run backwards, from {begin} to {end}", tensor=name)
    elements = count_elements(shape)
    if end - begin != dtype.byte_count(elements) or (elements * dtype.bits) % 8:
        raise CorruptFileError(
            f"{end - begin} bytes do not hold a {dtype} tensor of shape {describe_shape(shape)}", tensor=name
        )
    storage = Storage(source=file, offset=data_start + begin, nbytes=end - begin, key=name)
    return (
        StoredTensor(
            dtype=dtype, shape=tuple(shape), strides=contiguous_strides(shape), storage_offset=0, storage=storage
        ),
        begin,
        end,
    )


def _are_counts(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110 (many thousands of short ones, for which a generator takes twice as long)
        if type(value) is not int or not 0 <= value < 1 << 63:
            return False
    return True
