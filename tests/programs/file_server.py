"""A server of files on this machine: honest, or in one of the ways in which servers are not."""

from __future__ import annotations

import contextlib
import http.server
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.places import FIXTURES


@dataclass
class FileServer:
    """Files by path, and what was asked for and sent.

    Attributes:
        files: their bytes.
        behave: answers instead, where it returns True; gets the handler and the bytes of the file.
        sent: bytes of bodies.
        asked: path and headers of each question.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    behave: Callable[[Handler, bytes], bool] | None = None
    sent: int = 0
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with ranges and ETags, and keeps connections, as a good server does."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    files: FileServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with self.files.lock:
            self.files.asked.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        data = self.files.files.get(path)
        with contextlib.suppress(ConnectionError, TimeoutError):
            if self.files.behave is not None and self.files.behave(self, data or b""):
                return
            if data is None:
                self.answer(404, b"")
            else:
                self.answer_range(data)

    do_HEAD = do_GET

    def answer_range(self, data: bytes, *, size: int | None = None, etag: str = '"one"') -> None:
        """The range that was asked for."""
        start, end = self.read_range(len(data))
        part = data[start:end]
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(data) if size is None else size}", "ETag": etag}
        self.answer(206, part, headers)

    def read_range(self, size: int) -> tuple[int, int]:
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        return int(first), min(int(last) + 1, size)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        with self.files.lock:  # before a reader can have it and ask
            self.files.sent += len(body)
        if self.command != "HEAD":
            self.wfile.write(body)

    def drip(self, data: bytes) -> None:
        """Bytes one by one, until the test is over."""
        for at in range(len(data)):
            self.wfile.write(data[at : at + 1])
            if self.files.over.wait(0.02):
                return

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """What a test breaks on purpose is no news."""


TLS = FIXTURES / "tls" / "server.pem"  # key and certificate, of localhost and public.test


@contextlib.contextmanager
def serve_files(files: dict[str, bytes] | None = None, *, tls: bool = False) -> Iterator[FileServer]:
    """A server that runs in threads until the end of the context; with TLS by the certificate of the fixtures."""
    state = FileServer(files=files or {})
    handler = type("_Handler", (Handler,), {"files": state, "timeout": 20})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(TLS)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    state.url = f"http{'s' * tls}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def serve_proxy(target: str) -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that leads to one server, whatever host is asked for: its address, and what it was asked."""
    asked: list[bytes] = []
    place = ("127.0.0.1", int(target.rpartition(":")[2]))

    class Proxy(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += self.rfile.readline()
            asked.append(head)
            self.connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with socket.create_connection(place) as onward:
                there = threading.Thread(target=pump, args=(self.connection, onward), daemon=True)
                there.start()
                pump(onward, self.connection)
                there.join(5)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
