"""A package that offers bntool a format, installed beside the wheel; its files are written by the gguf package."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.packaging.environments import create_environment
from tests.places import ROOT

EXAMPLE = ROOT / "tests" / "packaging" / "example_extension"
WRITING = ROOT / "tests" / "packaging" / "writing_gguf.py"


def check_extension(wheel: Path, folder: Path) -> str:
    """What was looked at; an AssertionError says what is wrong."""
    programs = create_environment(folder / "extension", wheel, packages=("typer", "rich", "numpy", "gguf"))
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, str(EXAMPLE)], check=True, stderr=subprocess.DEVNULL)
    subprocess.run([programs / "python", WRITING], check=True, cwd=folder)
    shown = subprocess.run(
        [programs / "bntool", "inspect", "bn.gguf"], check=False, capture_output=True, text=True, cwd=folder
    )
    assert shown.returncode == 0, shown.stderr
    assert "BatchNorm: 1 layer, 8 channels" in shown.stdout, shown.stdout
    return "an installed package of somebody else reads GGUF files, written by gguf"
