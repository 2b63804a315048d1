"""What the schemas share is what the code has: codes of errors, steps of plans, the version of the document."""

from __future__ import annotations

from tests.documentation.json_schemas import FOLDER, list_codes, write_schema
from tests.places import ROOT


def test_schemas_are_what_the_code_has() -> None:
    for page in sorted(FOLDER.glob("*.json")):
        assert page.read_text() == write_schema(page), f"{page.name}: run `make docs`"


def test_the_page_lists_the_codes_of_errors() -> None:
    text = (ROOT / "docs" / "json.md").read_text()
    assert not [code for code in list_codes() if f"`{code}`" not in text]
