"""The commands of a fresh machine, in a clean clone: the two of make, and those that docs/install.md shows."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

from tests.documentation.consoles import read_consoles
from tests.places import ROOT


def check_clone(folder: Path) -> str:
    """What was looked at; it takes as long as an installation of torch and all tests do."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    subprocess.run(["make", "demo"], check=True, cwd=clone)
    (activation,) = [block for block in _read_blocks() if block.startswith("source ")]
    subprocess.run(["bash", "-ec", activation], check=True, cwd=clone)
    subprocess.run(["make", "test"], check=True, cwd=clone)
    return f"a clean clone: make demo and make test pass, and the environment is activated; {check_installation(clone)}"


def check_installation(clone: Path) -> str:
    """Install as docs/install.md shows, in an environment of its own, with the versions of constraints.txt."""
    environment = clone / ".venv-installed"
    venv.create(environment, with_pip=True)
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PIP_CONSTRAINT": str(clone / "constraints.txt")}
    lines = [line for block in _read_blocks() for line in block.splitlines() if line.startswith("pip install")]
    shown = "bntool inspect sample_ckpts/digits.pt"
    subprocess.run(["bash", "-ec", "\n".join([*lines, shown])], check=True, cwd=clone, env=variables)
    return f"{len(lines)} lines with pip install of docs/install.md work"


def _read_blocks() -> list[str]:
    return [console.command for console in read_consoles(ROOT / "docs" / "install.md")]
