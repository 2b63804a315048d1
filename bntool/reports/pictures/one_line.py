"""Pictures of one line, in block characters, for terminals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from bntool.reports.blocks import Histogram, Picture
from bntool.reports.pictures.histograms import merge_slots

BARS = "▁▂▃▄▅▆▇█"
EMPTY = "·"  # nothing there, or no number
PICTURE_SIZES = (24, 16, 12, 8)  # columns; the largest first


def draw_picture(picture: Picture, columns: int) -> str:
    """Draw a picture in so many columns, a divisor of 48; a series that is shorter takes no more than it needs."""
    if isinstance(picture, Histogram):
        counts = merge_slots(picture.counts, columns)
        most = max(counts)
        return "".join(_draw_bar(count / most if count else None) for count in counts)
    return "".join(map(_draw_bar, _condense(picture.heights, columns)))


def _draw_bar(height: float | None) -> str:
    """Draw a bar; even the smallest height above nothing is drawn as the lowest bar, so that it is seen."""
    return EMPTY if height is None else BARS[min(int(height * len(BARS)), len(BARS) - 1)]


def _condense(heights: Sequence[float | None], columns: int) -> list[float | None]:
    """Condense heights to at most so many; each is the largest of the run of heights that it stands for."""
    count = len(heights)
    if count <= columns:
        return list(heights)
    bounds = [count * column // columns for column in range(columns + 1)]
    runs = [[h for h in heights[a:b] if h is not None] for a, b in itertools.pairwise(bounds)]
    return [max(run, default=None) for run in runs]
