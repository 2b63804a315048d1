"""Progress of a call in a notebook: a line below the cell that follows the work, as on a terminal."""

from __future__ import annotations

import html
import sys
import time
from typing import Any

from bntool.progress import Progress
from bntool.reports.progress import DELAY, Work, format_duration

_INTERVAL = 0.2  # seconds between two changes


def show(progress: Progress) -> None:
    """Show progress below the running cell; nothing outside of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):  # a script, or IPython on a terminal
        return
    line = _lines.get(id(shell))
    if line is None or line.is_over:
        line = _lines[id(shell)] = _CellLine(shell)
    line.follow(progress)


class _CellLine:
    """One line of a cell: it is there once the work goes on for a moment, and says at the end how long that took."""

    def __init__(self, shell: Any) -> None:
        self.is_over = False
        self._work = Work()
        self._start = time.monotonic()
        self._changed = 0.0
        self._phase = ""
        self._handle: Any = None
        self._events = shell.events
        self._events.register("post_run_cell", self._end)

    def follow(self, progress: Progress) -> None:
        """Take note of how far the work is, and say so where that was not done a moment ago."""
        self._work.update(progress)
        now = time.monotonic()
        if progress.phase == self._phase and now - self._changed < _INTERVAL:
            return
        self._phase, self._changed = progress.phase, now
        if self._handle is not None or now - self._start > DELAY:
            self._say(self._work.describe(), self._work.share())

    def _end(self, result: Any) -> None:
        self._events.unregister("post_run_cell", self._end)
        self.is_over = True
        if self._handle is not None and result.success:
            self._say(f"done in {format_duration(time.monotonic() - self._start)}", 1.0)

    def _say(self, text: str, share: float | None) -> None:
        from IPython.display import display

        text = f"bntool: {text}"
        value = "" if share is None else f' value="{share:.3f}"'
        data = {
            "text/plain": text,
            "text/html": f'<progress aria-label="progress" max="1"{value}></progress> {html.escape(text)}',
        }
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


_lines: dict[int, _CellLine] = {}  # by shell
