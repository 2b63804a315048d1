"""README and docs/formats.md say of each format what its Format says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documentation.format_tables import PAGES
from tests.documentation.tables import fill


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_formats(page: Path) -> None:
    assert fill(page, PAGES[page]) == page.read_text(), "python -m tests.documentation.format_tables writes it anew"
