"""The command line: its commands, and the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Annotated, TextIO

import typer
from typer._click.core import Command as ClickCommand
from typer._click.exceptions import ClickException, UsageError  # since 0.26 typer carries its own click

from bntool import errors
from bntool.checkpoints.outputs import list_written, remove_unfinished
from bntool.cli.completion import prepare_bash, read_typed_words
from bntool.cli.help import Command, Group
from bntool.cli.output import flush_stdout, is_another_rank, print_report, print_warning
from bntool.reports.forms.form import ReportForm
from bntool.reports.report import FileReport, Report
from bntool.version import __version__


class ExitCode(IntEnum):
    """The exit codes of the process; documented in docs/cli.md."""

    DONE = 0
    FINDINGS = 1
    USAGE = 2
    FILE = 3
    REFUSED = 4
    VERIFICATION = 5
    USER_CODE = 6
    INTERRUPTED = 130


_CODES: tuple[tuple[type[errors.BntoolError], ExitCode], ...] = (
    (errors.UsageError, ExitCode.USAGE),
    (errors.FileError, ExitCode.FILE),
    (errors.RefusedError, ExitCode.REFUSED),
    (errors.VerificationError, ExitCode.VERIFICATION),
    (errors.UserCodeError, ExitCode.USER_CODE),
    (errors.InterruptedRunError, ExitCode.INTERRUPTED),
)

# name on the command line -> module of this package with a function ``command``
COMMANDS = {
    "inspect": "inspection",
    "recalibrate": "recalibration",
    "freeze": "freezing",
    "fold": "folding",
    "diff": "comparison",
    "convert": "conversion",
    "average": "averaging",
    "explain": "explanation",
}

# dependencies that a listing does without: docs/install.md has the way without torch
_PACKAGES = ("torch", "numpy", "rich", "safetensors")

_EPILOG = (
    "Exit codes: 0 done; 1 findings at or above --fail-on, or --expect not met; 2 usage, or a package is missing; "
    "3 file unreadable, unsafe or unwritable; 4 refused; 5 verification failed, nothing written; 6 your model or data "
    "code raised; 130 interrupted."
)


def exit_code_of(error: errors.BntoolError) -> ExitCode:
    """Return the documented exit code of an error."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """Return the application; importing the modules of its commands imports neither torch nor numpy.

    Args:
        arguments: where they begin with a command, it is the only one built: the others cost as much as a listing.
    """
    app = typer.Typer(
        name="bntool",
        cls=Group,
        help="Inspect, recalibrate, freeze and fold Batch Normalization in checkpoints.",
        epilog=_EPILOG,
        rich_markup_mode=None,  # markup would swallow [a-c] in help texts
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_root)
    for name in [name for name in COMMANDS if [name] == list(arguments[:1])] or COMMANDS:
        app.command(name, cls=Command)(importlib.import_module(f"bntool.cli.{COMMANDS[name]}").command)
    return app


@functools.cache
def _build_command(first: str) -> ClickCommand:
    """Build the command that runs arguments beginning with ``first``; once, for programs that call :func:`main` several
    times.
    """
    return typer.main.get_command(build_app([first]))


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show versions, as a bug report needs them.",
            callback=lambda wanted: _print_versions() if wanted else None,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


def _print_versions() -> None:
    import platform
    from importlib import metadata

    parts = [f"bntool {__version__}", f"Python {platform.python_version()}", platform.platform(terse=True)]
    for package in ("torch", "numpy", "typer", "rich", "Pillow", "h5py", "onnx", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            parts.append(f"{package} {metadata.version(package)}")
    print(", ".join(parts))
    raise typer.Exit


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
    except ClickException as error:
        return _fail_usage(error, arguments)
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        return _fail(_explain_missing(error.name, arguments), arguments)
    except (typer.Abort, KeyboardInterrupt):
        return _fail(_clean_up(before), arguments)


def _run(arguments: Sequence[str], typed: Sequence[str] | None) -> int:
    """Run what the arguments ask for.

    Args:
        typed: words that a shell asks to go on with; None where none asks.
    """
    command = _build_command(next(iter(arguments if typed is None else typed), ""))
    if typed is not None:
        prepare_bash()
    with _losses_in_a_line(quiet=not {"-q", "--quiet"}.isdisjoint(arguments)):
        try:
            code = command.main(args=list(arguments), prog_name="bntool", standalone_mode=False)
        except SystemExit as end:  # how typer ends what it does for shells
            code = end.code
        except OSError:  # from help and versions, which click prints by itself
            flush_stdout()
            raise
    if code == ExitCode.INTERRUPTED:  # typer turns the exception into a code
        raise KeyboardInterrupt
    return int(code or ExitCode.DONE)


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
    checkpoint = _find_checkpoint(arguments)
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


def _find_checkpoint(arguments: Sequence[str]) -> str:
    """Return the one checkpoint that the arguments name, "" where they name none or several."""
    place = next((index for index, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    with contextlib.suppress(Exception):  # what is wrong with the arguments is said elsewhere
        command = _build_command(arguments[place]).commands[arguments[place]]  # type: ignore[attr-defined]
        given = command.make_context("", list(arguments[place + 1 :]), resilient_parsing=True).params
        several: list[object] = given.get("checkpoints") or []
        return str(given.get("checkpoint") or (several[0] if len(several) == 1 else ""))
    return ""


def _fail_usage(error: ClickException, arguments: Sequence[str]) -> ExitCode:
    """Print what click found wrong with the arguments, with a hint where to read on."""
    context = error.ctx if isinstance(error, UsageError) else None
    hint = f" (see '{context.command_path} --help')" if context is not None else ""
    return _fail(errors.UsageError(error.format_message().rstrip(".") + hint), arguments)
