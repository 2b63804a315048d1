from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from bntool.reports.text import format_size, plural, sanitize, shorten_names
from bntool.representation import format_number

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x9b31m",  # C1 control sequence introducer
    "a\nb\rc\td\x00",
    "\u202egnp.exe",  # right-to-left override
    "\u2066x\u2069",
    "zero\u200bwidth\ufeff",
    "\ud800 lone",
    "\u2028 line separator",
    "\x07bell \x08 backspace \x7f",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_a_terminal_obeys_survives(name: str) -> None:
    shown = sanitize(name)
    assert all(unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029" for c in shown)
    shown.encode("utf-8")  # a lone surrogate would fail here


@given(st.text(max_size=400))
def test_any_text_becomes_one_harmless_line(text: str) -> None:
    shown = sanitize(text)
    assert "\x1b" not in shown
    assert len(shown.splitlines()) <= 1
    assert all(character.isprintable() or unicodedata.category(character) == "Zs" for character in shown)


def test_ordinary_names_are_left_alone() -> None:
    for name in ("layer1.0.bn1.running_mean", "[red]x[/red]", "couche.é.中文", "a b"):
        assert sanitize(name) == name


def test_long_names_are_cut() -> None:
    assert len(sanitize("x" * 10_000)) < 400
    one, two = (sanitize("block." * 100 + end) for end in ("1.bn", "2.bn"))
    assert one != two
    assert one.startswith("block.block.")
    assert one.endswith("block.1.bn")


def test_wide_names_are_shortened_by_columns() -> None:
    names = [f"{'編碼器' * 12}.層.{end}" for end in (1, 4, 10)]
    short = shorten_names(["模型.x", *names], 30, measure=cell_len)
    assert short is not None
    assert len(set(short)) == 4
    assert max(map(cell_len, short)) <= 30
    assert [name.rpartition(".")[2] for name in short[1:]] == ["1", "4", "10"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (0.00012345, "0.000123"), (1e-5, "1e-5"), (-1234567.0, "-1.23e6"), (math.nan, "nan"),
     (math.inf, "inf"), (-math.inf, "-inf"), (1e-12, "1e-12")],
)  # fmt: skip
def test_numbers_in_three_digits(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(660.4, "660"), (-862.0, "-862"), (99.7, "100"), (99.4, "99"), (12345.0, "12345"), (99999.0, "99999"),
     (1e5, "1e5"), (123456.0, "1.2e5"), (0.0066, "0.0066"), (6.6, "6.6")],
)  # fmt: skip
def test_the_whole_part_is_written_out_where_it_can_be_read(value: float, text: str) -> None:
    assert format_number(value, 2) == text


@given(st.floats(min_value=-1e300, max_value=1e300))
def test_a_shown_number_is_within_half_a_percent(value: float) -> None:
    assert math.isclose(float(format_number(value)), value, rel_tol=5.1e-3, abs_tol=0.0) or value == 0


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (10**10, "10.0 GB"), (123_456, "123 kB")],
)
def test_sizes(size: int, text: str) -> None:
    assert format_size(size) == text


def test_plural() -> None:
    assert [plural(count, "layer") for count in (0, 1, 2, 1234)] == ["0 layers", "1 layer", "2 layers", "1,234 layers"]
