"""Installed without a dependency, bntool says in one sentence what a command needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

HIDING = "import sys; sys.modules[{package!r}] = None; from bntool.__main__ import run; run()"
SAMPLE, NET = ROOT / "sample_ckpts" / "digits.pt", f"{ROOT / 'sample_ckpts' / 'digits_net.py'}:build"


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("torch", ("fold", SAMPLE, "-o", "out.pt", "--model", NET)),
        ("torch", ("recalibrate", SAMPLE, "-o", "out.pt", "--model", NET, "--data", "x.npy")),
        ("numpy", ("fold", SAMPLE, "-o", "out.pt", "--pair", "conv1=bn1", "--eps", "1e-5")),
        ("typer", ("freeze", SAMPLE, "-o", "out.pt")),
        ("safetensors", ("convert", SAMPLE, "--to", "safetensors", "-o", "out.safetensors")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_missing_package_is_one_sentence(package: str, arguments: tuple[object, ...], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", HIDING.format(package=package), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        f"bntool: error: {arguments[0]} needs {package} here, which is not installed: pip install {package}"
    ]
    assert not list(tmp_path.iterdir())
