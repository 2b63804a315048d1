"""The way without torch that docs/install.md shows: what works so, and what says that it needs more."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.behaviour.inputs import make_inputs
from tests.packaging.environments import create_environment

PACKAGES = ("typer", "rich", "safetensors", "numpy")

# a command line -> the exit code, and a part of what it says; in this order
RUNS = {
    ("inspect", "samples/digits.pt"): (0, "BatchNorm: 9 layers"),
    ("inspect", "samples/broken_nan_variance.pt", "--fail-on", "error"): (1, "running_var"),
    ("inspect", "samples/digits.pt", "--html", "page.html"): (2, "--html needs Jinja2"),
    ("diff", "samples/digits.pt", "samples/drifted.pt"): (0, "9 of 9 BatchNorm layers changed"),
    ("freeze", "samples/digits.pt", "-o", "frozen.pt"): (0, "freeze 9 BatchNorm layers"),
    ("diff", "samples/digits.pt", "frozen.pt", "--expect", "frozen"): (0, "0 of 9 BatchNorm layers changed"),
    ("explain", "non-finite"): (0, "what to do"),
    ("convert", "samples/digits.pt", "--to", "safetensors", "-o", "digits.safetensors"): (0, "wrote"),
    ("fold", "architectures/torchvision_mobilenet_v2.safetensors", "-o", "folded.safetensors"): (0, "fold 52 of 52"),
    ("fold", "samples/digits.pt", "--pair", "conv1=bn1", "--eps", "1e-5", "-o", "pair.pt"): (0, "fold 1 of 9"),
    ("fold", "samples/digits.pt", "--model", "samples/digits_net.py:build", "-o", "a.pt"): (2, "fold needs torch"),
    (
        *("recalibrate", "samples/digits.pt", "-o", "b.pt", "--model", "samples/digits_net.py:build"),
        *("--data", "samples/digits_train.npz"),
    ): (2, "recalibrate needs torch"),
}


def check_without_torch(wheel: Path, folder: Path) -> str:
    """What was looked at; an AssertionError says what is wrong."""
    programs = create_environment(folder / "without_torch", wheel, packages=PACKAGES)
    make_inputs(folder / "files")
    for arguments, (code, part) in RUNS.items():
        shown = subprocess.run(
            [programs / "bntool", *arguments], check=False, capture_output=True, text=True, cwd=folder / "files"
        )
        said = shown.stdout + shown.stderr
        assert shown.returncode == code, (arguments, shown.returncode, said)
        assert part in said, (arguments, said)
        assert "Traceback" not in said, (arguments, said)
    size = sum(file.stat().st_size for file in (folder / "without_torch").rglob("*") if file.is_file()) / 1e6
    shutil.rmtree(folder / "without_torch")
    return f"without torch, {size:.0f} MB with pip: {len(RUNS)} command lines end as they should"
