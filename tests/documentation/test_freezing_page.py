"""docs/freezing.md shows what was measured, and what can be measured here is measured again."""

import json
import re

from tests.oracles.freezing_semantics import bntool_rows, recipe_rows
from tests.places import FIXTURES, ROOT

RECORDED = json.loads((FIXTURES / "freezing_semantics.json").read_text())


def test_the_table_is_what_was_recorded():
    text = (ROOT / "docs" / "freezing.md").read_text()
    _, _, table = text.partition("## Other meanings of freezing")
    header, _, *rows = re.findall(r"^\| (.*) \|$|^\|(---.*)$", table, flags=re.MULTILINE)
    columns = header[0].split(" | ")[1:]
    found = {}
    for row, _ in rows:
        name, *cells = row.split(" | ")
        found[name.strip("`")] = {column: cell == "yes" for column, cell in zip(columns, cells, strict=True)}
    assert found == RECORDED


def test_rows_that_need_torch_only_hold_here():
    for name, facts in {**bntool_rows(), **recipe_rows()}.items():
        assert facts == RECORDED[name], name
