"""Reading ranges of files over HTTP from servers that may be slow, broken or hostile."""

from __future__ import annotations

import contextlib
import email.message
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bntool.checkpoints.addresses import Address
from bntool.errors import UnreachableFileError, UsageError
from bntool.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_REDIRECTS = 5
ATTEMPTS = 3
_PAUSE = 0.5  # seconds before the second attempt; twice as many before the third
_LONGEST_PAUSE = 10.0  # that a server may ask for
_CONNECT, _SILENCE = 10.0, 30.0  # seconds
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (429, 500, 502, 503, 504)  # worth another attempt
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Limits:
    """Limits on how long a server may take.

    Attributes:
        answer: seconds for one answer, beside those for its bytes.
        whole: seconds for all answers together, beside those for their bytes.
        rate: bytes that come in a second at least.
    """

    answer: float = 30.0
    whole: float = 120.0
    rate: float = 100_000.0


@dataclass(frozen=True)
class Answer:
    """The answer of a server, with a body that is still to be read.

    Attributes:
        status: 200, or 206 for a range.
        url: that it came from, after redirects.
    """

    status: int
    headers: email.message.Message
    url: str
    _response: http.client.HTTPResponse
    _limit: _TimeLimit

    def extend(self, seconds: float) -> None:
        """Give it so many seconds from now on."""
        self._limit.start(seconds)

    def read(self, length: int) -> bytes:
        """Read at most so many bytes of the body; fewer only at its end."""
        return _read(self._response, length)


class BrokenAnswerError(Exception):
    """The connection failed, or the answer is cut off: another attempt may do better."""


class HttpClient:
    """Asks for ranges of files; its connections are kept for the next question, and may be used by several threads.

    Plain HTTP is spoken with this machine only. A redirect leads to the same scheme, and from a public address to
    public addresses. What authorizes at one host is not sent to another.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._idle: dict[tuple[str, str, int], list[_Connection]] = {}
        self._busy: set[_Connection] = set()
        self._lock = threading.Lock()
        self._is_given_up = False

    @contextlib.contextmanager
    def ask(
        self, address: Address, url: str, headers: Mapping[str, str], *, start: int, length: int
    ) -> Iterator[Answer]:
        """Ask for a range; yield the answer, whose body can be read inside the context.

        Raises:
            UsageError: the address is none that is read.
            UnreachableFileError: the server does not give the file, or takes too long for it.
            BrokenAnswerError: as it says.
        """
        asked = {key.lower(): value for key, value in headers.items()}
        asked |= {"accept-encoding": "identity", "range": f"bytes={start}-{start + length - 1}"}
        asked.setdefault("user-agent", f"bntool/{__version__}")
        seconds = self._limits.answer + length / self._limits.rate
        target, is_public = split(url, address), False
        for hop in range(MAX_REDIRECTS + 1):
            ips = _resolve(target, address)
            with _blame_redirect(address) if hop else contextlib.nullcontext():
                is_public = _check_ips(target, ips, address, came_from_public=is_public)
            connection = self._connect(target, ips)
            is_done = False
            try:
                with _TimeLimit(connection, seconds, address) as limit:
                    response = _send(connection, target, asked)
                    location = response.headers.get("location")
                    if response.status not in _REDIRECTS or not location:
                        _check_status(response, address)
                        yield Answer(response.status, response.headers, url, response, limit)
                        is_done = True
                        return
                    _read(response, 1 << 16)
                    is_done = True
            finally:
                self._give_back(target, connection, usable=is_done)
            with _blame_redirect(address):
                url = urllib.parse.urljoin(url, location)
                following = split(url, address)
            if following.scheme != target.scheme:
                raise UnreachableFileError(
                    "the server redirects to another kind of address, which is not followed", path=address
                )
            if following.place != target.place:
                asked.pop("authorization", None)
                asked.pop("cookie", None)
            target = following
        raise UnreachableFileError(f"the server redirects more than {MAX_REDIRECTS} times", path=address)

    def _connect(self, target: _Target, ips: list[str]) -> _Connection:
        with self._lock:
            if self._is_given_up:
                raise UnreachableFileError("the server is not asked any more")
            kept = self._idle.get(target.place, [])
            connection = kept.pop() if kept else _Connection(target, ips)
            self._busy.add(connection)
        return connection

    def _give_back(self, target: _Target, connection: _Connection, *, usable: bool) -> None:
        response = connection.last
        with self._lock:
            self._busy.discard(connection)
        is_open = usable and not connection.is_cut and connection.sock is not None
        if is_open and response is not None and response.isclosed():
            with self._lock:
                self._idle.setdefault(target.place, []).append(connection)
        else:
            connection.end()

    def give_up(self) -> None:
        """End what other threads wait for, and ask nothing any more."""
        with self._lock:
            self._is_given_up = True
            for connection in self._busy:
                connection.cut()

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            for kept in self._idle.values():
                for connection in kept:
                    connection.end()
            self._idle.clear()


@contextlib.contextmanager
def _blame_redirect(address: Address) -> Iterator[None]:
    """Turn a wrong address that a server redirects to into an error of the server: the user did not give it."""
    try:
        yield
    except (UsageError, ValueError) as error:
        message = "the server redirects to what is no address of a file, or would be read in plain text"
        raise UnreachableFileError(message, path=address) from error


@dataclass(frozen=True)
class _Target:
    """A URL in its parts.

    Attributes:
        place: what names the server.
        proxy: host and port of the proxy that leads there; None without one.
    """

    scheme: str
    host: str
    port: int
    path: str
    proxy: tuple[str, int] | None

    @property
    def place(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def netloc(self) -> str:
        """Host and port as the server is called: a signed address holds for no other spelling."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def split(url: str, address: Address) -> _Target:
    """Return the parts of a URL.

    Raises:
        UsageError: it is none of HTTP, or holds a password.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError("this address cannot be understood", path=address) from error
    if parts.scheme not in _PORTS or not host or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise UsageError("this address cannot be understood; one such as https://HOST/FOLDER/NAME can", path=address)
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "addresses with a user name or a password are not taken: commands are kept in histories", path=address
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    proxy = _find_proxy(parts.scheme, host)
    return _Target(parts.scheme, host, port or _PORTS[parts.scheme], path, proxy)


def check_url(url: str, address: Address) -> None:
    """Refuse a URL that would not be asked: before another library asks it.

    Raises:
        UsageError: it is none of HTTP, or plain text would leave this machine.
        UnreachableFileError: its host is not known.
    """
    target = split(url, address)
    if target.scheme == "http":
        _check_ips(target, _resolve(target, address), address, came_from_public=False)


def _find_proxy(scheme: str, host: str) -> tuple[str, int] | None:
    """Return the proxy that the system names for public hosts; what is spoken plainly goes to this machine directly."""
    if scheme != "https" or urllib.request.proxy_bypass(host):
        return None
    named = urllib.request.getproxies().get("https")
    if not named:
        return None
    parts = urllib.parse.urlsplit(named if "://" in named else f"http://{named}")
    return (parts.hostname, parts.port or 80) if parts.hostname else None


def _resolve(target: _Target, address: Address) -> list[str]:
    """Return the IP addresses of a host; none where a proxy looks them up."""
    if target.proxy is not None:
        with contextlib.suppress(ValueError):
            return [str(ipaddress.ip_address(target.host))]
        return []
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnreachableFileError(f"the host {target.host} is not known; are you online?", path=address) from error
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def _check_ips(target: _Target, ips: list[str], address: Address, *, came_from_public: bool) -> bool:
    """Return whether a host is public, also in part, where it may be asked; one that a proxy looks up counts as public.

    Raises:
        UsageError: it would be asked in plain text.
        UnreachableFileError: a public host sends us to a private one.
    """
    known = [_unmap(ipaddress.ip_address(ip)) for ip in ips]
    if target.scheme == "http" and not all(ip.is_loopback for ip in known):
        raise UsageError("plain http is read from this machine only; use https", path=address)
    if came_from_public and not all(ip.is_global for ip in known):
        raise UnreachableFileError(
            f"the server redirects to {target.host}, which is on a private network; that is not followed", path=address
        )
    return not known or any(ip.is_global for ip in known)


def _unmap(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the IPv4 address that an IPv6 address stands for; every other address as it is."""
    return (getattr(ip, "ipv4_mapped", None) or ip) if ip.version == 6 else ip


class _Connection(http.client.HTTPConnection):
    """A connection to one of the IP addresses that were looked at, whatever the name leads to a moment later."""

    def __init__(self, target: _Target, ips: list[str]) -> None:
        super().__init__(target.host, target.port, timeout=_CONNECT)
        if target.proxy:
            self.set_tunnel(target.host, target.port)
        self._target = target
        self._ips = ips
        self.last: http.client.HTTPResponse | None = None
        self._held: socket.socket | None = None
        self.is_cut = False

    def connect(self) -> None:
        target = self._target
        problem: OSError | None = None
        for ip, port in [target.proxy] if target.proxy else [(ip, target.port) for ip in self._ips]:
            try:
                self.sock = self._hold(socket.create_connection((ip, port), _CONNECT))
                self.sock.settimeout(_SILENCE)
                break
            except OSError as error:
                problem = error
        else:
            raise problem or OSError("no address")
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.proxy:
            self._tunnel()  # type: ignore[attr-defined]
        if target.scheme == "https":
            context = ssl.create_default_context()
            wrapped = context.wrap_socket(self.sock, server_hostname=target.host, do_handshake_on_connect=False)
            self.sock = self._hold(wrapped)
            wrapped.do_handshake()

    def _hold(self, held: Any) -> Any:
        self._held = held
        if self.is_cut:
            self.cut()
        return held

    def cut(self) -> None:
        """End whatever waits for the server, in another thread."""
        self.is_cut = True
        if self._held is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._held, socket.SHUT_RDWR)

    def end(self) -> None:
        """Close the connection, and the answer that is read from it."""
        with contextlib.suppress(OSError):
            if self.last is not None:
                self.last.close()
            self.close()
        if self._held is not None:
            with contextlib.suppress(OSError):
                self._held.close()


def _send(connection: _Connection, target: _Target, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    is_kept = connection.sock is not None
    try:
        connection.request("GET", target.path, headers={"host": target.netloc, **headers})
        connection.last = connection.getresponse()
    except (http.client.RemoteDisconnected, ConnectionError):
        if not is_kept:
            raise
        connection.end()  # the server has ended what was kept: that is no fault of it
        connection.request("GET", target.path, headers={"host": target.netloc, **headers})
        connection.last = connection.getresponse()
    return connection.last


def _read(response: http.client.HTTPResponse, length: int) -> bytes:
    """Read at most so many bytes, whatever sizes of chunks the server says: a negative one makes ``read`` read on."""
    buffer = bytearray(length)
    return bytes(memoryview(buffer)[: response.readinto(buffer)])


class _TimeLimit:
    """Ends an exchange that takes longer, however busy the server is meanwhile."""

    def __init__(self, connection: _Connection, seconds: float, address: Address) -> None:
        self._connection, self._seconds, self._address = connection, seconds, address
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._has_ended = self._is_over = False

    def start(self, seconds: float) -> None:
        """Start to count the time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        with self._lock:
            if not self._has_ended:  # else the connection is kept, or serves the next question already
                self._is_over = True
                self._connection.cut()

    def __enter__(self) -> Self:
        self.start(self._seconds)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._has_ended = True
        if self._is_over and isinstance(error, Exception):  # whatever was made of what is cut off
            raise UnreachableFileError("the server takes too long to answer", path=self._address) from error
        if isinstance(error, TimeoutError):
            raise UnreachableFileError("the server takes too long to answer", path=self._address) from error
        if isinstance(error, ssl.SSLCertVerificationError):
            message = f"the certificate of the server is not valid: {error.verify_message}"
            raise UnreachableFileError(message, path=self._address) from error
        if isinstance(error, OSError | http.client.HTTPException):
            raise BrokenAnswerError(_describe(error)) from error


def _describe(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nothing answers there"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer is cut off"
    if isinstance(error, http.client.HTTPException):
        return "it does not speak HTTP as it should"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def _check_status(response: http.client.HTTPResponse, address: Address) -> None:
    """Refuse an answer that is no file.

    Raises:
        UnreachableFileError: it never will be.
        BrokenAnswerError: it may be later.
    """
    status = response.status
    if status in (200, 206):
        return
    if status in (404, 410):
        raise MissingFileError("there is no such file", path=address)
    if status in (401, 403, 407):
        raise UnreachableFileError(f"the server gives it only to those who may have it ({status})", path=address)
    if status == 416:
        raise UnreachableFileError("the file is empty", path=address)
    if status in _BUSY:
        raise BusyServerError(f"the server answers {status}", response.headers.get("retry-after", ""))
    raise UnreachableFileError(f"the server answers {status} instead of the file", path=address)


class MissingFileError(UnreachableFileError):
    """The server has no such file."""


class BusyServerError(BrokenAnswerError):
    """The server says that it may answer later."""

    def __init__(self, message: str, retry_after: str) -> None:
        super().__init__(message)
        self.pause = min(float(retry_after), _LONGEST_PAUSE) if retry_after.isdecimal() else 0.0


def pause_before(attempt: int, error: BrokenAnswerError) -> None:
    """Wait before another attempt, longer each time."""
    time.sleep(max(_PAUSE * 2 ** (attempt - 1), getattr(error, "pause", 0.0)))
