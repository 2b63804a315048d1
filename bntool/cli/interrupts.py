"""Ctrl-C at any moment: while modules are imported it waits until they are whole."""

from __future__ import annotations

import signal
from types import FrameType

_INTERVAL = 0.05  # seconds between two looks whether the import is done


class InterruptHandler:
    """Raises KeyboardInterrupt, but not in the middle of an import: there it would be swallowed or misunderstood.

    ``import torch`` takes seconds, and an exception in it may end in an ImportError, or in nothing at all. A second
    Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self._is_waiting = False
        self._is_reminder = False

    def install(self) -> None:
        """Handle SIGINT from now on, unless whoever started the process has it ignored."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self)

    def __call__(self, _number: int, frame: FrameType | None) -> None:
        is_reminder, self._is_reminder = self._is_reminder, False
        if not _is_importing(frame) or (self._is_waiting and not is_reminder):
            self._is_waiting = False
            raise KeyboardInterrupt
        import threading

        if not hasattr(threading, "Timer"):  # it is what is being imported
            raise KeyboardInterrupt
        self._is_waiting = True
        timer = threading.Timer(_INTERVAL, self._remind)
        timer.daemon = True
        timer.start()

    def _remind(self) -> None:
        import _thread

        if self._is_waiting:
            self._is_reminder = True
            _thread.interrupt_main()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
