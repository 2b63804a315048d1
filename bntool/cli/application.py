"""The commands as typer builds them, and the running of what arguments ask for."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Sequence
from typing import Annotated

import typer
from typer._click.core import Command as ClickCommand
from typer._click.exceptions import ClickException  # since 0.26 typer carries its own click
from typer._click.exceptions import UsageError as ClickUsageError

from bntool.cli.completion import prepare_bash
from bntool.cli.exit_codes import MEANINGS, ExitCode
from bntool.cli.help import Command, Group
from bntool.cli.output import flush_stdout
from bntool.errors import UsageError
from bntool.version import __version__

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


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """Return the application; importing the modules of its commands imports neither torch nor numpy.

    Args:
        arguments: where they begin with a command, it is the only one built: the others cost as much as a listing.
    """
    app = typer.Typer(
        name="bntool",
        cls=Group,
        help="Inspect, recalibrate, freeze and fold Batch Normalization in checkpoints.",
        epilog=f"Exit codes: {'; '.join(f'{code.value} {MEANINGS[code]}' for code in ExitCode)}.",
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


def run_command(arguments: Sequence[str], *, typed: Sequence[str] | None) -> int:
    """Run what the arguments ask for.

    Args:
        typed: words that a shell asks to go on with; None where none asks.

    Returns:
        The exit code.

    Raises:
        BntoolError: what the command raises; UsageError also for what is wrong with the arguments.
        KeyboardInterrupt: the command was interrupted.
    """
    command = _build_command(next(iter(arguments if typed is None else typed), ""))
    if typed is not None:
        prepare_bash()
    try:
        code = command.main(args=list(arguments), prog_name="bntool", standalone_mode=False)
    except ClickException as error:
        raise _describe(error) from error
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except SystemExit as end:  # how typer ends what it does for shells
        code = end.code
    except OSError:  # from help and versions, which click prints by itself
        flush_stdout()
        raise
    if code == ExitCode.INTERRUPTED:  # typer turns the exception into a code
        raise KeyboardInterrupt
    return int(code or ExitCode.DONE)


def find_checkpoint(arguments: Sequence[str]) -> str:
    """Return the one checkpoint that the arguments name, "" where they name none or several."""
    place = next((index for index, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    with contextlib.suppress(Exception):  # what is wrong with the arguments is said elsewhere
        command = _build_command(arguments[place]).commands[arguments[place]]  # type: ignore[attr-defined]
        given = command.make_context("", list(arguments[place + 1 :]), resilient_parsing=True).params
        several: list[object] = given.get("checkpoints") or []
        return str(given.get("checkpoint") or (several[0] if len(several) == 1 else ""))
    return ""


def _describe(error: ClickException) -> UsageError:
    """Say what click found wrong with the arguments, with a hint where to read on."""
    context = error.ctx if isinstance(error, ClickUsageError) else None
    hint = f" (see '{context.command_path} --help')" if context is not None else ""
    return UsageError(error.format_message().rstrip(".") + hint)
