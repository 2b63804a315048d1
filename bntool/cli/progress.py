"""A line on stderr that says how far long work is; on terminals only."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import final

from bntool.reports.text import plural

_INTERVAL = 0.1  # seconds between two updates
_DELAY = 0.5  # work that is done sooner shows nothing


@final
class Progress:
    """Samples done, their rate and the time left, on one line that is erased at the end."""

    def __init__(self, what: str, total: int | None, *, enabled: bool) -> None:
        self._what = what
        self._total = total
        self._enabled = enabled and sys.stderr.isatty()
        self._start = time.monotonic()
        self._last = self._start + _DELAY - _INTERVAL
        self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __call__(self, samples: int) -> None:
        """Show that so many samples are done."""
        now = time.monotonic()
        if not self._enabled or now - self._last < _INTERVAL:
            return
        self._last, self._shown = now, True
        rate = samples / max(now - self._start, 1e-9)
        text = f"{self._what}: {plural(samples, 'sample')}"
        if self._total:
            left = max(self._total - samples, 0) / rate if rate else 0.0
            text = f"{self._what}: {samples:,} of {plural(self._total, 'sample')}, {_duration(left)} left"
        sys.stderr.write(f"\r\x1b[K{text}, {rate:,.0f} a second")
        sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
