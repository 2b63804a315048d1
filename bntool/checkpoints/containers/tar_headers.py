"""The members of a tar archive, where every reader of such archives agrees on what they are.

Python's tarfile, by which torch.load reads one, gives a member another name, size or content where an extended header,
a link or a type says so, and takes the last of several members of one name. Archives that rely on it are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from bntool.checkpoints.files import SourceFile, quote
from bntool.errors import CorruptFileError, UnsafeFileError

TAR_BLOCK = 512
_NUMBER = re.compile(rb" *[0-7]+[ \0]*|[ \0]*")
_RECORD = re.compile(rb"([1-9]\d{0,8}) ([^=\n]{1,100})=")
_FILE, _OLD_FILE, _FOLDER, _EXTENDED, _EXTENDED_FOR_ALL = b"0", b"\0", b"5", b"x", b"g"
_MAX_EXTENDED = 1 << 16
# what extended headers may say: nothing of where the content lies and what it is called
_TIMES_AND_OWNERS = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"}


@dataclass(frozen=True, slots=True)
class TarHeader:
    """One member: a file or a folder, and where its bytes lie in the archive."""

    name: str
    is_file: bool
    offset: int
    size: int


def is_tar_header(block: bytes) -> bool:
    """Return whether a file that begins with this block is read as a tar archive: what counts is its checksum."""
    if len(block) < TAR_BLOCK or not block.strip(b"\0"):
        return False
    found = _NUMBER.fullmatch(block[148:156])
    return found is not None and int(found[0].strip(b" \0") or b"0", 8) in _checksums(block)


def _checksums(block: bytes) -> tuple[int, int]:
    """Compute both checksums of a header: over its bytes as unsigned and as signed numbers."""
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    negative = sum(1 for byte in block[:148] + block[156:TAR_BLOCK] if byte >= 128)
    return total, total - 256 * negative


def read_tar_headers(file: SourceFile, *, limit: int) -> Iterator[TarHeader]:
    """Yield the members of an archive in order.

    Raises:
        CorruptFileError: a damaged header, or truncated.
        UnsafeFileError: more members than ``limit``, or a member that readers could take for another.
    """
    position = 0
    for _ in range(limit):
        block = file.read(position, TAR_BLOCK)
        if not block.strip(b"\0"):  # two blank blocks end it
            file.read(position, 2 * TAR_BLOCK)
            return
        if _number(block[148:156]) != _checksums(block)[0]:
            raise CorruptFileError("a header of the tar archive is damaged")
        size, kind = _number(block[124:136]), block[156:157]
        name, position = _name(block), position + TAR_BLOCK
        if position + size > file.size:
            raise CorruptFileError("the tar archive is truncated")
        if kind in (_EXTENDED, _EXTENDED_FOR_ALL):
            _check_extended(file, position, size)
        elif kind not in (_FILE, _OLD_FILE, _FOLDER) or (kind == _FOLDER and size):
            raise UnsafeFileError(f"member {quote(name)} of the tar archive is a link, or of another unusual type")
        elif name.endswith("/") and kind != _FOLDER:
            raise UnsafeFileError(f"member {quote(name)} of the tar archive is a file with the name of a folder")
        else:
            yield TarHeader(name, kind != _FOLDER, position, size)
        position += -(-size // TAR_BLOCK) * TAR_BLOCK
    raise UnsafeFileError(f"the tar archive has more than {limit} members")


def _name(block: bytes) -> str:
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("latin-1")


def _number(digits: bytes) -> int:
    if _NUMBER.fullmatch(digits) is None:
        raise CorruptFileError("a header of the tar archive is damaged")
    return int(digits.strip(b" \0") or b"0", 8)


def _check_extended(file: SourceFile, position: int, size: int) -> None:
    """Refuse an extended header that says more of the next member than its times and owners."""
    if size > _MAX_EXTENDED:
        raise UnsafeFileError(f"an extended header of the tar archive has {size} bytes")
    data, place = file.read(position, size), 0
    while place < len(data.rstrip(b"\0")):
        found = _RECORD.match(data, place)
        if found is None:
            raise CorruptFileError("an extended header of the tar archive is damaged")
        if found[2] not in _TIMES_AND_OWNERS:
            key = found[2].decode("latin-1")
            raise UnsafeFileError(f"an extended header of the tar archive gives a member another {quote(key)}")
        place += int(found[1])
