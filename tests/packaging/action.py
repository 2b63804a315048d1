"""The action for GitHub in a fresh environment: what its scripts install is what they need."""

from __future__ import annotations

import shutil
import subprocess
import venv
from pathlib import Path

from tests.places import SAMPLES
from tests.workflow_steps import read_steps, run_step


def check_action(folder: Path) -> str:
    """What was looked at; its first step installs bntool without torch."""
    venv.create(folder / "action", with_pip=True)
    repository = folder / "repository"
    repository.mkdir()
    subprocess.run(["git", "init", "--quiet", str(repository)], check=True)
    for name in ("digits.pt", "broken_nan_variance.pt"):
        shutil.copy(SAMPLES / name, repository)
    install, inspect = (step for step in read_steps("action.yml") if step.get("name", "").startswith(("Inst", "Insp")))
    for checkpoints, code in (("digits.pt", 0), ("*.pt", 1)):
        values = {"inputs.checkpoints": checkpoints, "inputs.fail-on": "error"}
        for step, expected in ((install, 0), (inspect, code)):
            result = run_step(
                step,
                values=values,
                folder=repository,
                temporary=folder / "runner",
                path=str(folder / "action" / "bin"),
            )
            assert result.code == expected, result.printed
    return "the action of GitHub: installs and inspects in a fresh environment"
