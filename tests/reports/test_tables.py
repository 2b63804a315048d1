from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from bntool.reports.blocks import Cell, Column, Line, Style, Table, line
from bntool.reports.tables import render

TABLE = Table(
    (Column("layer", shrinks=True), Column("C", right=True), Column("empty"), Column("wide only", wide=100)),
    (
        (Cell("backbone.layer1.0.downsample.1.very.long.name"), Cell("64"), Cell(""), Cell("x")),
        (Cell("bn1", Style.ERROR), Cell("8"), Cell(""), Cell("")),
    ),
)


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_columns_line_up_and_empty_ones_are_left_out() -> None:
    assert render([TABLE]) == (
        "layer                                           C  wide only\n"
        "backbone.layer1.0.downsample.1.very.long.name  64  x\n"
        "bn1                                             8\n"
    )


def test_narrow_terminals_lose_wide_columns_and_the_middle_of_names() -> None:
    text = render([TABLE], width=30)
    assert text == ("layer                        C\nbackbone.…1.very.long.name  64\nbn1                          8\n")
    assert max(map(len, text.splitlines())) <= 30


def test_colours_change_nothing_else() -> None:
    blocks = [line("title", Style.HEADING), TABLE, line("warning text " * 20, Style.WARNING, indent=2)]
    for width in (40, 80, None):
        plain, coloured = render(blocks, width=width), render(blocks, width=width, colour=True)
        assert "\x1b" not in plain
        assert "\x1b[1m" in coloured
        assert visible(coloured) == plain


def test_text_from_files_never_reaches_the_terminal_raw() -> None:
    evil = "\x1b]8;;http://evil\x07click\x1b]8;;\x07"
    table = Table((Column(evil),), ((Cell(evil, Style.ERROR),),))
    text = render([line(evil), table])
    assert "\x1b" not in text.replace(evil, "") or "\x1b]8" not in text


def test_wide_characters_are_counted_as_the_terminal_does() -> None:
    table = Table((Column("name"), Column("n")), ((Cell("层一"), Cell("1")), (Cell("abcd"), Cell("2"))))
    rows = render([table]).splitlines()
    assert rows[1] == "层一  1"
    assert rows[2] == "abcd  2"


@given(st.lists(st.text(alphabet="ab c", max_size=30), min_size=1, max_size=6), st.integers(20, 120))
def test_wrapping_keeps_every_word_in_order(texts: list[str], width: int) -> None:
    block = Line(tuple(Cell(text, style) for text, style in zip(texts, list(Style) * 2, strict=False)), indent=2)
    drawn = render([block], width=width)
    assert drawn.split() == "".join(texts).split()
    words = "".join(texts).split()
    if all(len(word) <= width - 4 for word in words):
        assert all(len(part) <= width for part in drawn.splitlines())
