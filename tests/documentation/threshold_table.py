"""Write how near real numbers come to each threshold into docs/thresholds.md, from what was recorded:
``python -m tests.documentation.threshold_table``.
"""

from __future__ import annotations

import json
import re
from typing import Any

from bntool.representation import format_number
from tests.corpus.extremes import SMALLEST, Extreme, merge_extremes
from tests.places import FIXTURES, ROOT

PAGE = ROOT / "docs" / "thresholds.md"
RECORD = FIXTURES / "corpus.json"
_ROW = re.compile(r"^(\| `([a-z-]+)` \| [^|]+ \|)(?: [^|]* \|)?( [^|]+ \|)$", re.MULTILINE)


def read_extremes() -> tuple[dict[str, Extreme], dict[str, Extreme]]:
    """The extremes of real files, and those of the sound trainings of all networks."""
    recorded: dict[str, Any] = json.loads(RECORD.read_text())
    real = {field: Extreme(*found) for field, found in recorded["real"]["extremes"].items()}
    networks = [
        {field: Extreme(value, name) for field, (value, _) in results["extremes"].items()}
        for name, results in recorded["networks"].items()
    ]
    return real, merge_extremes(*networks)


def render_page() -> str:
    """The page, with the third column of its table written anew."""
    real, sound = read_extremes()

    def fill(row: re.Match[str]) -> str:
        field = row[2].replace("-", "_")
        cells = [
            f"{format_number(found[field].value, 2)} ({what.format(found[field].file)})"
            for what, found in (("`{}`", real), ("training of {}", sound))
            if field in found
        ]
        least = "at least " if field in SMALLEST else ""
        return f"{row[1]} {least * bool(cells)}{', '.join(cells) or '-'} |{row[3]}"

    return _ROW.sub(fill, PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(render_page())
