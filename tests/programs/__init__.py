"""Programs that tests run in a process of their own, and how they run them; ``user_code`` is what users give bntool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.places import ROOT


def command(name: str, *arguments: object) -> list[str]:
    """The command line of a program of this folder."""
    return [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *map(str, arguments)]


def run(name: str, *arguments: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder, which must end with ``code``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 120, **options}
    done = subprocess.run(command(name, *arguments), check=False, **options)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def run_ranks(name: str, *arguments: object) -> None:
    """Run a program of this folder twice at once, each time with the number of the rank as the last argument."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = [command(name, *arguments, rank) for rank in range(2)]
    ranks = [subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) for line in lines]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=120)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def list_loaded(*arguments: object, **options: Any) -> set[str]:
    """The modules that are loaded after ``import MODULE...`` or after a command of bntool."""
    return set(run("loaded_modules", *arguments, **options).stdout.splitlines()[-1].split())


def copy_user_code(name: str, folder: Path) -> Path:
    """Give a folder a module of ``user_code``, as if the user had written it there."""
    return Path(shutil.copy(Path(__file__).parent / "user_code" / f"{name}.py", folder))
