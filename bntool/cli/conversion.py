"""``bntool convert``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Optional

import typer

from bntool.cli import options
from bntool.cli.output import print_notes, print_report
from bntool.conversion.options import ConversionTarget, FrozenKind


def command(
    checkpoint: options.Checkpoint,
    to: Annotated[
        Optional[ConversionTarget],  # noqa: UP045 typer reads it at run time
        typer.Option(
            "--to",
            help="safetensors, torch: another file format. frozen-batchnorm: the keys of FrozenBatchNorm2d. batchnorm: "
            "back, or only adds a missing num_batches_tracked.",
            show_default=False,
        ),
    ] = None,
    strip_prefix: Annotated[
        str,
        typer.Option("--strip-prefix", metavar="P", help="Take P off the names, e.g. module.", show_default=False),
    ] = "",
    add_prefix: Annotated[
        str, typer.Option("--add-prefix", metavar="P", help="Put P before all names.", show_default=False)
    ] = "",
    rename: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--rename",
            metavar="OLD=NEW",
            help="Rename a module with all below it, or a tensor. Repeatable.",
            show_default=False,
        ),
    ] = None,
    output: options.Output = None,
    eps: Annotated[
        Optional[float],  # noqa: UP045 typer reads it at run time
        typer.Option(
            "--eps",
            help="eps of the layers, where the file does not say it.",
            show_default="a recognised architecture's",
        ),
    ] = None,
    kind: Annotated[
        FrozenKind, typer.Option("--for", help="Whose FrozenBatchNorm2d it will be.")
    ] = FrozenKind.TORCHVISION,
    target_eps: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--target-eps", help="eps that its layers will be built with.", show_default="1e-05"),
    ] = None,
    state_dict: options.StateDictKey = None,
    layers: options.Layers = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    strict: options.Strict = False,
    report_as: options.ReportAs = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Convert between file formats, or between BatchNorm and FrozenBatchNorm2d, and rename tensors.

    What cannot survive is listed, by --dry-run before anything is written, and refused with --strict. What the target
    has no place for is recorded where that is possible, so that the way back loses nothing. Without --to the format
    is the one that the name of OUT says, .safetensors or .pt.

    Examples:

      bntool convert ckpt.pt -o ckpt.safetensors

      bntool convert ckpt.pt --to frozen-batchnorm --eps 1e-5 -o frozen.pt

      bntool convert frozen.pt --to batchnorm -o back.pt

      bntool convert ddp.pt --strip-prefix module. --rename backbone=encoder -o plain.pt
    """
    from bntool.conversion.checkpoint import convert
    from bntool.reports.conversion import describe_conversion, show_conversion
    from bntool.reports.report import FileReport, Report

    form = options.choose_form(report_as, as_json=as_json)
    options.require_output(output, unless=dry_run)
    conversion = convert(
        checkpoint,
        None if dry_run else output,
        to=to,
        strip_prefix=strip_prefix,
        add_prefix=add_prefix,
        renames=_parse_renames(rename or ()),
        eps=eps,
        frozen_kind=kind,
        target_eps=target_eps,
        layers=layers or (),
        state_dict=state_dict,
        force=force,
        strict=strict,
    )
    report = FileReport(str(checkpoint), describe_conversion(conversion), show_conversion(conversion))
    print_report(Report("convert", (report,)), form=form, quiet=quiet)
    print_notes(conversion.source, quiet=quiet)
    return 0


def _parse_renames(texts: Sequence[str]) -> dict[str, str]:
    from bntool.errors import UsageError

    found = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not (old and equals and new) or old in found:
            raise UsageError(f"--rename {text!r} is not of the form OLD=NEW, or renames a second time")
        found[old] = new
    return found
