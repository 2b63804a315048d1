"""Formats and graph sources of other packages, found by the entry points of their metadata."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.places import ROOT, SAMPLES

EXAMPLE = ROOT / "tests" / "packaging" / "example_extension"


def install(folder: Path, entry_points: str | None = None) -> Path:
    """A folder for the path of Python that holds the example as an installer leaves it."""
    site = folder / "site"
    metadata = site / "bntool_example-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(EXAMPLE / "bntool_example.py", site)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bntool-example\nVersion: 0.1.0\n")
    if entry_points is None:  # an installer writes the tables of pyproject.toml in this form
        entry_points = (EXAMPLE / "pyproject.toml").read_text().partition("[project.entry-points")[2]
        entry_points = "[project.entry-points" + entry_points.partition("[tool.")[0]
        entry_points = entry_points.replace('[project.entry-points."', "[").replace('"]', "]").replace('"', "")
    (metadata / "entry_points.txt").write_text(entry_points)
    return site


def run(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bntool", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{site}"},
    )


def write_gguf(path: Path, tensors: dict[str, np.ndarray], kind: int = 0) -> Path:
    """As https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has it, version 3."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 2)
    header += text("general.architecture") + struct.pack("<I", 8) + text("bn")
    header += text("sizes") + struct.pack("<IIQ3I", 9, 4, 3, 1, 2, 3)
    data = b""
    for name, array in tensors.items():
        header += text(name) + struct.pack("<I", array.ndim) + b"".join(struct.pack("<Q", n) for n in array.shape[::-1])
        header += struct.pack("<IQ", kind, len(data))
        data += array.tobytes() + b"\0" * (-array.nbytes % 32)
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    layer = {name: numbers.uniform(0.5, 2, 4).astype("f") for name in ("weight", "bias", "running_mean", "running_var")}
    weight = numbers.normal(size=(4, 3, 3, 3)).astype("f")
    return {"conv.weight": weight} | {f"bn.{name}": value for name, value in layer.items()}


def test_a_format_of_another_package_is_read(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    file = write_gguf(tmp_path / "model.gguf", tensors)
    site = install(tmp_path)
    shown = run(site, "inspect", file, "--json")
    assert shown.returncode == 0, shown.stderr
    (state_dict,) = json.loads(shown.stdout)["files"][0]["state_dicts"]
    (layer,) = state_dict["layers"]
    assert layer["name"] == "bn"
    assert layer["tensors"]["running_var"]["max"] == pytest.approx(float(tensors["bn.running_var"].max()))
    without = run(tmp_path / "nothing", "inspect", file)
    assert without.returncode == 3
    assert "a GGUF file of llama.cpp" in without.stderr


def test_it_is_only_read_and_what_it_does_not_understand_is_said(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    site = install(tmp_path)
    file = write_gguf(tmp_path / "model.gguf", tensors)
    refused = run(site, "freeze", file, "-o", tmp_path / "out.gguf")
    assert refused.returncode == 4
    assert "GGUF files are only read" in refused.stderr
    quantised = run(site, "inspect", write_gguf(tmp_path / "quantised.gguf", tensors, kind=2), "--fail-on", "error")
    assert quantised.returncode == 1
    assert "quantised" in quantised.stdout + quantised.stderr


def test_a_graph_source_of_another_package_is_asked(tmp_path: Path) -> None:
    site = install(tmp_path)
    shutil.copy(SAMPLES / "digits.pt", tmp_path / "digits.pt")
    (tmp_path / "digits.pairs").write_text("conv1=bn1\n")
    arguments = ("fold", tmp_path / "digits.pt", "--eps", "1e-5", "--dry-run")
    assert "fold 1 of 9" in run(site, *arguments).stdout
    assert run(tmp_path / "nothing", *arguments).returncode == 4


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    site = install(tmp_path, "[bntool.formats]\nbroken = no_such_module:Format\n")
    (tmp_path / "strange.bin").write_bytes(b"strange bytes")
    shown = run(site, "inspect", tmp_path / "strange.bin")
    assert shown.returncode == 2
    assert (
        "bntool.formats broken of bntool-example cannot be imported: No module named 'no_such_module'" in shown.stderr
    )
    assert run(site, "inspect", SAMPLES / "digits.pt").returncode == 0  # nobody needed it there
