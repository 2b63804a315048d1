"""Progress of long work, on stderr: drawn by rich on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bntool.cli.output import is_another_rank, print_note
from bntool.progress import OnProgress, ignore
from bntool.reports.progress import Work

if TYPE_CHECKING:
    from rich.console import RenderableType

_LOG_INTERVAL = 10.0  # seconds between two lines of a log
_BAR = 24  # columns
_LARGE = 1 << 28  # bytes of a file that take longer than a moment to read


@contextlib.contextmanager
def show_progress(*, as_json: bool, quiet: bool) -> Iterator[OnProgress]:
    """Yield a function for ``on_progress``, and show what is reported to it; a terminal is left clean at the end.

    Args:
        as_json: the result goes to a program: lines as in a log, for which rich is not imported.
    """
    if quiet or is_another_rank():
        yield ignore
        return
    work = _DrawnWork()
    with _draw(work) if sys.stderr.isatty() and not as_json else _log(work):
        yield work.update


@contextlib.contextmanager
def show_reading(paths: Sequence[os.PathLike[str]], *, as_json: bool, quiet: bool) -> Iterator[OnProgress]:
    """Show progress for work that reads files whole; nothing where they are small enough to be read at once."""
    if any(map(_is_large, paths)):
        with show_progress(as_json=as_json, quiet=quiet) as progress:
            yield progress
    else:
        yield ignore


def _is_large(location: os.PathLike[str]) -> bool:
    if not isinstance(location, Path):  # an address
        return True
    path = location
    try:
        return path.is_dir() or path.name.endswith(".index.json") or path.stat().st_size >= _LARGE
    except (OSError, ValueError):  # whatever opens it says so
        return False


class _DrawnWork(Work):
    """Work as rich draws it."""

    def __rich__(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        text = self.describe()
        if not text or self.is_short:
            return Text()
        share = self.share()
        # what turns shows that the work goes on
        sign = Spinner("dots") if share is None else ProgressBar(total=1, completed=share, width=_BAR)
        row = Table.grid(padding=(0, 1))
        row.add_row(sign, Text(text, no_wrap=True, overflow="ellipsis"))
        return row


@contextlib.contextmanager
def _draw(work: _DrawnWork) -> Iterator[None]:
    """Draw one line that follows the work; what the user's code prints appears above it."""
    from rich.live import Live

    from bntool.reports.terminal import make_console

    console = make_console(sys.stderr)
    if not console.is_interactive:  # a dumb terminal
        with _log(work):
            yield
        return
    out, err = sys.stdout, sys.stderr
    live = Live(work, console=console, transient=True, refresh_per_second=8)

    def restore() -> None:
        """Let a worker process write by itself: the lock of the console may be held by a thread that it does not
        have.
        """
        if live.is_started:
            sys.stdout, sys.stderr = out, err

    if hasattr(os, "register_at_fork"):  # Windows starts processes anew
        os.register_at_fork(after_in_child=restore)
    with live:
        yield


@contextlib.contextmanager
def _log(work: _DrawnWork) -> Iterator[None]:
    """Write a line every ten seconds."""
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
