"""``bntool diff``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from bntool.checkpoints.addresses import as_location
from bntool.cli import completion, options
from bntool.cli.output import print_report, print_written
from bntool.comparison.options import Expectation


def command(
    a: Annotated[
        options.Location,
        typer.Argument(
            metavar="A",
            help="The checkpoint from before, also an address as of inspect.",
            parser=as_location,
            show_default=False,
        ),
    ],
    b: Annotated[
        options.Location,
        typer.Argument(
            metavar="B", help="The checkpoint from after; any format.", parser=as_location, show_default=False
        ),
    ],
    expect: Annotated[
        Optional[Expectation],  # noqa: UP045 typer reads it at run time
        typer.Option(
            "--expect",
            help="Exit with 1 unless it is so. frozen: no tensor of a BatchNorm changed. norm-eval: no statistics "
            "changed. stats-only: nothing else changed. identical: nothing did.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List the layers that did not change, too.")] = False,
    state_dict: options.StateDictKey = None,
    state_dict_b: Annotated[
        Optional[str],  # noqa: UP045 typer reads it at run time
        typer.Option(
            "--state-dict-b",
            metavar="KEY",
            help="Which state dict of B, where its key is another one.",
            show_default="as in A",
            autocompletion=completion.complete_state_dict_b,
        ),
    ] = None,
    prefix: Annotated[
        Optional[str],  # noqa: UP045 typer reads it at run time
        typer.Option(
            "--prefix",
            metavar="PREFIX",
            help="Compare only what lies under it, such as net. where one state dict holds a model and its average.",
            show_default=False,
        ),
    ] = None,
    prefix_b: Annotated[
        Optional[str],  # noqa: UP045 typer reads it at run time
        typer.Option("--prefix-b", metavar="PREFIX", help="The same for B.", show_default="as in A, where B has it"),
    ] = None,
    layers: options.Layers = None,
    html: options.Html = None,
    force: options.ForceHtml = False,
    report_as: options.ReportAs = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Show what changed between two checkpoints, BatchNorm layers first, worst first.

    mean: the largest shift of a running_mean in standard deviations of A; var: running_var of B over A where it moved
    most; scale and shift: what the layer does in eval mode, as vectors, relative to A. All other tensors are compared
    byte by byte.

    Examples:

      bntool diff before.pt after.pt

      bntool diff pretrained.pt epoch_12.pth --expect norm-eval --layers 'backbone.*'

      bntool diff drifted.pt recalibrated.pt --expect stats-only

      bntool diff ckpt.pt ckpt.pt --state-dict model --state-dict-b model_ema

      bntool diff ckpt.pt ckpt.pt --prefix net. --prefix-b ema.

      bntool diff mmcv.pth mmcv.pth --prefix-b ema_

      bntool diff frozen.pt fine_tuned.pt --expect frozen

    The last one holds the layers against each other that bntool freeze recorded in frozen.pt.
    """
    from bntool.cli.exit_codes import ExitCode
    from bntool.cli.progress import show_reading
    from bntool.comparison.checkpoint import diff
    from bntool.reports.comparison import describe_comparison, show_comparison
    from bntool.reports.forms.problems import list_problems
    from bntool.reports.report import FileReport, Report

    form = options.choose_form(report_as, as_json=as_json, judges=True)
    options.check_html(html, force=force, inputs=(a, b))
    with show_reading((a, b), as_json=form is not None, quiet=quiet) as progress:
        comparison = diff(
            a,
            b,
            state_dict=state_dict,
            state_dict_b=state_dict_b,
            prefix=prefix,
            prefix_b=prefix_b,
            layers=layers or (),
            expect=expect,
            on_progress=progress,
        )
    facts = describe_comparison(comparison, path_b=str(b))
    blocks = show_comparison(comparison, path_a=str(a), path_b=str(b), every=every)
    if html is not None:
        from bntool.reports.page.comparison import make_comparison_page
        from bntool.reports.page.writing import write_page

        write_page(make_comparison_page(comparison, path_a=str(a), path_b=str(b)), html, force=force)
    report = Report("diff", (FileReport(str(a), facts, blocks),))
    print_report(report, form=form, quiet=quiet, failing=list_problems(report))
    print_written(html, form=form, quiet=quiet)
    return ExitCode.FINDINGS if comparison.violations else ExitCode.DONE
