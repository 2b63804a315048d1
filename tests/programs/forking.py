"""Processes that are forked from one that has imported what takes long to import."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from tests.places import ROOT

# torch._dynamo is what DistributedDataParallel imports when it is made
ONNXRUNTIME = ("numpy", "onnxruntime")
TORCH = ("torch._dynamo", "bntool.recalibration.live", "bntool.freezing.live", "bntool.cli.progress")


class ForkedProcess:
    """What ``subprocess.Popen`` does, for Python programs, as far as it is needed here."""

    def __init__(
        self,
        command: list[str],
        *,
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = subprocess.DEVNULL,
        stderr: Any = subprocess.DEVNULL,
        env: dict[str, str],
        cwd: Path = ROOT,
        imported: tuple[str, ...] = TORCH,
    ) -> None:
        assert command[0] == sys.executable
        self.stdin, input_ = _open_stream(stdin, writing=True)
        self.stdout, output = _open_stream(stdout, writing=False)
        self.stderr, errors = _open_stream(stderr, writing=False)
        request = {"command": command[1:], "folder": str(cwd), "environment": env}
        self._server = start_server(imported)
        socket.send_fds(self._server, [json.dumps(request).encode()], [input_, output, errors])
        self.pid = json.loads(self._server.recv(1 << 10))
        for stream in (input_, output, errors):
            os.close(stream)
        self.returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            self._server.send(json.dumps({"wait": self.pid}).encode())
            self.returncode = json.loads(self._server.recv(1 << 10))
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, sent: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, sent)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _open_stream(stream: Any, *, writing: bool) -> tuple[IO[bytes] | None, int]:
    """This side of a stream, if it has one, and the number of the file that is the other."""
    if stream == subprocess.PIPE:
        read, write = os.pipe()
        return (os.fdopen(write, "wb"), read) if writing else (os.fdopen(read, "rb"), write)
    if stream == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_RDWR)
    return None, os.dup(stream.fileno())


@functools.cache
def start_server(imported: tuple[str, ...]) -> socket.socket:
    """A connection to a process of ``fork_server``, kept until this one ends; processes that test together share it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    place = f"\0bntool-{run[:12]}-{imported[0]}"  # no file: one that is killed leaves no name that another may need
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listening:
        try:
            listening.bind(place)
        except OSError:  # another has started it
            return _connect(place)
        listening.listen()
        program = Path(__file__).with_name("fork_server.py")
        needed, its = os.pipe()
        server = subprocess.Popen(
            [sys.executable, str(program), str(listening.fileno()), str(needed), " ".join(imported)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            pass_fds=[listening.fileno(), needed],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
        )
    os.close(needed)
    connection = _connect(place)

    def end() -> None:
        connection.close()
        os.close(its)
        server.wait()

    atexit.register(end)
    return connection


def _connect(place: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for _ in range(1000):  # until the one that has bound it listens
        try:
            connection.connect(place)
        except ConnectionRefusedError:
            time.sleep(0.01)
        else:
            atexit.register(connection.close)
            return connection
    raise TimeoutError(f"nothing listens at {place!r}")
