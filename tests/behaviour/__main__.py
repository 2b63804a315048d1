"""``make same BASE=REVISION``: every command does, byte for byte, what it did at that revision.

For whoever moves code: both trees run the same few hundred command lines, and what they print, return and write is
held side by side. What differs on purpose is named in the message of the commit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from difflib import unified_diff
from pathlib import Path
from typing import Any

from tests.places import ROOT

KEPT = ROOT / ".behaviour"  # what a revision did, so that it runs once
SHOWN = 20  # runs whose difference is printed; all are in a file of KEPT


def observe(tree: Path, inputs: Path) -> dict[str, Any]:
    """What the command lines do in one tree, each in a fork of a process that has torch imported already."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "found.json"
        work = Path(scratch) / "work"
        shutil.copytree(inputs, work)
        script = ROOT / "tests" / "behaviour" / "running.py"
        subprocess.run([sys.executable, "-P", script, tree, work, found], check=True)
        result: dict[str, Any] = json.loads(found.read_text())
        return result


def observe_revision(revision: str, inputs: Path) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"],
        check=True, cwd=ROOT, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    kept = KEPT / f"{commit}.json"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], check=True, cwd=ROOT)
        try:
            lines = json.dumps(command_lines(inputs))
            if kept.exists() and (result := json.loads(kept.read_text()))["lines"] == lines:
                return dict(result["runs"])
            runs = observe(Path(folder), inputs)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], check=True, cwd=ROOT)
    KEPT.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"lines": lines, "runs": runs}))
    return runs


def command_lines(inputs: Path) -> dict[str, list[str]]:
    from tests.behaviour.command_lines import list_command_lines

    return list_command_lines(inputs)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One text for each run that differs; what only terminals show comes last."""
    texts = []
    for name in sorted(dict.fromkeys([*before, *after]), key=lambda name: "[terminal" in name):
        old, new = before.get(name), after.get(name)
        if old != new:
            lines = [
                json.dumps(one, indent=1, ensure_ascii=False).replace("\\n", "\n").splitlines() for one in (old, new)
            ]
            texts.append("\n".join([name, *unified_diff(*lines, "before", "after", lineterm="", n=1)]))
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(prog="make same", description=__doc__)
    parser.add_argument("base", help="the revision to hold the working tree against")
    base = parser.parse_args().base
    from tests.behaviour.inputs import make_inputs

    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        make_inputs(inputs)
        (inputs / "lines.json").write_text(json.dumps(command_lines(inputs)))
        before = observe_revision(base, inputs)
        after = observe(ROOT, inputs)
    texts = differences(before, after)
    everything = KEPT / "differences.txt"
    everything.write_text("\n\n".join(texts))
    print(*texts[:SHOWN], sep="\n\n")
    print(f"\n{len(after)} runs, {len(texts)} do something else than at {base}; all in {everything.relative_to(ROOT)}")
    return 1 if texts else 0


if __name__ == "__main__":
    sys.exit(main())
