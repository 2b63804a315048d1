"""What rich draws for a person."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bntool.reports.blocks import Block, Cell, Column, Line, Style, Table, line, verbatim
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


def test_narrow_terminals_lose_wide_columns_and_break_names_that_stay_whole() -> None:
    lines = visible(show([TABLE], 30)).splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[0].split() == ["layer", "C"]
    names = "".join(line[: line.rindex(" C") if " C" in line else 26].strip() for line in lines[1:])
    assert "backbone.layer1.0.downsample.1.very.long.name" in names.replace(" ", "")


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
