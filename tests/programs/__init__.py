"""Programs that tests run in a process of their own, and how they run them; ``user_code`` is what users give bntool."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.places import ROOT

_FOLDER = Path(__file__).parent
_SECONDS = 120


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _check(done: subprocess.CompletedProcess[str], code: int) -> None:
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]


def run(name: str, *arguments: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder, which must end with ``code``."""
    options = {"env": _environment(), "capture_output": True, "text": True, "timeout": _SECONDS, **options}
    command = [sys.executable, str(_FOLDER / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, check=False, **options)
    _check(done, code)
    return done


def list_loaded(*arguments: object, **options: Any) -> set[str]:
    """The modules that are loaded after ``import MODULE...`` or after a command of bntool."""
    return set(run("loaded_modules", *arguments, **options).stdout.splitlines()[-1].split())


def run_forked(name: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder in a process that has imported torch already, which saves seconds.

    Not for programs that are about what is imported or how a process starts.
    """
    (done,) = _fork([[str(_FOLDER / f"{name}.py"), *map(str, arguments)]])
    _check(done, code)
    return done


def run_ranks(name: str, *arguments: object) -> None:
    """Run a program of this folder twice at once, as ``run_forked`` does, with the rank as the last argument."""
    for done in _fork([[str(_FOLDER / f"{name}.py"), *map(str, arguments), str(rank)] for rank in range(2)]):
        _check(done, 0)


def _fork(commands: list[list[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Run programs at once, each in a fork of ``fork_server``."""
    server = _start_fork_server()
    with tempfile.TemporaryDirectory() as folder:
        request, streams = [], []
        for number, (program, *arguments) in enumerate(commands):
            files = [Path(folder, f"{number}.{stream}") for stream in ("output", "errors")]
            for file in files:
                file.touch()
            output, errors = map(str, files)
            launch = {"program": program, "arguments": arguments, "environment": _environment(), "seconds": _SECONDS}
            request.append({**launch, "input": os.devnull, "output": output, "errors": errors})
            streams.append(files)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return [
            subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))
            for command, code, files in zip(commands, codes, streams, strict=True)
        ]


@functools.cache
def _start_fork_server() -> subprocess.Popen[str]:
    command = [sys.executable, str(_FOLDER / "fork_server.py")]
    server = subprocess.Popen(
        command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    atexit.register(server.communicate)  # its input ends, so that it does
    return server


def copy_user_code(name: str, folder: Path) -> Path:
    """Give a folder a module of ``user_code``, as if the user had written it there."""
    return Path(shutil.copy(_FOLDER / "user_code" / f"{name}.py", folder))
