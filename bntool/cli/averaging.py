"""``bntool average``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from bntool.checkpoints.addresses import as_location
from bntool.cli import options
from bntool.cli.globs import expand_globs
from bntool.cli.output import print_notes, print_report
from bntool.errors import UsageError


def command(
    checkpoints: options.Checkpoints,
    output: options.Output = None,
    weights: Annotated[
        Optional[str],  # noqa: UP045 typer reads it at run time
        typer.Option(
            "--weights",
            metavar="W,W,...",
            help="The weight of each file, e.g. 1,1,2; only their ratios count.",
            show_default="all the same",
        ),
    ] = None,
    statistics_from: Annotated[
        Optional[options.Location],  # noqa: UP045
        typer.Option(
            "--statistics-from",
            metavar="FILE",
            parser=as_location,
            help="Take the running statistics from this file.",
            show_default="pooled over all files",
        ),
    ] = None,
    state_dict: options.StateDictKey = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    report_as: options.ReportAs = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Average the weights of checkpoints of one model, and pool their running statistics.

    For the last epochs of a run (SWA), soups of fine-tuned models, rounds of federated training. Running statistics are
    pooled by the law of total variance, never averaged as numbers. They still belong to no model that was run, so the
    result is to be recalibrated; the command for that is printed.

    Examples:

      bntool average epoch_8.pt epoch_9.pt epoch_10.pt -o average.pt

      bntool average a.pt b.pt --weights 3,1 --statistics-from a.pt -o average.pt
    """
    from bntool.averaging.checkpoint import average_checkpoints
    from bntool.reports.averaging import describe_average, show_average
    from bntool.reports.report import FileReport, Report

    form = options.choose_form(report_as, as_json=as_json)
    options.require_output(output, unless=dry_run)
    checkpoints = expand_globs(checkpoints)
    average = average_checkpoints(
        checkpoints,
        None if dry_run else output,
        weights=None if weights is None else _parse_weights(weights),
        statistics_from=statistics_from,
        state_dict=state_dict,
        force=force,
    )
    report = FileReport(str(checkpoints[0]), describe_average(average), show_average(average))
    print_report(Report("average", (report,)), form=form, quiet=quiet)
    print_notes(*average.sources, quiet=quiet)
    return 0


def _parse_weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text!r} are not numbers with commas between them, as 1,1,2") from None
