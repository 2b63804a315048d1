"""Build wheel and sdist, look into them, install the wheel in a fresh environment and run it there.

Run by ``make wheel``. The environment gets the wheel without its dependencies and only typer beside it: listing a
checkpoint needs no more, which this proves on the way.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from tests.places import ROOT


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "dist"
        subprocess.run(
            [sys.executable, "-m", "build", "--outdir", str(built), str(ROOT)], check=True, stdout=subprocess.DEVNULL
        )
        (wheel,), (sdist,) = list(built.glob("*.whl")), list(built.glob("*.tar.gz"))
        check_contents(wheel, sdist)
        environment = Path(folder) / "venv"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        typer = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("typer"))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", typer], check=True)
        sample = ROOT / "sample_ckpts" / "digits.pt"
        for command in ([environment / "bin" / "bntool"], [python, "-m", "bntool"]):
            shown = subprocess.run(
                [*command, "inspect", sample], check=True, capture_output=True, text=True, cwd=folder
            )
            assert "BatchNorm: 9 layers" in shown.stdout, shown.stdout
        print(f"{wheel.name} and {sdist.name}: contents right, the wheel installs and inspects a checkpoint")


def check_contents(wheel: Path, sdist: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "bntool/py.typed" in names
    assert "bntool/cli/main.py" in names
    assert "bntool/graphs/architectures/catalogue.bin" in names
    assert not [n for n in names if n.startswith(("tests/", "sample_ckpts/"))], "tests in the wheel"
    assert any(n.endswith("licenses/LICENSE") for n in names)
    for field in ("Requires-Python: >=3.10", "License-Expression: MIT", "Requires-Dist: torch"):
        assert field in metadata, field
    with tarfile.open(sdist) as archive:
        members = archive.getnames()
    for part in ("tests/conftest.py", "docs/architecture.md", "sample_ckpts/digits.pt", "LICENSE", "Makefile"):
        assert any(member.endswith(part) for member in members), part


if __name__ == "__main__":
    main()
