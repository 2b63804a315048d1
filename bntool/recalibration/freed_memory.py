"""Giving back to the system what malloc keeps of freed memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

_PAUSE = 0.25  # seconds; what is returned has to be asked for again


class FreedMemory:
    """Returns to the system, now and then, what malloc keeps of freed memory.

    A batch leaves holes that the next one does not fill: without this the peak grows by a tenth. Where the C library is
    not glibc nothing is done.

    Args:
        pause: seconds from one time to the next.
    """

    def __init__(self, *, pause: float = _PAUSE) -> None:
        self._pause = pause
        self._last = -pause
        try:
            self._trim: Callable[[int], int] | None = ctypes.CDLL(None).malloc_trim
        except (AttributeError, OSError, TypeError):
            self._trim = None

    def return_unused(self) -> None:
        """Return freed memory to the system, unless that was done a moment ago."""
        now = time.monotonic()
        if self._trim is not None and now - self._last >= self._pause:
            self._trim(0)
            self._last = now
