"""Steps of GitHub's workflows and actions, read from their files and run as the runner would run them."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.places import ROOT

_EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")


def read_steps(path: str) -> list[dict[str, Any]]:
    """The steps of a composite action."""
    steps: list[dict[str, Any]] = yaml.safe_load((ROOT / path).read_text())["runs"]["steps"]
    return steps


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        code: its exit status.
        printed: stdout and stderr.
        outputs, summary: what it wrote for later steps and for people.
    """

    code: int
    printed: str
    outputs: str
    summary: str


def run_step(step: dict[str, Any], *, values: dict[str, str], folder: Path, temporary: Path, path: str) -> StepResult:
    """Run a step by bash as GitHub's runner does.

    Args:
        values: of expressions, such as ``inputs.checkpoints``.
        folder: the checked out repository.
        temporary: the folder of the runner.
        path: what ``PATH`` begins with.
    """
    temporary.mkdir(exist_ok=True)
    given = {key: _EXPRESSION.sub(lambda found: values[found[1]], text) for key, text in step.get("env", {}).items()}
    outputs, summary, script = (temporary / name for name in ("outputs", "summary", "script.sh"))
    outputs.write_text("")
    summary.write_text("")
    script.write_text(step["run"])
    environment = {
        **os.environ,
        **given,
        "PATH": path + os.pathsep + os.environ["PATH"],
        "RUNNER_TEMP": str(temporary),
        "GITHUB_OUTPUT": str(outputs),
        "GITHUB_STEP_SUMMARY": str(summary),
        "GITHUB_ACTION_PATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return StepResult(done.returncode, done.stdout, outputs.read_text(), summary.read_text())
