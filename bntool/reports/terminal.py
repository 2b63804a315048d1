"""Drawing blocks for a person, on a terminal: by rich, which is imported only for that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from bntool.reports.blocks import Block, Line, Style, Table
from bntool.reports.text import sanitize

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
    """A console of rich that takes every text as it is: names from files are no markup, and there are no emoji."""
    return Console(file=stream, markup=False, highlight=False, emoji=False)


def draw(blocks: Iterable[Block], stream: TextIO) -> str:
    """Blocks as text for the terminal behind a stream; whatever comes from a file is sanitised."""
    console = make_console(stream)
    with console.capture() as capture:
        for block in blocks:
            if isinstance(block, Line):
                _print_line(console, block)
            else:
                console.print(_make_table(block, console.width))
    return capture.get()


def draw_help(text: str, stream: TextIO) -> str:
    """The text of ``--help``, laid out already: titles, options, placeholders and examples get colours."""
    shown = Text(text)
    for pattern, style in _HELP_STYLES.items():
        shown.highlight_regex(pattern, style)
    console = make_console(stream)
    with console.capture() as capture:
        console.print(shown, soft_wrap=True, end="")
    return capture.get()


def _print_line(console: Console, line: Line) -> None:
    text = Text.assemble(*((text, STYLES[style]) for text, style in line.pieces()))
    if line.verbatim:
        console.print(Text(" " * line.indent).append_text(text), soft_wrap=True)
    else:
        console.print(Padding(text, (0, 0, 0, line.indent), expand=False) if line.indent else text)


def _make_table(table: Table, width: int) -> RichTable:
    shown = table.select(width)
    drawn = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style=STYLES[Style.HEADING])
    for index in shown:
        column = table.columns[index]
        drawn.add_column(
            Text(sanitize(column.title)),
            justify="right" if column.right else "left",
            no_wrap=not column.shrinks,
            overflow="fold" if column.shrinks else "ellipsis",
        )
    for row in table.rows:
        drawn.add_row(*(Text(sanitize(row[index].text), STYLES[row[index].style]) for index in shown))
    return drawn
