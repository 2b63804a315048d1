"""Writing a message of a file again: what is not to change is copied byte for byte, known to anybody here or not."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import IO, TypeAlias

from bntool.checkpoints.containers.protobufs.reading import Field, Message, Wire
from bntool.checkpoints.files import CHUNK, ByteSource
from bntool.checkpoints.tensors import Tensor, count_elements

Piece: TypeAlias = "bytes | Tensor | Field"  # new bytes, the elements of a tensor, or a field of the source as it is
Content: TypeAlias = tuple[Piece, ...]


def varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def size_of(content: Content) -> int:
    """Count the bytes that a content takes."""
    total = 0
    for piece in content:
        if isinstance(piece, bytes):
            total += len(piece)
        elif isinstance(piece, Field):
            total += piece.end - piece.start
        else:
            total += piece.dtype.byte_count(count_elements(piece.shape))
    return total


def embed(number: int, *pieces: Piece) -> Content:
    """Return a field of bytes, text or a message with that content."""
    return (varint(number << 3 | Wire.BYTES) + varint(size_of(pieces)), *pieces)


def integer_field(number: int, value: int) -> bytes:
    return varint(number << 3 | Wire.VARINT) + varint(value)


def packed_integers(number: int, values: Sequence[int]) -> bytes:
    data = b"".join(map(varint, values))
    return varint(number << 3 | Wire.BYTES) + varint(len(data)) + data


@dataclass
class Edits:
    """The changes to the messages of a file; everything else is copied.

    Attributes:
        replaced: new content for a field, by the position of its tag; nothing for one that is removed.
        inserted: content after a field, by the position of its tag.
    appended: content after the last field of a message, by where the message starts and ends.
        touched: messages with a change somewhere below them, by the position of the tag of their field.
    """

    replaced: dict[int, Content] = field(default_factory=dict)
    inserted: dict[int, Content] = field(default_factory=dict)
    appended: dict[tuple[int, int], Content] = field(default_factory=dict)
    touched: dict[int, Message] = field(default_factory=dict)

    def replace(self, message: Message, found: Field, *pieces: Piece) -> None:
        """Put pieces in the place of a field; none remove it."""
        self.replaced[found.start] = pieces
        self._touch(message)

    def insert_after(self, message: Message, found: Field, *pieces: Piece) -> None:
        """Add pieces behind a field."""
        self.inserted[found.start] = (*self.inserted.get(found.start, ()), *pieces)
        self._touch(message)

    def append(self, message: Message, *pieces: Piece) -> None:
        """Add pieces at the end of a message."""
        place = (message.start, message.end)
        self.appended[place] = (*self.appended.get(place, ()), *pieces)
        self._touch(message)

    def set_field(self, message: Message, number: int, *pieces: Piece) -> None:
        """Give a singular field a new content, and remove further ones of its number."""
        found = message.all(number)
        for one in found[:-1]:
            self.replace(message, one)
        if found:
            self.replace(message, found[-1], *pieces)
        else:
            self.append(message, *pieces)

    def _touch(self, message: Message) -> None:
        while message.parent is not None:
            above, own = message.parent
            self.touched[own.start] = message
            message = above

    def render(self, message: Message) -> Content:
        """Return the content of a message with all changes in and below it."""
        pieces: list[Piece] = []
        for one in message.fields:
            if one.start in self.replaced:
                pieces += self.replaced[one.start]
            elif one.start in self.touched:
                pieces += embed(one.number, *self.render(self.touched[one.start]))
            else:
                pieces.append(one)
            pieces += self.inserted.get(one.start, ())
        return (*pieces, *self.appended.get((message.start, message.end), ()))


def write_content(content: Content, source: ByteSource, stream: IO[bytes]) -> None:
    """Write pieces one after the other, those of the source copied from it."""
    position = end = 0
    for piece in (*content, b""):
        if isinstance(piece, Field) and piece.start == end:
            end = piece.end
            continue
        while position < end:
            data = source.read(position, min(CHUNK, end - position))
            stream.write(data)
            position += len(data)
        if isinstance(piece, Field):
            position, end = piece.start, piece.end
        elif isinstance(piece, bytes):
            stream.write(piece)
        else:
            for chunk in piece.chunks():
                stream.write(chunk)


def unused_name(wanted: str, taken: Container[str]) -> str:
    """Make a name that is not taken: the wanted one, or with ``@2``, ``@3`` ... after it."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}@{number}"
    return name
