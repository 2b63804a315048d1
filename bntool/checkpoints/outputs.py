"""Replacing files atomically: what is written appears whole, or not at all."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, cast

from bntool.checkpoints.files import SourceFile, describe_failure
from bntool.errors import UnwritableFileError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self


_PIECE = 1 << 18  # bytes written at a time: larger pages are rare, and often those that a virtual machine gave back
_SMALL = 1 << 14  # bytes from which on they are not copied before they are written
_WINDOWS_IN_USE = (5, 32)  # access denied, sharing violation
_STEP = 1 << 24  # bytes that are sent to the disk together
_SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h: begin to write, and wait for nothing
_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
_unfinished: dict[Path, int] = {}  # temporary files and folders, with the process that made them
_written: list[Path] = []


class OutputFiles:
    """A transaction of files to write: they appear together when all is well, or not at all.

    Each file is written beside its place under a temporary name, flushed to disk, and renamed over its place when
    the ``with`` block ends without an error. An existing file is replaced only with ``force``, and only a regular one.
    Temporary files are locked; those that are not are of a process that was killed, and are removed.

    Args:
        force: replace files that exist.
        mode: permission bits of the new files (those of the input); None for the process's default.
    """

    def __init__(self, *, force: bool = False, mode: int | None = None) -> None:
        self._force = force
        self._mode = mode
        self._files: list[_TemporaryFile] = []

    def __enter__(self) -> Self:
        return self

    def open(self, path: Path) -> IO[bytes]:
        """Return a new binary file, readable and seekable, that will become ``path``."""
        self.check(path)
        _remove_leftovers(path)
        file = _TemporaryFile(path, self._mode)
        try:
            stream = file.open()
        except OSError as error:
            raise UnwritableFileError(_write_reason(error, path), path=path) from error
        self._files.append(file)
        return stream

    def temporary(self, path: Path) -> Path:
        """Return where the file that will become ``path`` lies until then."""
        return next(file.temporary for file in self._files if file.final == path)

    @contextlib.contextmanager
    def preview(self, path: Path) -> Iterator[Path]:
        """Offer the file that will become ``path`` for reading, with the others beside it by their names."""
        self.flush()
        folder = _choose_name(path)
        try:
            with contextlib.ExitStack() as held:
                while not folder.is_dir():
                    folder.mkdir(mode=0o700)
                    held.enter_context(_locked(folder, waits=True))
                for file in self._files:
                    try:
                        os.link(file.temporary, folder / file.final.name)
                    except OSError:  # a file system without hard links
                        import shutil  # a listing needs none

                        shutil.copyfile(file.temporary, folder / file.final.name)
                yield folder / path.name
        finally:
            _remove(folder)

    def check(self, path: Path) -> None:
        """Refuse early what could not be written at the end.

        Raises:
            UnwritableFileError: nothing can be written there, or something is there that is not to be replaced.
        """
        try:
            os.fsencode(path)
            is_folder, has_parent = path.is_dir(), path.parent.is_dir()
            kind = stat.S_IFMT(path.lstat().st_mode) if os.path.lexists(path) else None
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
        if kind not in (None, stat.S_IFREG):
            what = _KINDS.get(kind, "a device")
            raise UnwritableFileError(
                f"the output is {what}, which is not replaced, not by --force either; name a file", path=path
            )
        if kind is not None and not self._force:
            raise UnwritableFileError("the file exists; use --force to replace it", path=path)

    def flush(self) -> None:
        """Bring all that was written to the disk, so that it can be read back and checked."""
        for file in self._files:
            file.stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
        except OSError as problem:
            raise UnwritableFileError(
                _write_reason(problem, self._files[0].final), path=self._files[0].final
            ) from problem
        finally:
            for file in self._files:
                file.discard()
        if isinstance(error, OSError):
            path = self._files[-1].final if self._files else None
            raise UnwritableFileError(_write_reason(error, path), path=path) from error

    def _commit(self) -> None:
        for file in self._files:
            file.finish()
        try:
            for number, file in enumerate(self._files):
                if any(other.is_at(file.final) for other in self._files[:number]):
                    message = "another output has this name on this file system, which takes some names for one"
                    raise UnwritableFileError(message, path=file.final)
                file.appear(force=self._force, keeps_old=len(self._files) > 1)
        except BaseException:
            for file in self._files:
                file.disappear()
            raise
        finally:
            _written.extend(file.final for file in self._files if file.has_appeared())
        for folder in {file.final.parent for file in self._files}:
            _sync_folder(folder)


class _OutputStream(io.FileIO):
    """A file that the kernel is given in large pieces, and the disk while the next ones are calculated.

    The kernel takes large pages for pieces that begin at a multiple of their size. Until one is whole, what is written
    is kept: bytes, and read-only views of an object, as they are, so that this object must not change; all else is
    copied.
    """

    def __init__(self, path: Path, mode: int | None) -> None:
        # with a mode of its own it is private until its end; without one the system gives it what the umask leaves
        begun = 0o666 if mode is None else 0o600
        super().__init__(os.fspath(path), "x+b", opener=partial(os.open, mode=begun))
        self._kept: list[bytearray | memoryview] = []
        self._end = 0  # of what is kept
        self._sent = 0  # how far the disk was given it

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if not self._kept:
            self._end = super().tell()
        last = self._kept[-1] if self._kept else None
        if view.nbytes >= _SMALL and view.readonly and view.obj is not None:  # else it is memory that nobody holds
            self._kept.append(view.cast("B"))
        elif isinstance(last, bytearray):
            last += view
        else:
            self._kept.append(bytearray(view))
        before, self._end = self._end, self._end + view.nbytes
        if before // _PIECE < self._end // _PIECE:
            self._write_out(rest=self._end % _PIECE)
        return view.nbytes

    def _write_out(self, *, rest: int) -> None:
        """Give the kernel all that is kept but the last few bytes, which came together."""
        parts, self._kept = self._kept, []
        if rest:
            last = memoryview(parts.pop())
            parts.append(last[:-rest])
            self._kept.append(last[-rest:] if last.readonly else bytearray(last[-rest:]))
        while parts:
            written = _write_parts(self, parts)
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if parts:
                parts[0] = memoryview(parts[0])[written:]
        self._note(self._end - rest)

    def _note(self, place: int) -> None:
        """Give the disk what was written up to a place, once it is much."""
        if place - self._sent >= _STEP:
            begin = _find_sync_file_range()
            if begin is not None:  # what fails here is told by fsync
                begin(self.fileno(), self._sent, place - self._sent, _SYNC_FILE_RANGE_WRITE)
            self._sent = place

    def flush(self) -> None:
        if self._kept:
            self._write_out(rest=0)

    def sync(self) -> None:
        """Bring it to the disk as a whole."""
        self.flush()
        os.fsync(self.fileno())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.flush()
        place = super().seek(offset, whence)
        self._note(place)  # also what the kernel has copied
        return place

    def tell(self) -> int:
        return self._end if self._kept else super().tell()

    def read(self, size: int | None = -1) -> bytes:
        self.flush()
        return super().read(size)

    def readinto(self, buffer: Any) -> int | None:
        self.flush()
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self.flush()
        return super().readall()

    def truncate(self, size: int | None = None) -> int:
        self.flush()
        return super().truncate(size)


def _write_parts(file: io.FileIO, parts: Sequence[bytes | bytearray | memoryview]) -> int:
    """Write bytes one after the other, as many as the system takes at once; return how many."""
    if hasattr(os, "writev"):
        return os.writev(file.fileno(), parts)
    return os.write(file.fileno(), b"".join(parts))  # Windows


@cache
def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Return Linux's sync_file_range(2), which Python has not; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        import ctypes

        function = ctypes.CDLL(None).sync_file_range
    except (ImportError, OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("Callable[[int, int, int, int], int]", function)


class _TemporaryFile:
    """A file under a temporary name, locked as long as this process works on it, on its way to its place."""

    stream: _OutputStream

    def __init__(self, final: Path, mode: int | None) -> None:
        self.final, self._mode = final, mode
        self.temporary = _choose_name(final)
        self._backup: Path | None = None
        self._replaces = False
        self._identity = (0, 0)
        self._held = contextlib.ExitStack()  # locks

    def open(self) -> IO[bytes]:
        try:
            while True:
                self.stream = _OutputStream(self.temporary, self._mode)
                self._held.enter_context(
                    _locked(self.temporary, waits=True)
                )  # who looks whether it is a leftover is soon done
                status = os.fstat(self.stream.fileno())
                if status.st_nlink:
                    break
                self.stream.close()  # another writer took it for what a killed one left, before it was locked
        except BaseException:
            self.discard()
            raise
        self._identity = (status.st_dev, status.st_ino)
        return self.stream

    def finish(self) -> None:
        """Bring it to the disk as a whole."""
        self.stream.sync()
        self.stream.close()
        if self._mode is not None:
            self.temporary.chmod(self._mode)

    def appear(self, *, force: bool, keeps_old: bool) -> None:
        """Give the file its final name.

        Args:
            force: replace a regular file that is there.
            keeps_old: so that :meth:`disappear` can bring it back.
        """
        OutputFiles(force=True).check(self.final)  # once more: time has passed
        self._replaces = os.path.lexists(self.final)
        if self._replaces and keeps_old:
            backup = self.temporary.with_suffix(".replaced")
            _unfinished[backup] = os.getpid()
            with contextlib.suppress(OSError):  # a file system without hard links
                self._held.enter_context(_locked(self.final, waits=False))
                os.link(self.final, backup)
                self._backup = backup
        if force:
            self.temporary.replace(self.final)
            return
        try:
            os.link(self.temporary, self.final)
        except FileExistsError:  # two writers at once: the one that comes second stops
            raise UnwritableFileError(
                "the file appeared while it was written; use --force to replace it", path=self.final
            ) from None
        except OSError:  # a file system without hard links
            self.temporary.replace(self.final)

    def has_appeared(self) -> bool:
        """Return whether what lies at its place is this file."""
        return self.is_at(self.final)

    def is_at(self, place: Path) -> bool:
        """Return whether what lies at a place is this file."""
        try:
            status = place.lstat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def disappear(self) -> None:
        """Put back the file that had the final name before, where a copy of it was kept."""
        if not self.has_appeared():
            return
        with contextlib.suppress(OSError):
            if self._backup is not None:
                self._backup.replace(self.final)
            elif not self._replaces:
                self.final.unlink()

    def discard(self) -> None:
        """Remove what is left under temporary names."""
        if hasattr(self, "stream"):
            with contextlib.suppress(OSError):
                self.stream.close()
        _remove(self.temporary)
        _remove(self.temporary.with_suffix(".replaced"))
        self._held.close()


def remove_unfinished() -> None:
    """Remove the temporary files of this process, where it was interrupted between two steps."""
    for path, process in list(_unfinished.items()):
        if process == os.getpid():
            _remove(path)


atexit.register(remove_unfinished)


def list_written() -> list[Path]:
    """Return the files that this process has written so far."""
    return list(_written)


def _choose_name(path: Path) -> Path:
    """Return a temporary name beside a path; it is remembered before there is such a file, whatever interrupts us."""
    temporary = path.with_name(f".{path.name[:20]}.{os.urandom(6).hex()}.writing")
    _unfinished[temporary] = os.getpid()
    return temporary


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            import shutil  # a listing needs none

            shutil.rmtree(path)
        else:
            path.unlink()
    _unfinished.pop(path, None)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of this path that a killed process left; those of running processes are locked."""
    pattern = re.compile(re.escape(f".{path.name[:20]}.") + r"[0-9a-f]{12}\.(?:writing|replaced)")
    try:
        places = [place for place in path.parent.iterdir() if pattern.fullmatch(place.name)]
    except OSError:  # a folder that can be written to and not listed
        return
    for place in places:
        with _locked(place, waits=False) as is_locked:
            if is_locked:
                _remove(place)


@contextlib.contextmanager
def _locked(path: Path, *, waits: bool) -> Iterator[bool]:
    """Lock a file or folder; yield whether that worked, which it does not on a file system without locks.

    Args:
        waits: until another process lets it go; else nothing is held where another process has it.
    """
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (ImportError, OSError):  # Windows; or it is gone already
        yield False
        return
    is_locked = False
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            is_locked = True
        yield is_locked
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system allows to open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_reason(error: OSError, path: Path | None) -> str:
    if getattr(error, "winerror", None) in _WINDOWS_IN_USE and path is not None and path.is_file():
        return "the file that is there cannot be replaced: another program has it open, or you have no permission"
    if error.errno == errno.EACCES and path is not None:
        return f"you have no permission to write in {path.parent}"
    return f"it could not be written: {describe_failure(error)}"


def check_output_differs(source: SourceFile, output: Path) -> None:
    """Check that the output is another file than the input, which is never written to.

    Raises:
        UsageError: ``output`` is the input itself, under whatever name.
    """
    with contextlib.suppress(OSError, ValueError):  # no such file yet, or no name that a file can have
        status = output.stat()
        if (status.st_dev, status.st_ino) == source.identity:
            raise UsageError("the output is the input; name another file", path=output)


def check_outputs_apart(outputs: Iterable[Path | None], inputs: Iterable[object]) -> None:
    """Check that files that are written are none of those that are read, and differ from each other.

    Args:
        outputs: None for none.
        inputs: paths, and texts that may begin with one, as ``net.py:build`` does; anything else names no file.

    Raises:
        UsageError
    """
    files, read = [path for path in outputs if path is not None], [one for spec in inputs for one in _list_paths(spec)]
    for at, path in enumerate(files):
        if any(is_same_file(path, other) for other in read):
            raise UsageError("the file is read, too: name another one to write", path=path)
        if any(is_same_file(path, other) for other in files[:at]):
            raise UsageError("two files to write have this name", path=path)


def _list_paths(spec: object) -> Iterator[str | os.PathLike[str]]:
    if isinstance(spec, str):
        yield from (spec, spec.rpartition(":")[0])
    elif isinstance(spec, os.PathLike):
        yield spec


def is_same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Return whether two paths name one file, whether it is there or not."""
    try:
        return os.path.realpath(one) == os.path.realpath(other) or Path(one).samefile(other)
    except (OSError, ValueError):  # one of them is not there, or no file can have that name
        return False
