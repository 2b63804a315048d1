"""Reading the zip archives that torch.save writes, strictly.

Python's zipfile would accept what an attacker relies on (overlapping records, two records of one name, local headers
that contradict the directory), and importing it costs more than listing a checkpoint.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bntool.checkpoints.files import SourceFile, quote
from bntool.errors import CorruptFileError, UnsafeFileError

LOCAL_MAGIC = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_ENTRY = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
MASK32 = 0xFFFFFFFF
STORED, DEFLATED = 0, 8
DESCRIPTOR_FLAG, UTF8_FLAG, ENCRYPTED_FLAG = 0x8, 0x800, 0x1
MAX_INFLATED = 1 << 28  # a deflated record larger than this is taken for a bomb
MAX_RATIO = 200
MAX_DIRECTORY = 1 << 28
_PIECE = 512  # bytes of a deflated record that are looked at for its start


class ZipRecord(NamedTuple):
    """One member of an archive.

    Attributes:
        name: as in the directory.
        header_offset: of its local header.
        data_offset, stored_size: where its bytes lie in the file.
        size: of the content; differs from ``stored_size`` where it is deflated.
        crc: as recorded.
        flags: general purpose bits.
        central_offset: of its entry in the directory.
    """

    name: str
    header_offset: int
    data_offset: int
    stored_size: int
    size: int
    crc: int
    method: int
    flags: int
    central_offset: int

    @property
    def is_deflated(self) -> bool:
        return self.method == DEFLATED


@dataclass(frozen=True, repr=False, eq=False)
class ZipArchive:
    """The directory of an archive.

    Attributes:
        records: by name, in order of the directory.
        directory_offset: where the directory begins.
        has_checksums: False where torch was told not to compute CRCs (all are 0).
        latest: content of the deflated record that was read last.
    """

    file: SourceFile
    records: Mapping[str, ZipRecord]
    directory_offset: int
    has_checksums: bool
    latest: dict[str, bytes] = field(default_factory=dict)

    def read(self, record: ZipRecord) -> bytes:
        """Return the content of a record, inflated within bounds, its CRC checked.

        Raises:
            CorruptFileError: it does not inflate, or its CRC differs.
            UnsafeFileError: it inflates to far more than it should.
        """
        data = self.file.read(record.data_offset, record.stored_size)
        if record.is_deflated:
            data = _inflate(data, record)
        if self.has_checksums and zlib.crc32(data) != record.crc:
            raise CorruptFileError(f"checksum of record {quote(record.name)} differs: the file is damaged")
        return data

    def read_start(self, record: ZipRecord, length: int) -> bytes:
        """Return the first bytes of a deflated record, held against no checksum.

        Raises:
            CorruptFileError: it does not inflate, or not to so many bytes.
        """
        inflater, content, position = zlib.decompressobj(-15), b"", 0
        try:
            while len(content) < length and position < record.stored_size:
                piece = self.file.read(record.data_offset + position, min(_PIECE, record.stored_size - position))
                content += inflater.decompress(inflater.unconsumed_tail + piece, length - len(content))
                position += len(piece)
        except zlib.error as error:
            raise CorruptFileError(f"record {quote(record.name)} does not inflate") from error
        if len(content) < length:
            raise CorruptFileError(f"record {quote(record.name)} inflates to another size than it claims")
        return content

    def check_record(self, record: ZipRecord) -> None:
        """Compare the bytes of a record with its checksum.

        Raises:
            CorruptFileError: they differ.
        """
        if record.is_deflated:
            self.read(record)
            return
        if not self.has_checksums:
            return
        from bntool.checkpoints.containers.zips.checksums import crc32  # listing a file does without

        crc = 0
        for chunk in self.file.chunks(record.data_offset, record.stored_size):
            crc = crc32(chunk, crc)
        if crc != record.crc:
            raise CorruptFileError(f"checksum of record {quote(record.name)} differs: the file is damaged")

    def check_records(self) -> int | None:
        """Compare all records with their checksums; return how many there are, None where the archive has no checksums.

        Raises:
            CorruptFileError: one differs.
        """
        if not self.has_checksums:
            return None
        for record in self.records.values():
            self.check_record(record)
        return len(self.records)


class InflatedRecord:
    """The content of a deflated record, inflated when it is read; the archive keeps the last one only."""

    def __init__(self, archive: ZipArchive, record: ZipRecord) -> None:
        self._archive = archive
        self._record = record

    @property
    def size(self) -> int:
        return self._record.size

    def read(self, offset: int, length: int) -> bytes:
        latest = self._archive.latest
        if self._record.name not in latest:
            latest.clear()
            latest[self._record.name] = self._archive.read(self._record)
        return latest[self._record.name][offset : offset + length]


def _inflate(data: bytes, record: ZipRecord) -> bytes:
    if record.size > MAX_INFLATED or record.size > MAX_RATIO * max(len(data), 1024):
        raise UnsafeFileError(f"record {quote(record.name)} of {len(data)} bytes claims to inflate to {record.size}")
    inflater = zlib.decompressobj(-15)
    try:
        content = inflater.decompress(data, record.size + 1)
    except zlib.error as error:
        raise CorruptFileError(f"record {quote(record.name)} does not inflate") from error
    if len(content) != record.size:
        raise CorruptFileError(f"record {quote(record.name)} inflates to another size than it claims")
    return content


def read_archive(file: SourceFile) -> ZipArchive:
    """Read the directory of a zip file and hold every local header against it.

    Raises:
        CorruptFileError: no directory, records that overlap, share a name, or contradict their local header.
        UnsafeFileError: an absurdly large directory.
    """
    count, size, offset = _find_directory(file)
    if size > MAX_DIRECTORY:
        raise UnsafeFileError(f"the zip directory has {size} bytes")
    directory = file.read(offset, size)
    entries: list[_Entry] = []
    position = 0
    for _ in range(count):
        entry, position = _read_entry(directory, position, offset)
        entries.append(entry)
    file.announce([(entry.header_offset, LOCAL_HEADER.size + len(entry.raw_name)) for entry in entries])
    records: dict[str, ZipRecord] = {}
    for entry in entries:
        record = _make_record(file, entry)
        if record.name in records:
            raise CorruptFileError(f"two records of the zip archive are named {quote(record.name)}")
        records[record.name] = record
    if position != size:
        raise CorruptFileError("the zip directory holds more than it counts")
    _check_overlaps(records.values(), offset)
    has_checksums = any(record.crc for record in records.values())
    return ZipArchive(file, records, offset, has_checksums)


def _find_directory(file: SourceFile) -> tuple[int, int, int]:
    """Return number of entries, size and offset of the directory."""
    tail_size = min(file.size, END.size + 0xFFFF)
    tail = file.read(file.size - tail_size, tail_size)
    index = tail.rfind(b"PK\x05\x06")
    if index < 0 or len(tail) - index < END.size:
        raise CorruptFileError("the zip directory is missing: the file is truncated", path=file.path)
    if len(tail) - index - END.size != int.from_bytes(tail[index + END.size - 2 : index + END.size], "little"):
        raise CorruptFileError("bytes follow the end of the zip archive", path=file.path)
    end_offset = file.size - tail_size + index
    _, _, _, _, count, size, offset, _ = END.unpack_from(tail, index)
    has_locator = _has_locator(file, end_offset)
    if count == 0xFFFF or MASK32 in (size, offset) or has_locator:
        if not has_locator:
            raise CorruptFileError("the zip64 directory is missing", path=file.path)
        _, _, where, _ = LOCATOR.unpack(file.read(end_offset - LOCATOR.size, LOCATOR.size))
        magic, _, _, _, _, _, _, count, size, offset = END64.unpack(file.read(where, END64.size))
        if magic != b"PK\x06\x06":
            raise CorruptFileError("the zip64 directory is damaged", path=file.path)
    if offset + size > end_offset:
        raise CorruptFileError("the zip directory lies outside of the file", path=file.path)
    return count, size, offset


def _has_locator(file: SourceFile, end_offset: int) -> bool:
    start = end_offset - LOCATOR.size
    return start >= 0 and file.read(start, 4) == b"PK\x06\x07"


class _Entry(NamedTuple):
    """A record as the directory has it: where its data begins is not known before its local header is read."""

    raw_name: bytes
    header_offset: int
    stored_size: int
    size: int
    crc: int
    method: int
    flags: int
    central_offset: int


def _read_entry(directory: bytes, position: int, base: int) -> tuple[_Entry, int]:
    if position + CENTRAL_ENTRY.size > len(directory):
        raise CorruptFileError("the zip directory is truncated")
    fields = CENTRAL_ENTRY.unpack_from(directory, position)
    magic, _, _, flags, method, _, _, crc, stored, size, name_length, extra_length, comment_length = fields[:13]
    header_offset = fields[16]
    if magic != b"PK\x01\x02":
        raise CorruptFileError("the zip directory is damaged")
    name_start = position + CENTRAL_ENTRY.size
    extra_start = name_start + name_length
    end = extra_start + extra_length + comment_length
    if end > len(directory):
        raise CorruptFileError("the zip directory is truncated")
    raw_name = directory[name_start:extra_start]
    extra = directory[extra_start : extra_start + extra_length]
    size, stored, header_offset = _zip64_values(extra, size, stored, header_offset)
    if flags & ENCRYPTED_FLAG:
        raise CorruptFileError("the zip archive is encrypted", remedy="decrypt it first")
    if method not in (STORED, DEFLATED):
        raise CorruptFileError(f"zip compression method {method} is not known", remedy="unpack it and zip it anew")
    if method == STORED and size != stored:
        raise CorruptFileError("a stored record has two different sizes")
    return _Entry(raw_name, header_offset, stored, size, crc, method, flags, base + position), end


def _make_record(file: SourceFile, entry: _Entry) -> ZipRecord:
    """Return the record of an entry of the directory, once its local header agrees with it."""
    raw_name, header_offset, stored, size, crc, method, flags, central_offset = entry
    data_offset = _check_local_header(file, header_offset, raw_name, (method, crc, stored, size))
    name = _decode(raw_name)
    return ZipRecord(name, header_offset, data_offset, stored, size, crc, method, flags, central_offset)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _zip64_values(extra: bytes, size: int, stored: int, offset: int) -> tuple[int, int, int]:
    """Replace the values that do not fit in 32 bits by those of the zip64 extra field."""
    if MASK32 not in (size, stored, offset):
        return size, stored, offset
    values = [size, stored, offset]
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, position)
        if tag == 1:
            wide = extra[position + 4 : position + 4 + length]
            for index, value in enumerate(values):
                if value == MASK32:
                    if len(wide) < 8:
                        raise CorruptFileError("the zip64 sizes of a record are missing")
                    values[index] = int.from_bytes(wide[:8], "little")
                    wide = wide[8:]
            break
        position += 4 + length
    return values[0], values[1], values[2]


def _check_local_header(file: SourceFile, offset: int, name: bytes, facts: tuple[int, int, int, int]) -> int:
    """Check the header before a record; return where its data begins. ``facts`` are method, CRC and sizes as the
    directory has them.
    """
    header = file.read(offset, LOCAL_HEADER.size + len(name))
    fields = LOCAL_HEADER.unpack_from(header)
    magic, flags, method, name_length, extra_length = fields[0], fields[2], fields[3], fields[9], fields[10]
    if magic != LOCAL_MAGIC:
        raise CorruptFileError(f"record {quote(_decode(name))} of the zip archive has no local header")
    agrees = method == facts[0] and name_length == len(name) and header[LOCAL_HEADER.size :] == name
    if not flags & DESCRIPTOR_FLAG:  # else CRC and sizes follow the data
        agrees = agrees and all(here in (there, MASK32) for here, there in zip(fields[6:9], facts[1:], strict=True))
    if not agrees:
        raise CorruptFileError(f"local header and directory of the zip archive disagree on {quote(_decode(name))}")
    return offset + LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _check_overlaps(records: Iterable[ZipRecord], directory_offset: int) -> None:
    end, previous = 0, ""
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.header_offset < end:
            raise CorruptFileError(f"records {quote(previous)} and {quote(record.name)} of the zip archive overlap")
        end, previous = record.data_offset + record.stored_size, record.name
    if end > directory_offset:
        raise CorruptFileError(f"record {quote(previous)} runs into the zip directory")
