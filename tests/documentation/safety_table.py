"""Write the table of advisories of docs/safety.md: ``python -m tests.documentation.safety_table``."""

from __future__ import annotations

from tests.documentation.tables import fill, render_table
from tests.inspection.advisories import ADVISORIES
from tests.places import ROOT

PAGE = ROOT / "docs" / "safety.md"
_REFUSALS = {"unsafe", "corrupt", "unknown-format"}


def render_advisories() -> str:
    rows = [
        [one.number, one.affected, one.what, f"refused: {one.says}" if one.says in _REFUSALS else one.says]
        for one in ADVISORIES
    ]
    return render_table(["advisory", "up to", "a file of ours", "bntool says"], rows)


TABLES = {"advisories": render_advisories}


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE, TABLES))
