"""Look into wheel and sdist, and run the wheel in a fresh environment.

The environment holds only typer beside the wheel: listing a checkpoint needs no more, which this proves on the way.
"""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path

from tests.packaging.environments import create_environment
from tests.places import ROOT, SAMPLES


def check_wheel(wheel: Path, sdist: Path, folder: Path) -> str:
    """What was looked at; an AssertionError says what is wrong."""
    check_contents(wheel, sdist)
    programs = create_environment(folder / "wheel", wheel, packages=("typer",))
    sample = SAMPLES / "digits.pt"
    for command in ([programs / "bntool"], [programs / "python", "-m", "bntool"]):
        shown = subprocess.run([*command, "inspect", sample], check=True, capture_output=True, text=True, cwd=folder)
        assert "BatchNorm: 9 layers" in shown.stdout, shown.stdout
    return f"{wheel.name} and {sdist.name}: contents right, the wheel installs and inspects a checkpoint"


def check_contents(wheel: Path, sdist: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "bntool/py.typed" in names
    assert "bntool/cli/main.py" in names
    assert "bntool/graphs/architectures/catalogue.bin" in names
    templates = ROOT / "bntool" / "reports" / "page" / "templates"
    assert {f"bntool/reports/page/templates/{path.name}" for path in templates.iterdir()} <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "sample_ckpts/"))], "tests in the wheel"
    assert any(n.endswith("licenses/LICENSE") for n in names)
    for field in ("Requires-Python: >=3.10", "License-Expression: MIT", "Requires-Dist: torch"):
        assert field in metadata, field
    with tarfile.open(sdist) as archive:
        members = archive.getnames()
    for part in ("tests/conftest.py", "docs/architecture.md", "sample_ckpts/digits.pt", "LICENSE", "Makefile"):
        assert any(member.endswith(part) for member in members), part
