"""Reading msgpack (the specification of msgpack.org) without bytes: long values stay where they are in the file."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from bntool.checkpoints.files import ByteSource
from bntool.errors import CorruptFileError, UnsafeFileError

MAX_DEPTH = 100
MAX_VALUES = 2_000_000
MAX_TEXT = 1 << 16  # bytes of a key or another text
_WINDOW = 4096  # bytes read at a time

_NUMBERS: Mapping[int, struct.Struct] = {
    0xCA: struct.Struct(">f"), 0xCB: struct.Struct(">d"),
    0xCC: struct.Struct(">B"), 0xCD: struct.Struct(">H"), 0xCE: struct.Struct(">I"), 0xCF: struct.Struct(">Q"),
    0xD0: struct.Struct(">b"), 0xD1: struct.Struct(">h"), 0xD2: struct.Struct(">i"), 0xD3: struct.Struct(">q"),
}  # fmt: skip


class _Kind(Enum):
    BYTES = "bytes"
    EXTENSION = "extension"
    TEXT = "text"
    LIST = "list"
    MAP = "map"


_LENGTHS: Mapping[int, tuple[_Kind, int]] = {  # what follows, and the bytes of its length
    0xC4: (_Kind.BYTES, 1), 0xC5: (_Kind.BYTES, 2), 0xC6: (_Kind.BYTES, 4),
    0xC7: (_Kind.EXTENSION, 1), 0xC8: (_Kind.EXTENSION, 2), 0xC9: (_Kind.EXTENSION, 4),
    0xD9: (_Kind.TEXT, 1), 0xDA: (_Kind.TEXT, 2), 0xDB: (_Kind.TEXT, 4),
    0xDC: (_Kind.LIST, 2), 0xDD: (_Kind.LIST, 4), 0xDE: (_Kind.MAP, 2), 0xDF: (_Kind.MAP, 4),
}  # fmt: skip
_SHORT = ((0x80, 0x8F, _Kind.MAP), (0x90, 0x9F, _Kind.LIST), (0xA0, 0xBF, _Kind.TEXT))
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class Bytes(NamedTuple):
    """The place of a value's bytes in the source."""

    offset: int
    length: int


class Extension(NamedTuple):
    """A value of a type that an application defines, and where its bytes lie."""

    type: int
    offset: int
    length: int


def read_msgpack(source: ByteSource, *, offset: int = 0, end: int | None = None) -> Any:
    """Return the one value in a range of bytes: maps as dicts, arrays as lists, bytes and extensions by their places.

    Args:
        end: the byte after the range; None for all that there is.

    Raises:
        CorruptFileError: truncated, something behind the value, a key that is no text or comes twice.
        UnsafeFileError: nested deeper, or of more values than any checkpoint needs.
    """
    reader = _Reader(source, offset, source.size if end is None else end)
    value = reader.read(0)
    if reader.position != reader.end:
        raise CorruptFileError(f"{reader.end - reader.position} bytes stand behind the msgpack value")
    return value


class _Reader:
    def __init__(self, source: ByteSource, position: int, end: int) -> None:
        self._source = source
        self.position = position
        self.end = end
        self._window = b""
        self._start = position
        self._values = 0

    def _take(self, length: int) -> bytes:
        start = self.position - self._start
        if not 0 <= start <= len(self._window) - length:
            if length > self.end - self.position:
                raise CorruptFileError("the msgpack value is truncated")
            self._window = self._source.read(self.position, min(max(_WINDOW, length), self.end - self.position))
            self._start, start = self.position, 0
        self.position += length
        return self._window[start : start + length]

    def _skip(self, length: int) -> int:
        """Pass by bytes; where they begin."""
        if length > self.end - self.position:
            raise CorruptFileError(f"the msgpack file ends before {length} bytes that it announces")
        self.position += length
        return self.position - length

    def read(self, depth: int) -> Any:  # noqa: PLR0911 (one for each kind)
        self._values += 1
        if self._values > MAX_VALUES or depth > MAX_DEPTH:
            raise UnsafeFileError(f"the msgpack file holds more than {MAX_VALUES} values or {MAX_DEPTH} levels")
        code = self._take(1)[0]
        if code <= 0x7F or code >= 0xE0:
            return code if code <= 0x7F else code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return _NUMBERS[code].unpack(self._take(_NUMBERS[code].size))[0]
        kind, length = self._find_kind(code)
        if kind is _Kind.MAP:
            return self._read_map(length, depth)
        if kind is _Kind.LIST:
            return self._read_list(length, depth)
        if kind is _Kind.TEXT:
            return self._read_text(length)
        return self._read_extension(length) if kind is _Kind.EXTENSION else Bytes(self._skip(length), length)

    def _find_kind(self, code: int) -> tuple[_Kind, int]:
        """Return the kind of value that follows a code, and its length, which the code or the next bytes say."""
        for first, last, kind in _SHORT:
            if first <= code <= last:
                return kind, code - first
        if 0xD4 <= code <= 0xD8:
            return _Kind.EXTENSION, 1 << (code - 0xD4)
        if code not in _LENGTHS:
            raise CorruptFileError(f"byte {self.position - 1} begins no msgpack value (0x{code:02x})")
        kind, width = _LENGTHS[code]
        return kind, int.from_bytes(self._take(width), "big")

    def _read_extension(self, length: int) -> Extension:
        kind = self._take(1)[0]
        return Extension(kind if kind < 0x80 else kind - 0x100, self._skip(length), length)

    def _read_text(self, length: int) -> str:
        if length > MAX_TEXT:
            raise UnsafeFileError(f"the msgpack file holds a text of {length} bytes")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptFileError("a text of the msgpack file is no UTF-8") from error

    def _check_count(self, count: int, *, width: int) -> None:
        if count * width > self.end - self.position:
            raise CorruptFileError(f"the msgpack file ends before {count} values that it announces")

    def _read_list(self, count: int, depth: int) -> list[Any]:
        self._check_count(count, width=1)
        return [self.read(depth + 1) for _ in range(count)]

    def _read_map(self, count: int, depth: int) -> dict[str | int, Any]:
        self._check_count(count, width=2)
        found: dict[str | int, Any] = {}
        for _ in range(count):
            key = self.read(depth + 1)
            if type(key) not in (str, int):
                raise CorruptFileError("a key of the msgpack file is neither a text nor a number")
            if key in found:
                raise CorruptFileError(f"a key of the msgpack file comes twice: {str(key)[:80]!r}")
            found[key] = self.read(depth + 1)
        return found
