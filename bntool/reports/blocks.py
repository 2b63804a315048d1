"""What a report shows, as data: lines and tables. Rendering them is another matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias


class Style(Enum):
    """What a piece of text means; colours are chosen where it is drawn."""

    PLAIN = "plain"
    HEADING = "heading"
    MUTED = "muted"
    GOOD = "good"
    NOTICE = "notice"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Cell:
    """A piece of text of one style. Text from a file is sanitised when it is drawn.

    Attributes:
        is_sentence: may be longer than a name.
    """

    text: str
    style: Style = Style.PLAIN
    is_sentence: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text, of one or more pieces.

    Attributes:
        indent: columns to leave free on the left, also where the line is wrapped.
    """

    cells: tuple[Cell, ...]
    indent: int = 0


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        right: align to the right.
        wide: shown only where the terminal is at least this many columns wide.
        narrow: shown only where it is narrower than this; 0 for everywhere.
        shrinks: may be shortened in its middle where the table is too wide.
    """

    title: str
    right: bool = False
    wide: int = 0
    narrow: int = 0
    shrinks: bool = False


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells; a row has one cell for each column."""

    columns: tuple[Column, ...]
    rows: Sequence[tuple[Cell, ...]] = field(default_factory=tuple)


Block: TypeAlias = Line | Table


def line(text: str = "", style: Style = Style.PLAIN, *, indent: int = 0) -> Line:
    """A line of one piece."""
    return Line((Cell(text, style),), indent)
