"""A file on another machine, read by position as if it lay here."""

from __future__ import annotations

import bisect
import os
import threading
import time
import urllib.parse
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from bntool.checkpoints.addresses import Address, Location
from bntool.checkpoints.files import Folder, SourceFile, describe_missing
from bntool.checkpoints.remote import cache
from bntool.checkpoints.remote.http import Limits, MissingFileError
from bntool.checkpoints.remote.transfers import Transfers, Version
from bntool.errors import UnreachableFileError

_FIRST = 1 << 16  # bytes that are asked for first: most headers fit
_LEAST, _MOST = 1 << 13, 1 << 23  # bytes of one question; more where one piece after the other is read
_GAP = 1 << 12  # bytes between two ranges that are fetched together, rather than asked for twice
_AT_ONCE = 8  # questions
_MAX_ANNOUNCED = 1 << 26  # bytes


class _RemoteSource(SourceFile):
    """The base of files on other machines.

    Attributes:
        found: how the file was found, a sentence each.
    """

    found: tuple[str, ...] = ()
    _folder: Folder

    @property
    def folder(self) -> Folder:
        return self._folder


class RangedFile(_RemoteSource):
    """A file of a server that gives parts of it; what was read is kept, here and in the cache."""

    mode = 0o644
    is_far = True

    def __init__(self, transfers: Transfers, version: Version, folder: Folder) -> None:
        if version.size == 0:
            raise UnreachableFileError("the file is empty", path=transfers.address)
        self.path = transfers.address
        self.size = version.size
        self.identity = (-1, hash((transfers.address, version)))
        self._transfers, self._version, self._folder = transfers, version, folder
        self._ranges = _Ranges()
        self._saved = self._from_before = 0
        self._key = transfers.key
        self._window, self._next = _LEAST, -1
        self._end = weakref.finalize(self, transfers.close)

    def keep(self, start: int, data: bytes) -> None:
        """Keep bytes that were read already."""
        self._ranges.add(start, data)

    def take_over(self, ranges: cache.Ranges) -> None:
        """Take over what was read of this version before."""
        before = self._ranges.size
        for start, data in ranges:
            self._ranges.add(start, data)
        self._saved = self._ranges.size
        self._from_before = self._saved - before

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """How the file was found, and how much of it was read."""
        kept = f", {self._from_before:,} more were in the cache" if self._from_before else ""
        of_all = f"{self._transfers.received:,} of {self.size:,} bytes were read from {self._transfers.host}{kept}"
        return (*self.found, of_all)

    def check_unchanged(self) -> None:
        """Ask the server once more.

        Raises:
            UnreachableFileError: it has another version now.
        """
        self._transfers.check_unchanged(self._version)

    def check_same(self, before: SourceFile) -> None:
        if self.identity != before.identity:
            raise UnreachableFileError(
                "the file was changed on the server while it was read; try again", path=self.path
            )

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        wanted: list[tuple[int, int]] = []
        for offset, length in sorted(ranges):
            for start, end in self._ranges.find_missing(offset, min(offset + length, self.size)):
                if wanted and start - wanted[-1][1] <= _GAP:
                    wanted[-1] = wanted[-1][0], max(end, wanted[-1][1])
                else:
                    wanted.append((start, end))
        if sum(end - start for start, end in wanted) > _MAX_ANNOUNCED:
            return
        if len(wanted) == 1:
            self._fetch(*wanted[0])
        elif wanted:
            with self._transfers.waiting():
                self._fetch_together(wanted)

    def _fetch_together(self, wanted: Sequence[tuple[int, int]]) -> None:
        began = time.monotonic()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            futures = [pool.submit(self._transfers.fetch, a, b - a, self._version) for a, b in wanted]
            try:
                for (start, _), future in zip(wanted, futures, strict=True):
                    self._ranges.add(start, future.result())
                    self._transfers.check_pace(began)
            except BaseException:  # also where the user interrupts it: nobody waits for the rest
                pool.shutdown(wait=False, cancel_futures=True)
                self._transfers.give_up()
                raise

    def _read_once(self, offset: int, length: int) -> bytes:
        while not (found := self._ranges.get(offset, length)):  # again where another thread has let go of it
            self._window = min(self._window * 2, _MOST) if offset == self._next else _LEAST
            until = min(offset + max(length, self._window), self.size)
            for start, end in self._ranges.find_missing(offset, until)[:1]:
                self._fetch(start, min(end, start + _MOST))
        self._next = offset + len(found)
        return found

    def _fetch(self, start: int, end: int) -> None:
        with self._transfers.waiting():
            self._ranges.add(start, self._transfers.fetch(start, end - start, self._version))

    def copy_to(self, stream: IO[bytes], *, offset: int, length: int) -> None:
        for chunk in self.chunks(offset, length):
            stream.write(chunk)

    def close(self) -> None:
        if self._end.alive and self._ranges.size > self._saved:
            cache.save(self._key, self._version, self._ranges.list())
        self._end()


class FetchedFile(_RemoteSource):
    """A file of a server that gives no parts: all of it was fetched into a temporary file."""

    def __init__(self, address: Address, stream: IO[bytes], folder: Folder) -> None:
        self._take(os.dup(stream.fileno()), address)
        stream.close()
        self._folder = folder
        self.mode = 0o644

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.found, f"the server gives no parts of files: all {self.size:,} bytes were fetched")


class CachedFile(_RemoteSource):
    """A file that another program keeps here for its address."""

    def __init__(self, path: str, address: Address, folder: Folder) -> None:
        super().__init__(path)
        self.path, self._folder = address, folder

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.found, "it was in the cache of huggingface_hub")


class WebFolder(Folder):
    """The folder of a file on a server."""

    def __init__(self, address: Address, limits: Limits) -> None:
        self._address, self._limits = address, limits

    def open(self, name: str, *, named_by: Location) -> SourceFile:
        address = self._join(name)
        try:
            return open_url(address, limits=self._limits)
        except MissingFileError as error:
            raise describe_missing(address, named_by) from error

    def find(self, name: str) -> SourceFile | None:
        try:
            return open_url(self._join(name), limits=self._limits)
        except MissingFileError:
            return None

    def contains(self, name: str) -> bool:
        return ".." not in name.split("/")

    def _join(self, name: str) -> Address:
        parts = urllib.parse.urlsplit(self._address.text)
        there = parts._replace(path=urllib.parse.urljoin(parts.path, urllib.parse.quote(f"./{name}")), fragment="")
        return Address(there.geturl())  # the query that opens one file may open its neighbours


def open_url(address: Address, *, limits: Limits) -> SourceFile:
    """Open a file of a server.

    Raises:
        UsageError: the address is none.
        UnreachableFileError: the server does not give it.
    """
    url = urllib.parse.urldefrag(address.text).url
    return open_transfers(Transfers(address, url, limits=limits), WebFolder(address, limits))


def open_transfers(transfers: Transfers, folder: Folder) -> _RemoteSource:
    """Open the file that transfers are for: by its ranges, or as a whole where the server gives none."""
    kept = cache.load(transfers.key)
    try:
        version, data, whole = transfers.begin(1 if kept is not None else _FIRST)
        if whole is not None:
            transfers.close()
            return FetchedFile(transfers.address, whole, folder)
        file = RangedFile(transfers, version, folder)
    except BaseException:
        transfers.close()
        raise
    file.keep(0, data)
    if kept is not None and kept[0] == version and version.tag:
        file.take_over(kept[1])
    return file


class _Ranges:
    """Parts of a file that were read already: sorted, disjoint, and small neighbours joined."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._parts: list[bytes] = []
        self._lock = threading.Lock()
        self.size = 0

    def add(self, start: int, data: bytes) -> None:
        with self._lock:
            for a, b in self._find_missing(start, start + len(data)):
                at = bisect.bisect(self._starts, a)
                self._starts.insert(at, a)
                self._parts.insert(at, data[a - start : b - start])
                self.size += b - a
            while self.size > _MAX_ANNOUNCED and len(self._parts) > 1:  # what is read through once is not kept
                at = 0 if self._starts[0] != start else 1
                self.size -= len(self._parts.pop(at))
                del self._starts[at]

    def get(self, offset: int, length: int) -> bytes:
        """Return the bytes from ``offset`` on that are known, in one part; b"" where none is."""
        with self._lock:
            at = bisect.bisect(self._starts, offset) - 1
            if at < 0:
                return b""
            inner = offset - self._starts[at]
            return self._parts[at][inner : inner + length]

    def find_missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts between two places that are not known."""
        with self._lock:
            return self._find_missing(start, end)

    def _find_missing(self, start: int, end: int) -> list[tuple[int, int]]:
        missing = []
        at = max(bisect.bisect(self._starts, start) - 1, 0)
        for a, part in zip(self._starts[at:], self._parts[at:], strict=True):
            if a >= end:
                break
            if a > start:
                missing.append((start, a))
            start = max(start, a + len(part))
        if start < end:
            missing.append((start, end))
        return missing

    def list(self) -> cache.Ranges:
        with self._lock:
            return list(zip(self._starts, self._parts, strict=True))
