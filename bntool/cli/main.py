"""The command line as a function: the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import TextIO

from bntool import errors
from bntool.checkpoints.addresses import Location, as_location
from bntool.checkpoints.outputs import list_written, remove_unfinished
from bntool.cli.completion import read_typed_words
from bntool.cli.exit_codes import ExitCode, exit_code_of
from bntool.cli.output import is_another_rank, print_report, print_warning
from bntool.reports.forms.form import ReportForm
from bntool.reports.report import FileReport, Report

# dependencies that a listing does without: docs/install.md has the way without torch
_PACKAGES = ("torch", "numpy", "typer", "rich", "safetensors")


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments: without the name of the program.

    Returns:
        The exit code.
    """
    typed = read_typed_words()
    if not arguments and typed is None:
        main(["--help"])
        return ExitCode.USAGE
    before = len(list_written())
    try:
        return _run(arguments, typed)
    except errors.BntoolError as error:
        return _fail(error, arguments)
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        return _fail(_explain_missing(error.name, arguments), arguments)
    except KeyboardInterrupt:
        return _fail(_clean_up(before), arguments)


def _run(arguments: Sequence[str], typed: Sequence[str] | None) -> int:
    """Run what the arguments ask for.

    Args:
        typed: words that a shell asks to go on with; None where none asks.
    """
    with _losses_in_a_line(quiet=not {"-q", "--quiet"}.isdisjoint(arguments)):
        plain = read_plain_listing(arguments) if typed is None else None
        if plain is not None:
            from bntool.cli.listing import list_checkpoints

            paths, form = plain
            return list_checkpoints(paths, form=form)
        from bntool.cli.application import run_command

        return run_command(arguments, typed=typed)


def read_plain_listing(arguments: Sequence[str]) -> tuple[list[Location], ReportForm | None] | None:
    """Read ``inspect`` with paths and no option but ``--json``; None where typer has to read the arguments.

    That is what most people type, and typer alone takes as long to import as a checkpoint to be read.
    """
    places = [argument for argument in arguments[1:] if argument != "--json"]
    if arguments[:1] != ["inspect"] or not places or any(place.startswith("-") for place in places):
        return None
    form = ReportForm.JSON if "--json" in arguments else None
    return [as_location(place) for place in places], form


@contextlib.contextmanager
def _losses_in_a_line(*, quiet: bool) -> Iterator[None]:
    """Show each LossWarning as one line on stderr, and the warnings of others as ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", errors.LossWarning)
        show = warnings.showwarning

        def show_line(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, errors.LossWarning):
                show(message, category, filename, lineno, file, line)
            elif not quiet:
                print_warning(str(message))

        warnings.showwarning = show_line
        yield


def _explain_missing(package: str, arguments: Sequence[str]) -> errors.MissingExtraError:
    """Explain what to install where bntool was installed without one of its dependencies, as docs/install.md shows."""
    return errors.MissingExtraError(
        f"{' '.join(arguments[:1])} needs {package} here, which is not installed: pip install {package}"
    )


def _clean_up(before: int) -> errors.InterruptedRunError:
    """Remove temporary files that an interrupt left; the error says what had been written by then.

    Args:
        before: how many files the process had written before the command.
    """
    remove_unfinished()
    written = ", ".join(map(str, dict.fromkeys(list_written()[before:])))
    return errors.InterruptedRunError(f"interrupted; {written or 'nothing'} was written")


def _fail(error: errors.BntoolError, arguments: Sequence[str]) -> ExitCode:
    """Print the error in the form that was asked for."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    checkpoint = ""
    with contextlib.suppress(ModuleNotFoundError):  # typer, which reads what the arguments name
        from bntool.cli.application import find_checkpoint

        checkpoint = find_checkpoint(arguments)
    if checkpoint and isinstance(error, errors.RefusedError | errors.VerificationError):
        error.about(checkpoint)
    report = Report(command, (FileReport(error.path or checkpoint, error=error),))
    form = None if command == "recalibrate" and is_another_rank() else _find_form(arguments)
    print_report(report, form=form)
    return exit_code_of(error)


def _find_form(arguments: Sequence[str]) -> ReportForm | None:
    """Return the form that the arguments ask for, also where something is wrong with them; None for text."""
    given = [one.partition("=")[2] for one in arguments if one.startswith("--report=")]
    given += [after for one, after in itertools.pairwise(arguments) if one == "--report"]
    given += ["json"] * ("--json" in arguments)
    return next((form for form in ReportForm if form.value in given), None)
