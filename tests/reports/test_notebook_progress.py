"""How far a call is, below a cell of a notebook; IPython itself is stood in for, which the tests do not install."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bntool
from bntool.progress import Progress, tell_notebook


class Events:
    """Callbacks of a shell, as IPython.core.events keeps them."""

    def __init__(self) -> None:
        self.registered: list[Any] = []

    def register(self, event: str, callback: Any) -> None:
        assert event == "post_run_cell"
        self.registered.append(callback)

    def unregister(self, event: str, callback: Any) -> None:
        self.registered.remove(callback)


class Notebook:
    """A shell with a kernel that notes what is displayed."""

    def __init__(self) -> None:
        self.events, self.kernel, self.displayed = Events(), object(), list[dict[str, str]]()

    def display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        self.displayed.append(data)
        return SimpleNamespace(update=lambda data, raw: self.displayed.append(data))

    def end_cell(self, *, success: bool = True) -> None:
        for callback in list(self.events.registered):
            callback(SimpleNamespace(success=success))


class Clock:
    """The time, which goes on only as the work does."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("progress", "notebook_progress"):
        monkeypatch.setattr(f"bntool.reports.{module}.time", clock)
    return clock


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    shell = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=shell.display))
    return shell


PHASES = ("before", "after")


def work(clock: Clock, seconds: float) -> None:
    for phase in PHASES:
        for done in range(0, 101, 25):
            tell_notebook(Progress(phase, done, 100, PHASES))
            clock.sleep(seconds)


def test_a_line_follows_the_work_and_says_how_long_it_took(notebook: Notebook, clock: Clock) -> None:
    work(clock, 0.15)
    texts = [data["text/plain"] for data in notebook.displayed]
    assert texts[0].startswith("bntool: before: ")
    assert any(text.startswith("bntool: after: ") and "of 100 samples" in text for text in texts)
    assert all("<progress" in data["text/html"] for data in notebook.displayed)
    notebook.end_cell()
    assert notebook.displayed[-1]["text/plain"].startswith("bntool: done in ")
    assert notebook.events.registered == []


def test_a_call_that_failed_is_not_done(notebook: Notebook, clock: Clock) -> None:
    work(clock, 0.1)
    notebook.end_cell(success=False)
    assert "done" not in notebook.displayed[-1]["text/plain"]


def test_short_work_shows_nothing(notebook: Notebook, clock: Clock) -> None:
    work(clock, 0)
    notebook.end_cell()
    assert notebook.displayed == []


def test_a_script_shows_nothing_though_ipython_is_imported(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    monkeypatch.delitem(sys.modules, "IPython.display", raising=False)
    work(clock, 0.1)


class Slow(nn.Module):
    """A model that takes its time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.bn, self.clock = nn.BatchNorm1d(4), clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.sleep(0.1)
        return self.bn(x)


@pytest.mark.parametrize("asks", [False, True])
def test_calls_of_the_library_show_themselves_unless_the_caller_asks(
    notebook: Notebook, clock: Clock, asks: bool
) -> None:
    batches = [torch.randn(8, 4) for _ in range(7)]
    seen: list[Any] = []
    bntool.recalibrate(Slow(clock), batches, **({"on_progress": seen.append} if asks else {}))
    said = "".join(data["text/plain"] for data in notebook.displayed)
    assert ("pooled statistics" in said) is not asks
    assert bool(seen) is asks
