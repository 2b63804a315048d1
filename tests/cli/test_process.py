"""How the process ends, and what becomes of streams that are closed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.places import ROOT, SAMPLES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shells and signals")
BNTOOL = f"{sys.executable} -m bntool"


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", line], check=False, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "tests" / "programs" / "late_model.py", tmp_path / "net.py")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(net.state_dict(), tmp_path / "in.pt")
    return tmp_path


@pytest.mark.parametrize(("shape", "code"), [("1,3,8,8", 0), ("1,5,8,8", 6)])
def test_what_the_users_code_left_is_brought_to_its_end(model: Path, shape: str, code: int) -> None:
    done = shell(f"{BNTOOL} fold in.pt --model net.py:build --input-shape {shape} --dry-run -q", model)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == ["thread", "function for the end"]
    assert (model / "text").read_text() == "not flushed"
    assert (model / "raw").read_bytes() == b"bytes"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_nobodys_files(model: Path, closed: str) -> None:
    done = shell(f"{BNTOOL} inspect {SAMPLES / 'digits.pt'} {closed}", model)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    done = shell(f"{BNTOOL} fold in.pt --pair 0=1 --eps 1e-5 -o out.pt {closed}", model)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(torch.load(model / "out.pt", weights_only=True)) == 2


@pytest.mark.parametrize("options", ["", "--json", "--all", "--json --fail-on notice"])
def test_a_reader_that_goes_early_changes_no_exit_code(tmp_path: Path, options: str) -> None:
    command = f"{BNTOOL} inspect {SAMPLES / 'dead_channels.pt'} {options}"
    done = shell(f"({command}; echo $? >&2) | sleep 0", tmp_path)
    assert done.stderr.splitlines() == ["1" if "--fail-on" in options else "0"]
