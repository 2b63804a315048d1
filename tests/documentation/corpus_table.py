"""Write the table of docs/findings.md from what was recorded: ``python -m tests.documentation.corpus_table``."""

from __future__ import annotations

import json
from typing import Any

from tests.documentation.tables import fill, render_table
from tests.places import FIXTURES, ROOT

PAGE = ROOT / "docs" / "findings.md"
RECORD = FIXTURES / "corpus.json"


def render_corpus() -> str:
    """Which mistakes are named on which network, and how many sound files raise a false alarm."""
    recorded: dict[str, Any] = json.loads(RECORD.read_text())
    networks: dict[str, dict[str, Any]] = recorded["networks"]
    head = ["mistake", "named by"]
    head += [f"{name} (held out)" if results["held_out"] else name for name, results in networks.items()]
    rows = [
        [title, ", ".join(f"`{code}`" for code in codes)]
        + ["yes" if results["named"][title] else "**no**" for results in networks.values()]
        for title, codes in recorded["codes"].items()
    ]
    sound = sum(results["sound_files"] for results in networks.values())
    alarms = sum(len(results["false_alarms"]) for results in networks.values())
    summary = (
        f"Named: {_count_named(networks, held_out=False)} on the networks by which thresholds were set, "
        f"{_count_named(networks, held_out=True)} on those held out. Called sick or suspicious: {alarms} of {sound} "
        f"files of sound trainings of the same networks. Of {recorded['real']['files']} files that real trainings and "
        f"other frameworks wrote, {len(recorded['real']['alarms'])} have a warning that a threshold decides."
    )
    return f"{summary}\n\n{render_table(head, rows)}"


def _count_named(networks: dict[str, dict[str, Any]], *, held_out: bool) -> str:
    named = [found for r in networks.values() if r["held_out"] is held_out for found in r["named"].values()]
    return f"{sum(named)} of {len(named)}"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE, {"mistakes": render_corpus}))
