"""Everything that bntool prints: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from bntool.reports.blocks import Cell, Line, Style
from bntool.reports.forms.form import ReportForm, draw
from bntool.reports.text import MAX_SENTENCE, sanitize

if TYPE_CHECKING:
    from bntool.checkpoints.checkpoint import Checkpoint
    from bntool.errors import BntoolError
    from bntool.reports.blocks import Block
    from bntool.reports.forms.problems import Problem
    from bntool.reports.report import Report

_LONGEST_PATH = 4096


def print_report(
    report: Report, *, form: ReportForm | None, quiet: bool = False, failing: Sequence[Problem] = ()
) -> None:
    """Print what a command did: in a form for programs, or as text that suits where it goes.

    Args:
        form: None for text.
        quiet: no text.
        failing: why the command ends with an exit code of 1; said on stderr where no text says it.
    """
    if form is not None:
        for piece in draw(report, form):
            _write(sys.stdout, piece)
    elif not quiet:
        shown = [blocks for blocks in (*(file.blocks for file in report.files), report.blocks) if blocks]
        for index, blocks in enumerate(shown):
            if index:
                _write(sys.stdout, "\n")
            print_blocks(blocks)
    for file in report.files:
        if file.error is not None:
            print_error(file.error)
    if quiet or (form is not None and not form.lists_problems and not form.takes_blocks):
        for problem in failing:
            place = sanitize(problem.file, limit=_LONGEST_PATH)
            _note(f"bntool: {problem.severity}: {place}: {sanitize(problem.sentence, limit=MAX_SENTENCE)}", Style.ERROR)


def print_blocks(blocks: Iterable[Block]) -> None:
    """Print blocks to stdout."""
    if is_drawn(sys.stdout):
        from bntool.reports import terminal

        _write(sys.stdout, terminal.draw(blocks, sys.stdout))
    else:
        from bntool.reports import plain

        _write(sys.stdout, plain.draw(blocks))


def print_written(path: Path | None, *, form: ReportForm | None, quiet: bool) -> None:
    """Print that a page was written beside what the command is for; nothing where none was."""
    if path is not None and form is None and not quiet:
        print_blocks([Line((Cell(f"wrote {path}", Style.GOOD),), verbatim=True)])


def print_error(error: BntoolError) -> None:
    """Print one sentence about what went wrong to stderr; a long path or name is shortened, so that the end of the
    sentence stays.
    """
    place = [sanitize(error.path, limit=_LONGEST_PATH)] if error.path else []
    place += [sanitize(error.tensor)] if error.tensor else []
    sentence = sanitize(error.sentence, limit=MAX_SENTENCE)
    _note(f"bntool: error: {': '.join([*place, sentence])}", Style.ERROR)


def print_warning(message: str) -> None:
    """Print one sentence that the user should not miss, to stderr."""
    _note(f"bntool: warning: {sanitize(message, limit=MAX_SENTENCE)}", Style.WARNING)


def print_notes(*checkpoints: Checkpoint, quiet: bool) -> None:
    """Print how files elsewhere were found and read, to stderr, where the report does not say it."""
    for checkpoint in checkpoints:
        for note in () if quiet else checkpoint.notes:
            print_note(f"{checkpoint.path}: {note}")


def print_note(message: str) -> None:
    """Print one sentence about what goes on, to stderr."""
    _note(f"bntool: {sanitize(message, limit=MAX_SENTENCE)}", Style.PLAIN)


def is_drawn(stream: TextIO) -> bool:
    """Return whether what goes to the stream is drawn by rich: for a terminal, or where FORCE_COLOR says so."""
    return stream.isatty() or bool(os.environ.get("FORCE_COLOR"))


def is_another_rank() -> bool:
    """Return whether this is one of several processes of a job, and not the one that answers for all."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def _note(text: str, style: Style) -> None:
    if is_drawn(sys.stderr):
        from bntool.reports import terminal

        _write(sys.stderr, terminal.draw([Line((Cell(text, style),), verbatim=True)], sys.stderr))
    else:
        _write(sys.stderr, text + "\n")


def flush_stdout() -> None:
    """Let out what was printed.

    Raises:
        UnwritableFileError: stdout cannot take it.
    """
    _write(sys.stdout, "")


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        # what is left in the buffer would raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough; the exit code is for others
            return
        from bntool.errors import UnwritableFileError  # a full disk

        raise UnwritableFileError(f"what was to be printed cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def user_output_to_stderr() -> Iterator[None]:
    """Send what the user's model and data code prints to stderr, also from C and from worker processes.

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
