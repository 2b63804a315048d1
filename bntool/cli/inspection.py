"""``bntool inspect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bntool.cli import options
from bntool.cli.output import is_drawn, print_report, print_written
from bntool.inspection.findings import Severity


def command(
    checkpoints: options.Checkpoints,
    state_dict: options.StateDictKey = None,
    layers: options.Layers = None,
    all_tensors: Annotated[
        bool, typer.Option("--all", help="List every layer with its parameters and buffers, not only BatchNorm.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="List every tensor, with its minimum, mean and maximum.")
    ] = False,
    fail_on: Annotated[
        Severity | None,
        typer.Option(
            "--fail-on", help="Exit with 1 if there is a finding of this severity or worse.", show_default=False
        ),
    ] = None,
    verify_crc: Annotated[
        bool, typer.Option("--verify-crc", help="Hold every byte against the checksums of the file (reads all of it).")
    ] = False,
    prototxt: Annotated[
        Path | None,
        typer.Option(
            "--prototxt",
            metavar="NET",
            help="The .prototxt that a .caffemodel is run by; its eps wins.",
            show_default=False,
        ),
    ] = None,
    html: options.Html = None,
    force: options.ForceHtml = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Show what the BatchNorm layers of a checkpoint hold, and what is wrong with them.

    Nothing in the file is executed, whatever it is; torch is not needed for it either.

    Examples:

      bntool inspect ckpt.pt

      bntool inspect ckpt.pt --layers 'backbone.layer3.*' --json

      bntool inspect *.pt --fail-on error --quiet

      bntool inspect ckpt.pt --html page.html

      bntool inspect net.caffemodel --prototxt deploy.prototxt

    Findings are marked X (error), ! (warning) and i (notice); docs/findings.md says what each means and what to do.
    """
    from bntool.cli.main import ExitCode, exit_code_of
    from bntool.errors import BntoolError, UsageError
    from bntool.inspection.checkpoint import inspect
    from bntool.reports.inspection import describe_inspection, show_inspection
    from bntool.reports.report import FileReport, Report

    options.check_html(html, force=force, inputs=checkpoints)
    if html is not None and len(checkpoints) > 1:
        raise UsageError("--html takes one file")
    reports, code, every = [], ExitCode.DONE, all_tensors or stats
    for path in checkpoints:
        try:
            inspection = inspect(
                path,
                state_dict=state_dict,
                layers=layers or (),
                every_tensor=all_tensors,
                statistics=stats,
                verify_checksums=verify_crc,
                prototxt=prototxt,
            )
        except BntoolError as error:
            reports.append(FileReport(str(path), error=error.about(path)))
            code = max(code, exit_code_of(error))
            continue
        facts = describe_inspection(inspection, every_tensor=every) if as_json else {}
        shown = show_inspection(
            str(path), inspection, every_layer=all_tensors or not is_drawn(sys.stdout), every_tensor=every
        )
        blocks = () if as_json or quiet else tuple(shown)
        reports.append(FileReport(str(path), facts=facts, blocks=blocks))
        if html is not None:
            from bntool.reports.page.inspection import make_inspection_page
            from bntool.reports.page.writing import write_page

            write_page(make_inspection_page(str(path), inspection), html, force=force)
        if fail_on is not None and inspection.fails_on(fail_on):
            code = max(code, ExitCode.FINDINGS)
    print_report(Report("inspect", tuple(reports)), as_json=as_json, quiet=quiet)
    print_written(html, as_json=as_json, quiet=quiet)
    return code
