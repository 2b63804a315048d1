"""``bntool convert``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from bntool.cli import options
from bntool.cli.output import print_report
from bntool.conversion.options import ConversionTarget, FrozenKind


def command(
    checkpoint: options.Checkpoint,
    to: Annotated[
        ConversionTarget,
        typer.Option(
            "--to",
            help="safetensors, torch: another file format. frozen-batchnorm: the keys of FrozenBatchNorm2d. batchnorm: "
            "back, or only adds a missing num_batches_tracked.",
            show_default=False,
        ),
    ],
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
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Convert between file formats, or between BatchNorm and FrozenBatchNorm2d.

    What cannot survive is listed before anything is written, and refused with --strict. What the target has no place
    for is recorded where that is possible, so that the way back loses nothing.

    Examples:

      bntool convert ckpt.pt --to safetensors -o ckpt.safetensors

      bntool convert ckpt.pt --to frozen-batchnorm --eps 1e-5 -o frozen.pt

      bntool convert frozen.pt --to batchnorm -o back.pt
    """
    from bntool.checkpoints.application import apply_plan
    from bntool.checkpoints.creation import create_file
    from bntool.checkpoints.formats import open_checkpoint
    from bntool.cli.output import print_warning
    from bntool.cli.writing import check_place, check_plan, save
    from bntool.conversion.checkpoint import plan_conversion
    from bntool.errors import RefusedError
    from bntool.reports.conversion import describe_conversion, show_conversion
    from bntool.reports.loading import show_loading_code
    from bntool.reports.report import FileReport, Report

    with open_checkpoint(checkpoint) as source:
        check_place(source, output, dry_run=dry_run, force=force)
        conversion = plan_conversion(
            source,
            to,
            state_dict=state_dict,
            layers=layers or (),
            eps=eps,
            frozen_kind=kind,
            target_eps=target_eps,
        )
        if conversion.new is None:
            check_plan(conversion.plan, checkpoint, strict=strict)
        if strict and conversion.losses:
            raise RefusedError(f"--strict: this would be lost: {conversion.losses[0]}", path=checkpoint)
        if not (as_json or quiet):
            for loss in conversion.losses:
                print_warning(f"this will be lost: {loss}")
        loading: list[str] = []
        if not dry_run and output is not None:
            if conversion.new is not None and conversion.new_format is not None:
                create_file(conversion.new, conversion.new_format, output, source=source, force=force)
            else:
                save(apply_plan(source, conversion.plan), output, force=force)
            with open_checkpoint(output) as written:
                key = "" if conversion.new is not None else conversion.plan.state_dict
                loading = show_loading_code(written, written.state_dict(key), str(output))
        done = None if dry_run else str(output)
        facts = describe_conversion(source, conversion, output=done)
        blocks = show_conversion(source, conversion, output=done, loading=loading)
    print_report(Report("convert", (FileReport(str(checkpoint), facts, blocks),)), as_json=as_json, quiet=quiet)
    return 0
