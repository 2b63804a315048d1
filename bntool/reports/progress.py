"""The progress of long work and the time that it will take, in words and as a share; each place draws it in its own
way.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from bntool.progress import Progress
from bntool.reports.text import format_size, plural, sanitize

DELAY = 0.3  # work that is done sooner shows nothing


class _Moment(NamedTuple):
    """What is known of the work: one value, as whatever shows it may do so in another thread.

    Attributes:
        progress: None before anything was told.
        start: of the phase.
        durations: of the phases that are over and counted samples.
    """

    progress: Progress | None
    start: float
    durations: tuple[float, ...] = ()

    @property
    def elapsed(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self.start


class Work:
    """The work that is being done, since when, and how long the rest will take."""

    def __init__(self) -> None:
        self._moment = _Moment(None, time.monotonic())

    def update(self, progress: Progress) -> None:
        """Take note of how far the work is."""
        before, start, durations = self._moment
        if before is None or progress.phase != before.phase:
            now = time.monotonic()
            if before is not None and before.done:
                durations = (*durations, now - start)
            start = now
        self._moment = _Moment(progress, start, durations)

    def share(self) -> float | None:
        """Return how much of all phases is done, 0 to 1; None where it is not known how much there is to do."""
        progress = self._moment.progress
        if progress is None or not progress.total:
            return None
        phases = progress.phases or (progress.phase,)
        return (phases.index(progress.phase) + min(progress.done / progress.total, 1)) / len(phases)

    def describe(self) -> str:
        """Describe the phase, how much of it is done, and the time left for this and all phases to come."""
        moment = self._moment
        progress = moment.progress
        if progress is None:
            return ""
        parts, total = [format_duration(moment.elapsed)], progress.total
        if total:
            done = format_size(progress.done) if progress.unit == "byte" else f"{progress.done:,}"
            parts = [f"{done} of {_count(total, progress.unit)}", *_estimate(moment, progress, total)]
        elif progress.done:
            parts = [_count(progress.done, progress.unit), *parts]
        return f"{sanitize(progress.phase)}: {', '.join(parts)}"

    @property
    def is_short(self) -> bool:
        """Whether it went on for so little time that nothing need be said."""
        moment = self._moment
        return moment.elapsed < DELAY and not moment.durations


def _estimate(moment: _Moment, progress: Progress, total: int) -> list[str]:
    """Return the time left, if the phases to come take as long as those so far do."""
    if not progress.done:
        return []
    elapsed = moment.elapsed
    whole = max(elapsed * total / progress.done, elapsed)
    known = [*moment.durations, whole]
    phases = progress.phases or (progress.phase,)
    ahead = len(phases) - phases.index(progress.phase) - 1
    return [f"{format_duration(whole - elapsed + ahead * sum(known) / len(known))} left"]


def _count(number: int, unit: str) -> str:
    return format_size(number) if unit == "byte" else plural(number, unit)


def format_duration(seconds: float) -> str:
    """Format a duration, e.g. ``2 min 5 s``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
