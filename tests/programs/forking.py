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
from pathlib import Path
from typing import IO, Any

from tests.places import ROOT

# torch._dynamo is what DistributedDataParallel imports when it is made
ONNXRUNTIME = ("numpy", "onnxruntime")
TORCH = ("torch._dynamo", "bntool.recalibration.live", "bntool.freezing.live")


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
    """A process of ``fork_server``, kept until this one ends."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = Path(__file__).with_name("fork_server.py")
    server = subprocess.Popen(
        [sys.executable, str(program), str(its.fileno()), " ".join(imported)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        pass_fds=[its.fileno()],
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
    )
    its.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours
