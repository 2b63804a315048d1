"""The documentation is held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bntool.inspection.findings import FindingCode
from tests.places import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "sample_ckpts").glob("*.md")])


def test_every_finding_is_documented_once() -> None:
    text = (ROOT / "docs" / "findings.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \|", text, flags=re.MULTILINE)
    assert sorted(rows) == sorted(code.value for code in FindingCode)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_pages_exist(page: Path) -> None:
    for path in re.findall(r"`((?:bntool|docs|tests|sample_ckpts)/[\w./-]+\.\w+)`", page.read_text()):
        if not Path(path).stem.removeprefix("test_").isupper():  # NAME and NOUN stand for others
            assert (ROOT / path).exists(), f"{page.name} names {path}"
