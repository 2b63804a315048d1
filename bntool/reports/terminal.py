"""Drawing blocks for a person, on a terminal: by rich, which is imported only for that."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from bntool.reports.blocks import Block, Cell, Column, Line, Style, Table, line
from bntool.reports.pictures.one_line import BARS, EMPTY, PICTURE_SIZES, draw_picture
from bntool.reports.text import sanitize, shorten_names

_GAP = 2  # columns between those of a table
_SHORTEST = 8  # columns below which a name says nothing

STYLES = {
    Style.PLAIN: "",
    Style.HEADING: "bold",
    Style.MUTED: "dim",
    Style.GOOD: "green",
    Style.NOTICE: "cyan",
    Style.WARNING: "yellow",
    Style.ERROR: "bold red",
}

_HELP_STYLES = {
    r"(?m)^\w[\w ]*:": "bold",  # titles
    r"(?<![\w-])--?[a-zA-Z][\w-]*": "cyan",  # options
    r"(?m)^  [a-z]+(?=  )": "bold cyan",  # commands
    r"(?m)^    bntool .*$": "green",  # examples
    r"\[(?:default|required)[^\]]*\]": "dim",
}


def make_console(stream: TextIO) -> Console:
    """Make a console of rich that takes every text as it is: names from files are no markup, and there are no emoji."""
    return Console(file=stream, markup=False, highlight=False, emoji=False)


def draw(blocks: Iterable[Block], stream: TextIO) -> str:
    """Draw blocks as text for the terminal behind a stream; whatever comes from a file is sanitised."""
    console = make_console(stream)
    with console.capture() as capture:
        for block in blocks:
            if isinstance(block, Line):
                _print_line(console, block)
            else:
                _print_table(console, block)
    return capture.get()


def draw_help(text: str, stream: TextIO) -> str:
    """Draw the text of ``--help``, laid out already: titles, options, placeholders and examples get colours."""
    shown = Text(text)
    for pattern, style in _HELP_STYLES.items():
        shown.highlight_regex(pattern, style)
    console = make_console(stream)
    with console.capture() as capture:
        console.print(shown, soft_wrap=True, end="")
    return capture.get()


def _print_line(console: Console, block: Line) -> None:
    text = Text.assemble(*((text, STYLES[style]) for text, style in block.pieces()))
    if block.verbatim:
        console.print(Text(" " * block.indent).append_text(text), soft_wrap=True)
    else:
        console.print(Padding(text, (0, 0, 0, block.indent), expand=False) if block.indent else text)


def _print_table(console: Console, table: Table) -> None:
    """Print a table; rows between lines are tables of their own whose columns line up."""
    columns, texts = _draw_cells(console, table)
    if table.caption and any(column.pictures for column in columns):
        _print_line(console, line(table.caption, Style.MUTED))
    _shorten(texts, columns, console.width)
    widths = _measure(texts, columns)
    fits = sum(widths) + _GAP * len(widths) <= console.width + _GAP
    drawn = _make_table(columns, widths if fits else None, header=True)
    cells = iter(texts)
    for row in table.rows:
        if isinstance(row, Line):
            if drawn.row_count:
                console.print(drawn)
                drawn = _make_table(columns, widths if fits else None, header=False)
            _print_line(console, row)
        else:
            drawn.add_row(*next(cells))
    if drawn.row_count:
        console.print(drawn)


def _draw_cells(console: Console, table: Table) -> tuple[list[Column], list[list[Text]]]:
    """Draw the cells of all rows, with the columns that are shown and the largest pictures that leave names whole.

    The smallest pictures stay as long as names can be shortened to something that says more than nothing.
    """
    rows = [row for row in table.rows if not isinstance(row, Line)]
    for size in (*PICTURE_SIZES, 0) if _shows_blocks(console) else (0,):
        shown = table.select(console.width, pictures=size > 0)
        columns = [table.columns[index] for index in shown]
        texts = [[_draw_cell(row[index], size) for index in shown] for row in rows]
        shortest = _SHORTEST if size == PICTURE_SIZES[-1] else None
        if not rows or _leaves_names(texts, columns, console.width, shortest=shortest):
            break
    return columns, texts


def _leaves_names(rows: list[list[Text]], columns: Sequence[Column], width: int, *, shortest: int | None) -> bool:
    """Return whether the other columns leave room for the names of a table: whole, or shortened to ``shortest``
    columns.
    """
    sizes = _measure(rows, columns)
    needed = [
        size if shortest is None or not column.shrinks else min(size, shortest)
        for size, column in zip(sizes, columns, strict=True)
    ]
    return sum(needed) + _GAP * len(needed) <= width + _GAP


def _make_table(columns: Sequence[Column], widths: Sequence[int] | None, *, header: bool) -> RichTable:
    drawn = RichTable(
        box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=header, header_style=STYLES[Style.HEADING]
    )
    for at, column in enumerate(columns):
        drawn.add_column(
            Text(sanitize(column.title)),
            justify="right" if column.right else "left",
            no_wrap=not column.shrinks,
            overflow="fold" if column.shrinks else "ellipsis",
            width=None if widths is None else widths[at],
        )
    return drawn


def _measure(rows: Sequence[Sequence[Text]], columns: Sequence[Column]) -> list[int]:
    return [
        max(cell_len(sanitize(column.title)), *(row[at].cell_len for row in rows)) for at, column in enumerate(columns)
    ]


def _draw_cell(cell: Cell, size: int) -> Text:
    if cell.picture is None:
        return Text(sanitize(cell.text), STYLES[cell.style])
    pieces = re.split(f"({EMPTY}+)", draw_picture(cell.picture, size))
    return Text.assemble(*((piece, STYLES[Style.MUTED if EMPTY in piece else cell.style]) for piece in pieces))


def _shorten(rows: list[list[Text]], columns: Sequence[Column], width: int) -> None:
    """Shorten the names of a table to what the other columns leave of the width, as long as they stay distinct."""
    shrinking = [at for at, column in enumerate(columns) if column.shrinks]
    if not rows or not shrinking:
        return
    sizes = _measure(rows, columns)
    room = width + _GAP - sum(sizes[at] + _GAP for at in range(len(columns)) if at not in shrinking)
    for count, at in enumerate(sorted(shrinking, key=lambda at: sizes[at])):
        share = room // (len(shrinking) - count) - _GAP  # what a short column leaves, a long one takes
        names = [row[at].plain for row in rows]
        different = list(dict.fromkeys(names))
        if sizes[at] > share >= _SHORTEST:
            short = dict(zip(different, shorten_names(different, share, measure=cell_len) or different, strict=True))
            for row in rows:
                row[at] = Text(short[row[at].plain], row[at].style)
        room -= min(sizes[at], share) + _GAP


def _shows_blocks(console: Console) -> bool:
    try:
        f"{BARS}{EMPTY}".encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True
