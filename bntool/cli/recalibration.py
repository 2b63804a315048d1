"""``bntool recalibrate``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from bntool.cli import options
from bntool.cli.help import JUDGING, MODEL
from bntool.cli.output import print_report, user_output_to_stderr
from bntool.data.policies import OnBadData
from bntool.recalibration.options import Method, Precision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from bntool.checkpoints.checkpoint import StateDict

_WITHOUT_LABELS = 512  # samples looked at for changed predictions where there is nothing to count as right


def command(  # noqa: PLR0915 a third of the statements are imports
    checkpoint: options.Checkpoint,
    model: options.ModelSpec = None,
    model_arg: options.ModelArguments = None,
    data: options.DataSpec = None,
    output: options.Output = None,
    method: Annotated[
        Method,
        typer.Option(
            "--method",
            help="pooled: each batch is normalised by its own statistics. exact: what eval mode sees, whatever the "
            "batches. paper: Algorithm 2 of Ioffe and Szegedy.",
        ),
    ] = Method.POOLED,
    samples: Annotated[
        str | None,
        typer.Option(
            "--samples",
            metavar="N",
            help="Use so many samples; auto: as many as fit into memory, for --method exact.",
            show_default="all",
            rich_help_panel=MODEL,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Samples of a batch.", min=1, rich_help_panel=MODEL)
    ] = 64,
    seed: Annotated[
        int, typer.Option("--seed", help="Order of the samples, and which of them are used.", rich_help_panel=MODEL)
    ] = 0,
    workers: Annotated[
        int, typer.Option("--workers", help="Processes that read data.", min=0, rich_help_panel=MODEL)
    ] = 0,
    preprocess: Annotated[
        str | None,
        typer.Option(
            "--preprocess",
            metavar="STEPS",
            help="For images and pixels: imagenet, inception, clip, cifar10, cifar100, mnist, normalize, scale, or "
            "steps: resize=40,crop=32,mean=0.5,std=0.2; or a preset and changes: imagenet,resize=232.",
            show_default="what torchvision: or timm: say of the model",
            rich_help_panel=MODEL,
        ),
    ] = None,
    prior: Annotated[
        float, typer.Option("--prior", metavar="N", help="Count the old statistics as N samples.", min=0)
    ] = 0.0,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval-data",
            metavar="SPEC",
            help="Labelled data to measure before and after on.",
            show_default="--data",
            rich_help_panel=JUDGING,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="METRIC",
            help="top1, top5 or FILE.py:function of all outputs and labels; larger is better.",
            show_default="top1, where there are class labels",
            rich_help_panel=JUDGING,
        ),
    ] = None,
    keep_if_better: Annotated[
        bool,
        typer.Option(
            "--keep-if-better", help="Write only if the metric is better than before.", rich_help_panel=JUDGING
        ),
    ] = False,
    on_bad_data: Annotated[
        OnBadData,
        typer.Option(
            "--on-bad-data", help="Unreadable images, and batches with NaN: stop, or skip them.", rich_help_panel=MODEL
        ),
    ] = OnBadData.STOP,
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision",
            help="bfloat16: run the model under autocast. Faster where the processor has instructions for it; the "
            "statistics are approximate.",
        ),
    ] = Precision.MODEL,
    promote: Annotated[
        bool, typer.Option("--promote", help="Store statistics that half precision cannot hold as float32.")
    ] = False,
    device: options.Device = "cpu",
    layers: options.Layers = None,
    state_dict: options.StateDictKey = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    strict: options.Strict = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Recompute the running statistics of BatchNorm layers from data.

    For checkpoints whose statistics are missing, damaged, or of other data than the model will see: after weight
    averaging, pruning, a change of domain; or for a model that is good in train mode and terrible in eval mode
    (--dry-run shows which layer is to blame). Weights stay as they are. It can also hurt: compare before and after.

    Examples:

      bntool recalibrate ckpt.pt --model net.py:build --data images.npz -o out.pt

      bntool recalibrate ckpt.pt --model timm:resnet50 --data photos/ -o out.pt

      bntool recalibrate ckpt.pt --model net.py:build --data data.py:loader --dry-run
    """
    from functools import partial

    import torch

    from bntool.checkpoints.application import apply_plan
    from bntool.checkpoints.formats import open_checkpoint
    from bntool.checkpoints.records import make_record
    from bntool.checkpoints.state_dicts import choose_state_dict
    from bntool.cli.progress import Progress
    from bntool.cli.writing import check_output, check_plan, save
    from bntool.data.loading import load_data
    from bntool.data.preprocessing import PRESETS, parse_preprocessing
    from bntool.data.presets import find_model_preset
    from bntool.errors import UsageError
    from bntool.modules.loading import load_state
    from bntool.recalibration.dtype_limits import fit_plan, list_promoted
    from bntool.recalibration.evaluation import count_flipped, evaluate, is_better, parse_metric
    from bntool.recalibration.live import check_live_statistics, plan_recalibration
    from bntool.recalibration.output_changes import measure_output_changes
    from bntool.recalibration.ranks import join_job
    from bntool.recalibration.warnings import (
        counts_other_classes,
        warn_of_fewer,
        warn_of_globs,
        warn_of_judging,
        warn_of_precision,
    )
    from bntool.reports.loading import show_loading_code
    from bntool.reports.recalibration import Outcome, describe_recalibration, show_recalibration
    from bntool.reports.report import FileReport, Report

    if model is None or data is None:
        raise UsageError("recalibrate runs the model on data: give --model SPEC and --data SPEC")
    with user_output_to_stderr(), join_job() as ranks, open_checkpoint(checkpoint) as source:
        check_output(source, output, dry_run=dry_run, force=force)
        chosen = choose_state_dict(source, state_dict)
        torch.manual_seed(seed)  # user code that draws random numbers gives the same, run after run and on every rank
        live = _load_model(model, model_arg or (), device, chosen)
        _check_selection(live, layers or (), checkpoint, strict=strict)
        suggested = find_model_preset(model, live)
        presets = PRESETS if suggested is None else {**PRESETS, "model": suggested}
        steps = parse_preprocessing(preprocess, presets=presets) if preprocess else None
        read = partial(
            load_data,
            batch_size=batch_size,
            workers=workers,
            preprocessing=steps,
            model_preprocessing=suggested,
            on_bad_data=on_bad_data,
        )
        wanted, fit_memory = _parse_samples(samples), samples == "auto"
        batches = read(data, samples=wanted, seed=seed, share=(ranks.rank, ranks.world))
        held_out = read(eval_data) if eval_data else read(data, samples=wanted, seed=seed)
        if held_out.has_labels is False:
            if keep_if_better:
                raise UsageError("--keep-if-better needs labels: give --eval-data with labels")
            held_out = read(eval_data or data, samples=_WITHOUT_LABELS)
        judge = partial(evaluate, live, metric=parse_metric(metric), on_bad_data=on_bad_data)
        leads = ranks.rank == 0  # one of several processes judges and writes
        show = leads and not (as_json or quiet)
        with Progress("before", held_out.samples, enabled=show) as progress:
            before = judge(held_out, on_progress=progress) if leads else None
        with Progress(f"{method.value} statistics", batches.samples, enabled=show) as progress:
            result = plan_recalibration(
                live,
                batches,
                layers=layers or (),
                method=method,
                prior=prior,
                on_bad_data=on_bad_data,
                on_progress=progress,
                fit_memory=fit_memory,
                precision=precision,
            )
        check_plan(result.plan, checkpoint, strict=strict)
        if before is None:
            return 0
        if keep_if_better and counts_other_classes(before, held_out):
            raise UsageError(
                f"--keep-if-better needs labels of the model: there are {len(held_out.classes or ())} class folders, "
                f"but the model has {before.outputs} outputs"
            )
        plan = fit_plan(result.plan, chosen, promote=promote)
        check_live_statistics(live, result)
        output_changes = measure_output_changes(live, held_out, result)
        if source.format.can_record(source, chosen):
            facts = {"method": method.value, "prior": prior, "data": data, "seed": seed}
            if precision is not Precision.MODEL:
                facts["precision"] = precision.value
            if batches.preprocessing is not None:
                facts["preprocessing"] = batches.preprocessing.describe()
            plan = plan.with_record(make_record(plan, **facts, samples=result.samples, batches=result.batches))
        edited = apply_plan(source, plan)
        # the model is given what will be in the file, so that what is judged is what is written
        load_state(live, edited.state_dict(chosen.key))
        with Progress("after", held_out.samples, enabled=show) as progress:
            after = judge(held_out, on_progress=progress)
        kept = keep_if_better and not is_better(before, after)
        written = str(output) if not dry_run and not kept else None
        outcome = Outcome(
            recalibration=result,
            before=before,
            after=after,
            flipped=count_flipped(before, after),
            output_changes=output_changes,
            evaluated_on=eval_data or f"{data} (the calibration data)",
            output=written,
            kept=kept,
            preprocessing=batches.preprocessing,
            promoted=list_promoted(plan),
            loading=tuple(show_loading_code(edited, chosen, str(output))),
            warnings=(
                *warn_of_fewer(result, asked=wanted, there=batches.samples, cut=fit_memory and ranks.world == 1),
                *warn_of_globs(live, layers or ()),
                *warn_of_precision(live, precision),
                *warn_of_judging(before, held_out, fair=not keep_if_better or bool(eval_data), apart=bool(eval_data)),
            ),
        )
        report = FileReport(str(checkpoint), describe_recalibration(outcome), show_recalibration(outcome))
        if written is not None:
            save(edited, output, force=force)
    print_report(Report("recalibrate", (report,)), as_json=as_json, quiet=quiet)
    return 0


def _load_model(spec: str, arguments: Sequence[str], device: str, chosen: StateDict) -> torch.nn.Module:
    from bntool.errors import UsageError
    from bntool.models.exported import check_has_layers
    from bntool.models.loading import load_model, parse_assignments
    from bntool.modules.loading import load_state

    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device == "meta":
        raise UsageError("--device meta computes nothing")
    live = load_model(spec, arguments=parse_assignments(arguments))
    check_has_layers(live, spec)
    load_state(live, chosen)
    try:
        return live.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"the model cannot be moved to --device {device}: {' '.join(str(error).split())}") from error


def _check_selection(live: torch.nn.Module, layers: Sequence[str], checkpoint: Path, *, strict: bool) -> None:
    """Refuse what would recalibrate no layer before anything is measured.

    Raises:
        RefusedError: as :func:`bntool.cli.writing.check_plan`.
    """
    from bntool.cli.writing import check_plan
    from bntool.modules.finding import find_wrapper_prefix
    from bntool.plan import Operation, Plan
    from bntool.recalibration.layers import choose_layers

    selected, skips = choose_layers(live, layers, prefix=find_wrapper_prefix(live))
    if not selected:
        check_plan(Plan(Operation.RECALIBRATE, skips=tuple(skips)), checkpoint, strict=strict)


def _parse_samples(text: str | None) -> int | None:
    from bntool.errors import UsageError

    if text is None or text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--samples {text!r}: give a number of at least 1, or auto")
    return int(text)
