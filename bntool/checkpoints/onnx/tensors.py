"""ONNX's TensorProto: raw bytes, typed fields, or bytes in another file of the same folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bntool.checkpoints.containers.protobufs.reading import Message, Wire
from bntool.checkpoints.containers.protobufs.tensors import VarintTensor, read_fixed
from bntool.checkpoints.dtypes import BY_NAME, DType, NumberKind
from bntool.checkpoints.files import ByteSource, SourceFile, quote
from bntool.checkpoints.tensors import (
    MAX_DIMENSIONS,
    Storage,
    StoredTensor,
    Tensor,
    contiguous_strides,
    count_elements,
    describe_shape,
)
from bntool.errors import CorruptFileError, UnsafeFileError

# TensorProto
DIMS, DATA_TYPE, SEGMENT, FLOAT_DATA, INT32_DATA, STRING_DATA, INT64_DATA = 1, 2, 3, 4, 5, 6, 7
RAW_DATA, DOUBLE_DATA, UINT64_DATA, EXTERNAL_DATA, DATA_LOCATION = 9, 10, 11, 13, 14
ELEMENTS = (FLOAT_DATA, INT32_DATA, STRING_DATA, INT64_DATA, RAW_DATA, DOUBLE_DATA, UINT64_DATA)
_EXTERNAL = 1

_OPAQUE = {
    8: DType("string", 8, NumberKind.OPAQUE),
    21: DType("uint4", 4, NumberKind.OPAQUE),
    22: DType("int4", 4, NumberKind.OPAQUE),
    23: DType("float4", 4, NumberKind.OPAQUE),
    25: DType("uint2", 2, NumberKind.OPAQUE),
    26: DType("int2", 2, NumberKind.OPAQUE),
}
_NAMES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16", 17: "float8_e4m3fn",
    18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz", 24: "float8_e8m0fnu",
}  # fmt: skip
DTYPES: Mapping[int, DType] = {code: BY_NAME[name] for code, name in _NAMES.items()} | _OPAQUE
CODES: Mapping[DType, int] = {dtype: code for code, dtype in DTYPES.items()}


class ExternalData:
    """The files beside a model that hold its large tensors: within its folder, and nowhere else.

    Args:
        model: the model's own file.
        replaced: files to read instead of those that the model names, by that name.
    """

    def __init__(self, model: SourceFile, *, replaced: Mapping[str, Path] | None = None) -> None:
        self._model = model
        self.files: dict[str, SourceFile] = {}
        self._replaced = replaced or {}

    def open(self, location: str) -> SourceFile:
        """Return a file by the path that the model gives.

        Raises:
            UnsafeFileError: the path leads out of the folder.
            UnreadableFileError: there is no such file.
        """
        if location not in self.files:
            if location in self._replaced:
                self.files[location] = SourceFile(self._replaced[location])
            else:
                self._check_inside(location)
                self.files[location] = self._model.folder.open(location, named_by=self._model.path)
        return self.files[location]

    def _check_inside(self, location: str) -> None:
        parts = location.replace("\\", "/").split("/")
        if not location or "\0" in location or ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise UnsafeFileError(f"the model names {quote(location)}, which is no file of its folder")
        try:
            leads_outside = not self._model.folder.contains(location)
        except (OSError, ValueError) as error:
            raise CorruptFileError(f"the model names {quote(location)}, which no file can be called") from error
        if leads_outside:
            raise UnsafeFileError(f"the model names {quote(location)}, a link that leads out of its folder")


def read_tensor(message: Message, *, key: str, external: ExternalData) -> Tensor:
    """Return the elements of a TensorProto, lazily.

    Args:
        key: its name.

    Raises:
        CorruptFileError: data, shape and dtype disagree.
        UnsafeFileError: its data lie outside of the model's folder.
    """
    try:
        return _read(message, key=key, external=external)
    except (CorruptFileError, UnsafeFileError) as error:
        error.tensor = error.tensor or key
        raise


def _read(message: Message, *, key: str, external: ExternalData) -> Tensor:
    dtype = DTYPES.get(message.integer(DATA_TYPE))
    shape = message.integers(DIMS)
    if dtype is None:
        raise CorruptFileError(f"unknown data type {message.integer(DATA_TYPE)}")
    if any(extent < 0 for extent in shape) or len(shape) > MAX_DIMENSIONS:
        raise CorruptFileError(f"impossible shape {describe_shape(shape)}")
    if message.integer(DATA_LOCATION) == _EXTERNAL:
        return _read_external(message, dtype=dtype, shape=shape, external=external)
    if dtype.name == "string" or message.last(SEGMENT) is not None:
        return _unread(dtype, shape, wrapper="string" if dtype.name == "string" else "segment")
    if message.last(RAW_DATA) is not None:
        return read_fixed(message, RAW_DATA, dtype=dtype, shape=shape, key=key)
    return _read_typed(message, dtype=dtype, shape=shape, key=key)


def _read_typed(message: Message, *, dtype: DType, shape: tuple[int, ...], key: str) -> Tensor:
    """Return elements in the field for their type; the small ones each as a varint."""
    if dtype.name in ("float32", "complex64"):
        return read_fixed(message, FLOAT_DATA, dtype=dtype, shape=shape, key=key)
    if dtype.name in ("float64", "complex128"):
        return read_fixed(message, DOUBLE_DATA, dtype=dtype, shape=shape, key=key)
    if dtype.bits < 8:
        return _unread(dtype, shape, wrapper=dtype.name)
    number = {"int64": INT64_DATA, "uint64": UINT64_DATA, "uint32": UINT64_DATA}.get(dtype.name, INT32_DATA)
    runs = tuple(message.all(number))
    if any(run.wire not in (Wire.VARINT, Wire.BYTES) for run in runs):
        raise CorruptFileError(f"field {number} holds no integers")
    stored = sum(max(run.length, 1) for run in runs)
    if stored < count_elements(shape):  # each takes a byte at least
        raise CorruptFileError(f"{stored} bytes do not hold a {dtype} tensor of shape {describe_shape(shape)}")
    return VarintTensor(dtype, shape, message, runs)


def _unread(dtype: DType, shape: tuple[int, ...], *, wrapper: str) -> StoredTensor:
    """Return a tensor that is shown and passed through."""
    return StoredTensor(dtype, shape, contiguous_strides(shape), 0, None, wrapper=wrapper)


def _read_external(message: Message, *, dtype: DType, shape: tuple[int, ...], external: ExternalData) -> StoredTensor:
    facts = {entry.text(1): entry.text(2) for entry in message.messages(EXTERNAL_DATA)}
    file = external.open(facts.get("location", ""))
    wanted = dtype.byte_count(count_elements(shape))
    try:
        offset = int(facts.get("offset") or 0)
        length = int(facts["length"]) if facts.get("length") else wanted
    except ValueError as error:
        raise CorruptFileError("offset or length of its external data is no number") from error
    if length != wanted or dtype.name == "string":
        raise CorruptFileError(f"{length} external bytes do not hold a {dtype} tensor of shape {describe_shape(shape)}")
    if offset < 0 or offset + length > file.size:
        raise CorruptFileError(
            f"bytes {offset} to {offset + length} of {file.path.name} are needed, which has {file.size}: "
            "it is truncated or belongs to another model"
        )
    source: ByteSource = file
    storage = Storage(source=source, offset=offset, nbytes=length, key=f"{file.path.name}@{offset}")
    return StoredTensor(dtype, shape, contiguous_strides(shape), 0, storage)


def is_external(message: Message) -> bool:
    return message.integer(DATA_LOCATION) == _EXTERNAL
