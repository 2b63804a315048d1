"""Drawing blocks as text: for a pipe, for a terminal of some width, with or without colours.

One renderer serves all three, so that what is piped is what is seen. It is our own because importing a library for it
would cost more than listing a checkpoint.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from bntool.reports.blocks import Block, Cell, Column, Line, Style, Table
from bntool.reports.text import MAX_NAME, MAX_SENTENCE, sanitize

# select graphic rendition codes of ECMA-48
_CODES = {
    Style.HEADING: "1",
    Style.MUTED: "2",
    Style.GOOD: "32",
    Style.NOTICE: "36",
    Style.WARNING: "33",
    Style.ERROR: "1;31",
}
_GAP = 2
_NARROWEST = 8


def render(blocks: Iterable[Block], *, width: int | None = None, colour: bool = False) -> str:
    """Blocks as text; whatever comes from a file is sanitised.

    Args:
        width: columns to keep to: lines are wrapped, tables shrink; None for as wide as needed, which suits a pipe.
        colour: paint styles with terminal codes.
    """
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, Line):
            lines.extend(_draw_line(block, width, colour=colour))
        else:
            lines.extend(_draw_table(block, width, colour=colour))
    return "".join(line + "\n" for line in lines)


def _paint(text: str, style: Style, *, colour: bool) -> str:
    code = _CODES.get(style) if colour else None
    return f"\x1b[{code}m{text}\x1b[0m" if code and text.strip() else text


# lines


def _draw_line(block: Line, width: int | None, *, colour: bool) -> list[str]:
    """One line of text, broken between words where it is too long, the rest indented further."""
    words: list[tuple[str, Style]] = [
        (word, cell.style)
        for cell in block.cells
        for word in re.findall(r"\s+|\S+", sanitize(cell.text, limit=MAX_SENTENCE if cell.is_sentence else MAX_NAME))
    ]
    lines, current, used = [], " " * block.indent, block.indent
    for text, style in _join_pieces(words):
        size = sum(_columns(piece) for piece in text)
        if width is not None and used + size > width and current.strip():
            lines.append(current.rstrip())
            current, used = " " * (block.indent + _GAP), block.indent + _GAP
        if current.strip() or text[0].strip() or used == block.indent:
            current += "".join(
                _paint(piece, piece_style, colour=colour) for piece, piece_style in zip(text, style, strict=True)
            )
            used += size
    return [*lines, current.rstrip()]


def _join_pieces(words: Sequence[tuple[str, Style]]) -> Iterable[tuple[list[str], list[Style]]]:
    """Group pieces that touch without a space between: they must stay on one line."""
    group: list[tuple[str, Style]] = []
    for word, style in words:
        if group and (word.isspace() or group[-1][0].isspace()):
            yield [text for text, _ in group], [s for _, s in group]
            group = []
        group.append((word, style))
    if group:
        yield [text for text, _ in group], [s for _, s in group]


# tables


def _draw_table(table: Table, width: int | None, *, colour: bool) -> list[str]:
    shown = [
        index
        for index, column in enumerate(table.columns)
        if _is_wanted(column, width) and any(row[index].text for row in table.rows)
    ]
    columns = [table.columns[index] for index in shown]
    header = [Cell(column.title, Style.HEADING) for column in columns]
    rows = [header, *([Cell(sanitize(row[i].text), row[i].style) for i in shown] for row in table.rows)]
    widths = [max(_columns(row[i].text) for row in rows) for i in range(len(columns))]
    if width is not None:
        widths = _fit(widths, [column.shrinks for column in columns], width)
    return [_draw_row(row, columns, widths, colour=colour) for row in rows]


def _is_wanted(column: Column, width: int | None) -> bool:
    if width is None:
        return not column.narrow
    return width >= column.wide and (not column.narrow or width < column.narrow)


def _draw_row(row: Sequence[Cell], columns: Sequence[Column], widths: Sequence[int], *, colour: bool) -> str:
    parts = []
    for index, (cell, column, size) in enumerate(zip(row, columns, widths, strict=True)):
        text = _shorten(cell.text, size)
        padding = " " * (size - _columns(text))
        painted = _paint(text, cell.style, colour=colour)
        last = index == len(columns) - 1
        parts.append(padding + painted if column.right else painted + ("" if last else padding))
    return (" " * _GAP).join(parts).rstrip()


def _fit(widths: Sequence[int], shrinks: Sequence[bool], width: int) -> list[int]:
    """Take what is too much from the widest columns that may shrink."""
    fitted = list(widths)
    excess = sum(fitted) + _GAP * (len(fitted) - 1) - width
    while excess > 0:
        candidates = [i for i, may in enumerate(shrinks) if may and fitted[i] > _NARROWEST]
        if not candidates:
            break
        widest = max(candidates, key=lambda index: fitted[index])
        fitted[widest] -= 1
        excess -= 1
    return fitted


def _shorten(text: str, width: int) -> str:
    """The text with its middle left out: the ends of layer names tell most."""
    if _columns(text) <= width:
        return text
    keep = max(width - 1, 1)
    tail = keep * 2 // 3
    return text[: keep - tail] + "…" + text[len(text) - tail :]


def _columns(text: str) -> int:
    """How many columns a terminal needs for the text."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
