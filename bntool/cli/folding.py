"""``bntool fold``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bntool.cli import completion, options
from bntool.cli.output import is_drawn, print_notes, print_report, print_written, user_output_to_stderr
from bntool.folding.options import Layout


def command(
    checkpoint: options.Checkpoint,
    model: options.ModelSpec = None,
    model_arg: options.ModelArguments = None,
    data: options.DataSpec = None,
    output: options.Output = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input-shape", metavar="N,C,H,W", help="Shape of an input.", show_default="some are tried"),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            "--pair",
            metavar="A=B",
            help="Declare that only BatchNorm B reads A, e.g. conv1=bn1, instead of tracing; @FILE holds one on each "
            "line. Repeatable.",
            show_default=False,
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="NAME",
            help="The architecture whose forward and eps are assumed where neither --model nor --pair is given: "
            "torchvision:NAME or timm:NAME.",
            show_default="recognised by names and shapes",
            autocompletion=completion.complete_architecture,
        ),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(
            "--eps",
            help="eps of the layers; no state dict holds it.",
            show_default="the model's, or the architecture's",
        ),
    ] = None,
    layout: Annotated[
        Layout,
        typer.Option(
            "--layout",
            help="folded: BatchNorms are gone, producers have biases. same-keys: BatchNorms stay and only add their "
            "shift; loads into unmodified code. deploy: parallel branches are one convolution; loads into the deploy "
            "model of RepVGG, MobileOne, RepViT and others.",
        ),
    ] = Layout.FOLDED,
    change_padding: Annotated[
        bool,
        typer.Option(
            "--change-padding",
            help="Let convolutions pad with other values than zeros where that lets BatchNorms fold (XCiT). "
            "The model then no longer fits its code: with --model and --export alone, not with -o.",
        ),
    ] = False,
    direct_only: Annotated[
        bool,
        typer.Option(
            "--direct-only",
            help="Fold only into the convolution or linear right before a BatchNorm; no other weight changes.",
        ),
    ] = False,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest difference of outputs, relative to the largest output.")
    ] = 1e-5,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export",
            metavar="FILE",
            help="Write the folded model as a program too, or without -o alone: FILE.pt2 (torch.export) or FILE.onnx, "
            "run and compared. Needs --model, and --input-shape or --data: all axes but the batch keep that shape.",
            show_default=False,
        ),
    ] = None,
    benchmark: Annotated[
        bool,
        typer.Option(
            "--benchmark",
            help="Measure how much faster the folded model is than the original: in turn, on the input of --data, "
            "--input-shape or the one that was tried. Needs --model; takes about 10 s.",
        ),
    ] = False,
    prototxt: options.Prototxt = None,
    keras_config: options.KerasConfig = None,
    device: options.Device = "cpu",
    layers: options.Layers = None,
    state_dict: options.StateDictKey = None,
    html: options.Html = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    strict: options.Strict = False,
    report_as: options.ReportAs = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Absorb BatchNorm layers into the convolutions and linears around them.

    One forward of the model shows what feeds what; a layer is folded only where that proves it exact, and is left alone
    with a reason otherwise. Outputs before and after are compared in float64 before anything is written.

    Without --model, architectures of torchvision and timm are recognised by the names and shapes of their tensors, also
    under a prefix such as backbone; their forward and eps are then assumed, which --strict refuses.

    Examples:

      bntool fold resnet50.pth -o folded.pth

      bntool fold ckpt.pt --model net.py:build -o folded.pt

      bntool fold ckpt.pt --model torchvision:resnet50 --layout same-keys -o folded.pt

      bntool fold ckpt.pt --model net.py:build --input-shape 2,3,224,224 --export folded.onnx

      bntool fold weights.safetensors --pair conv1=bn1 --eps 1e-5 -o folded.safetensors

      bntool fold weights.safetensors --pair @pairs.txt --eps 1e-5 -o folded.safetensors

      bntool fold model.onnx -o folded.onnx

      bntool fold model.keras -o folded.keras

      bntool fold net.caffemodel --prototxt net.prototxt -o folded.caffemodel
    """
    from bntool.cli.progress import show_progress
    from bntool.folding.checkpoint import fold_checkpoint
    from bntool.graphs.declared import read_pairs
    from bntool.models.assignments import parse_assignments
    from bntool.reports.folding import describe_fold, show_fold
    from bntool.reports.report import FileReport, Report

    form = options.choose_form(report_as, as_json=as_json)
    options.require_output(output, unless=dry_run or export is not None or change_padding)
    options.check_html(html, force=force, inputs=(checkpoint,), outputs=(output, export))
    options.check_specs(model, data)
    with user_output_to_stderr(), show_progress(as_json=form is not None, quiet=quiet) as progress:
        result = fold_checkpoint(
            checkpoint,
            output,
            model=model,
            model_arguments=parse_assignments(model_arg or ()),
            data=data,
            input_shape=input_shape,
            pairs=read_pairs(pair or ()),
            architecture=arch,
            eps=eps,
            layout=layout,
            change_padding=change_padding,
            direct_only=direct_only,
            tolerance=tolerance,
            export=export,
            benchmark=benchmark,
            prototxt=prototxt,
            keras_config=keras_config,
            device=device,
            layers=layers or (),
            state_dict=state_dict,
            dry_run=dry_run,
            force=force,
            strict=strict,
            on_progress=progress,
        )
    pictures = form is None and not quiet and is_drawn(sys.stdout)
    report = FileReport(str(checkpoint), describe_fold(result), show_fold(result, pictures=pictures))
    if html is not None:
        from bntool.reports.page.folding import make_fold_page
        from bntool.reports.page.writing import write_page

        write_page(make_fold_page(str(checkpoint), result), html, force=force)
    print_report(Report("fold", (report,)), form=form, quiet=quiet)
    print_notes(result.source, quiet=quiet)
    print_written(html, form=form, quiet=quiet)
    return 0
