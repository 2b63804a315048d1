"""``bntool recalibrate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer._click.core import ParameterSource

from bntool.cli import completion, options
from bntool.cli.globs import match_glob
from bntool.cli.help import JUDGING, MODEL, SHARES
from bntool.cli.output import print_note, print_notes, print_report, print_written, user_output_to_stderr
from bntool.data.columns import Columns
from bntool.data.policies import OnBadData
from bntool.errors import UsageError
from bntool.progress import Progress, ignore
from bntool.recalibration.options import (
    DataOptions,
    JudgingOptions,
    Method,
    MethodOptions,
    Precision,
    ShareOptions,
)

if TYPE_CHECKING:
    from bntool.recalibration.partials import Partial
    from bntool.recalibration.results import CheckpointRecalibration
    from bntool.reports.forms.form import ReportForm

# the parameters that act where partials are merged
_MERGING = {
    *("checkpoint", "from_partials", "output", "prior", "promote", "layers", "state_dict"),
    *("html", "dry_run", "force", "strict", "report_as", "as_json", "quiet"),
}


def command(
    context: typer.Context,
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
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Memory for activations with --method exact, e.g. 2GB: what does not fit waits in a file.",
            show_default="all there is, and no file",
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
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            help="Processes that read data beside this one; results do not depend on it.",
            show_default="one for each core where images are decoded, else none",
            min=0,
            rich_help_panel=MODEL,
        ),
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(
            "--preprocess",
            metavar="STEPS",
            help="For images and pixels: imagenet, inception, clip, cifar10, cifar100, mnist, normalize, scale, or "
            "steps: resize=40,crop=32,mean=0.5,std=0.2; or a preset and changes: imagenet,resize=232.",
            show_default="what torchvision: or timm: say of the model",
            rich_help_panel=MODEL,
            autocompletion=completion.complete_preprocessing,
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--inputs",
            metavar="NAME",
            help="The column, array or file of a sample that holds the input, as jpg or pixels.",
            show_default="found",
            rich_help_panel=MODEL,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="NAME",
            help="The one that holds the label; none: there are none, and subfolders are no classes.",
            show_default="found",
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
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="K/N",
            help="Measure the K-th of N shares of the batches only, for --partial.",
            show_default=False,
            rich_help_panel=SHARES,
        ),
    ] = None,
    partial: Annotated[
        Path | None,
        typer.Option(
            "--partial",
            metavar="FILE",
            help="Write what was measured to this file, a safetensors file, instead of new statistics.",
            show_default=False,
            rich_help_panel=SHARES,
        ),
    ] = None,
    from_partials: Annotated[
        list[str] | None,
        typer.Option(
            "--from-partials",
            metavar="GLOB",
            help="Merge the partials of all shards, without model and data: the output is that of one run. Repeatable.",
            show_default=False,
            rich_help_panel=SHARES,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="FILE",
            help="Keep what is measured in this file; the same command goes on from it after it was killed.",
            show_default=False,
            rich_help_panel=SHARES,
        ),
    ] = None,
    resume_every: Annotated[
        float,
        typer.Option(
            "--resume-every", metavar="SECONDS", help="How often it is written.", min=0, rich_help_panel=SHARES
        ),
    ] = 30.0,
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
    """Recompute the running statistics of BatchNorm layers from data.

    For checkpoints whose statistics are missing, damaged, or of other data than the model will see: after weight
    averaging, pruning, a change of domain; or for a model that is good in train mode and terrible in eval mode
    (--dry-run shows which layer is to blame). Weights stay as they are. It can also hurt: compare before and after.

    Examples:

      bntool recalibrate ckpt.pt --model net.py:build --data images.npz -o out.pt

      bntool recalibrate ckpt.pt --model timm:resnet50 --data photos/ -o out.pt

      bntool recalibrate ckpt.pt --model net.py:build --data data.py:loader --dry-run

      bntool recalibrate ckpt.pt --model net.py:build --data photos/ --shard 3/64 --partial part-3.safetensors

      bntool recalibrate ckpt.pt --from-partials 'part-*' -o out.pt
    """
    from bntool.checkpoints.checkpoint import check_changeable
    from bntool.checkpoints.formats import open_checkpoint
    from bntool.checkpoints.saving import check_output
    from bntool.cli.progress import show_progress
    from bntool.models.assignments import parse_assignments

    form = options.choose_form(report_as, as_json=as_json)
    target = None if dry_run else output
    writing: Any = {"layers": layers or (), "state_dict": state_dict, "force": force, "strict": strict}
    if from_partials:
        _refuse_with_partials(context)
        options.require_output(output, unless=dry_run)
        options.check_html(html, force=force, inputs=(checkpoint,), outputs=(output,))
        from bntool.recalibration.merging import merge_statistics

        merged = merge_statistics(checkpoint, _expand(from_partials), target, prior=prior, promote=promote, **writing)
        _print(checkpoint, merged, html=html, force=force, form=form, quiet=quiet)
        return 0
    model, data = _require_model_and_data(checkpoint, model, data)
    sharing = ShareOptions(shard=shard, partial=partial, resume=resume, resume_every=resume_every)
    options.require_output(output, unless=dry_run or sharing.is_share)
    if (dry_run or html is not None) and partial is not None:
        raise UsageError("--partial is all that is written: it does not go with --dry-run or --html")
    options.check_html(html, force=force, inputs=(checkpoint,), outputs=(output,))
    options.check_specs(model, data, eval_data)
    reading = DataOptions(
        samples=_parse_samples(samples), batch_size=batch_size, seed=seed, workers=workers, on_bad_data=on_bad_data
    )
    how = MethodOptions(
        method=method, precision=precision, memory=memory, fit_memory=samples == "auto", prior=prior, promote=promote
    )
    arguments = parse_assignments(model_arg or ())
    with open_checkpoint(checkpoint) as source:  # what is wrong with the files is said before torch is imported
        check_changeable(source)
        check_output(source, partial or target, force=force, keeps_format=partial is None)
        with user_output_to_stderr(), show_progress(as_json=form is not None, quiet=quiet) as progress:
            progress(Progress("importing torch"))
            from bntool.recalibration.checkpoint import recalibrate_source

            result = recalibrate_source(
                source,
                target,
                model=model,
                data=data,
                model_arguments=arguments,
                device=device,
                preprocess=preprocess,
                columns=Columns(inputs, labels),
                how=how,
                reading=reading,
                judging=JudgingOptions(eval_data=eval_data, metric=metric, keep_if_better=keep_if_better),
                sharing=sharing,
                **writing,
                on_progress=progress,
                on_forecast=ignore if quiet else print_note,
            )
    if result is not None:
        _print(checkpoint, result, html=html, force=force, form=form, quiet=quiet)
    return 0


def _require_model_and_data(checkpoint: options.Location, model: str | None, data: str | None) -> tuple[str, str]:
    """Return both specs.

    Raises:
        UsageError: one is missing.
        RefusedError: there is nothing that they would be needed for.
    """
    if model is None or data is None:
        _check_has_layers(checkpoint)
        raise UsageError("recalibrate runs the model on data: give --model SPEC and --data SPEC")
    return model, data


def _check_has_layers(checkpoint: options.Location) -> None:
    """Refuse a file without any BatchNorm before a model and data are asked for.

    Where some may be there without their statistics, the model is to tell.
    """
    from bntool.errors import RefusedError
    from bntool.inspection.checkpoint import inspect
    from bntool.inspection.verdict import Health

    if inspect(checkpoint).verdict.health is Health.NO_BATCH_NORM:
        raise RefusedError("the file has no BatchNorm layer: there is nothing to recalibrate", path=checkpoint)


def _print(
    checkpoint: options.Location,
    result: CheckpointRecalibration | Partial,
    *,
    html: Path | None,
    force: bool,
    form: ReportForm | None,
    quiet: bool,
) -> None:
    if quiet and form is None and html is None:
        return  # what nobody sees takes as long to draw
    from bntool.recalibration.partials import Partial
    from bntool.reports.partials import describe_partial, show_partial
    from bntool.reports.recalibration import describe_recalibration, show_recalibration
    from bntool.reports.report import FileReport, Report

    if isinstance(result, Partial):
        facts, blocks = describe_partial(result), show_partial(result)
    else:
        facts, blocks = describe_recalibration(result), show_recalibration(result)
        if html is not None:
            from bntool.reports.page.recalibration import make_recalibration_page
            from bntool.reports.page.writing import write_page

            write_page(make_recalibration_page(str(checkpoint), result), html, force=force)
    report = FileReport(str(checkpoint), facts, blocks)
    print_report(Report("recalibrate", (report,)), form=form, quiet=quiet)
    if not isinstance(result, Partial):
        print_notes(result.checkpoint, quiet=quiet)
    print_written(html, form=form, quiet=quiet)


def _refuse_with_partials(context: typer.Context) -> None:
    """Refuse options that act where partials are measured, or where a model is judged."""
    others = {one.name: one.opts[0] for one in context.command.params if one.name and one.name not in _MERGING}
    source = context.get_parameter_source
    given = [option for name, option in others.items() if source(name) is ParameterSource.COMMANDLINE]
    if given:
        verb = "does" if len(given) == 1 else "do"
        raise UsageError(f"--from-partials merges what was measured: {', '.join(given)} {verb} not go with it")


def _expand(globs: Sequence[str]) -> list[str]:
    """Return the files that globs name, each once; names that are no globs as they are."""
    found: dict[str, None] = {}
    for text in globs:
        files = match_glob(text)
        if files == []:
            raise UsageError(f"--from-partials {text!r}: there is no such file")
        found.update(dict.fromkeys([text] if files is None else files))
    return list(found)


def _parse_samples(text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--samples {text!r}: give a number of at least 1, or auto")
    return int(text)
