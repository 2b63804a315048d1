"""Blocks that both ways of drawing are tested with."""

from __future__ import annotations

from bntool.reports.blocks import Cell, Column, Style, Table

TABLE = Table(
    (Column("layer", shrinks=True), Column("C", right=True), Column("empty"), Column("wide only", wide=100)),
    (
        (Cell("backbone.layer1.0.downsample.1.very.long.name"), Cell("64"), Cell(""), Cell("x")),
        (Cell("bn1", Style.ERROR), Cell("8"), Cell(""), Cell("")),
    ),
)
EVIL = "\x1b]8;;http://evil\x07click\x1b]8;;\x07 [bold red]not[/bold red] :smile: [/x]"
