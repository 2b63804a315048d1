"""``bntool freeze``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from bntool.cli import options
from bntool.cli.output import print_notes, print_report
from bntool.freezing.options import EmitTarget, FreezeForm


def command(
    checkpoint: options.Checkpoint,
    output: options.Output = None,
    norm_eval: Annotated[
        bool, typer.Option("--norm-eval/--no-norm-eval", help="Statistics stay: the layers are kept in eval mode.")
    ] = True,
    requires_grad: Annotated[
        Optional[bool],  # noqa: UP045 typer reads it at run time
        typer.Option(
            "--requires-grad/--no-requires-grad",
            help="Whether weight and bias of the layers train.",
            show_default="they train, as with mmdet's norm_eval=True",
        ),
    ] = None,
    frozen_stages: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--frozen-stages",
            metavar="N",
            help="Also freeze the first stages of the backbone whole, as mmdet does: 0 the stem, N up to stage N "
            "(ResNet, ResNeXt, RegNet, Darknet, CSPDarknet, MobileNetV2).",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        FreezeForm,
        typer.Option(
            "--as",
            help="policy: same tensors, what to freeze is recorded. constant: statistics become constants, folded into "
            "weight and bias.",
        ),
    ] = FreezeForm.POLICY,
    eps: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--eps",
            help="eps of the layers, for --as constant; no state dict holds it.",
            show_default="a recognised architecture's",
        ),
    ] = None,
    emit: Annotated[
        Optional[EmitTarget],  # noqa: UP045
        typer.Option(
            "--emit", help="Print code or configuration that freezes the same layers there.", show_default=False
        ),
    ] = None,
    prototxt: options.Prototxt = None,
    keras_config: options.KerasConfig = None,
    state_dict: options.StateDictKey = None,
    layers: options.Layers = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    strict: options.Strict = False,
    report_as: options.ReportAs = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Keep BatchNorm layers from changing while the model trains on.

    Two independent switches, named as in mmdet: --norm-eval keeps the statistics (the default), --no-requires-grad
    keeps weight and bias (by default these train). A file alone freezes nothing, because a state dict holds
    neither modes nor requires_grad: the command records what to freeze, and one line applies it to the model.

    Examples:

      bntool freeze ckpt.pt -o frozen.pt

      bntool freeze ckpt.pt -o frozen.pt --no-requires-grad --layers 'backbone.*' --frozen-stages 1

      bntool freeze ckpt.pt --emit python

      bntool freeze net.caffemodel --prototxt train_val.prototxt -o frozen.caffemodel

    Then, in your training script: bntool.apply_freeze(model, "frozen.pt"). After training, bntool diff --expect
    norm-eval proves that nothing moved.
    """
    from bntool.freezing.checkpoint import freeze_checkpoint
    from bntool.reports.freezing import describe_freeze, show_freeze
    from bntool.reports.report import FileReport, Report

    report_form = options.choose_form(report_as, as_json=as_json)
    options.require_output(output, unless=dry_run or emit is not None)
    result = freeze_checkpoint(
        checkpoint,
        None if dry_run else output,
        norm_eval=norm_eval,
        requires_grad=requires_grad,
        layers=layers or (),
        frozen_stages=frozen_stages,
        form=form,
        eps=eps,
        emit=emit,
        prototxt=prototxt,
        keras_config=keras_config,
        state_dict=state_dict,
        force=force,
        strict=strict,
    )
    report = FileReport(str(checkpoint), describe_freeze(result), show_freeze(result))
    print_report(Report("freeze", (report,)), form=report_form, quiet=quiet)
    print_notes(result.source, quiet=quiet)
    return 0
