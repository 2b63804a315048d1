"""What rich draws for a person."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bntool.reports.blocks import Block, Cell, Column, Histogram, Line, Series, Style, Table, line, verbatim
from bntool.reports.terminal import draw
from tests.reports.blocks import EVIL, TABLE


def show(blocks: list[Block], width: int, **environment: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
            patch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "FORCE_COLOR": "1", "COLUMNS": str(width), **environment}.items():
            patch.setenv(name, value)
        return draw(blocks, io.StringIO())


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_narrow_terminals_lose_wide_columns_and_shorten_names() -> None:
    lines = visible(show([TABLE], 30)).splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[0].split() == ["layer", "C"]
    assert lines[1].split() == ["backbone.lay…ery.long.name", "64"]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_shortened_names_stay_distinct(width: int) -> None:
    names = [f"net.encoder.layer{i}.{j}.downsample.1" for i in range(1, 5) for j in range(12)]
    columns = (Column("layer", shrinks=True), Column("numbers"))
    lines = visible(show([Table(columns, [(Cell(name), Cell("0.135..0.481 (0.27)")) for name in names])], width))
    shown = [line.split("  ")[0] for line in lines.splitlines()[1:]]
    assert len(set(shown)) == len(names) == len(shown)
    assert all(name.endswith(short.rpartition("…")[2]) for name, short in zip(names, shown, strict=True))


def test_names_that_cannot_be_told_apart_in_so_few_columns_are_broken_and_stay_whole() -> None:
    names = [f"{a}.some.module.{b}.another.module.{c}" for a in "xy" for b in "xy" for c in "xy"]
    columns = (Column("layer", shrinks=True), Column("numbers"))
    text = visible(show([Table(columns, [(Cell(name), Cell("12345")) for name in names])], 20))
    assert max(map(len, text.splitlines())) <= 20
    joined = "".join(line[:11].strip() for line in text.splitlines()[1:])
    assert joined == "".join(names)


def test_rows_around_lines_line_up() -> None:
    columns = (Column("layer", shrinks=True), Column("C", right=True))
    rows = [(Cell("a"), Cell("1")), line("in between, of any length", Style.ERROR), (Cell("longer"), Cell("1024"))]
    lines = visible(show([Table(columns, rows)], 80)).splitlines()
    assert [row.rstrip() for row in lines] == [
        "layer      C",
        "a          1",
        "in between, of any length",
        "longer  1024",
    ]


PICTURES = Table(
    (Column("layer"), Column("", pictures=True), Column("", pictures=True)),
    [
        (
            Cell("bn1"),
            Cell("", picture=Histogram((0,) * 12 + (1,) + (0,) * 11 + (100,) * 12 + (50,) * 12)),
            Cell("", picture=Series((0.0, None, 1.0))),
        )
    ],
    caption="what they show",
)


def test_pictures_take_the_room_there_is() -> None:
    for width, size in ((22, 8), (26, 12), (80, 24)):
        caption, _, row = visible(show([PICTURES], width)).splitlines()
        assert caption.rstrip() == "what they show"
        histogram = row.split()[1]
        assert len(histogram) == size
        quarters = [histogram[at : at + size // 4] for at in range(0, size, size // 4)]
        assert set(quarters[0]) == {"·"}
        assert quarters[1][0] == "▁"  # one channel among many is seen
        assert set(quarters[2]) == {"█"}
        assert set(quarters[3]) == {"▅"}
        assert row.split()[2] == "▁·█"


def test_terminals_without_block_characters_get_no_pictures() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        assert draw([PICTURES], stream).split() == ["layer", "bn1"]


def test_colours_change_nothing_else() -> None:
    blocks = [line("title", Style.HEADING), TABLE, line("warning text " * 20, Style.WARNING, indent=2)]
    for width in (40, 80, 200):
        plain, coloured = show(blocks, width, NO_COLOR="1"), show(blocks, width)
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]", plain)
        assert "\x1b[33m" in coloured
        assert visible(coloured) == visible(plain)


def test_text_from_files_is_no_command_and_no_markup() -> None:
    table = Table((Column(EVIL),), ((Cell(EVIL, Style.ERROR),),))
    text = show([line(EVIL), table, *verbatim([EVIL])], 400)
    assert "\x1b]8" not in text
    assert "\x07" not in text
    assert visible(text).count("[bold red]not[/bold red] :smile: [/x]") == 4


def test_what_is_pasted_is_whole() -> None:
    code = f"bntool.apply_freeze(model, {'a folder with spaces/' * 150!r})"
    assert visible(show(verbatim([code], indent=4), 40)) == f"    {code}\n"


def test_a_dumb_terminal_gets_no_escapes() -> None:
    assert "\x1b" not in show([line("title", Style.HEADING), TABLE], 80, TERM="dumb")


@given(st.lists(st.text(alphabet="ab c", max_size=30), min_size=1, max_size=6), st.integers(20, 120))
def test_wrapping_keeps_every_word_in_order(texts: list[str], width: int) -> None:
    block = Line(tuple(Cell(text, style) for text, style in zip(texts, list(Style) * 2, strict=False)), indent=2)
    drawn = visible(show([block], width))
    words = "".join(texts).split()
    assert "".join(drawn.split()) == "".join(words)
    assert all(len(part) <= width for part in drawn.splitlines())
    if all(len(word) <= width - 4 for word in words):
        assert drawn.split() == words
