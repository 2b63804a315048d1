"""``bntool explain``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from bntool.cli import completion, options
from bntool.cli.output import print_report


def command(
    code: Annotated[
        Optional[str],  # noqa: UP045 typer reads it at run time
        typer.Argument(
            metavar="[CODE]",
            help="A finding, skip reason or exit code.",
            show_default="list all",
            autocompletion=completion.complete_code,
        ),
    ] = None,
    report_as: options.ReportAs = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Say what a finding, a skip reason or an exit code means, and what to do.

    Examples:

      bntool explain

      bntool explain counter-low

      bntool explain 'shared output'

      bntool explain 4
    """
    from bntool.reports.explanations import (
        describe_explanations,
        explain,
        list_explanations,
        show_codes,
        show_explanations,
    )
    from bntool.reports.report import FileReport, Report

    form = options.choose_form(report_as, as_json=as_json)
    found = list_explanations() if code is None else explain(code)
    blocks = show_codes(found) if code is None else show_explanations(found)
    report = FileReport(found[0].page, describe_explanations(found), blocks)
    print_report(Report("explain", (report,)), form=form, quiet=quiet)
    return 0
