"""Copying zip archives with changes, and writing new ones as torch lays them out."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, TypeAlias

from bntool.checkpoints.containers.zips.checksums import crc32
from bntool.checkpoints.containers.zips.reading import (
    CENTRAL_ENTRY,
    DESCRIPTOR_FLAG,
    END,
    END64,
    LOCAL_HEADER,
    LOCAL_MAGIC,
    LOCATOR,
    MASK32,
    STORED,
    UTF8_FLAG,
    ZipArchive,
    ZipRecord,
)
from bntool.checkpoints.files import CHUNK, ByteSource, Chunk, MemorySource, quote
from bntool.errors import CorruptFileError

Patch: TypeAlias = Callable[[], Iterable[tuple[int, Chunk]]]

_ALIGNMENT = 64  # torch maps storages; it aligns them so
_LARGE = 1 << 17  # bytes from which on a record is copied by the kernel, to the same place in a page
_PAGE = 4096


def copy_with_patches(
    archive: ZipArchive, stream: IO[bytes], patches: Mapping[str, Iterable[tuple[int, Chunk]]]
) -> None:
    """Copy the whole archive, changing bytes inside stored records and the checksums of these records only.

    Every byte outside of the patched ranges and of the CRC fields is copied as it is. The source is held against the
    checksums of the patched records; the others keep theirs, so that damage in them stays as visible as it was.

    Args:
        patches: by record name, (offset in the record, bytes) in ascending order, none overlapping.

    Raises:
        CorruptFileError: a patched record of the source does not match its checksum.
    """
    file = archive.file
    position = 0
    checksums: list[tuple[ZipRecord, int]] = []
    for record in sorted((archive.records[name] for name in patches), key=lambda record: record.header_offset):
        file.copy_to(stream, offset=position, length=record.data_offset - position)
        crc = 0
        for chunk in patched_chunks(archive, record, patches[record.name]):
            crc = crc32(chunk, crc)
            stream.write(chunk)
        checksums.append((record, crc))
        position = record.data_offset + record.stored_size
    file.copy_to(stream, offset=position, length=file.size - position)
    if archive.has_checksums:
        for record, crc in checksums:
            _replace_checksum(archive, record, stream, crc)


def patched_chunks(archive: ZipArchive, record: ZipRecord, patches: Iterable[tuple[int, Chunk]]) -> Iterator[Chunk]:
    """Yield the content of a record with changes, while its own checksum is verified.

    Raises:
        CorruptFileError: the record of the source does not match its checksum.
    """
    content: ByteSource = archive.file
    base = record.data_offset
    if record.is_deflated:
        content, base = MemorySource(archive.read(record)), 0
    crc, position = 0, 0
    for offset, data in itertools.chain(patches, ((record.size, b""),)):
        while position < offset:
            chunk = content.read(base + position, min(CHUNK, offset - position))
            crc = crc32(chunk, crc)
            position += len(chunk)
            yield chunk
        if data:
            crc = crc32(content.read(base + position, len(data)), crc)
            position += len(data)
            yield data
    if archive.has_checksums and crc != record.crc:
        raise CorruptFileError(f"checksum of record {quote(record.name)} differs: the file is damaged")


def patches_of_nested(archive: ZipArchive, patches: Mapping[str, Patch]) -> Iterator[tuple[int, Chunk]]:
    """Yield the bytes to put over an archive that is a record of another one, in ascending order; see
    copy_with_patches.

    Args:
        patches: by name of a stored record, what gives (offset in the archive, bytes); called twice.

    Raises:
        CorruptFileError: a patched record of the source does not match its checksum.
    """
    pieces: list[tuple[int, Iterable[tuple[int, Chunk]]]] = []
    for name, patch in patches.items():
        record = archive.records[name]
        pieces.append((record.data_offset, patch()))
        crc = 0
        for chunk in patched_chunks(archive, record, _shifted(patch(), -record.data_offset)):
            crc = crc32(chunk, crc)
        if archive.has_checksums:
            packed = struct.pack("<I", crc)
            pieces += [(place, ((place, packed),)) for place in _checksum_places(archive, record)]
    for _, piece in sorted(pieces, key=lambda piece: piece[0]):
        yield from piece


def _shifted(patch: Iterable[tuple[int, Chunk]], by: int) -> Iterator[tuple[int, Chunk]]:
    return ((offset + by, data) for offset, data in patch)


def _replace_checksum(archive: ZipArchive, record: ZipRecord, stream: IO[bytes], crc: int) -> None:
    for place in _checksum_places(archive, record):
        stream.seek(place)
        stream.write(struct.pack("<I", crc))
    stream.seek(0, 2)


def _checksum_places(archive: ZipArchive, record: ZipRecord) -> list[int]:
    """Find where the archive has the CRC of a record: in the directory, and before or after its data."""
    places = [record.central_offset + 16]
    if record.flags & DESCRIPTOR_FLAG:
        after = record.data_offset + record.stored_size
        has_magic = archive.file.read(after, 4) == b"PK\x07\x08"
        places.append(after + 4 if has_magic else after)
    else:
        places.append(record.header_offset + 14)
    return places


class ZipWriter:
    """Writes a new archive of stored records, aligned as torch aligns them.

    Args:
        stream: binary, writable and seekable.
        has_checksums: False writes zeros for checksums, as torch does when told so.
    """

    def __init__(self, stream: IO[bytes], *, has_checksums: bool = True) -> None:
        self._stream = stream
        self._has_checksums = has_checksums
        self._directory: list[bytes] = []
        self._headers: dict[int, bytes] = {}  # by their place, of records whose checksum was not known before

    def add(self, name: str, chunks: Iterator[Chunk], *, size: int) -> None:
        """Append one record of ``size`` bytes.

        Raises:
            ValueError: the chunks are not ``size`` bytes together.
        """
        stream = self._stream
        offset = stream.tell()
        raw = name.encode("utf-8")
        extra = _extra_field(offset + LOCAL_HEADER.size + len(raw), size=size)
        crc, written = 0, 0
        if size <= CHUNK:
            parts = list(chunks)
            for part in parts:
                crc, written = self._checksum(part, crc), written + len(part)
            stream.write(self._local_header(raw, extra, size=size, crc=crc))
            for part in parts:
                stream.write(part)
        else:
            stream.write(self._local_header(raw, extra, size=size, crc=0))
            for chunk in chunks:
                crc, written = self._checksum(chunk, crc), written + len(chunk)
                stream.write(chunk)
            self._headers[offset] = self._local_header(raw, extra, size=size, crc=crc)
        if written != size:
            raise ValueError(f"record {name!r}: {written} bytes given, {size} announced")
        self._directory.append(self._central_entry(raw, size=size, crc=crc, offset=offset))

    def copy(self, archive: ZipArchive, record: ZipRecord) -> None:
        """Append a stored record of another archive as it is, with the checksum that it has there."""
        stream, size = self._stream, record.size
        offset = stream.tell()
        raw = record.name.encode("utf-8")
        like = record.data_offset if size >= _LARGE else 0
        extra = _extra_field(offset + LOCAL_HEADER.size + len(raw), size=size, like=like)
        stream.write(self._local_header(raw, extra, size=size, crc=record.crc))
        if size >= _LARGE:
            archive.file.copy_to(stream, offset=record.data_offset, length=size)
        else:
            stream.write(archive.file.read(record.data_offset, size))
        self._directory.append(self._central_entry(raw, size=size, crc=record.crc, offset=offset))

    def _checksum(self, chunk: Chunk, before: int) -> int:
        return crc32(chunk, before) if self._has_checksums else 0

    def _local_header(self, name: bytes, extra: bytes, *, size: int, crc: int) -> bytes:
        narrow = min(size, MASK32)
        fields = (LOCAL_MAGIC, 45 if size >= MASK32 else 0, UTF8_FLAG, STORED, 0, 0, crc, narrow, narrow)
        return LOCAL_HEADER.pack(*fields, len(name), len(extra)) + name + extra

    def _central_entry(self, name: bytes, *, size: int, crc: int, offset: int) -> bytes:
        wide = b""
        if size >= MASK32:
            wide += struct.pack("<QQ", size, size)
        if offset >= MASK32:
            wide += struct.pack("<Q", offset)
        extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
        narrow = min(size, MASK32)
        version = 45 if wide else 0
        head = (b"PK\x01\x02", version, version, UTF8_FLAG, STORED, 0, 0, crc, narrow, narrow)
        tail = (len(name), len(extra), 0, 0, 0, 0, min(offset, MASK32))
        return CENTRAL_ENTRY.pack(*head, *tail) + name + extra

    def close(self) -> None:
        """Write the directory, then the checksums before records: going back earlier would cut up what is written."""
        stream = self._stream
        offset = stream.tell()
        for entry in self._directory:
            stream.write(entry)
        end = stream.tell()
        count, size = len(self._directory), end - offset
        stream.write(END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, size, offset))
        stream.write(LOCATOR.pack(b"PK\x06\x07", 0, end, 1))
        short, small, near = min(count, 0xFFFF), min(size, MASK32), min(offset, MASK32)
        stream.write(END.pack(b"PK\x05\x06", 0, 0, short, short, small, near, 0))
        for place, header in self._headers.items():
            stream.seek(place)
            stream.write(header)
        stream.seek(0, 2)


def _extra_field(start: int, *, size: int, like: int = 0) -> bytes:
    """Return sizes that need 64 bits, and padding until the data is aligned.

    Args:
        start: where the field begins.
        size: of the record.
        like: where the data lies in the file that it is copied from: at the same place in a page of memory the kernel
            copies it for half the price.
    """
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= MASK32 else b""
    step = _PAGE if like and like % _ALIGNMENT == 0 else _ALIGNMENT
    padding = (like - start - len(extra) - 4) % step
    return extra + struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", torch's own padding field
