"""Drawing blocks for a pipe or a file: aligned text, nothing wrapped, no colours.

It is our own because importing rich would cost as much as listing a checkpoint.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from bntool.reports.blocks import Block, Line, Table
from bntool.reports.text import sanitize

_GAP = 2


def draw(blocks: Iterable[Block]) -> str:
    """Draw blocks as text; whatever comes from a file is sanitised."""
    lines: list[str] = []
    for block in blocks:
        lines += [_draw_line(block)] if isinstance(block, Line) else _draw_table(block)
    return "".join(line + "\n" for line in lines)


def _draw_line(line: Line) -> str:
    return (" " * line.indent + "".join(text for text, _ in line.pieces())).rstrip()


def _draw_table(table: Table) -> list[str]:
    rows = [row for row in table.rows if not isinstance(row, Line)]
    columns = []
    for index in table.select(None):
        column = table.columns[index]
        texts = [sanitize(column.title), *(sanitize(row[index].text) for row in rows)]
        sizes = [_count_columns(text) for text in texts]
        width = max(sizes)
        padding = [" " * (width - size) for size in sizes]
        columns.append([p + t if column.right else t + p for t, p in zip(texts, padding, strict=True)])
    drawn = [(" " * _GAP).join(row).rstrip() for row in zip(*columns, strict=True)]
    if len(rows) == len(table.rows):
        return drawn
    header, *others = drawn
    cells = iter(others)
    return [header, *(_draw_line(row) if isinstance(row, Line) else next(cells) for row in table.rows)]


def _count_columns(text: str) -> int:
    """Count the columns that a terminal needs for the text."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
