"""Heat strips: many numbers in one row of coloured pixels, as small PNG files with sixteen colours.

A colour stands for a class of numbers, and the colours are told apart by people who see few: viridis (Smith and van der
Walt 2015) for sizes, blue and orange for less and more. What must not be missed is drawn on top, as a notch.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from bntool.reports.blocks import Style

LEVELS = 12
_NOTHING, _UNUSED, _WARNING, _ERROR = range(LEVELS, 16)
_CLEAR = 0x00000000
_MARKS = (_CLEAR, _CLEAR, 0xE08A00FF, 0xD92D20FF)
_SIZES = (
    0x440154FF, 0x482173FF, 0x433E85FF, 0x38588CFF, 0x2D708EFF, 0x25858EFF,
    0x1E9B8AFF, 0x2BB07FFF, 0x51C56AFF, 0x85D54AFF, 0xC2DF23FF, 0xFDE725FF,
)  # fmt: skip
_LESS, _MORE, _ALPHAS = 0x1F6FB4, 0xC8590A, (0x14, 0x40, 0x6C, 0x98, 0xC6, 0xFF)
_CHANGES = (
    *((_LESS << 8) | alpha for alpha in reversed(_ALPHAS)),
    *((_MORE << 8) | alpha for alpha in _ALPHAS),
)
_Levels = tuple[int, int, int]  # numbers of colours, from the top
_EMPTY: _Levels = (_NOTHING, _NOTHING, _NOTHING)
_HATCHED: _Levels = (_ERROR, _NOTHING, _ERROR)
BINS = 64  # pixels of a strip over channels; more channels share them
_OUTSIDE = 0.005  # share of the numbers on either side that the ends of a scale leave to the end colours

_UNUSUAL = 0.05  # share of the numbers on either side that may lie far away


class Kind(Enum):
    """The meaning of the colours of a scale."""

    SIZE = "size"  # small to large
    CHANGE = "change"  # less, as before, more


@dataclass(frozen=True)
class Scale:
    """The numbers that colours stand for; equal steps are equal factors.

    Attributes:
        low, high: decimal logarithms of the numbers at the ends; numbers beyond have the colours of the ends.
    """

    kind: Kind
    low: float
    high: float

    def level(self, value: float) -> int:
        """Return the number of the colour of a positive number or 0."""
        if value <= 0:
            return 0
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return min(max(int(share * LEVELS), 0), LEVELS - 1)

    @property
    def colours(self) -> tuple[int, ...]:
        return (*(_SIZES if self.kind is Kind.SIZE else _CHANGES), *_MARKS)

    def draw_legend(self) -> bytes:
        """Draw all colours in order."""
        return _write_png([list(range(LEVELS))], self.colours)


def scale_sizes(values: Iterable[float]) -> Scale:
    """Choose a scale for sizes: it spans nearly all of them, in whole halves of decades; a few far away do not stretch
    it.

    It goes at most a decade beyond nine tenths of them.
    """
    known = sorted(value for value in values if 0 < value < math.inf)
    if not known:
        return Scale(Kind.SIZE, -1.0, 1.0)
    outside, unusual = int(_OUTSIDE * len(known)), int(_UNUSUAL * len(known))
    low = max(math.log10(known[outside]), math.log10(known[unusual]) - 1)
    high = min(math.log10(known[-1 - outside]), math.log10(known[-1 - unusual]) + 1)
    low, high = math.floor(2 * low) / 2, math.ceil(2 * high) / 2
    return Scale(Kind.SIZE, low, max(high, low + 1))


def scale_changes(factors: Iterable[float]) -> Scale:
    """Choose a scale for factors, as wide above 1 as below: at least a factor of two, at most a thousand."""
    known = sorted(abs(math.log10(factor)) for factor in factors if 0 < factor < math.inf)
    far = known[-1 - int(_OUTSIDE * len(known))] if known else 0.0
    reach = min(max(far, math.log10(2)), 3.0)
    return Scale(Kind.CHANGE, -reach, reach)


@dataclass(frozen=True)
class Mark:
    """Places of a strip that are drawn on top.

    Attributes:
        places: numbers of the channels, or of the files.
    """

    style: Style
    places: Collection[int]


def draw_channels(values: Sequence[float], scale: Scale, marks: Sequence[Mark] = ()) -> bytes:
    """Draw a strip over channels. Where channels share a place, it shows the largest, the median and the smallest of
    them.

    What is not finite, and a negative number, is hatched.
    """
    count = min(len(values), BINS)
    edges = [index * len(values) // count for index in range(count + 1)] if count else [0]
    places: list[_Levels] = []
    for first, last in itertools.pairwise(edges):
        shared = sorted(values[first:last])
        if all(0 <= value < math.inf for value in shared):
            places.append((scale.level(shared[-1]), scale.level(shared[len(shared) // 2]), scale.level(shared[0])))
        else:
            places.append(_HATCHED)
    return _draw(places, _place(marks, edges), scale)


def draw_series(values: Sequence[float | None], scale: Scale, marks: Sequence[Mark] = (), gap: int = 0) -> bytes:
    """Draw a strip over a series; None leaves its place empty.

    Args:
        gap: the place before which one pixel is left free, in every strip of a table: a line through all of them; 0 for
            none.
    """
    wide = count_pixels(len(values))
    places = [
        _EMPTY if value is None else (scale.level(value),) * 3 if 0 <= value < math.inf else _HATCHED
        for value in values
    ]
    marked = _place(marks, range(len(values) + 1))
    pixels = [level for level in places for _ in range(wide)]
    notches = {place * wide + more: colour for place, colour in marked.items() for more in range(wide)}
    if gap:
        pixels.insert(gap * wide, _EMPTY)
        notches = {pixel + (pixel >= gap * wide): colour for pixel, colour in notches.items()}
    return _draw(pixels, notches, scale)


def count_pixels(count: int) -> int:
    """Count the pixels that each number of a series is wide, so that a gap of one pixel is no wider than a line."""
    return max(1, 2 * BINS // count)


def _place(marks: Sequence[Mark], edges: Sequence[int]) -> dict[int, int]:
    """Return the colour of the notch of each marked pixel; an error wins."""
    marked: dict[int, int] = {}
    for mark in marks:
        colour = _ERROR if mark.style is Style.ERROR else _WARNING
        for place in mark.places:
            pixel = next((index for index, edge in enumerate(edges[1:]) if place < edge), None)
            if pixel is not None and place >= 0:
                marked[pixel] = max(marked.get(pixel, 0), colour)
    return marked


def _draw(places: Sequence[_Levels], marked: dict[int, int], scale: Scale) -> bytes:
    notch = [marked.get(index, _NOTHING) for index in range(len(places))]
    above, middle, below = ([place[row] for place in places] for row in range(3))
    return _write_png([notch] * 2 + [above] * 2 + [middle] * 3 + [below] * 2, scale.colours)


def _write_png(rows: Sequence[Sequence[int]], colours: Sequence[int]) -> bytes:
    """Write a PNG file (ISO/IEC 15948) of four bits a pixel and sixteen colours, given as 0xRRGGBBAA."""
    width, previous, lines = len(rows[0]), b"", []
    for row in rows:
        padded = [*row, 0] if width % 2 else row
        packed = bytes(a << 4 | b for a, b in zip(padded[::2], padded[1::2], strict=True))
        same = packed == previous
        lines.append(b"\2" + bytes(len(packed)) if same else b"\0" + packed)  # as the line above, or as it is
        previous = packed
    palette = b"".join(struct.pack(">I", colour)[:3] for colour in colours)
    alphas = bytes(colour & 0xFF for colour in colours).rstrip(b"\xff")
    header = struct.pack(">IIBBBBB", width, len(rows), 4, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"tRNS", alphas), (b"IDAT", zlib.compress(b"".join(lines), 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in (*chunks, (b"IEND", b"")))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
