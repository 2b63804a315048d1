"""Sorted tables of keys and values as LevelDB writes them, which is what the index of a TensorFlow checkpoint is.

Layout: https://github.com/google/leveldb/blob/main/doc/table_format.md. Blocks of entries, an index of the blocks, and
a footer that says where that index lies. Each block has a checksum, which is held against it.
"""

from __future__ import annotations

from collections.abc import Iterator

from bntool.checkpoints.containers.crc32c import crc32c, unmask
from bntool.checkpoints.files import SourceFile
from bntool.errors import CorruptFileError, UnknownFormatError, UnsafeFileError

MAGIC = bytes.fromhex("57fb808b247547db")
MAX_SIZE = 1 << 26  # of the blocks of a table, unpacked
MAX_ENTRIES = 1 << 17
MAX_KEY = 1 << 12
_FOOTER, _TRAILER = 48, 5
_PLAIN, _SNAPPY = 0, 1
_LONGEST_VARINT = 10


def read_table(file: SourceFile) -> dict[bytes, bytes]:
    """Return all entries of a table, in order.

    Raises:
        UnknownFormatError: the file does not end as a table does.
        CorruptFileError: a checksum differs, or lengths and places contradict each other.
        UnsafeFileError: it is larger than any honest index.
    """
    footer = file.read(max(file.size - _FOOTER, 0), min(_FOOTER, file.size))
    if len(footer) < _FOOTER or not footer.endswith(MAGIC):
        raise UnknownFormatError(
            "it does not end as the index of a TensorFlow checkpoint does: truncated, or of another format"
        )
    blocks = _Blocks(file)
    _, place = _read_handle(footer, 0)  # of the block with metadata, which has none
    index, _ = _read_handle(footer, place)
    entries: dict[bytes, bytes] = {}
    last = b""
    for _, handle in _read_entries(blocks.read(*index)):
        for key, value in _read_entries(blocks.read(*_read_handle(handle, 0)[0])):
            if key <= last and entries:
                raise CorruptFileError("the keys of the table are not in order")
            if len(entries) >= MAX_ENTRIES:
                raise UnsafeFileError(f"the table has more than {MAX_ENTRIES} entries")
            entries[key] = value
            last = key
    return entries


class _Blocks:
    """Reads blocks, and counts their bytes: an index may name one block many times."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._left = MAX_SIZE

    def read(self, offset: int, size: int) -> bytes:
        if offset + size + _TRAILER > self._file.size:
            raise CorruptFileError(f"a block of {size} bytes at byte {offset} reaches beyond the end of the table")
        self._take(size)
        data = self._file.read(offset, size + 1)
        stored = int.from_bytes(self._file.read(offset + size + 1, 4), "little")
        if crc32c(data) != unmask(stored):
            raise CorruptFileError(f"the checksum of the block at byte {offset} of the table differs: it is damaged")
        if data[size] == _PLAIN:
            return data[:size]
        if data[size] != _SNAPPY:
            raise CorruptFileError(f"a block is compressed in an unknown way ({data[size]})")
        length, place = read_varint(data, 0)
        self._take(length)
        return unpack_snappy(data[place:size], length)

    def _take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise UnsafeFileError(f"the blocks of the table have more than {MAX_SIZE} bytes")


def _read_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of a block: of each key only what differs from the one before is stored."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restarts
    if len(block) < 4 or end < 0:
        raise CorruptFileError("a block of the table is cut")
    key, place = b"", 0
    while place < end:
        shared, place = read_varint(block, place)
        fresh, place = read_varint(block, place)
        length, place = read_varint(block, place)
        if shared > len(key) or fresh + length > end - place:
            raise CorruptFileError("an entry of the table reaches beyond its block")
        if shared + fresh > MAX_KEY:
            raise UnsafeFileError(f"a key of the table has {shared + fresh} bytes")
        key = key[:shared] + block[place : place + fresh]
        yield key, block[place + fresh : place + fresh + length]
        place += fresh + length


def _read_handle(data: bytes, place: int) -> tuple[tuple[int, int], int]:
    """Read the offset and size of a block; return them and the place behind them."""
    offset, place = read_varint(data, place)
    size, place = read_varint(data, place)
    return (offset, size), place


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Return an integer of seven bits a byte, and the place after it.

    Raises:
        CorruptFileError: it has no end.
    """
    value = 0
    for index, byte in enumerate(data[place : place + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, place + index + 1
    raise CorruptFileError("an integer of the table has no end")


def unpack_snappy(data: bytes, length: int) -> bytes:
    """Unpack Snappy's raw format; https://github.com/google/snappy/blob/main/format_description.txt.

    Args:
        data: what follows the length.
        length: of the result.

    Raises:
        CorruptFileError: it gives more or fewer bytes.
    """
    unpacked = bytearray()
    place = 0
    while place < len(data) and len(unpacked) <= length:
        tag, place = data[place], place + 1
        kind, size = tag & 3, tag >> 2
        if kind == 0:  # literal bytes; long ones have their length in the next one to four bytes
            width = max(size - 59, 0)
            if width:
                size, place = int.from_bytes(data[place : place + width], "little"), place + width
            unpacked += data[place : place + size + 1]
            place += size + 1
            continue
        width = {1: 1, 2: 2, 3: 4}[kind]
        offset, place = int.from_bytes(data[place : place + width], "little"), place + width
        if kind == 1:
            size, offset = (size & 7) + 3, offset | tag >> 5 << 8
        start = len(unpacked) - offset
        if offset == 0 or start < 0:
            raise CorruptFileError("a block of the table copies bytes from before its beginning")
        copied = unpacked[start : start + size + 1]
        unpacked += (copied * (size // len(copied) + 1))[: size + 1]  # what is copied may overlap what it makes
    if place != len(data) or len(unpacked) != length:
        raise CorruptFileError("a block of the table does not unpack to its length")
    return bytes(unpacked)
