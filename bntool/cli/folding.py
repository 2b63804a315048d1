"""``bntool fold``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bntool.cli import options
from bntool.cli.output import print_report, user_output_to_stderr
from bntool.folding.options import Layout

if TYPE_CHECKING:
    import torch

_BATCHES, _BATCH_SIZE = 3, 16  # of --data, to verify on


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
            "shift; loads into unmodified code.",
        ),
    ] = Layout.FOLDED,
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
    device: options.Device = "cpu",
    layers: options.Layers = None,
    state_dict: options.StateDictKey = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    strict: options.Strict = False,
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
    from bntool.checkpoints.formats import open_checkpoint
    from bntool.checkpoints.state_dicts import choose_state_dict
    from bntool.cli.exports import check_export, save_fold
    from bntool.cli.nets import deploy_net
    from bntool.cli.writing import check_output, check_plan
    from bntool.errors import RefusedError, UsageError
    from bntool.folding.checkpoint import fold_checkpoint
    from bntool.graphs.declared import read_pairs
    from bntool.reports.folding import describe_fold, show_fold
    from bntool.reports.report import FileReport, Report

    if not tolerance > 0:
        raise UsageError(f"--tolerance {tolerance} is no positive number")
    if benchmark and model is None:
        raise UsageError("--benchmark runs the model: give --model")
    with user_output_to_stderr(), open_checkpoint(checkpoint) as opened:
        if output is not None or export is None:
            check_output(opened, output, dry_run=dry_run, force=force)
        kind = None
        if export is not None:
            has_shape = input_shape is not None or data is not None
            kind = check_export(opened, export, output, model=model, has_shape=has_shape, force=force)
        source, net = deploy_net(opened, prototxt, None if dry_run else output, force=force)
        chosen = choose_state_dict(source, state_dict)
        if chosen.is_module and layout is Layout.FOLDED and (output is not None or export is None):
            raise RefusedError(
                "the file pickles whole modules, whose code still calls its BatchNorms: use --layout same-keys, or "
                "save model.state_dict() and fold that",
                path=checkpoint,
            )
        live = inputs = None
        if model is not None:
            from bntool.models.exported import check_has_layers
            from bntool.models.loading import load_model, parse_assignments
            from bntool.modules.loading import load_state

            live = load_model(model, arguments=parse_assignments(model_arg or ()))
            check_has_layers(live, model)
            load_state(live, chosen)
            live = live.to(device)
            inputs = _read_inputs(live, data, input_shape)
        result = fold_checkpoint(
            source,
            chosen,
            model=live,
            inputs=inputs or (),
            pairs=read_pairs(pair or ()),
            architecture=arch,
            layers=layers or (),
            layout=layout,
            eps=eps,
            tolerance=tolerance,
            export=kind,
            benchmark=benchmark,
        )
        check_plan(result.plan, checkpoint, strict=strict)
        if not dry_run:
            result = save_fold(result, output, net=net, export=export, tolerance=tolerance, force=force)
        written = None if dry_run or output is None else str(output)
        exported = None if dry_run or export is None else str(export)
        facts = describe_fold(result, output=written, export=exported)
        blocks = show_fold(result, chosen, output=written, export=exported)
    print_report(Report("fold", (FileReport(str(checkpoint), facts, blocks),)), as_json=as_json, quiet=quiet)
    return 0


def _read_inputs(model: torch.nn.Module, data: str | None, input_shape: str | None) -> list[Any]:
    """What to trace and verify on; empty where it is to be guessed."""
    from itertools import islice

    from bntool.data.batches import find_placement, move
    from bntool.data.loading import load_data
    from bntool.graphs.traced.inputs import make_input, parse_shape

    if data is not None:
        place, dtype = find_placement(model)
        batches = islice(load_data(data, batch_size=_BATCH_SIZE), _BATCHES)
        return [move(batch.inputs_for(model), device=place, dtype=dtype) for batch in batches]
    return [make_input(model, parse_shape(input_shape))] if input_shape is not None else []
