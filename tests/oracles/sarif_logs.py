"""SARIF logs under the judgement of other projects: Microsoft's validator, sarif-pydantic and sarif-tools.

The validator is a program for Linux in an npm package; where npm is missing, the two Python packages judge alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tests.places import SAMPLES

REQUIREMENTS = [
    *("sarif-pydantic==0.6.2", "sarif-tools==3.0.5", "numpy", "safetensors", "typer<0.29", "rich", "Jinja2"),
]
VALIDATOR = "@microsoft/sarif-multitool-linux@5.7.0"
HOSTILE = "<script>alert(1)</script> %22\"'\\ \u202e$(x)"


def write_hostile(path: Path) -> Path:
    """A sick layer of a name that must be escaped, in a file of such a name."""
    import numpy as np
    from safetensors.numpy import save_file

    vectors = {"weight": np.ones(4), "bias": np.zeros(4), "running_mean": np.full(4, np.nan), "running_var": np.ones(4)}
    save_file({f"{HOSTILE}.{role}": vector.astype("f4") for role, vector in vectors.items()}, path)
    return path


def write_log(folder: Path, name: str, *arguments: str) -> Path:
    """What a command prints under ``--report sarif``."""
    command = [sys.executable, "-m", "bntool", *arguments, "--report", "sarif"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=SAMPLES, check=False)
    path = folder / f"{name}.sarif"
    path.write_bytes(done.stdout)
    return path


def check_with_pydantic(path: Path) -> str:
    """Nothing, or what its model of the standard does not take, or does not keep."""
    from sarif_pydantic import Sarif

    document: dict[str, Any] = json.loads(path.read_text())
    log = Sarif.model_validate(document)
    again = json.loads(log.model_dump_json(by_alias=True, exclude_none=True))
    if again != document:
        return f"{path.name}: sarif-pydantic does not keep all of it"
    extra = [kind for kind in (log, *log.runs, *(r for run in log.runs for r in run.results or ())) if kind.model_extra]
    return f"{path.name}: it has what the standard does not name: {extra}" if extra else ""


def check_with_tools(path: Path) -> str:
    """Nothing, or that sarif-tools counts other results."""
    from sarif import loader

    counted = loader.load_sarif_file(str(path)).get_result_count()
    held = sum(len(run["results"]) for run in json.loads(path.read_text())["runs"])
    return "" if counted == held else f"{path.name}: sarif-tools counts {counted} of {held} results"


def fetch_validator(folder: Path) -> Path | None:
    """The program; None where it cannot be had."""
    if shutil.which("npm") is None or sys.platform != "linux":
        return None
    packed = subprocess.run(
        ["npm", "pack", "--silent", VALIDATOR], cwd=folder, capture_output=True, text=True, check=False
    )
    if packed.returncode:
        return None
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    (program,) = (folder / "package").rglob("Sarif.Multitool")
    program.chmod(0o755)
    return program


def check_with_validator(program: Path, path: Path) -> str:
    """Nothing, or the errors of the validator; what it calls a warning is a recommendation."""
    environment = {**os.environ, "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1"}
    done = subprocess.run([program, "validate", path], env=environment, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error " in line]
    if "Analysis completed successfully" not in done.stdout:
        errors.append(f"{path.name}: the validator did not finish: {done.stdout[-500:]}{done.stderr[-500:]}")
    return "\n".join(errors)


def main() -> int:
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hostile = write_hostile(folder / "a b%20#?.safetensors")
        sick = ("broken_nan_variance.pt", "broken_never_updated.pt", str(hostile), "nothing.pt")
        logs = [
            write_log(folder, "sick", "inspect", *sick),
            write_log(folder, "sound", "inspect", "digits.pt"),
            write_log(folder, "changed", "diff", "digits.pt", "drifted.pt", "--expect", "frozen"),
        ]
        validator = fetch_validator(folder)
        broken = json.loads(logs[0].read_text())
        del broken["runs"][0]["results"][0]["message"]
        (folder / "broken.sarif").write_text(json.dumps(broken))
        for log in logs:
            problems += [check_with_pydantic(log), check_with_tools(log)]
            problems += [check_with_validator(validator, log)] if validator else []
        if validator and not check_with_validator(validator, folder / "broken.sarif"):
            problems.append("the validator takes a result without a message: it judges nothing")
    problems = list(filter(None, problems))
    judges = ["sarif-pydantic", "sarif-tools", *([VALIDATOR] if validator else [])]
    print("\n".join(problems) or f"{len(logs)} logs are valid to {', '.join(judges)}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
