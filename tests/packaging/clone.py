"""The two commands of a fresh machine, in a clean clone."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.places import ROOT


def check_clone(folder: Path) -> str:
    """What was looked at; it takes as long as an installation of torch and all tests do."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "clone")], check=True)
    for target in ("demo", "test"):
        subprocess.run(["make", target], check=True, cwd=folder / "clone")
    return "a clean clone: make demo and make test pass"
