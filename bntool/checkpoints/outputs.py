"""Replacing files atomically: what is written appears whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from bntool.checkpoints.files import SourceFile, describe_failure
from bntool.errors import UnwritableFileError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self


_BUFFER = 1 << 20  # bytes written at a time: the kernel takes large pages for them, a third faster than 128 KiB


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
        stream = os.fdopen(descriptor, "w+b", buffering=_BUFFER)
        self._open.append(stream)
        return stream

    def temporary(self, path: Path) -> Path:
        """Where the file that will become ``path`` lies until then."""
        return next(temporary for temporary, final in self._pending if final == path)

    @contextlib.contextmanager
    def preview(self, path: Path) -> Iterator[Path]:
        """Where the file that will become ``path`` can be used until then, with the others beside it by their names."""
        import tempfile

        self.flush()
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:20]}.", suffix=".writing") as folder:
            for temporary, final in self._pending:
                place = Path(folder) / final.name
                try:
                    os.link(temporary, place)
                except OSError:  # a file system without hard links
                    shutil.copyfile(temporary, place)
            yield Path(folder) / path.name

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
        replaced: list[tuple[Path, Path]] = []
        try:
            for temporary, final in self._pending:
                if self._force and os.path.lexists(final):
                    if len(self._pending) > 1:
                        replaced += _keep(final, beside=temporary)
                    temporary.replace(final)
                else:
                    temporary.replace(final) if self._force else _rename_without_replacing(temporary, final)
                    appeared.append(final)
        except BaseException:
            for final in appeared:
                with contextlib.suppress(OSError):
                    final.unlink()
            for kept, final in replaced:
                with contextlib.suppress(OSError):
                    kept.replace(final)
            raise
        for kept, _ in replaced:
            with contextlib.suppress(OSError):
                kept.unlink()
        for folder in {final.parent for _, final in self._pending}:
            _sync_folder(folder)

    def _discard(self) -> None:
        for stream in self._open:
            with contextlib.suppress(OSError):
                stream.close()
        for temporary, _ in self._pending:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _keep(final: Path, *, beside: Path) -> list[tuple[Path, Path]]:
    """A second name for a file that is about to be replaced, should a later file of the transaction fail."""
    kept = beside.with_suffix(".replaced")
    try:
        os.link(final, kept)
    except OSError:  # there is none, or a file system without hard links
        return []
    return [(kept, final)]


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
    return f"it could not be written: {describe_failure(error)}"


def check_output_differs(source: SourceFile, output: Path) -> None:
    """The input is never written to.

    Raises:
        UsageError: ``output`` is the input itself, under whatever name.
    """
    with contextlib.suppress(OSError, ValueError):  # no such file yet, or no name that a file can have
        status = output.stat()
        if (status.st_dev, status.st_ino) == source.identity:
            raise UsageError("the output is the input; name another file", path=output)
