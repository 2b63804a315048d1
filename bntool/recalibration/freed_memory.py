"""Giving back to the system what malloc keeps of freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # of mallopt
_LARGE = 1 << 20  # bytes: pieces from here on are mapped, and unmapped when they are freed
_LARGEST = 32 << 20  # where glibc's own threshold ends once pieces of all sizes were freed
_PAUSE = 0.25  # seconds of CPU time; what is returned has to be asked for again


@contextlib.contextmanager
def returning_large_pieces() -> Iterator[None]:
    """Give memory of large tensors back to the system as soon as it is freed inside, if the C library is glibc.

    What lives on between freed pieces keeps 10 MB of a ResNet-50 there otherwise. Threads that begin inside, and from
    then on, share one arena: with one for each, that is 20 MB in each of them.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        _set_thresholds_to_largest()


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Inside, freed memory of arrays of up to 32 MB is kept for the next ones, if the C library is glibc.

    glibc comes to that by itself after pieces of that size were freed. Before, each array of more than 128 KB asks the
    system for new pages, which takes longer than adding its numbers up.
    """
    _set_thresholds_to_largest()
    try:
        yield
    finally:
        FreedMemory(pause=0).return_unused()


def _set_thresholds_to_largest() -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGEST)
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)


class FreedMemory:
    """Returns to the system, now and then, what malloc keeps of freed memory.

    A batch leaves holes that the next one does not fill: without this the peak grows by a tenth. Where the C library is
    not glibc nothing is done.

    Args:
        pause: seconds of CPU time from one time to the next.
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
        now = time.process_time()
        if self._trim is not None and now - self._last >= self._pause:
            self._trim(0)
            self._last = now
