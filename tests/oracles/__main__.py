"""``python -m tests.oracles [NAME...]``: hold the recorded answers of foreign frameworks against the frameworks.

Each script of this folder names what it needs in ``REQUIREMENTS`` and runs in an environment of its own under
``.oracles/``: mmdet, Keras, OpenCV and Lightning cannot share one. One that asks for an older ``PYTHON`` runs bntool by
the interpreter in ``BNTOOL_PYTHON``.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.places import ROOT

FOLDER = Path(__file__).parent
ENVIRONMENTS = ROOT / ".oracles"


def read_requirements(script: Path) -> list[str]:
    """The packages that a script asks for, read without running it."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIREMENTS":
            assert isinstance(node.value, ast.List)
            found: list[str] = []
            for element in node.value.elts:  # strings, and tuples of them behind a star
                is_starred = isinstance(element, ast.Starred)
                found += ast.literal_eval(element.value) if is_starred else [ast.literal_eval(element)]
            return found
    raise SystemExit(f"{script.name} names no REQUIREMENTS")


def find_interpreter(script: Path) -> str | None:
    """The Python that a script asks for in ``PYTHON``, or this one; None where it is not installed."""
    asked = next(
        (
            ast.literal_eval(node.value)
            for node in ast.parse(script.read_text()).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PYTHON"
        ),
        None,
    )
    return sys.executable if asked is None else shutil.which(f"python{asked}")


def make_environment(name: str, requirements: list[str], interpreter: str) -> Path:
    """The interpreter of the environment, made where it is missing."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    wanted = "\n".join(requirements)
    stamp = folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([interpreter, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        # torch first and alone: whatever asks for a range of it is then content
        for group in ([r for r in requirements if r.startswith("torch==")], requirements):
            if group:
                subprocess.run([*pip, *group], check=True)
        if interpreter == sys.executable:
            subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
        stamp.write_text(wanted)
    return python


def main(wanted: list[str]) -> int:
    failed = []
    for script in sorted(FOLDER.glob("*.py")):
        if script.stem.startswith("__") or (wanted and script.stem not in wanted):
            continue
        print(f"== {script.stem}", flush=True)
        interpreter = find_interpreter(script)
        if interpreter is None:
            print("   not run: the Python that it asks for is not installed")
            continue
        python = make_environment(script.stem, read_requirements(script), interpreter)
        environment = {**os.environ, "BNTOOL_PYTHON": sys.executable}
        command = [python, "-m", f"tests.oracles.{script.stem}"]
        if subprocess.run(command, cwd=ROOT, check=False, env=environment).returncode:
            failed.append(script.stem)
    print(f"failed: {', '.join(failed)}" if failed else "all recorded answers hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
