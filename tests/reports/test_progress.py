"""How far long work is, and how long it will take."""

from __future__ import annotations

import time

import pytest

from bntool.progress import Progress
from bntool.reports.progress import Work

PHASES = ("before", "pooled statistics", "after")


def test_the_time_left_is_that_of_all_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    state = Work()
    state.update(Progress("before", 0, 100, PHASES))
    clock[0] = 10
    state.update(Progress("before", 50, 100, PHASES))
    assert state.describe() == "before: 50 of 100 samples, 50 s left"  # 10 of this phase, twice 20 of the others
    assert state.share() == pytest.approx(1 / 6)
    clock[0] = 20
    state.update(Progress("before", 100, 100, PHASES))
    state.update(Progress("pooled statistics", 0, 100, PHASES))
    clock[0] = 40
    state.update(Progress("pooled statistics", 25, 100, PHASES))
    assert state.describe() == "pooled statistics: 25 of 100 samples, 1 min 50 s left"  # 60, and (20 + 80) / 2
    state.update(Progress("writing"))
    clock[0] = 3 * 3600 + 40 + 60
    assert state.describe() == "writing: 3 h 1 min"
