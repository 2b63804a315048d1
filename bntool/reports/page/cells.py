"""Cells of tables with pictures: numbers of channels as a strip, as their extremes, and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bntool.reports.blocks import Style
from bntool.reports.page.document import Item, Picture
from bntool.reports.page.strips import Mark, Scale, draw_channels
from bntool.reports.text import plural
from bntool.representation import format_number

_LISTED = 12  # channels, or runs of them, that are named


def describe_channels(channels: Sequence[int]) -> str:
    """Describe channels, e.g. ``channels 1, 5, 9 to 12``; "" for none."""
    if not channels:
        return ""
    runs: list[list[int]] = []
    for channel in sorted(channels):
        if runs and channel == runs[-1][1] + 1:
            runs[-1][1] = channel
        else:
            runs.append([channel, channel])
    shown = [f"{first}" if first == last else f"{first} to {last}" for first, last in runs[:_LISTED]]
    more = f" and {len(channels) - sum(b - a + 1 for a, b in runs[:_LISTED])} more" if len(runs) > _LISTED else ""
    return f"channel{'s' * (len(channels) > 1)} {', '.join(shown)}{more}"


def draw_item(values: Sequence[float], scale: Scale, marks: Sequence[Mark] = (), *, what: str) -> Item:
    """Draw a strip over channels, sorted by its largest number.

    Args:
        what: the numbers are.
    """
    if not values:
        return Item(sort=-math.inf)
    finite = sorted(value for value in values if math.isfinite(value))
    broken = len(values) - len(finite)
    text = f"{what} of {plural(len(values), 'channel')}"
    if finite:
        numbers = (format_number(number, 2) for number in (finite[0], finite[-1], finite[len(finite) // 2]))
        text += " from {} to {}, median {}".format(*numbers)
    if broken:
        text += f", {broken} not finite"
    marked = sorted({place for mark in marks for place in mark.places})
    if marked:
        text += f"; marked: {describe_channels(marked)}"
    sort = math.inf if broken else finite[-1]
    return Item(sort=sort, picture=Picture(draw_channels(values, scale, marks), text, len(values)))


def range_item(values: Sequence[float]) -> Item:
    """Return the smallest and the largest number, sorted by the latter's magnitude; or how many are not finite."""
    if not values:
        return Item("-", sort=-math.inf)
    broken = sum(not math.isfinite(value) for value in values)
    if broken:
        return Item(f"{broken} not finite", Style.ERROR, sort=math.inf)
    low, high = (format_number(number, 2) for number in (min(values), max(values)))
    return Item(low if low == high else f"{low} to {high}", sort=max(map(abs, values)))


def number_item(value: float | None, unit: str = "") -> Item:
    """Format a number in two digits with its unit; nothing for None."""
    if value is None:
        return Item(sort=-math.inf)
    if math.isnan(value):
        return Item("not finite", Style.ERROR, sort=math.inf)
    return Item(format_number(value, 2) + unit, sort=value)
