"""Pages in a real browser: their script runs, and nothing else does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bntool.cli.main import main
from tests.places import SAMPLES
from tests.reports.page.browser import Opened, Parsed, open_page

BROKEN = SAMPLES / "broken_nan_variance.pt"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("browser") / "page.html"
    assert main(["inspect", str(BROKEN), "--html", str(path), "--quiet"]) == 0
    return path


def list_rows(opened: Opened) -> dict[str, bool]:
    """Whether the row of each layer is shown."""
    rows = re.findall(r"<tr id=\"l\d+\"([^>]*)><th[^>]*>(?:<i.*?</i>)?<bdi>(.*?)</bdi>", opened.document)
    return {name: "hidden" not in attributes for attributes, name in rows}


def test_the_script_filters_by_what_the_address_says(page: Path) -> None:
    opened = open_page(page, "filter=layer2%20bn1")
    assert opened.console == []
    rows = list_rows(opened)
    assert [name for name, shown in rows.items() if shown] == ["layer2.0.bn1"]
    assert len(rows) == 9
    text = Parsed(opened.document).text
    assert "1 of 9 layers" in text
    assert "1 layer sick" in text
    assert text.count("Copy") >= 2  # the script adds the buttons


def test_what_was_slipped_into_a_page_does_not_run(page: Path, tmp_path: Path) -> None:
    evil = '<script>document.title = "owned"</script><img src=x onerror="document.title = \'owned\'">'
    (tmp_path / "evil.html").write_text(page.read_text().replace("<main", evil + "<main"))
    opened = open_page(tmp_path / "evil.html")
    assert len([line for line in opened.console if "Content Security Policy" in line]) >= 2
    assert "<title>owned" not in opened.document
    assert all(list_rows(opened).values())  # what is the page's own runs as ever, and without a filter shows all
