"""Tables of pages that are written from what the code or the records say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def render_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def fill(page: Path, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with its tables written anew, each between two comments that name it."""
    text = page.read_text()
    for name, render in tables.items():
        start, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
        head, found, rest = text.partition(start)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{page.name} has no place for the table {name}")
        text = f"{head}{start}\n{render()}\n\n{end}{tail}"
    return text
