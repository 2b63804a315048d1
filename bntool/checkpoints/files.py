"""Reading files by position, and replacing files atomically.

Files are read with ``pread`` rather than mapped: a mapped file that another process shortens ends the reader with
SIGBUS, a short ``pread`` is an error that can be named. What is not read costs nothing either way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol

from bntool.errors import CorruptFileError, UnreadableFileError, UnwritableFileError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK = 1 << 20  # bytes copied at a time


class ByteSource(Protocol):
    """Something that bytes can be read from by position."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


class MemorySource:
    """Bytes that are already in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class SourceFile:
    """A regular file opened for reading by position.

    Raises:
        UnreadableFileError: absent, not a regular file, or no permission.
        CorruptFileError: from :meth:`read`, where the file ends before the bytes asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # O_NONBLOCK: opening a pipe must not wait for its writer
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise UnreadableFileError(_reason(error), path=path) from error
        except ValueError as error:  # a NUL byte in the name
            raise UnreadableFileError(str(error), path=path) from error
        self._close = weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            what = "a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UnreadableFileError(f"this is {what}", path=path)
        self.size = status.st_size
        self.mode = stat.S_IMODE(status.st_mode)
        self.identity = (status.st_dev, status.st_ino)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``."""
        if length <= 0:
            return b""
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
                raise UnreadableFileError(_reason(error), path=self.path) from error
            if not part:
                raise UnreadableFileError("the file became shorter while it was read", path=self.path)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_once(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, length, offset)
        os.lseek(self._descriptor, offset, os.SEEK_SET)  # Windows has no pread
        return os.read(self._descriptor, length)

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """The bytes from ``offset`` on, a chunk at a time."""
        end = offset + length
        while offset < end:
            part = self.read(offset, min(CHUNK, end - offset))
            yield part
            offset += len(part)

    def copy_to(self, stream: IO[bytes], *, offset: int, length: int) -> None:
        """Append a range of bytes to a file, inside the kernel where it can do that."""
        stream.flush()
        position, end = stream.tell(), offset + length
        if hasattr(os, "copy_file_range"):
            with contextlib.suppress(OSError):  # not every pair of file systems can; what is left is copied below
                while offset < end:
                    copied = os.copy_file_range(
                        self._descriptor, stream.fileno(), min(end - offset, 1 << 30), offset, position
                    )
                    if copied == 0:
                        break
                    offset, position = offset + copied, position + copied
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
    """A part of an open file that is read as if it were a file of its own; the file stays its owner's to close."""

    def __init__(self, file: SourceFile, *, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > file.size:
            raise CorruptFileError("a part of the file lies beyond its end: it is truncated", path=file.path)
        self._file = file
        self._offset = offset
        self.path, self.size, self.mode, self.identity = file.path, length, file.mode, file.identity

    def _read_once(self, offset: int, length: int) -> bytes:
        return self._file._read_once(self._offset + offset, length)  # noqa: SLF001 (its own kind)

    def copy_to(self, stream: IO[bytes], *, offset: int, length: int) -> None:
        self._file.copy_to(stream, offset=self._offset + offset, length=length)

    def close(self) -> None:
        """Does nothing."""


def _reason(error: OSError) -> str:
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


class OutputFiles:
    """A transaction of files to write: they appear together when all is well, or not at all.

    Each file is written beside its place under a temporary name, flushed to disk, and renamed over its place when
    the ``with`` block ends without an error. An existing file is replaced only with ``force``.

    Args:
        force: replace files that exist.
        mode: permission bits of the new files (those of the input); None for the process's default.
    """

    def __init__(self, *, force: bool = False, mode: int | None = None) -> None:
        self._force = force
        self._mode = mode
        self._pending: list[tuple[Path, Path]] = []
        self._open: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def open(self, path: Path) -> IO[bytes]:
        """A new binary file, readable and seekable, that will become ``path``."""
        import tempfile  # reading needs none of what it imports

        self.check(path)
        try:
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:20]}.", suffix=".writing")
        except OSError as error:
            raise UnwritableFileError(_write_reason(error, path), path=path) from error
        self._pending.append((Path(temporary), path))
        stream = os.fdopen(descriptor, "w+b")
        self._open.append(stream)
        return stream

    def temporary(self, path: Path) -> Path:
        """Where the file that will become ``path`` lies until then."""
        return next(temporary for temporary, final in self._pending if final == path)

    def check(self, path: Path) -> None:
        """Refuse early what could not be written at the end."""
        try:
            os.fsencode(path)
            is_folder, has_parent = path.is_dir(), path.parent.is_dir()
        except UnicodeEncodeError as error:
            raise UnwritableFileError("no file can have this name", path=path) from error
        except OSError as error:
            raise UnwritableFileError(_write_reason(error, path), path=path) from error
        if is_folder:
            raise UnwritableFileError("the output is an existing folder; name a file in it", path=path)
        if not has_parent:
            raise UnwritableFileError(f"there is no folder {path.parent}; create it first", path=path)
        if "\0" in str(path):
            raise UnwritableFileError("no file can have this name", path=path)
        if not self._force and os.path.lexists(path):
            raise UnwritableFileError("the file exists; use --force to replace it", path=path)

    def flush(self) -> None:
        """Bring all that was written to the disk, so that it can be read back and checked."""
        for stream in self._open:
            stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()
            if isinstance(error, OSError):
                path = self._pending[-1][1] if self._pending else None
                raise UnwritableFileError(_write_reason(error, path), path=path) from error
            return
        try:
            self._commit()
        except OSError as problem:
            self._discard()
            path = self._pending[0][1]
            raise UnwritableFileError(_write_reason(problem, path), path=path) from problem
        except BaseException:
            self._discard()
            raise

    def _commit(self) -> None:
        for stream, (temporary, _) in zip(self._open, self._pending, strict=True):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            temporary.chmod(_default_mode() if self._mode is None else self._mode)
        appeared: list[Path] = []
        try:
            for temporary, final in self._pending:
                if self._force:
                    temporary.replace(final)
                else:
                    _rename_without_replacing(temporary, final)
                    appeared.append(final)
        except BaseException:
            for final in appeared:
                with contextlib.suppress(OSError):
                    final.unlink()
            raise
        for folder in {final.parent for _, final in self._pending}:
            _sync_folder(folder)

    def _discard(self) -> None:
        for stream in self._open:
            with contextlib.suppress(OSError):
                stream.close()
        for temporary, _ in self._pending:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _rename_without_replacing(temporary: Path, final: Path) -> None:
    """Two writers at once: the one that comes second finds the file there and stops."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise UnwritableFileError(
            "the file appeared while it was written; use --force to replace it", path=final
        ) from None
    except OSError:  # a file system without hard links
        temporary.replace(final)
        return
    temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system allows to open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _default_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _write_reason(error: OSError, path: Path | None) -> str:
    if error.errno == errno.EACCES and path is not None:
        return f"you have no permission to write in {path.parent}"
    return f"it could not be written: {_reason(error)}"


def check_output_differs(source: SourceFile, output: Path) -> None:
    """The input is never written to.

    Raises:
        UsageError: ``output`` is the input itself, under whatever name.
    """
    with contextlib.suppress(OSError, ValueError):  # no such file yet, or no name that a file can have
        status = output.stat()
        if (status.st_dev, status.st_ino) == source.identity:
            raise UsageError("the output is the input; name another file", path=output)
