"""The output of a command on a terminal, as parts of a page: its lines, what is meant to be pasted, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bntool.plan import Plan
from bntool.reports import blocks
from bntool.reports.blocks import Block, Line, Style
from bntool.reports.page.document import Column, Item, Row, Snippet, Table

_MARKED = (Style.WARNING, Style.ERROR)


class Parts(NamedTuple):
    """Blocks sorted by what they become on a page."""

    lines: tuple[Item, ...]
    snippets: tuple[Snippet, ...]
    tables: tuple[blocks.Table, ...]


def read_blocks(shown: Iterable[Block]) -> Parts:
    """Sort blocks into parts of a page; the line before verbatim lines becomes the title of the snippet."""
    lines: list[Item] = []
    snippets: list[Snippet] = []
    tables: list[blocks.Table] = []
    title, pasted = "", list[str]()
    for block in [*shown, blocks.line()]:
        if isinstance(block, blocks.Table):
            tables.append(block)
            continue
        if block.verbatim and not _is_said(block):
            if not pasted and lines:
                title = lines.pop().text.rstrip(":")
            pasted.append(_join(block))
            continue
        if pasted:
            snippets.append(Snippet(title, tuple(pasted)))
            pasted = []
        text = _join(block).removeprefix("! ")
        if text:
            lines.append(Item(text, _style(block)))
    return Parts(tuple(lines), tuple(snippets), tuple(tables))


def leave_out_skips(lines: Sequence[Item], plan: Plan) -> tuple[Item, ...]:
    """Leave out lines on what is left alone, which a page shows apart."""
    starts = ("left alone", *(f"{skip.layer}: " for skip in plan.skips))
    return tuple(line for line in lines if not line.text.startswith(starts))


def _is_said(block: Line) -> bool:
    """Return whether it is verbatim only because it holds a path: ``wrote out.pt``."""
    return all(cell.style is Style.GOOD for cell in block.cells)


def _join(block: Line) -> str:
    return "".join(cell.text for cell in block.cells)


def _style(block: Line) -> Style:
    """Return the worst of its cells, or what all of them share."""
    styles = [cell.style for cell in block.cells if cell.text]
    worst = next((style for style in reversed(_MARKED) if style in styles), None)
    return worst or (styles[0] if styles and len(set(styles)) == 1 else Style.PLAIN)


def make_table(table: blocks.Table, *, title: str, noun: str) -> Table:
    """Make a table without pictures, of the columns that hold anything."""
    shown = table.select(None)
    chosen = [table.columns[index] for index in shown]
    columns = tuple(Column(one.title, is_number=one.right, is_minor=bool(one.wide)) for one in chosen)
    rows = (_make_row(row, shown) for row in table.rows if not isinstance(row, Line))
    return Table(title, noun, columns, tuple(rows))


def _make_row(row: Sequence[blocks.Cell], shown: Sequence[int]) -> Row:
    items = tuple(Item(row[index].text, row[index].style) for index in shown)
    worst = next((style for style in reversed(_MARKED) if any(item.style is style for item in items)), Style.PLAIN)
    return Row(items, style=worst)
