"""Reading files by position.

Files are read with ``pread`` rather than mapped: a mapped file that another process shortens ends the reader with
SIGBUS, a short ``pread`` is an error that can be named. Bytes that nobody asks for are not read in either case.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, TypeAlias

from bntool.checkpoints.addresses import Location
from bntool.errors import CorruptFileError, UnreadableFileError

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK = 1 << 19  # bytes read and calculated at a time: fewer cost more calls, more no longer lie in a cache
Chunk: TypeAlias = bytes | memoryview
_LONGEST_NAME = 80  # characters of a name that a sentence shows
_CHANGED = "the file was changed while it was read; nothing was written: wait until it is complete and try again"
_TICK = 12_000_000  # nanoseconds: in which a file system may give two changes one time
_SMALL = 1 << 15  # bytes of a part that is kept in memory
_COPIED = 1 << 25  # bytes that the kernel copies together; the disk takes them while the next ones are copied
_POSITION, _LONGEST_READ = threading.Lock(), 1 << 30


def keep_freed_memory() -> None:
    """Let blocks of a few chunks be used again when they are freed.

    glibc gives blocks of 128 KiB and more back to the system, and each new one is faulted in again, which costs more
    than what is calculated in it. When such a block is freed it raises this bound to its size (mallopt(3)).
    """
    bytes(8 * CHUNK)


keep_freed_memory()


class ByteSource(Protocol):
    """Something that bytes can be read from by position."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


class MemorySource:
    """Bytes that are already in memory."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._data[offset : offset + length])


class Folder:
    """The folder that a file lies in, for formats that need others of its files."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str, *, named_by: Location) -> SourceFile:
        """Open a file that another one needs; the error for a missing one says what needs it.

        Args:
            name: with ``/`` between folders.

        Raises:
            UnreadableFileError
        """
        try:
            return SourceFile(self._path / name)
        except UnreadableFileError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise describe_missing(self._path / name, named_by) from error.__cause__

    def find(self, name: str) -> SourceFile | None:
        """Open a file if there is one of that name; ``..`` is the folder above, as the path is written."""
        place = Path(os.path.normpath(self._path.absolute() / name))
        return SourceFile(place) if place.is_file() else None

    def contains(self, name: str) -> bool:
        """Return whether a name leads to a file in this folder, and not by a link out of it.

        The cache of huggingface_hub keeps all files in ``blobs``, to which those in ``snapshots/REVISION`` are links.

        Raises:
            OSError, ValueError: no file can have this name.
        """
        root, place = (Path(os.path.realpath(path)) for path in (self._path, self._path / name))
        is_snapshot = root.parent.name == "snapshots"
        return root in place.parents or (is_snapshot and place.parent == root.parent.parent / "blobs")


def describe_missing(place: Location, named_by: Location) -> UnreadableFileError:
    """Return the error of a file that is not there, and that another one needs."""
    needed = f"there is no such file, which {named_by.name} needs; put it there or keep the files together"
    return UnreadableFileError(needed, path=place)


class JoinedSource:
    """Ranges of a source, each by its offset and length, one after the other."""

    def __init__(self, source: ByteSource, places: Sequence[tuple[int, int]]) -> None:
        self._source = source
        self._places = places
        self.size = sum(length for _, length in places)

    def read(self, offset: int, length: int) -> bytes:
        parts, start = [], 0
        for place, size in self._places:
            first, end = max(offset, start), min(offset + length, start + size)
            if first < end:
                parts.append(self._source.read(place + first - start, end - first))
            start += size
        return b"".join(parts)


class SourceFile:
    """A regular file opened for reading by position.

    Attributes:
        path: where it lies: a path, or an address.
        size: in bytes.
        mode: its permission bits.
        identity: equal for two names of one file.
        notes: what is worth saying of how it was found and read, a sentence each.
        is_far: each reading takes its time, so that it is worth to announce what will be read.

    Args:
        path: where it lies.
        is_own: nobody else writes to it, as to what this process has just written and holds under lock.

    Raises:
        UnreadableFileError: absent, not a regular file, or no permission.
        CorruptFileError: from :meth:`read`, where the file ends before the bytes asked for.
    """

    path: Location
    notes: tuple[str, ...] = ()
    is_far: bool = False
    _last: tuple[tuple[int, int], bytes] = ((0, 0), b"")  # offset and length of the last piece that was read, and it

    def __init__(self, path: str | os.PathLike[str], *, is_own: bool = False) -> None:
        self.path = Path(path)
        try:
            # O_NONBLOCK: opening a pipe must not wait for its writer
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise UnreadableFileError(describe_failure(error), path=path) from error
        except ValueError as error:  # a NUL byte or half of a surrogate pair in the name
            raise UnreadableFileError("no file can have this name", path=path) from error
        self._take(descriptor, self.path, waits=not is_own)

    def _take(self, descriptor: int, path: Location, *, waits: bool = True) -> None:
        """Take over a file that was opened.

        Args:
            waits: until a change could be seen by its time.
        """
        self.path = path
        self._close = weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            if stat.S_ISDIR(status.st_mode):
                raise UnreadableFileError("this is a folder, not a file; name a file of it", path=path)
            raise UnreadableFileError("this is a pipe or a device, not a regular file; copy it to a file", path=path)
        # a change within the same tick could not be seen
        if waits and 0 <= time.time_ns() - status.st_mtime_ns < _TICK:
            time.sleep(_TICK / 1e9)
            status = os.fstat(descriptor)
        self._status = status
        self.size = status.st_size
        self.mode = stat.S_IMODE(status.st_mode)
        self.identity = (status.st_dev, status.st_ino)

    @property
    def folder(self) -> Folder:
        """The folder that the file lies in."""
        return Folder(Path(self.path).parent)

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say which ranges will be read, as offset and length: where each takes its time, they are fetched together."""

    def check_same(self, before: SourceFile) -> None:
        """Make sure that the file is as it was when it was opened before.

        Raises:
            UnreadableFileError: it is another one, or was written to.
        """
        if self.identity != before.identity or self._was_changed(before._status):
            raise UnreadableFileError(_CHANGED, path=self.path)

    def _was_changed(self, before: os.stat_result) -> bool:
        now = os.fstat(self._descriptor)
        same = (before.st_size, before.st_mtime_ns) == (now.st_size, now.st_mtime_ns)
        return not same or (before.st_ctime_ns != now.st_ctime_ns and before.st_nlink == now.st_nlink)

    def check_unchanged(self) -> None:
        """Make sure that the file was not written to since it was opened: what was read belongs together.

        Raises:
            UnreadableFileError: it was written to; a file that took its place under its name does not matter.
        """
        if self._was_changed(self._status):
            raise UnreadableFileError(_CHANGED, path=self.path)

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``.

        The last piece is kept: what was read to be changed is read once more to be held against its checksum.
        """
        if length <= 0:
            return b""
        place, data = self._last  # both at once: another thread may read, too
        if (offset, length) == place:
            return data
        data = self._read_whole(offset, length)
        if length <= CHUNK:
            self._last = ((offset, length), data)
        return data

    def _read_whole(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise CorruptFileError(
                f"the file ends at byte {self.size}, but bytes {offset} to {offset + length} are needed; "
                "it is truncated or damaged",
                path=self.path,
            )
        parts = []
        while length > 0:
            try:
                part = self._read_once(offset, length)
            except OSError as error:
                raise UnreadableFileError(describe_failure(error), path=self.path) from error
            if not part:
                raise UnreadableFileError("the file became shorter while it was read", path=self.path)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_once(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, length, offset)
        with _POSITION:  # Windows has no pread, and one position for all threads
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, min(length, _LONGEST_READ))

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield the bytes from ``offset`` on, a chunk at a time."""
        end = offset + length
        while offset < end:
            part = self.read(offset, min(CHUNK, end - offset))
            yield part
            offset += len(part)

    def copy_to(self, stream: IO[bytes], *, offset: int, length: int) -> None:
        """Append a range of bytes to a file, inside the kernel where it can do that and where that is worth a flush."""
        if length <= CHUNK:
            stream.write(self.read(offset, length))
            return
        stream.flush()
        position, end = stream.tell(), offset + length
        if hasattr(os, "copy_file_range"):
            with contextlib.suppress(OSError):  # not every pair of file systems can; what is left is copied below
                while offset < end:
                    copied = os.copy_file_range(
                        self._descriptor, stream.fileno(), min(end - offset, _COPIED), offset, position
                    )
                    if copied == 0:
                        break
                    offset, position = offset + copied, position + copied
                    stream.seek(position)
        stream.seek(position)
        for chunk in self.chunks(offset, end - offset):
            stream.write(chunk)

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileSlice(SourceFile):
    """A part of an open file that is read as if it were a file of its own; the file stays its owner's to close.

    A small part is read at once: an archive of one small tensor would ask for its bytes in twenty pieces.
    """

    def __init__(self, file: SourceFile, *, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > file.size:
            raise CorruptFileError("a part of the file lies beyond its end: it is truncated", path=file.path)
        self._file = file
        self._offset = offset
        self.path, self.size, self.mode, self.identity = file.path, length, file.mode, file.identity
        self.is_far = file.is_far
        self._kept = file.read(offset, length) if length <= _SMALL else None

    @property
    def folder(self) -> Folder:
        return self._file.folder

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._file.announce([(self._offset + offset, length) for offset, length in ranges])

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def _read_once(self, offset: int, length: int) -> bytes:
        if self._kept is not None:
            return self._kept[offset : offset + length]
        return self._file._read_once(self._offset + offset, length)  # noqa: SLF001 (its own kind)

    def copy_to(self, stream: IO[bytes], *, offset: int, length: int) -> None:
        self._file.copy_to(stream, offset=self._offset + offset, length=length)

    def close(self) -> None:
        """Do nothing."""


class FileView(SourceFile):
    """A part of another source, read as if it were a file of its own."""

    def __init__(self, source: ByteSource, *, like: SourceFile) -> None:
        self._source, self._like = source, like
        self.path, self.size, self.mode, self.identity = like.path, source.size, like.mode, like.identity

    @property
    def folder(self) -> Folder:
        return self._like.folder

    def check_unchanged(self) -> None:
        self._like.check_unchanged()

    def _read_once(self, offset: int, length: int) -> bytes:
        return self._source.read(offset, length)

    def copy_to(self, stream: IO[bytes], *, offset: int, length: int) -> None:
        for chunk in self.chunks(offset, length):
            stream.write(chunk)

    def close(self) -> None:
        """Do nothing."""


def place_beside(weights: Path, *, ending: str) -> Path:
    """Return the path of a file that belongs to one of weights: ``net.prototxt`` beside ``net.caffemodel.h5``."""
    return weights.with_name(name_beside(weights.name, ending=ending))


def name_beside(weights: str, *, ending: str) -> str:
    """Return the name of a file that belongs to one of weights of that name."""
    stem = weights.removesuffix(".h5").removesuffix(".hdf5").removesuffix(".caffemodel").removesuffix(".weights")
    return f"{stem if stem != weights else Path(weights).stem}{ending}"


def quote(text: str) -> str:
    """Quote a name from a file for a sentence: no longer than a line."""
    return repr(text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}...")


def describe_failure(error: OSError) -> str:
    """Describe what the system says of a file, as a sentence."""
    sentences = {
        errno.ENOENT: "there is no such file",
        errno.EISDIR: "this is a folder, not a file",
        errno.EACCES: "you have no permission to read it",
        errno.ENOSPC: "no space is left on the device",
        errno.EROFS: "the file system is read-only",
        errno.ELOOP: "too many levels of symbolic links",
        errno.ENAMETOOLONG: "the file name is too long",
    }
    return sentences.get(error.errno or 0, (error.strerror or str(error)).lower())
