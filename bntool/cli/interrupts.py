"""Ctrl-C and requests to end at any moment: what was begun is cleaned up, and imports are finished first."""

from __future__ import annotations

import os
import signal
from types import FrameType

_INTERVAL = 0.05  # seconds between two looks whether the import is done


class InterruptHandler:
    """Raises KeyboardInterrupt on SIGINT, SIGTERM and SIGHUP, but not in the middle of an import.

    There it would be swallowed or misunderstood: ``import torch`` takes seconds, and an exception in it may end in an
    ImportError, or in nothing at all. A second signal does not wait.
    """

    def __init__(self) -> None:
        self._received: int = signal.SIGINT
        self._is_waiting = False
        self._is_reminder = False

    def install(self) -> None:
        """Handle the signals from now on, except those that whoever started the process has ignored."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self)
        ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        ends = [number for number in ends if signal.getsignal(number) is signal.SIG_DFL]
        for number in ends:
            signal.signal(number, self)
        if hasattr(os, "register_at_fork"):  # worker processes have nothing to clean up
            os.register_at_fork(after_in_child=lambda: [signal.signal(number, signal.SIG_DFL) for number in ends])

    def __call__(self, number: int, frame: FrameType | None) -> None:
        is_reminder, self._is_reminder = self._is_reminder, False
        if is_reminder and not self._is_waiting:  # a second signal came while it was sent
            return
        if not is_reminder:
            self._received = number
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

    def end_process(self) -> None:
        """End the process by the signal that ended the command, so that the sender of the signal sees it work."""
        if self._received != signal.SIGINT:
            signal.signal(self._received, signal.SIG_DFL)
            os.kill(os.getpid(), self._received)

    def _remind(self) -> None:
        """Send the signal once more: a real one, which a system call that blocks is cut short by."""
        import threading

        if not self._is_waiting:
            return
        self._is_reminder = True
        main = threading.main_thread().ident
        if hasattr(signal, "pthread_kill") and main is not None:
            signal.pthread_kill(main, self._received)
        else:  # Windows
            import _thread

            _thread.interrupt_main()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
