"""A line on stderr that says how far long work is; on terminals only."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import final

from bntool.progress import Progress
from bntool.reports.text import plural

_INTERVAL = 0.1  # seconds between two updates
_DELAY = 0.5  # work that is done sooner shows nothing


@final
class ProgressLine:
    """Samples done of each phase, their rate and the time left, on one line that is erased at the end."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._phase = ""
        self._start = self._last = 0.0
        self._shown = False

    def __enter__(self) -> ProgressLine:
        return self

    def __call__(self, progress: Progress) -> None:
        """Show how far the call is."""
        if not self._enabled:
            return
        now = time.monotonic()
        if progress.phase != self._phase:
            self._erase()
            self._phase, self._start, self._last = progress.phase, now, now + _DELAY - _INTERVAL
        if not progress.done or now - self._last < _INTERVAL:
            return
        self._last, self._shown = now, True
        rate = progress.done / max(now - self._start, 1e-9)
        text = f"{progress.phase}: {plural(progress.done, 'sample')}"
        if progress.total:
            left = max(progress.total - progress.done, 0) / rate if rate else 0.0
            text = f"{progress.phase}: {progress.done:,} of {plural(progress.total, 'sample')}, {_duration(left)} left"
        sys.stderr.write(f"\r\x1b[K{text}, {rate:,.0f} a second")
        sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._erase()

    def _erase(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        self._shown = False


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
