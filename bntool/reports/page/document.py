"""The parts of a page, as data: a verdict, facts, findings, tables with pictures, and lines to copy."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bntool.reports.blocks import Style
from bntool.reports.page.strips import Scale


@dataclass(frozen=True)
class Picture:
    """A strip, with what it shows in words.

    Attributes:
        data: a PNG file.
        text: for those who do not see it.
        count: how many numbers it shows; a pixel is one of them, or several.
    """

    data: bytes
    text: str
    count: int

    @property
    def url(self) -> str:
        """The picture itself, as a URL."""
        return "data:image/png;base64," + b64encode(self.data).decode()


@dataclass(frozen=True)
class Item:
    """The contents of one cell of a table.

    Attributes:
        text: from a file or not; it is made harmless when it is drawn.
        sort: what the column is sorted by; None for the text.
        target: the anchor that the text leads to, "" for none.
    """

    text: str = ""
    style: Style = Style.PLAIN
    sort: float | None = None
    picture: Picture | None = None
    target: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        hint: what it shows, in a sentence.
        is_number: aligned to the right.
        is_minor: left out where the page is narrow.
        scale: of the pictures in it.
        places: what the pixels of its pictures are, e.g. ``channel``; or names of all of them.
        gap: the place before which its pictures leave a pixel free; 0 for none.
        ticks: labels below its legend, each with the share of the width where it stands.
    """

    title: str
    hint: str = ""
    is_number: bool = False
    is_minor: bool = False
    scale: Scale | None = None
    places: str | Sequence[str] = "channel"
    gap: int = 0
    ticks: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of a table; its first cell names it.

    Attributes:
        anchor: what links lead to, "" for none.
        style: of the worst that is to be said of it.
    """

    items: tuple[Item, ...]
    anchor: str = ""
    style: Style = Style.PLAIN


_URGENT = {Style.ERROR: 0, Style.WARNING: 1}


@dataclass(frozen=True)
class Table:
    """A table of rows that can be filtered and sorted.

    Attributes:
        title: its heading.
        note: a sentence below it.
        noun: what a row is, in the plural.
        marked: what is said of the rows that have a style, to show only them.
    """

    title: str
    noun: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""
    marked: str = "only with findings"

    @property
    def shown(self) -> list[int]:
        """Numbers of the columns in which anything stands."""
        filled = {at for row in self.rows for at, item in enumerate(row.items) if item.text or item.picture is not None}
        return [at for at in range(len(self.columns)) if at in filled]

    def choose_rows(self, most: int) -> list[Row]:
        """Choose so many rows in their order: those with errors and warnings before others; 0 for all."""
        if not most or len(self.rows) <= most:
            return list(self.rows)
        worst_first = sorted(range(len(self.rows)), key=lambda at: _URGENT.get(self.rows[at].style, len(_URGENT)))
        return [self.rows[at] for at in sorted(worst_first[:most])]

    @property
    def has_pictures(self) -> bool:
        return any(column.scale is not None for column in self.columns)


@dataclass(frozen=True)
class Place:
    """A layer that a finding concerns.

    Attributes:
        name: of the layer.
        target: anchor of its row, "" where it has none.
        more: which of its channels, or since when; in words.
    """

    name: str
    target: str = ""
    more: str = ""


@dataclass(frozen=True)
class Entry:
    """One thing that was found.

    Attributes:
        label: of its kind, e.g. the code of a finding.
        text: what was found, with its numbers.
        advice: what to do, "" for nothing.
        places: where.
        anchor: what links lead to, "" for none.
    """

    style: Style
    label: str
    text: str
    advice: str = ""
    places: tuple[Place, ...] = ()
    anchor: str = ""


@dataclass(frozen=True)
class Snippet:
    """Lines to copy.

    Attributes:
        title: what they do.
    """

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """All that is shown of one result.

    Attributes:
        command: that it is the result of.
        subject: what it is about, e.g. a path.
        style, verdict: whether all is well, in a few words.
        details: sentences that go with it, each of a style.
        facts: by name.
        heading: of the entries.
    """

    command: str
    subject: str
    style: Style
    verdict: str
    details: tuple[Item, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    heading: str = "Findings"
    entries: tuple[Entry, ...] = ()
    tables: tuple[Table, ...] = ()
    snippets: tuple[Snippet, ...] = ()
