"""Strips, read again by Pillow."""

from __future__ import annotations

import io
import math

import pytest
from PIL import Image

from bntool.reports.blocks import Style
from bntool.reports.page.strips import LEVELS, Kind, Mark, Scale, draw_channels, draw_series, scale_changes, scale_sizes

AXIS = Scale(Kind.SIZE, -3.0, 3.0)
RED, ORANGE, CLEAR = (0xD9, 0x2D, 0x20, 255), (0xE0, 0x8A, 0, 255), 0


def read(data: bytes) -> list[list[tuple[int, ...]]]:
    """Pixels by row."""
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.format == "PNG"
    pixels = image.convert("RGBA")
    return [[pixels.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]


def colours(scale: Scale) -> list[tuple[int, ...]]:
    (row,) = read(scale.draw_legend())
    return row


def test_a_larger_number_has_a_later_colour_of_the_legend() -> None:
    legend = colours(AXIS)
    assert len(set(legend)) == LEVELS
    values = [10.0**exponent for exponent in (-5, -2.9, -1, 0.1, 1, 2.9, 9)]
    rows = read(draw_channels(values, AXIS))
    numbers = [legend.index(pixel) for pixel in rows[3]]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (0, LEVELS - 1)
    # as bright as it is large: viridis rises in luminance, so that it is read without seeing colours
    luminance = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue, _ in legend]
    assert luminance == sorted(luminance)


def test_channels_that_share_a_place_show_their_extremes() -> None:
    legend = colours(AXIS)
    values = [1.0] * 2048
    values[1000] = 1e9
    values[7] = 1e-9
    rows = read(draw_channels(values, AXIS))
    assert len(rows[0]) == 64
    place, other = 1000 * 64 // 2048, 7 * 64 // 2048
    assert rows[2][place] == legend[-1]
    assert rows[-1][other] == legend[0]
    usual = legend.index(rows[5][20])
    assert legend.index(rows[5][place]) == legend.index(rows[5][other]) == usual


@pytest.mark.parametrize("count", [1, 5, 64, 65, 2048])
@pytest.mark.parametrize("style", [Style.ERROR, Style.WARNING])
def test_a_marked_channel_has_a_notch_wherever_it_is(count: int, style: Style) -> None:
    for channel in {0, count // 2, count - 1}:
        rows = read(draw_channels([1.0] * count, AXIS, [Mark(style, [channel])]))
        notches = [index for index, pixel in enumerate(rows[0]) if pixel[3]]
        (place,), width = notches, len(rows[0])
        assert place * count // width <= channel < (place + 1) * count // width
        assert rows[0][place] == (RED if style is Style.ERROR else ORANGE)


def test_an_error_is_drawn_over_a_warning() -> None:
    marks = [Mark(Style.ERROR, [3]), Mark(Style.WARNING, [2, 3])]
    top = read(draw_channels([1.0] * 8, AXIS, marks))[0]
    assert (top[2], top[3]) == (ORANGE, RED)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_what_is_no_size_is_hatched_also_among_others(value: float) -> None:
    for count in (8, 2048):
        rows = read(draw_channels([1.0] * (count - 1) + [value], AXIS))
        assert rows[3][-1] == RED
        assert rows[5][-1][3] == CLEAR
        assert rows[3][0][3] == rows[5][0][3] == 255


def test_a_series_has_places_of_one_width_and_a_gap_before_the_break() -> None:
    legend = colours(AXIS)
    rows = read(draw_series([1.0, None, 1.0, 900.0], AXIS, [Mark(Style.ERROR, [3])], gap=3))
    wide = (len(rows[0]) - 1) // 4
    assert len(rows[0]) == 4 * wide + 1
    shown = [pixel[3] > 0 for pixel in rows[3]]
    assert shown == [True] * wide + [False] * wide + [True] * wide + [False] + [True] * wide
    assert set(rows[3][-wide:]) == {legend[-1]}
    assert [pixel[3] > 0 for pixel in rows[0]] == [False] * (3 * wide + 1) + [True] * wide
    assert len(read(draw_series([1.0] * 300, AXIS))[0]) == 300


def test_a_few_far_away_do_not_stretch_a_scale() -> None:
    scale = scale_sizes([*(0.1 + index / 100 for index in range(400)), 1e9, 0.0, math.nan, math.inf])
    assert (scale.low, scale.high) == (-1.0, 1.0)
    assert scale_sizes([]).low < scale_sizes([]).high
    assert scale_sizes([0.3] * 5).high - scale_sizes([0.3] * 5).low >= 1


def test_no_change_is_nearly_invisible_and_both_directions_are_told_apart() -> None:
    scale = scale_changes([0.1, 1.0, 2.0])
    assert scale.high == -scale.low == pytest.approx(1.0)
    rows = read(draw_channels([0.1, 1.0, 10.0], scale))
    less, same, more = rows[3]
    assert same[3] < 40
    assert less[3] == more[3] == 255
    assert less[2] > less[0]
    assert more[0] > more[2]
