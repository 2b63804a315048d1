"""Distributions built from this folder, and fresh virtual environments to try them in."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from tests.places import ROOT


def build_distributions(folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist of this folder."""
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, stdout=subprocess.DEVNULL
    )
    (wheel,), (sdist,) = list(folder.glob("*.whl")), list(folder.glob("*.tar.gz"))
    return wheel, sdist


def create_environment(folder: Path, wheel: Path, packages: tuple[str, ...]) -> Path:
    """An environment that holds the wheel without its dependencies, and packages in the versions of constraints.txt.

    Returns:
        Its folder of programs.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *packages], check=True, stderr=subprocess.DEVNULL)  # pip counts what bntool lacks on purpose
    return folder / "bin"
