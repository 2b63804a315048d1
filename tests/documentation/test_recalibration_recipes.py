"""The recipes of docs/recalibration.md, run: a shell spells their commands out, and bntool carries them out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bntool.cli.main import main
from tests.places import ROOT, SAMPLES

PAGE = (ROOT / "docs" / "recalibration.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
RECORDER = "#!/bin/sh\nprintf '%s\\037' \"$@\" '\x1e' >> calls\n"  # at once: no other call writes between


def spell_out(script: str, folder: Path, **variables: str) -> list[list[str]]:
    """The commands of bntool that a script runs, in the order in which it starts them, as lists of arguments."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "bntool").write_text(RECORDER)
    (folder / "bin" / "bntool").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}
    subprocess.run(["bash", "-n", "-c", script], check=True)
    subprocess.run(["bash", "-c", script], check=True, cwd=folder, env=environment)
    calls = (folder / "calls").read_text().split("\x1e\x1f")[:-1]
    (folder / "calls").unlink()
    return [call.split("\x1f")[:-1] for call in calls]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copy(SAMPLES / "drifted.pt", tmp_path / "ckpt.pt")
    shutil.copy(SAMPLES / "digits_net.py", tmp_path / "net.py")
    shutil.copy(SAMPLES / "digits_train.npz", tmp_path / "calibration.npz")
    monkeypatch.chdir(tmp_path)
    run = ["recalibrate", "ckpt.pt", "--model", "net.py:build", "--data", "calibration.npz", "--quiet"]
    assert main([*run, "-o", "one.pt"]) == 0
    return tmp_path


def test_a_job_array(folder):
    (script,) = [block for block in BLOCKS if "for shard in" in block]
    commands = spell_out(script, folder)
    assert len(commands) == 5, commands
    assert "--from-partials" in commands[-1], commands
    for command in commands:
        assert main([*command, "--quiet"]) == 0
    assert (folder / "out.pt").read_bytes() == (folder / "one.pt").read_bytes()


def test_a_slurm_script(folder):
    (script,) = [block for block in BLOCKS if "#SBATCH" in block]
    (merge,) = re.findall(r"--wrap \"(bntool [^\"]*)\"", PAGE)
    for task in range(1, 4):
        (command,) = spell_out(script, folder, SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT="3")
        assert f"{task}/3" in command
        assert main([*command, "--quiet"]) == 0
        assert main([*command, "--quiet"]) == 0  # a task that is put into the queue again
    (command,) = spell_out(merge, folder)
    assert main([*command, "--quiet"]) == 0
    assert (folder / "out.pt").read_bytes() == (folder / "one.pt").read_bytes()
