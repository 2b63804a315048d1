"""Installed without a dependency, bntool says in one sentence what a command needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import programs
from tests.places import SAMPLES

SAMPLE, NET = SAMPLES / "digits.pt", f"{SAMPLES / 'digits_net.py'}:build"


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
    run = programs.run("without_a_package", package, *arguments, cwd=tmp_path, code=2)
    assert run.stderr.splitlines() == [
        f"bntool: error: {arguments[0]} needs {package} here, which is not installed: pip install {package}"
    ]
    assert not list(tmp_path.iterdir())
