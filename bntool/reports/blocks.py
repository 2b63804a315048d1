"""Blocks of a report, as data: lines and tables. ``plain.py`` draws them for pipes, ``terminal.py`` for terminals."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, TypeAlias

from bntool.reports.text import MAX_SENTENCE, sanitize


class Style(Enum):
    """The meaning of a piece of text; colours are chosen where it is drawn."""

    PLAIN = "plain"
    HEADING = "heading"
    MUTED = "muted"
    GOOD = "good"
    NOTICE = "notice"
    WARNING = "warning"
    ERROR = "error"


class Histogram(NamedTuple):
    """The number of values in each slot of an axis; see ``pictures/histograms.py``."""

    counts: tuple[int, ...]


class Series(NamedTuple):
    """One height for each of several files, from 0 to 1; None where there is none."""

    heights: tuple[float | None, ...]


Picture: TypeAlias = Histogram | Series


class Cell(NamedTuple):
    """A piece of text of one style, or a picture in a table. Text from a file is sanitised when it is drawn."""

    text: str
    style: Style = Style.PLAIN
    picture: Picture | None = None


class Line(NamedTuple):
    """One line of text, of one or more pieces.

    Attributes:
        indent: columns to leave free on the left, also where the line is wrapped.
        verbatim: it is meant to be pasted: never wrapped and never shortened.
    """

    cells: tuple[Cell, ...]
    indent: int = 0
    verbatim: bool = False

    def pieces(self) -> list[tuple[str, Style]]:
        """Return the text of each piece, safe to print, with its style."""
        limit = None if self.verbatim else MAX_SENTENCE
        return [(sanitize(cell.text, limit=limit), cell.style) for cell in self.cells]


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: its heading.
        right: align to the right.
        wide: shown only where the terminal is at least this many columns wide.
        narrow: shown only where it is narrower than this; 0 for everywhere.
        shrinks: holds names, which may be shortened or broken over lines where the table is too wide.
        pictures: holds pictures, which a terminal shows whose encoding has block characters.
    """

    title: str
    right: bool = False
    wide: int = 0
    narrow: int = 0
    shrinks: bool = False
    pictures: bool = False


class Table(NamedTuple):
    """Columns and rows.

    Attributes:
        rows: each has one cell for each column; or is a line that stands between such rows.
        caption: what the pictures show; it stands above them.
    """

    columns: tuple[Column, ...]
    rows: Sequence[tuple[Cell, ...] | Line] = ()
    caption: str = ""

    def select(self, width: int | None, *, pictures: bool = False) -> list[int]:
        """Select the columns that are shown, by number: those meant for the width that are not empty.

        Args:
            width: of the terminal; None for a pipe, which takes any.
            pictures: whether they can be shown.
        """
        cells = [row for row in self.rows if not isinstance(row, Line)]
        return [
            index
            for index, column in enumerate(self.columns)
            if (not column.narrow if width is None else column.wide <= width and not 0 < column.narrow <= width)
            and (pictures or not column.pictures)
            and any(row[index].text or row[index].picture is not None for row in cells)
        ]


Block: TypeAlias = Line | Table


def line(text: str = "", style: Style = Style.PLAIN, *, indent: int = 0) -> Line:
    """Make a line of one piece."""
    return Line((Cell(text, style),), indent)


def verbatim(texts: Sequence[str], style: Style = Style.PLAIN, *, indent: int = 0) -> list[Line]:
    """Make lines of code or commands that are meant to be pasted."""
    return [Line((Cell(text, style),), indent, verbatim=True) for text in texts]
