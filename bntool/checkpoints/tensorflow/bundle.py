"""The tensors of a TensorFlow checkpoint: which shard holds the bytes of each, as ``tensor_bundle.proto`` says."""

from __future__ import annotations

from dataclasses import dataclass

from bntool.checkpoints.checkpoint import Content
from bntool.checkpoints.containers.crc32c import crc32c, unmask
from bntool.checkpoints.containers.leveldb_table import read_table, read_varint
from bntool.checkpoints.containers.protobufs.reading import Buffer, Message, Wire
from bntool.checkpoints.dtypes import BY_NAME, DType
from bntool.checkpoints.files import CHUNK, MemorySource, SourceFile
from bntool.checkpoints.tensors import (
    MAX_DIMENSIONS,
    Storage,
    StoredTensor,
    contiguous_strides,
    count_elements,
    describe_shape,
)
from bntool.errors import CorruptFileError, UnknownFormatError, UnsafeFileError

MAX_SHARDS = 512
MAX_STRING = 1 << 28  # of the description of the objects
_STRING = 7
# DataType of types.proto
_DTYPES = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 8: "complex64", 9: "int64", 10: "bool",
    11: "qint8", 12: "quint8", 13: "qint32", 14: "bfloat16", 17: "uint16", 18: "complex128", 19: "float16",
    22: "uint32", 23: "uint64", 24: "float8_e5m2", 25: "float8_e4m3fn", 26: "float8_e4m3fnuz", 28: "float8_e5m2fnuz",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of a value, as BundleEntryProto says it.

    Attributes:
        dtype: number in TensorFlow's DataType.
        checksum: masked CRC-32C of its bytes.
        is_partitioned: cut into parts that have entries of their own.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    is_partitioned: bool


class Bundle(Content):
    """A checkpoint: the index and its shards.

    Args:
        file: the index.

    Attributes:
        path: of the index.
        entries: of all values, by key.
        tensors: of those that are tensors of numbers, by key.

    Raises:
        UnknownFormatError: it is another table.
        CorruptFileError, UnsafeFileError
        UnreadableFileError: a shard is missing.
    """

    def __init__(self, file: SourceFile) -> None:
        table = read_table(file)
        if b"" not in table:
            raise UnknownFormatError("it is a table, but not the index of a TensorFlow checkpoint")
        header = _parse(table.pop(b""))
        if any(one.wire is Wire.BYTES for one in header.all(1)):
            raise UnknownFormatError(
                "this is a TensorFlow checkpoint of version 1 (one file for all, before 2017), which is not read; load "
                "it and save it again with tf.compat.v1.train.Saver"
            )
        self._count = header.integer(1)
        self._big_endian = header.integer(2) == 1
        if not 1 <= self._count <= MAX_SHARDS:
            raise UnsafeFileError(f"the index names {self._count} shards")
        self.path, self.folder = file.path, file.folder
        self._shards: dict[int, SourceFile] = {}
        self.entries: dict[str, Entry] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for raw, value in table.items():
            if not raw.startswith(b"\0"):  # a part of a partitioned tensor, under an encoded name
                self._add(raw.decode("utf-8", errors="backslashreplace"), _parse(value))

    def _add(self, key: str, message: Message) -> None:
        shape, checksum = _read_shape(message, key), message.last(6)
        entry = Entry(
            dtype=message.integer(1),
            shape=shape,
            shard=message.integer(3),
            offset=message.integer(4),
            size=message.integer(5),
            checksum=checksum.value if checksum is not None else 0,
            is_partitioned=message.last(7) is not None,
        )
        self.entries[key] = entry
        name = _DTYPES.get(entry.dtype)
        if entry.is_partitioned:
            if name is not None:
                strides = contiguous_strides(shape)
                self.tensors[key] = StoredTensor(BY_NAME[name], shape, strides, 0, None, wrapper="partitioned")
            return
        self._check_place(key, entry)
        if name is not None:
            self.tensors[key] = self._make_tensor(key, entry, BY_NAME[name])

    def _check_place(self, key: str, entry: Entry) -> None:
        if not 0 <= entry.shard < self._count:
            raise CorruptFileError(f"the index places it in shard {entry.shard}, but counts {self._count}", tensor=key)
        size = self._shard(entry.shard).size
        if entry.offset < 0 or entry.size < 0 or entry.offset + entry.size > size:
            raise CorruptFileError(
                f"bytes {entry.offset} to {entry.offset + entry.size} lie beyond the end of "
                f"{self._shard(entry.shard).path.name}, which has {size}: truncated, or of another checkpoint",
                tensor=key,
            )

    def _make_tensor(self, key: str, entry: Entry, dtype: DType) -> StoredTensor:
        if entry.size != dtype.byte_count(count_elements(entry.shape)):
            raise CorruptFileError(
                f"{entry.size} bytes do not hold a {dtype} tensor of shape {describe_shape(entry.shape)}", tensor=key
            )
        storage = Storage(
            source=self._shard(entry.shard),
            offset=entry.offset,
            nbytes=entry.size,
            key=key,
            big_endian=self._big_endian,
        )
        return StoredTensor(dtype, entry.shape, contiguous_strides(entry.shape), 0, storage)

    def _shard(self, number: int) -> SourceFile:
        if number not in self._shards:
            prefix = self.path.name.removesuffix(".index")
            name = f"{prefix}.data-{number:05}-of-{self._count:05}"
            self._shards[number] = self.folder.open(name, named_by=self.path)
        return self._shards[number]

    @property
    def size(self) -> int:
        """Bytes of the shards."""
        return sum(shard.size for shard in self._shards.values())

    def read_text(self, key: str) -> bytes | None:
        """Return the bytes of a string, held against its checksum; None where there is none of that key.

        A tensor of strings is their lengths, a checksum of these, and then the strings.
        """
        entry = self.entries.get(key)
        if entry is None or entry.dtype != _STRING or entry.shape or entry.is_partitioned:
            return None
        if entry.size > MAX_STRING:
            raise UnsafeFileError(f"it has {entry.size} bytes", tensor=key)
        data = self._shard(entry.shard).read(entry.offset, entry.size)
        length, place = read_varint(data, 0)
        if place + 4 + length != entry.size:
            raise CorruptFileError(f"{entry.size} bytes do not hold a text of {length}", tensor=key)
        return data[place + 4 :]

    def verify_checksums(self) -> int:
        """Compare the bytes of every value with its checksum; return how many there are.

        Raises:
            CorruptFileError: one differs.
        """
        checked = 0
        for key, entry in self.entries.items():
            is_text = entry.dtype == _STRING and not entry.shape
            if entry.is_partitioned or not (is_text or entry.dtype in _DTYPES):
                continue  # several texts, and objects, have checksums of other forms
            checksum = self._checksum_text(key, entry) if is_text else self._checksum(entry)
            if checksum != unmask(entry.checksum):
                raise CorruptFileError("the checksum of its bytes differs: the file is damaged", tensor=key)
            checked += 1
        return checked

    def _checksum(self, entry: Entry) -> int:
        checksum = 0
        for position in range(entry.offset, entry.offset + entry.size, CHUNK):
            length = min(CHUNK, entry.offset + entry.size - position)
            checksum = crc32c(self._shard(entry.shard).read(position, length), checksum)
        return checksum

    def _checksum_text(self, key: str, entry: Entry) -> int:
        """Compute the checksum of texts: of the length as 32 bits (64 where it needs them), of the checksum beside it,
        and of the text.
        """
        text = self.read_text(key) or b""
        width = 4 if len(text) < 1 << 32 else 8
        start = entry.offset + entry.size - len(text) - 4
        beside = self._shard(entry.shard).read(start, 4)
        return crc32c(text, crc32c(beside, crc32c(len(text).to_bytes(width, "little"))))


def _parse(data: bytes) -> Message:
    return Message(Buffer(MemorySource(data)), 0, len(data))


def _read_shape(message: Message, key: str) -> tuple[int, ...]:
    shape = message.message(2)
    extents = tuple(dim.integer(1) for dim in shape.messages(2)) if shape is not None else ()
    if len(extents) > MAX_DIMENSIONS or any(extent < 0 for extent in extents):
        raise CorruptFileError(f"impossible shape {describe_shape(extents)}", tensor=key)
    return extents
