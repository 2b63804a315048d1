"""Programs that tests run in a process of their own, and how they run them; ``user_code`` is what users give bntool."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.places import ROOT
from tests.programs.forking import TORCH, ForkedProcess, start_server

_FOLDER = Path(__file__).parent
_SECONDS = 600


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _check(done: subprocess.CompletedProcess[str], code: int) -> None:
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]


def run(name: str, *arguments: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder, which must end with ``code``."""
    options = {"env": _environment(), "capture_output": True, "text": True, "timeout": _SECONDS, **options}
    done = subprocess.run([sys.executable, *_command(name, *arguments)], check=False, **options)
    _check(done, code)
    return done


def start(name: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program of this folder, with pipes as its output and errors."""
    command = [sys.executable, *_command(name, *arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=_environment())


def list_loaded(*arguments: object, **options: Any) -> set[str]:
    """The modules that are loaded after ``import MODULE...`` or after commands of bntool, parted by ``;``."""
    return set(run("loaded_modules", *arguments, **options).stdout.splitlines()[-1].split())


def run_forked(name: str, *arguments: object, cwd: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder in a process that has imported torch already, which saves seconds.

    Not for programs that are about what is imported or how a process starts.
    """
    (done,) = _fork([_command(name, *arguments)], cwd)
    _check(done, code)
    return done


def run_ranks(name: str, *arguments: object) -> None:
    """Run a program of this folder twice at once, as ``run_forked`` does, with the rank as the last argument."""
    for done in _fork([_command(name, *arguments, rank) for rank in range(2)]):
        _check(done, 0)


def run_bntool(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command of bntool as ``run_forked`` runs programs."""
    (done,) = _fork([["-m", "bntool", *map(str, arguments)]], cwd)
    _check(done, code)
    return done


def start_bntool(*arguments: object, cwd: Path) -> ForkedProcess:
    """Start a command of bntool in a process that has imported torch already, with pipes as its output and errors."""
    command = [sys.executable, "-m", "bntool", *map(str, arguments)]
    return ForkedProcess(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(), cwd=cwd)


def run_bntool_as_ranks(count: int, *arguments: object, cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run a command of bntool in several processes of one job, which have the environment that torchrun gives."""
    from torch.distributed import TCPStore  # most of what is run here needs none of it

    # as torchrun has it in its own process, at a port that it keeps from then on
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    job["WORLD_SIZE"] = str(count)
    environments = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _fork([["-m", "bntool", *map(str, arguments)]] * count, cwd, environments)


def _command(name: str, *arguments: object) -> list[str]:
    return [str(_FOLDER / f"{name}.py"), *map(str, arguments)]


def _fork(
    commands: list[list[str]], folder: Path = ROOT, environments: list[dict[str, str]] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run Python programs at once."""
    with contextlib.ExitStack() as stack:
        started = []
        for number, command in enumerate(commands):
            environment = {**_environment(), **(environments[number] if environments else {})}
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in ("stdout", "stderr")]
            options = {"stdout": files[0], "stderr": files[1], "env": environment, "cwd": folder}
            started.append((ForkedProcess([sys.executable, *command], **options), files))
        done = []
        for command, (process, files) in zip(commands, started, strict=True):
            code = process.wait()
            for file in files:
                file.seek(0)
            done.append(subprocess.CompletedProcess(command, code, *(file.read() for file in files)))
        return done


def write_commands(folder: Path, real: Path) -> int:
    """Write ``bntool`` and ``python`` for shells.

    Commands of bntool that run a model and scripts are forked, as in ``run_bntool``; the others are real.

    Args:
        folder: where they are written.
        real: where the installed ones are.

    Returns:
        the file descriptor that the shell has to inherit.
    """
    server = start_server(TORCH).fileno()
    forked = f'exec "{sys.executable}" -I -S "{_FOLDER / "forked_program.py"}" {server}'
    for name, chosen, beginning in (("bntool", "recalibrate|fold", " -m bntool"), ("python", "*.py", "")):
        script = folder / name
        lines = ["#!/bin/sh", "case $1 in", f'{chosen}) {forked}{beginning} "$@";;', f'*) exec "{real / name}" "$@";;']
        script.write_text("\n".join([*lines, "esac", ""]))
        script.chmod(0o755)
    return server


def copy_user_code(name: str, folder: Path) -> Path:
    """Give a folder a module of ``user_code``, as if the user had written it there."""
    return Path(shutil.copy(_FOLDER / "user_code" / f"{name}.py", folder))
