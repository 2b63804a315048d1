"""Bytes of one file of a server: asked for by position, and held against what the server said of the file before."""

from __future__ import annotations

import contextlib
import email.message
import re
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, NamedTuple, TypeVar

from bntool.checkpoints.addresses import Address
from bntool.checkpoints.remote.http import ATTEMPTS, Answer, BrokenAnswerError, HttpClient, Limits, pause_before
from bntool.errors import UnreachableFileError

MAX_WHOLE = 256_000_000  # bytes of a file that is fetched whole, where the server gives no parts
_CHUNK, _STEP = 1 << 18, 1 << 23
_RANGE = re.compile(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20})", re.ASCII)
_CHANGED = "the file was changed on the server while it was read; try again"

Result = TypeVar("Result")


class Version(NamedTuple):
    """The facts that tell two versions of a file apart.

    Attributes:
        size: in bytes; -1 where the server does not say it before the end.
        tag: the server's ETag, else its date of the last change; "" where it says neither.
    """

    size: int
    tag: str


@dataclass
class Transfers:
    """The questions for one file.

    Attributes:
        url: of the file; after the first answer the one that it came from.
        headers: to send with each question to its host.
        received: bytes of the file that came.
        asked: how many questions were answered.
        waited: seconds that whoever reads waited for them.
    """

    address: Address
    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    limits: Limits = field(default_factory=Limits)
    received: int = 0
    asked: int = 0
    waited: float = 0.0

    def __post_init__(self) -> None:
        self._first_url, self._client = self.url, HttpClient(self.limits)
        self._lock = threading.Lock()

    @property
    def host(self) -> str:
        """The one that is asked first."""
        return urllib.parse.urlsplit(self._first_url).netloc

    @property
    def key(self) -> str:
        """The name of the file in the cache: its URL without the query, which may be of this moment only."""
        return self._first_url.partition("?")[0]

    def fetch(self, start: int, length: int, version: Version) -> bytes:
        """Fetch a range of the file, which has this version and reaches so far.

        Raises:
            UnreachableFileError: the server does not give it, or gives something else.
        """

        def read(answer: Answer) -> bytes:
            self._check_version(answer, version)
            data = self._read_range(answer, start, length)
            with self._lock:
                self.received += length
            return data

        return self._try(start, length, read)

    def check_unchanged(self, version: Version) -> None:
        """Ask once more whether the file has this version.

        Raises:
            UnreachableFileError: it has another one, or the server does not give it any more.
        """

        def read(answer: Answer) -> None:
            self._check_version(answer, version)
            self._read_range(answer, 0, 1)

        self._try(0, 1, read)

    def _check_version(self, answer: Answer, version: Version) -> None:
        if answer.status == 200:
            raise UnreachableFileError("the server gives no parts of the file any more", path=self.address)
        if self._read_version(answer) != version:
            raise UnreachableFileError(_CHANGED, path=self.address)

    def begin(self, length: int) -> tuple[Version, bytes, IO[bytes] | None]:
        """Return the first bytes of the file, and its version; or all of it as a temporary file, from a server without
        ranges.

        Raises:
            UnreachableFileError: the server does not give it; or gives no ranges, and it is too large to be fetched.
        """

        def read(answer: Answer) -> tuple[Version, bytes, IO[bytes] | None]:
            version = self._read_version(answer)
            if answer.status == 200:
                return version, b"", self._read_whole(answer, version.size)
            data = self._read_range(answer, 0, min(length, version.size))
            self.received += len(data)
            self.url = answer.url
            return version, data, None

        with self.waiting():
            return self._try(0, length, read)

    def _try(self, start: int, length: int, read: Callable[[Answer], Result]) -> Result:
        attempt = 1
        while True:
            url = self.url
            headers = self.headers if url == self._first_url else {}  # those are not for where it redirects to
            try:
                with self._client.ask(self.address, url, headers, start=start, length=length) as answer:
                    result = read(answer)
                with self._lock:
                    self.asked += 1
            except BrokenAnswerError as error:
                if attempt == ATTEMPTS:
                    message = f"the server does not give the file, asked {ATTEMPTS} times: {error}"
                    raise UnreachableFileError(message, path=self.address) from error
                pause_before(attempt, error)
                attempt += 1
            except UnreachableFileError:
                if url == self._first_url:
                    raise
                self.url = self._first_url  # where it redirected to may be for a while only
            else:
                return result

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for answers inside the context; a server that is slow in all is given up after it.

        Raises:
            UnreachableFileError
        """
        began = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - began
            with self._lock:
                self.waited += took
        self.check_pace(0.0)

    def check_pace(self, began: float) -> None:
        """Give up a server that is slow in all.

        Args:
            began: when the waiting that is not over yet did; 0 where all is.

        Raises:
            UnreachableFileError
        """
        waited = self.waited + (time.monotonic() - began if began else 0.0)
        if waited > self.limits.whole + self.received / self.limits.rate:
            message = f"the server is too slow: {self.received:,} bytes came in {waited:.0f} seconds"
            raise UnreachableFileError(message, path=self.address)

    def _read_version(self, answer: Answer) -> Version:
        headers = answer.headers
        if headers.get("content-encoding", "identity") != "identity":
            raise UnreachableFileError("the server sends the file in another form than it is in", path=self.address)
        tag = headers.get("etag") or headers.get("last-modified") or ""
        if answer.status == 206:
            return Version(self._read_places(headers)[2], tag)
        length = headers.get("content-length", "")
        return Version(int(length) if length.isdecimal() and length.isascii() else -1, tag)

    def _read_places(self, headers: email.message.Message) -> tuple[int, int, int]:
        """Return first byte, the one after the last, and the size of the file."""
        found = _RANGE.fullmatch(headers.get("content-range", ""))
        if found is None:
            raise UnreachableFileError("the server does not say which part of the file it sends", path=self.address)
        first, last, size = map(int, found.groups())
        return first, last + 1, size

    def _read_range(self, answer: Answer, start: int, length: int) -> bytes:
        first, end, _ = self._read_places(answer.headers)
        announced = answer.headers.get("content-length")
        if (first, end) != (start, start + length) or (announced is not None and announced != str(length)):
            raise UnreachableFileError(
                "the server sends another part of the file than it was asked for", path=self.address
            )
        parts = []
        left = length
        while left:
            part = answer.read(min(left, _CHUNK))
            if not part:
                raise BrokenAnswerError("the answer is cut off")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _read_whole(self, answer: Answer, size: int) -> IO[bytes]:
        """Return all of the file, for a server that gives no parts of it."""
        too_large = UnreachableFileError(
            f"the server gives the file as a whole only, which is done up to {MAX_WHOLE / 1e6:.0f} MB; download it "
            "first",
            path=self.address,
        )
        if size > MAX_WHOLE:
            raise too_large
        extended = 0
        file = tempfile.TemporaryFile()  # noqa: SIM115 (whoever reads it closes it)
        try:
            while part := answer.read(_CHUNK):
                file.write(part)
                if file.tell() > MAX_WHOLE:
                    raise too_large
                if file.tell() >= extended:
                    answer.extend(self.limits.answer + _STEP / self.limits.rate)
                    extended += _STEP
            if size not in (-1, file.tell()):
                raise BrokenAnswerError("the answer is cut off")
            file.flush()
        except BaseException:
            file.close()
            raise
        self.received = file.tell()
        return file

    def give_up(self) -> None:
        """End all questions that other threads ask."""
        self._client.give_up()

    def close(self) -> None:
        """Close all connections."""
        self._client.close()
