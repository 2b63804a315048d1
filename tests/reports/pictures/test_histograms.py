"""Histograms on a logarithmic axis, judged by numpy's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bntool.reports.pictures.histograms import SLOTS, count_values, find_axis, merge_slots


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_of_numpy(seed: int) -> None:
    rows = [np.sort(np.random.default_rng([seed, row]).lognormal(row, 1, 300)) for row in range(3)]
    axis = find_axis([row.tolist() for row in rows])
    assert axis is not None
    assert (axis.low, axis.high) == (min(row[0] for row in rows), max(row[-1] for row in rows))
    for row in rows:
        expected, _ = np.histogram(np.log(row), bins=SLOTS, range=(math.log(axis.low), math.log(axis.high)))
        found = count_values(row.tolist(), axis.edges())
        assert sum(found) == 300
        assert sum(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 2  # a value on an edge


def test_what_lies_beyond_the_axis_counts_at_its_ends() -> None:
    values = [-1.0, 0.0, 1e-30, 0.5, 1.0, 2.0, 1e9, math.inf]
    axis = find_axis([values, [0.9, 1.0, 1.1]])
    assert axis is not None
    assert axis.below
    assert axis.above
    assert 1e-5 < axis.low < 1e-3  # one absurd value does not squeeze the others into one slot
    assert 1e3 < axis.high < 1e5
    counts = count_values(values, axis.edges())
    assert sum(counts) == len(values)
    assert counts[0] == 3
    assert counts[-1] == 2


def test_equal_values_stand_in_the_middle() -> None:
    axis = find_axis([[1.0, 1.0]])
    assert axis is not None
    counts = merge_slots(count_values([1.0, 1.0], axis.edges()), 8)
    assert sum(counts[3:5]) == 2


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [-1.0], [math.inf]])
def test_nothing_positive_has_no_axis(values: list[float]) -> None:
    assert find_axis([values]) is None


def test_fewer_slots_hold_the_same_values() -> None:
    counts = tuple(range(SLOTS))
    for slots in (8, 12, 16, 24, 48):
        merged = merge_slots(counts, slots)
        assert len(merged) == slots
        assert sum(merged) == sum(counts)
