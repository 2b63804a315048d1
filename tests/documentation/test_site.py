"""The site's contents; building it, with all links, is `make site`."""

from __future__ import annotations

import re

import bntool
from tests.places import ROOT


def test_every_public_name_is_on_the_page_of_calls() -> None:
    shown = re.findall(r"^::: bntool\.[\w.]+\.(\w+)$", (ROOT / "docs" / "python.md").read_text(), flags=re.MULTILINE)
    assert sorted(shown) == sorted(set(bntool.__all__) - {"__version__"})


def test_every_page_can_be_found_from_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert sorted(re.findall(r": ([\w/-]+\.md)$", menu, flags=re.MULTILINE)) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")
    )
