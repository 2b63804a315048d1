"""The tables of docs/folding.md say what was recorded."""

from __future__ import annotations

import json

from tests.documentation.folding_tables import PAGE, RECORDED, TABLES
from tests.documentation.tables import fill


def test_the_page_is_as_recorded() -> None:
    assert fill(PAGE, TABLES) == PAGE.read_text(), "python -m tests.documentation.folding_tables writes it anew"


def test_what_is_recorded_of_bntool_is_never_wrong() -> None:
    answers = json.loads((RECORDED / "folding_tools.json").read_text())
    assert {given["bntool"] for given in answers.values()} == {"folds", "leaves it"}
    zoo = json.loads((RECORDED / "fold_zoo.json").read_text())
    assert zoo["tools"]["bntool"]["wrong"] == zoo["tools"]["bntool"]["fails"] == 0
