"""Protocol Buffers as they lie in a file: fields by number, read by position.

No schema and no generated code: Caffe's and ONNX's messages are read by field number, payloads such as tensor data are
skipped until somebody wants them. Wire format: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from bntool.checkpoints.files import ByteSource
from bntool.errors import CorruptFileError, UnsafeFileError

MAX_FIELDS = 2_000_000  # of one file, beside those in payloads; a field takes about 150 bytes of memory
MAX_DEPTH = 100  # the limit of Google's own readers
MAX_TEXT = 1 << 20
_BLOCK = 1 << 15
_LONGEST_VARINT = 10


class Wire(IntEnum):
    """The layout of a field's value."""

    VARINT = 0
    FIXED64 = 1
    BYTES = 2
    GROUP = 3
    END_GROUP = 4
    FIXED32 = 5


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message, as positions in the file.

    Attributes:
        start: first byte of its tag.
        value_start, end: where its value lies; for ``BYTES`` without the length.
        value: of a varint or a fixed-width field, as an unsigned integer.
    """

    number: int
    wire: Wire
    start: int
    value_start: int
    end: int
    value: int = 0

    @property
    def length(self) -> int:
        return self.end - self.value_start


class Buffer:
    """A file read in blocks: neighbouring small reads cost one system call. Counts the fields that were read."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.fields = 0
        self._block = b""
        self._start = 0

    @property
    def size(self) -> int:
        return self.source.size

    def read(self, offset: int, length: int) -> bytes:
        """See :class:`~bntool.checkpoints.files.ByteSource`."""
        if length > _BLOCK:
            return self.source.read(offset, length)
        data, place = self.around(offset)
        if place + length <= len(data):
            return data[place : place + length]
        return self.source.read(offset, length)

    def around(self, offset: int) -> tuple[bytes, int]:
        """Return a block that holds a position with some bytes after it, and the place of the position in it."""
        place = offset - self._start
        if not 0 <= place <= len(self._block) - 2 * _LONGEST_VARINT:
            self._start = offset
            self._block = self.source.read(offset, min(_BLOCK, self.size - offset))
            place = 0
        return self._block, place


class Message:
    """A message of a file: its fields in order, repeated ones included.

    Args:
        buffer: of the file.
        start, end: where it lies.
        parent: the message that it is a field of, and that field.

    Raises:
        CorruptFileError: what lies there is no message.
        UnsafeFileError: more fields, or deeper, than any honest file.
    """

    def __init__(self, buffer: Buffer, start: int, end: int, *, parent: tuple[Message, Field] | None = None) -> None:
        self.buffer = buffer
        self.start, self.end = start, end
        self.parent = parent
        self.depth: int = parent[0].depth + 1 if parent is not None else 0
        if self.depth > MAX_DEPTH:
            raise UnsafeFileError(f"messages are nested deeper than {MAX_DEPTH}")
        self.fields = _read_fields(buffer, start, end)
        self._by_number: dict[int, list[Field]] = {}
        for one in self.fields:
            self._by_number.setdefault(one.number, []).append(one)

    def all(self, number: int) -> Sequence[Field]:
        """Return the fields of that number."""
        return self._by_number.get(number, ())

    def last(self, number: int) -> Field | None:
        """Return the field of that number: of several of a singular field the last one counts."""
        found = self._by_number.get(number)
        return found[-1] if found else None

    def integer(self, number: int, default: int = 0) -> int:
        """Read a varint as int64."""
        found = self.last(number)
        return default if found is None else as_signed(_expect(found, Wire.VARINT).value)

    def float32(self, number: int, default: float) -> float:
        """Read a float, as the shortest decimal that is this float: 1e-5 rather than 9.99999974738e-06."""
        found = self.last(number)
        if found is None:
            return default
        return shortest(_expect(found, Wire.FIXED32).value)

    def text(self, number: int, default: str = "") -> str:
        found = self.last(number)
        return default if found is None else self.text_of(found)

    def texts(self, number: int) -> tuple[str, ...]:
        return tuple(self.text_of(one) for one in self.all(number))

    def bytes_of(self, found: Field) -> bytes:
        """Return the value of a field that is text, a name or the like.

        Raises:
            UnsafeFileError: it is longer than a mebibyte.
        """
        if _expect(found, Wire.BYTES).length > MAX_TEXT:
            raise UnsafeFileError(f"a name or text has {found.length} bytes")
        return self.buffer.read(found.value_start, found.length)

    def text_of(self, found: Field) -> str:
        """Decode a text; what is no UTF-8 is shown in escapes, as old files have names in local encodings."""
        return self.bytes_of(found).decode("utf-8", errors="backslashreplace")

    def message_of(self, found: Field) -> Message:
        _expect(found, Wire.BYTES)
        return Message(self.buffer, found.value_start, found.end, parent=(self, found))

    def message(self, number: int) -> Message | None:
        found = self.last(number)
        return None if found is None else self.message_of(found)

    def messages(self, number: int) -> Iterator[Message]:
        return (self.message_of(one) for one in self.all(number))

    def integers(self, number: int) -> tuple[int, ...]:
        """Read a repeated varint, packed or not, as int64."""
        values: list[int] = []
        for one in self.all(number):
            if one.wire is Wire.VARINT:
                values.append(as_signed(one.value))
            elif one.wire is Wire.BYTES:
                values += map(as_signed, read_varints(self.bytes_of(one)))
            else:
                _expect(one, Wire.BYTES)
        return tuple(values)

    def floats(self, number: int) -> tuple[float, ...]:
        """Read a repeated float, packed or not."""
        data = b"".join(self.buffer.read(one.value_start, one.length) for one in self.all(number))
        if len(data) % 4 or any(one.wire not in (Wire.FIXED32, Wire.BYTES) for one in self.all(number)):
            raise CorruptFileError(f"field {number} holds no floats")
        return struct.unpack(f"<{len(data) // 4}f", data)


def _expect(found: Field, wire: Wire) -> Field:
    if found.wire is not wire:
        raise CorruptFileError(f"field {found.number} has wire type {found.wire.name}, not {wire.name}")
    return found


def as_signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def shortest(bits: int) -> float:
    """Return the decimal with the fewest digits that rounds to the float32 of these bits, as a float64."""
    (value,) = struct.unpack("<f", struct.pack("<I", bits))
    for digits in range(6, 10):
        text = float(f"{value:.{digits}g}")
        if abs(text) < 3.4e38 and struct.pack("<f", text) == struct.pack("<I", bits):
            return text
    return float(value)


def read_varints(data: bytes) -> list[int]:
    """Return packed varints, as unsigned integers.

    Raises:
        CorruptFileError: the last one is cut, or one is longer than ten bytes.
    """
    values, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            values.append(value & 0xFFFFFFFFFFFFFFFF)
            value, shift = 0, 0
        else:
            shift += 7
            if shift >= 7 * _LONGEST_VARINT:
                raise CorruptFileError("an integer is longer than ten bytes")
    if shift:
        raise CorruptFileError("packed integers end in the middle of one")
    return values


def _read_fields(buffer: Buffer, start: int, end: int) -> list[Field]:
    if end > buffer.size:
        raise CorruptFileError(f"a message needs bytes up to {end}; the file has {buffer.size}: it is truncated")
    fields: list[Field] = []
    position = start
    while position < end:
        one = _read_field(buffer, position, end, depth=0)
        fields.append(one)
        position = one.end
    return fields


def _read_field(buffer: Buffer, start: int, end: int, *, depth: int) -> Field:
    buffer.fields += 1
    if buffer.fields > MAX_FIELDS:
        raise UnsafeFileError(f"the file has more than {MAX_FIELDS} fields")
    tag, position = _read_varint(buffer, start, end)
    number, kind = tag >> 3, tag & 7
    if number == 0 or kind > Wire.FIXED32 or number >= 1 << 29:
        raise CorruptFileError(f"byte {start} begins no field: the file is damaged or of another format")
    wire = Wire(kind)
    if wire is Wire.VARINT:
        value, after = _read_varint(buffer, position, end)
        return Field(number, wire, start, position, after, value)
    if wire is Wire.GROUP:
        return Field(number, wire, start, position, _skip_group(buffer, position, end, number, depth=depth + 1))
    if wire is Wire.BYTES:
        length, position = _read_varint(buffer, position, end)
    else:
        length = {Wire.FIXED64: 8, Wire.FIXED32: 4, Wire.END_GROUP: 0}[wire]
    if length > end - position:
        raise CorruptFileError(
            f"field {number} at byte {start} claims {length} bytes where {end - position} are left: "
            "the file is truncated or damaged"
        )
    value = 0
    if wire in (Wire.FIXED32, Wire.FIXED64):
        value = int.from_bytes(buffer.read(position, length), "little")
    elif wire is Wire.END_GROUP and depth == 0:
        raise CorruptFileError(f"byte {start} ends a group that did not begin")
    return Field(number, wire, start, position, position + length, value)


def _skip_group(buffer: Buffer, position: int, end: int, number: int, *, depth: int) -> int:
    """Return where a group ends, a form of nesting that protobuf gave up long ago."""
    if depth > MAX_DEPTH:
        raise UnsafeFileError(f"groups are nested deeper than {MAX_DEPTH}")
    while True:
        inner = _read_field(buffer, position, end, depth=depth)
        position = inner.end
        if inner.wire is Wire.END_GROUP:
            if inner.number != number:
                raise CorruptFileError(f"byte {inner.start} ends another group than the one that is open")
            return position


def _read_varint(buffer: Buffer, position: int, end: int) -> tuple[int, int]:
    if position >= end:
        raise CorruptFileError(f"a field is cut at byte {position}: the file is truncated or damaged")
    block, place = buffer.around(position)
    value = shift = 0
    for index in range(place, min(place + _LONGEST_VARINT, place + end - position, len(block))):
        byte = block[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position + index - place + 1
        shift += 7
    raise CorruptFileError(f"the integer at byte {position} has no end: the file is truncated or damaged")
