"""Histograms over the channels of layers, one for each row of a table, on one axis; and what that axis is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from bntool.reports.blocks import Cell, Histogram, Style
from bntool.reports.pictures.histograms import LogAxis, count_values, find_axis, find_axis_of_ratios
from bntool.representation import format_number

if TYPE_CHECKING:
    from bntool.verification.statistics_shift import StatisticsShift


def draw_sizes(rows: Iterable[Sequence[float]], *, name: str) -> tuple[list[Cell], str]:
    """Draw the positive numbers of each row, and a caption: what they are, and from where to where."""
    return _draw(rows, name, find_axis)


def draw_ratios(rows: Iterable[Sequence[float]], *, name: str) -> tuple[list[Cell], str]:
    """Draw ratios of each row, with 1 in the middle, and a caption: what they are, and from where to where."""
    return _draw(rows, name, find_axis_of_ratios)


def draw_shifts(shifts: Sequence[StatisticsShift | None]) -> tuple[list[Cell], list[Cell], str]:
    """Draw how far running_mean of each channel moved, and by which factor running_var did; with a caption for both."""
    known = [shift for shift in shifts if shift is not None]
    means, of_means = draw_sizes((shift.mean_shifts() for shift in known), name="mean shift")
    ratios, of_ratios = draw_ratios((shift.variance_ratios() for shift in known), name="variance by a factor of")
    caption = ", ".join(filter(None, (of_means, of_ratios)))
    cells = iter(zip(means, ratios, strict=True))
    pairs = [(Cell(""), Cell("")) if shift is None else next(cells) for shift in shifts]
    return [mean for mean, _ in pairs], [ratio for _, ratio in pairs], f"channels: {caption}" if caption else ""


def _draw(
    rows: Iterable[Sequence[float]], name: str, axis_of: Callable[[Iterable[Sequence[float]]], LogAxis | None]
) -> tuple[list[Cell], str]:
    values = [sorted(value for value in row if not math.isnan(value)) for row in rows]
    axis = axis_of(values)
    if axis is None:
        return [Cell("") for _ in values], ""
    edges = axis.edges()
    cells = [Cell("", Style.PLAIN, picture=Histogram(count_values(row, edges)) if row else None) for row in values]
    return cells, f"{name} {describe_axis(axis)}"


def describe_axis(axis: LogAxis) -> str:
    """Describe from where to where an axis goes, and whether something lies beyond."""
    low, high = format_number(axis.low, 2), format_number(axis.high, 2)
    return f"{'below ' * axis.below}{low} to {'beyond ' * axis.above}{high}"
