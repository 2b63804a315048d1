"""Explanations of findings, skip reasons and exit codes, from the pages of the documentation that the package
carries.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bntool.errors import UsageError
from bntool.reports.blocks import Block, Cell, Line, Style, line

# page -> what its rows are
_PAGES = {"findings.md": "finding", "skip-reasons.md": "skip reason", "exit-codes.md": "exit code"}
_ROW = re.compile(r"^\| `([^`|]+)` \|(.*)\|$", re.MULTILINE)
_HERE = Path(__file__).parent


class Explanation(NamedTuple):
    """A row of a page.

    Attributes:
        code: of the finding, skip reason or exit code.
        kind: which of them.
        page: the name of the page.
        facts: the other columns, by their headings.
    """

    code: str
    kind: str
    page: str
    facts: dict[str, str]


def list_explanations() -> list[Explanation]:
    """List all rows of all pages."""
    return [row for page, kind in _PAGES.items() for row in _read_page(page, kind)]


def explain(code: str) -> list[Explanation]:
    """Return the rows that have a code; several where it is a finding and a skip reason.

    Raises:
        UsageError: no row has it; those that were probably meant are named.
    """
    known = list_explanations()
    found = [one for one in known if one.code == code.strip().lower().replace("_", "-")]
    found = found or [one for one in known if one.code.lower() == code.strip().lower().replace("-", " ")]
    if not found:
        near = difflib.get_close_matches(code, [one.code for one in known], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "bntool explain lists all codes"
        raise UsageError(f"{code!r} is no finding, skip reason or exit code; {hint}")
    return found


def _read_page(name: str, kind: str) -> Iterator[Explanation]:
    text = _find_page(name).read_text(encoding="utf-8")
    for match in _ROW.finditer(text):
        headings = text[: match.start()].rpartition("\n|---")[0].rpartition("\n")[2]
        titles = [part.strip() for part in headings.strip("| ").split("|")][1:]
        values = [_plain(part) for part in re.split(r"(?<!\\)\|", match[2])]
        yield Explanation(match[1], kind, name, dict(zip(titles, values, strict=True)))


def _find_page(name: str) -> Path:
    """Find a page where a wheel has it, else where the repository has it."""
    packaged = _HERE / "pages" / name
    return packaged if packaged.exists() else _HERE.parents[1] / "docs" / name


def _plain(text: str) -> str:
    """Return the Markdown of a cell without its marks."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text.strip())
    return text.replace("\\|", "|").replace("**", "").replace("`", "")


def describe_explanations(found: list[Explanation]) -> dict[str, Any]:
    """Return the facts as JSON data."""
    return {"explanations": [one._asdict() for one in found]}


def show_explanations(found: list[Explanation]) -> list[Block]:
    """Show explanations one after the other, with the headings of their pages."""
    blocks: list[Block] = []
    for one in found:
        blocks += [line()] if blocks else []
        blocks.append(Line((Cell(one.code, Style.HEADING), Cell(f"  {one.kind}", Style.MUTED))))
        for title, value in one.facts.items():
            if value:
                blocks.append(Line((Cell(f"{title}: ", Style.MUTED), Cell(value)), indent=2))
    return blocks


def show_codes(found: list[Explanation]) -> list[Block]:
    """Show all codes, by what they are of."""
    blocks: list[Block] = []
    for kind in _PAGES.values():
        codes = [one.code for one in found if one.kind == kind]
        blocks += [line(f"{kind}s", Style.HEADING), Line((Cell(", ".join(codes)),), indent=2)]
    return blocks
