"""Everything that bntool prints: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

from bntool.reports.text import MAX_SENTENCE, sanitize

if TYPE_CHECKING:
    from bntool.errors import BntoolError
    from bntool.reports.blocks import Block
    from bntool.reports.report import Report

_LONGEST_PATH = 4096


def print_report(report: Report, *, as_json: bool, quiet: bool = False) -> None:
    """Print what a command did: as JSON, or as text that fits where it goes."""
    if as_json:
        from bntool.reports.report import to_json

        _write(sys.stdout, to_json(report.to_document()) + "\n")
    elif not quiet:
        for index, file in enumerate(report.files):
            if index:
                _write(sys.stdout, "\n")
            print_blocks(file.blocks)
    for file in report.files:
        if file.error is not None:
            print_error(file.error)


def print_blocks(blocks: Iterable[Block]) -> None:
    """Print blocks to stdout."""
    from bntool.reports.tables import render

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    _write(sys.stdout, render(blocks, width=width, colour=wants_colour(sys.stdout)))


def print_error(error: BntoolError) -> None:
    """One sentence about what went wrong, to stderr: neither a long path nor a long name costs it its end."""
    place = [sanitize(error.path, limit=_LONGEST_PATH)] if error.path else []
    place += [sanitize(error.tensor)] if error.tensor else []
    sentence = sanitize(error.sentence, limit=MAX_SENTENCE)
    _note(f"bntool: error: {': '.join([*place, sentence])}", code="31")


def print_warning(message: str) -> None:
    """One sentence that the user should not miss, to stderr."""
    _note(f"bntool: warning: {sanitize(message, limit=MAX_SENTENCE)}", code="33")


def wants_colour(stream: TextIO) -> bool:
    """Colours on terminals, unless NO_COLOR is set or the terminal is dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _note(text: str, *, code: str) -> None:
    _write(sys.stderr, f"\x1b[{code}m{text}\x1b[0m\n" if wants_colour(sys.stderr) else text + "\n")


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk; what is left in the buffer would raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        from bntool.errors import UnwritableFileError

        raise UnwritableFileError(f"what was to be printed cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def user_output_to_stderr() -> Iterator[None]:
    """What the user's model and data code prints goes to stderr, also from C and from worker processes.

    The result must be alone on stdout.
    """
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no stdout at all
        kept = None
    try:
        if kept is not None:
            os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)
