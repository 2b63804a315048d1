"""How far long work is, on stderr: drawn by rich on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bntool.cli.output import is_another_rank, print_note
from bntool.progress import OnProgress, Progress, ignore
from bntool.reports.text import plural, sanitize

if TYPE_CHECKING:
    from rich.console import RenderableType

_LOG_INTERVAL = 10.0  # seconds between two lines of a log
_DELAY = 0.3  # work that is done sooner shows nothing
_BAR = 24  # columns


@contextlib.contextmanager
def show_progress(*, as_json: bool, quiet: bool) -> Iterator[OnProgress]:
    """Show what the calls report that are given what this yields; nothing is left on a terminal at the end.

    Args:
        as_json: the result goes to a program: lines as in a log, for which rich is not imported.
    """
    if quiet or is_another_rank():
        yield ignore
        return
    work = _Work()
    with _draw(work) if sys.stderr.isatty() and not as_json else _log(work):
        yield work.update


class _Work:
    """What is being done, since when, and how long the rest will take."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._start = time.monotonic()
        self._durations: list[float] = []  # of the phases that are over and counted samples
        self._counted: int | None = None  # by the last of them

    def update(self, progress: Progress) -> None:
        """Take note of how far the work is."""
        before, now = self._progress, time.monotonic()
        if before is None or progress.phase != before.phase:
            if before is not None and before.done:
                self._durations.append(now - self._start)
                self._counted = before.done
            self._start = now
        self._progress = progress

    @property
    def elapsed(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self._start

    def share(self) -> float | None:
        """How much of all phases is done, 0 to 1; None where it is not known how much there is to do."""
        progress, total = self._progress, self._total()
        if progress is None or not total:
            return None
        phases = progress.phases or (progress.phase,)
        return (phases.index(progress.phase) + min(progress.done / total, 1)) / len(phases)

    def describe(self) -> str:
        """In words: the phase, its samples, and the time left for this and all phases to come."""
        progress, total = self._progress, self._total()
        if progress is None:
            return ""
        parts = [_format_duration(self.elapsed)]
        if total:
            parts = [f"{progress.done:,} of {plural(total, 'sample')}", *self._estimate(progress, total)]
        elif progress.done:
            parts = [plural(progress.done, "sample"), *parts]
        return f"{sanitize(progress.phase)}: {', '.join(parts)}"

    def _total(self) -> int | None:
        """Samples of the phase: where the data do not say how many they have, as many as the phase before had."""
        progress = self._progress
        if progress is None or progress.total or not progress.phases:
            return progress.total if progress is not None else None
        return self._counted

    def _estimate(self, progress: Progress, total: int) -> list[str]:
        """The time left, if the phases to come take as long as those so far do."""
        if not progress.done:
            return []
        elapsed = self.elapsed
        whole = max(elapsed * total / progress.done, elapsed)
        known = [*self._durations, whole]
        phases = progress.phases or (progress.phase,)
        ahead = len(phases) - phases.index(progress.phase) - 1
        return [f"{_format_duration(whole - elapsed + ahead * sum(known) / len(known))} left"]

    def __rich__(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        text = self.describe()
        if not text or (self.elapsed < _DELAY and not self._durations):
            return Text()
        share = self.share()
        # what turns shows that the work goes on
        sign = Spinner("dots") if share is None else ProgressBar(total=1, completed=share, width=_BAR)
        row = Table.grid(padding=(0, 1))
        row.add_row(sign, Text(text, no_wrap=True, overflow="ellipsis"))
        return row


@contextlib.contextmanager
def _draw(work: _Work) -> Iterator[None]:
    """One line that follows the work; what the user's code prints appears above it."""
    from rich.live import Live

    from bntool.reports.terminal import make_console

    console = make_console(sys.stderr)
    if not console.is_interactive:  # a dumb terminal
        with _log(work):
            yield
        return
    out, err = sys.stdout, sys.stderr

    def restore() -> None:
        """A worker process writes itself: the lock of the console may be held by a thread that it does not have."""
        if sys.stderr is not err:
            sys.stdout, sys.stderr = out, err

    os.register_at_fork(after_in_child=restore)
    with Live(work, console=console, transient=True, refresh_per_second=8):
        yield


@contextlib.contextmanager
def _log(work: _Work) -> Iterator[None]:
    """A line every ten seconds."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(_LOG_INTERVAL):
            if text := work.describe():
                print_note(text)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
