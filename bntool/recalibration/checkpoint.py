"""Recalibrating a checkpoint file: opened, measured, judged and written in one call."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from bntool.batchnorm import STATISTICS
from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.checkpoint import Checkpoint, StateDict, check_changeable
from bntool.checkpoints.outputs import check_outputs_apart
from bntool.checkpoints.records import check_not_folded
from bntool.checkpoints.saving import check_output, save_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.choices import choose
from bntool.data.batches import Batches, as_batches
from bntool.data.columns import Columns
from bntool.data.loading import load_data
from bntool.data.policies import OnBadData
from bntool.data.preprocessing import PRESETS, Preprocessing, parse_preprocessing
from bntool.data.presets import find_model_preset
from bntool.data.shares import WHOLE, Share, parse_shard
from bntool.errors import RefusedError, UsageError
from bntool.modules.building import build_model
from bntool.modules.finding import find_batchnorm_modules, find_name_prefix
from bntool.modules.loading import load_state
from bntool.modules.opening import open_source
from bntool.names import join_name
from bntool.plan import Operation, Plan, check_plan
from bntool.progress import OnProgress, OnWarning, Progress, ignore, tell_notebook
from bntool.recalibration.dtype_limits import fit_plan, list_promoted
from bntool.recalibration.evaluation import count_flipped, find_other_data, is_better, parse_metric
from bntool.recalibration.fingerprints import fingerprint_model, fingerprint_state_dict
from bntool.recalibration.layers import choose_layers
from bntool.recalibration.live import check_live_statistics, measure_share, plan_recalibration
from bntool.recalibration.memory_format import is_faster_in_bfloat16
from bntool.recalibration.options import (
    DataOptions,
    JudgingOptions,
    Method,
    MethodOptions,
    Precision,
    ShareOptions,
    check_memory,
)
from bntool.recalibration.output_changes import measure_output_changes
from bntool.recalibration.partials import Origin, Partial, write_partial
from bntool.recalibration.ranks import Ranks, join_job
from bntool.recalibration.results import CheckpointRecalibration, PreprocessingSteps, with_record
from bntool.recalibration.resumable_evaluation import Judge
from bntool.recalibration.resumable_measurement import PartialKeeper, check_can_resume, name_kept
from bntool.recalibration.warnings import (
    counts_other_classes,
    warn_of_fewer,
    warn_of_judging,
    warn_of_lacking,
    warn_of_platforms,
    warn_of_precision,
)

_WITHOUT_LABELS = 512  # samples looked at for changed predictions where there is nothing to count as right


def recalibrate_checkpoint(  # noqa: PLR0913 as many as the command has options
    path: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | torch.nn.Module,
    data: str | Iterable[Any],
    model_arguments: Mapping[str, str] | None = None,
    method: Method | str = Method.POOLED,
    samples: int | None = None,
    fit_memory: bool = False,
    memory: int | str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    workers: int | None = None,
    preprocess: str | None = None,
    inputs: str | None = None,
    labels: str | None = None,
    prior: float = 0.0,
    eval_data: str | Iterable[Any] | None = None,
    metric: str | None = None,
    keep_if_better: bool = False,
    on_bad_data: OnBadData | str = OnBadData.STOP,
    precision: Precision | str = Precision.MODEL,
    promote: bool = False,
    device: str = "cpu",
    layers: Sequence[str] = (),
    state_dict: str | None = None,
    shard: str | None = None,
    partial: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    resume_every: float = 30.0,
    force: bool = False,
    strict: bool = False,
    on_progress: OnProgress = tell_notebook,
    on_forecast: OnWarning = ignore,
) -> CheckpointRecalibration | Partial | None:
    """Recompute the running statistics in a checkpoint from data; what ``bntool recalibrate`` does.

    In a job of several processes each measures its share of the data; the first one judges and writes.

    Examples:
        >>> bntool.recalibrate_checkpoint("ckpt.pt", "out.pt", model="net.py:build", data="images.npz")

    Args:
        path: the checkpoint, or one that is open already; never written to.
        output: the file to write; None to write none.
        model: the live model of the checkpoint, which is copied, or a spec as ``--model`` has it.
        data: batches that can be read several times, or a spec as ``--data`` has it.
        model_arguments: of the factory of a spec.
        method: how the statistics are computed.
        prior: for how many samples the old statistics count beside the new ones.
        fit_memory: let the method exact use fewer samples where not all fit into memory, instead of refusing.
        memory: what activations may take in memory with the method exact, in bytes or as ``2GB``; None: what there is.
        batch_size: samples of a batch, where bntool makes the batches.
        samples: at most so many are read.
        seed: of the order in which samples are read.
        workers: processes that read images or a Dataset beside this one; None for as many as there are cores where
            images are decoded, and none elsewhere.
        preprocess: what to do to images or uint8 pixels; None for what the package of the model says.
        inputs: the column of a spec's data that holds them, where names do not tell.
        labels: likewise; ``none`` for no labels.
        eval_data: labelled data to measure before and after on; None for ``data``.
        metric: ``top1``, ``top5`` or ``FILE.py:function``; None for top1 where there are class labels.
        keep_if_better: write only if the metric is better than before.
        on_bad_data: what to do about unreadable images, and batches with NaN.
        precision: bfloat16 runs the forwards under autocast: faster where the processor has it, and approximate.
        promote: store statistics that half precision cannot hold as float32.
        device: where the model runs.
        layers: globs; none for all layers that the model itself does not keep frozen.
        state_dict: its key; None for the one chosen by rule.
        shard: ``3/64``: measure the third of 64 shares of the batches only, for ``partial``.
        partial: the file to write what was measured to, for :func:`~bntool.recalibration.merging.merge_statistics`; no
            model is judged then and no statistics are computed.
        resume: a file in which what is measured is kept, and from which a call goes on whose process was killed.
        resume_every: seconds from one writing of it to the next.
        force: replace a file that exists.
        strict: refuse if a layer is skipped.
        on_progress: called with the samples done of each phase.
        on_forecast: called with a sentence about what ``memory`` means for the method exact.

    Returns:
        What was found and done, or the partial; None in processes of a job other than the first.

    Raises:
        UsageError, FileError, RefusedError, UserCodeError: see :mod:`bntool.errors`; nothing is written then.
    """
    return recalibrate_source(
        path,
        output,
        model=model,
        data=data,
        model_arguments=model_arguments,
        device=device,
        preprocess=preprocess,
        columns=Columns(inputs, labels),
        how=MethodOptions(
            method=choose(Method, method, option="method"),
            precision=choose(Precision, precision, option="precision"),
            memory=memory,
            fit_memory=fit_memory,
            prior=prior,
            promote=promote,
        ),
        reading=DataOptions(
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            workers=workers,
            on_bad_data=choose(OnBadData, on_bad_data, option="on_bad_data"),
        ),
        judging=JudgingOptions(eval_data=eval_data, metric=metric, keep_if_better=keep_if_better),
        sharing=ShareOptions(shard=shard, partial=partial, resume=resume, resume_every=resume_every),
        layers=layers,
        state_dict=state_dict,
        force=force,
        strict=strict,
        on_progress=on_progress,
        on_forecast=on_forecast,
    )


def recalibrate_source(  # noqa: PLR0913 what a file goes through, one step after the other
    path: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | torch.nn.Module,
    data: str | Iterable[Any],
    model_arguments: Mapping[str, str] | None,
    device: str,
    preprocess: str | None,
    columns: Columns,
    how: MethodOptions,
    reading: DataOptions,
    judging: JudgingOptions,
    sharing: ShareOptions,
    layers: Sequence[str],
    state_dict: str | None,
    force: bool,
    strict: bool,
    on_progress: OnProgress,
    on_forecast: OnWarning,
) -> CheckpointRecalibration | Partial | None:
    """Do what :func:`recalibrate_checkpoint` does, with the options that belong together as one value."""
    memory = check_memory(how.memory, method=how.method, fit_memory=how.fit_memory)
    target, part, kept = (None if one is None else Path(one) for one in (output, sharing.partial, sharing.resume))
    number, shards = parse_shard(sharing.shard)
    if sharing.is_share:
        _check_share(part, target, how=how, judging=judging)
    if kept is not None:
        check_can_resume(how.method, every=sharing.resume_every)
    check_outputs_apart([target, part, kept], (model, data, judging.eval_data))
    with join_job() as ranks, open_source(path) as source, _seeded(reading.seed):
        check_changeable(source)
        check_output(source, part if sharing.is_share else target, force=force, keeps_format=not sharing.is_share)
        chosen = choose_state_dict(source, state_dict)
        check_not_folded(source.records.get(chosen.key, ()), source.path)
        live = build_model(model, chosen, arguments=model_arguments, device=device, may_lack=STATISTICS)
        prefix = find_name_prefix(live, map(chosen.strip, chosen.tensors))
        lacking = _reset_what_is_lacking(live, chosen, prefix)
        _check_selection(live, layers, source.path, prefix=prefix, strict=strict)
        read = _Reader.of(live, model, preprocess, columns=columns, reading=reading)
        share = _choose_share(Share(number, shards, ranks.rank, ranks.world), data, is_kept=kept is not None)
        batches = read(data, samples=reading.samples, seed=reading.seed, share=share)
        measuring = f"{how.method.value} statistics"
        options: Any = {"layers": layers, "method": how.method, "on_bad_data": reading.on_bad_data, "prefix": prefix}
        options["precision"] = how.precision
        keeper: PartialKeeper | None = None
        if sharing.is_share or kept is not None:
            origin = _describe_origin(chosen, live, batches, data=data, reading=reading, **options)
            of_rank = None if kept is None else name_kept(kept, share)
            keeper = PartialKeeper(origin, share, of_rank, every=sharing.resume_every, device=device)
            rest = replace(share, start=keeper.position)
            batches = read(data, samples=reading.samples, seed=reading.seed, share=rest)
        if part is not None:
            assert keeper is not None
            tell = _Samples(on_progress, measuring, batches.samples, phases=(measuring,)) if ranks.rank == 0 else None
            return _measure_partial(live, batches, keeper, part, ranks, force=force, on_progress=tell, **options)
        held_out, reopen = _choose_held_out(read, data, judging, reading)
        metric = parse_metric(judging.metric)
        return _measure_and_judge(
            _Subject(source, chosen, live, lacking, batches, data, ranks, keeper),
            Judge(live, held_out, reopen, metric, reading.on_bad_data, kept, every=sharing.resume_every),
            target,
            how=how,
            reading=reading,
            judging=judging,
            force=force,
            strict=strict,
            memory=memory,
            report=functools.partial(_Samples, on_progress, phases=("before", measuring, "after")),
            on_forecast=on_forecast if ranks.rank == 0 else ignore,
            **options,
        )


@dataclass(frozen=True)
class _Subject:
    """A file with all that it is measured with.

    Attributes:
        source: the file.
        chosen: the state dict of it.
        live: the model, in the state of the state dict.
        lacking: the layers whose statistics the file lacks.
        batches: of the calibration data, as many as this process is to read.
        data: what they were asked for by.
        ranks: the processes of the job.
        keeper: of what is measured, where it is kept.
    """

    source: Checkpoint
    chosen: StateDict
    live: torch.nn.Module
    lacking: tuple[str, ...]
    batches: Batches
    data: str | Iterable[Any]
    ranks: Ranks
    keeper: PartialKeeper | None


def _measure_and_judge(  # noqa: PLR0913 as above
    subject: _Subject,
    judge: Judge,
    target: Path | None,
    *,
    how: MethodOptions,
    reading: DataOptions,
    judging: JudgingOptions,
    force: bool,
    strict: bool,
    memory: int | None,
    report: Callable[[str, int | None], _Samples],
    on_forecast: OnWarning,
    prefix: str,
    **options: Any,
) -> CheckpointRecalibration | None:
    """Measure new statistics, evaluate the model before and after, and write the file.

    Args:
        judge: evaluates the model.
        target: the file to write; None for a dry run.
        report: makes what takes the progress of a phase, by its name and its number of samples.

    Returns:
        What was found and done; None in processes of a job other than the first, which only measure.
    """
    source, chosen, live = subject.source, subject.chosen, subject.live
    batches, held_out = subject.batches, judge.batches
    leads = subject.ranks.rank == 0
    before = judge.evaluate("before", chosen, on_progress=report("before", held_out.samples)) if leads else None
    # of data that do not say how many they are, the first pass tells the others
    counted = None if before is None else before.samples
    is_whole = judging.eval_data is None and held_out.has_labels is not False
    result = plan_recalibration(
        live,
        batches,
        **options,
        prefix=prefix,
        prior=how.prior,
        on_progress=report(f"{how.method.value} statistics", batches.samples or (counted if is_whole else None))
        if leads
        else None,
        fit_memory=how.fit_memory,
        memory=memory,
        on_forecast=on_forecast,
        keeper=subject.keeper,
    )
    check_plan(result.plan, source.path, strict=strict)
    if before is None:
        return _end(subject.keeper, subject.ranks, None)
    if judging.keep_if_better and counts_other_classes(before, held_out):
        raise UsageError(
            f"--keep-if-better needs labels of the model: there are {len(held_out.classes or ())} class folders, "
            f"but the model has {before.outputs} outputs"
        )
    eps = {name.removeprefix(prefix): statistics.eps for name, statistics in result.statistics.items()}
    plan = fit_plan(result.plan, chosen, eps=eps, promote=how.promote)
    check_live_statistics(live, result)
    output_changes = measure_output_changes(live, held_out, result)
    steps = batches.preprocessing
    plan = with_record(
        plan,
        source,
        chosen,
        result,
        data=_name(subject.data),
        seed=reading.seed,
        preprocessing=None if steps is None else steps.describe(),
    )
    edited = apply_plan(source, plan)
    # the model is given what will be in the file, so that what is judged is what is written
    load_state(live, edited.state_dict(chosen.key), may_lack=STATISTICS)
    after = judge.evaluate(
        "after", edited.state_dict(chosen.key), on_progress=report("after", held_out.samples or counted)
    )
    kept_old = judging.keep_if_better and not is_better(before, after)
    if target is not None and not kept_old:
        save_checkpoint(edited, target, force=force)
    cut, apart = how.fit_memory and subject.ranks.world == 1, judging.eval_data is not None
    found = CheckpointRecalibration(
        checkpoint=edited,
        state_dict=chosen,
        recalibration=result,
        before=before,
        after=after,
        flipped=count_flipped(before, after),
        output_changes=output_changes,
        evaluated_on=_name(judging.eval_data)
        if judging.eval_data is not None
        else f"{_name(subject.data)} (the calibration data)",
        output=None if target is None or kept_old else str(target),
        kept=kept_old,
        preprocessing=None if steps is None else PreprocessingSteps(steps.describe(), steps.origin),
        promoted=list_promoted(plan),
        lacking=subject.lacking,
        warnings=(
            *warn_of_fewer(result, asked=reading.samples, there=batches.samples, cut=cut),
            *warn_of_lacking(subject.lacking, result),
            *warn_of_precision(how.precision, is_faster=is_faster_in_bfloat16(live)),
            *warn_of_platforms(
                [] if subject.keeper is None else subject.keeper.platforms, what="what was kept and the rest were"
            ),
            *warn_of_judging(
                before,
                held_out,
                fair=not judging.keep_if_better or apart,
                apart=apart,
                difference=find_other_data(before, after),
            ),
        ),
    )
    judge.end()
    return _end(subject.keeper, subject.ranks, found)


def _end(
    keeper: PartialKeeper | None, ranks: Ranks, found: CheckpointRecalibration | None
) -> CheckpointRecalibration | None:
    """End a recalibration: nothing has to be gone on with."""
    if keeper is not None:
        keeper.end(ranks)
    return found


def _measure_partial(
    live: torch.nn.Module,
    batches: Batches,
    keeper: PartialKeeper,
    path: Path,
    ranks: Ranks,
    *,
    force: bool,
    **options: Any,
) -> Partial | None:
    """Measure a share and write its partial; None in processes other than the first."""
    tree = measure_share(live, batches, keeper=keeper, **options)
    measured = replace(keeper.make(tree, batches), path=str(path))
    if ranks.rank == 0:
        write_partial(measured, path, force=force)
    keeper.end(ranks)
    return measured if ranks.rank == 0 else None


def _describe_origin(
    state_dict: StateDict,
    live: torch.nn.Module,
    batches: Batches,
    *,
    data: str | Iterable[Any],
    reading: DataOptions,
    layers: Sequence[str],
    **options: Any,
) -> Origin:
    """Describe what a partial was measured of."""
    steps = batches.preprocessing
    options |= {"batch_size": reading.batch_size, "samples": reading.samples, "seed": reading.seed}
    known = {field.name for field in fields(Origin)}
    return Origin(
        checkpoint=fingerprint_state_dict(state_dict),
        model=fingerprint_model(live),
        data=batches.identify(),
        state_dict=state_dict.key,
        data_name=_name(data),
        preprocessing=None if steps is None else steps.describe(),
        preprocessing_origin=None if steps is None else steps.origin,
        layers=tuple(layers),
        **{name: value for name, value in options.items() if name in known},
    )


def _choose_share(share: Share, data: str | Iterable[Any], *, is_kept: bool) -> Share:
    """Return each process of the caller's own job gives batches of its own; only specs and shards are one list for all.

    Raises:
        UsageError: these are to be kept, or to be a shard.
    """
    if isinstance(data, str) or share.ranks == 1:
        return share
    if share.shards > 1 or is_kept:
        raise UsageError("processes of a job that share one list of batches need data that a spec names")
    return WHOLE


def _check_share(partial: Path | None, output: Path | None, *, how: MethodOptions, judging: JudgingOptions) -> None:
    """Check the options of a share against what it can do.

    Raises:
        UsageError: the partial has no name, or an option acts elsewhere.
        RefusedError: the method needs all batches.
    """
    if how.method is Method.EXACT:
        raise RefusedError(
            "--method exact needs all batches at each layer, where they wait for the final statistics; a shard has but "
            "its own, so use torchrun, whose processes wait for each other"
        )
    if partial is None:
        raise UsageError("--shard measures for a partial: name the file with --partial FILE")
    if output is not None:
        raise UsageError("--partial writes no checkpoint: give -o where the partials are merged, with --from-partials")
    if judging.eval_data is not None or judging.metric or judging.keep_if_better:
        raise UsageError("a shard judges nothing: --eval-data, --metric and --keep-if-better do not go with --partial")
    if how.prior or how.promote:
        raise UsageError("--prior and --promote act where the partials are merged, with --from-partials")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what user code draws random numbers from, the same run after run and on every rank; the caller's go on
    afterwards.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _reset_what_is_lacking(live: torch.nn.Module, state_dict: StateDict, prefix: str) -> tuple[str, ...]:
    """Return the layers whose statistics the file lacks, which begin as those of a new layer: a mean of 0, a variance
    of 1.
    """
    lacking = []
    for name, module in find_batchnorm_modules(live).items():
        mean, variance = (module._buffers.get(role) for role in STATISTICS)
        layer = name.removeprefix(prefix)
        full = state_dict.full_name(join_name(layer, "running_mean"))
        if mean is not None and variance is not None and full not in state_dict.tensors:
            mean.zero_()
            variance.fill_(1)
            lacking.append(layer)
    return tuple(lacking)


def _check_selection(live: torch.nn.Module, layers: Sequence[str], path: object, *, prefix: str, strict: bool) -> None:
    """Refuse what would recalibrate no layer before anything is measured.

    Raises:
        UsageError: a glob selects nothing.
        RefusedError: as :func:`bntool.plan.check_plan`.
    """
    selected, skips = choose_layers(live, layers, prefix=prefix)
    if not selected:
        check_plan(Plan(Operation.RECALIBRATE, skips=tuple(skips)), path, strict=strict)


@dataclass(frozen=True)
class _Reader:
    """Data, as specs or as batches, with one set of options.

    Attributes:
        suggested: preprocessing that goes with the model, for data that need one.
    """

    batch_size: int
    workers: int | None
    columns: Columns
    steps: Preprocessing | None
    suggested: Preprocessing | None
    on_bad_data: OnBadData

    @classmethod
    def of(
        cls,
        live: torch.nn.Module,
        model: str | torch.nn.Module,
        preprocess: str | None,
        *,
        columns: Columns,
        reading: DataOptions,
    ) -> _Reader:
        """Make a reader with the preprocessing that was asked for, or that of the model."""
        suggested = find_model_preset(model if isinstance(model, str) else "", live)
        presets = PRESETS if suggested is None else {**PRESETS, "model": suggested}
        steps = parse_preprocessing(preprocess, presets=presets) if preprocess else None
        return cls(reading.batch_size, reading.workers, columns, steps, suggested, reading.on_bad_data)

    def __call__(
        self,
        data: str | Iterable[Any],
        *,
        samples: int | None = None,
        seed: int | None = None,
        share: Share = WHOLE,
    ) -> Batches:
        """See :func:`~bntool.data.loading.load_data`; batches that are there are taken as they are.

        Raises:
            UsageError: they can be read only once.
        """
        if not isinstance(data, str):
            if isinstance(data, Iterator):
                raise UsageError(
                    "the data are read several times: give a list or a loader, not an iterator or generator"
                )
            if isinstance(data, Batches) and share != data.share:
                raise UsageError("these batches are a share of their own: give a list or a loader")
            return as_batches(data, share=share)
        return load_data(
            data,
            batch_size=self.batch_size,
            samples=samples,
            seed=seed,
            workers=self.workers,
            preprocessing=self.steps,
            model_preprocessing=self.suggested,
            on_bad_data=self.on_bad_data,
            columns=self.columns,
            share=share,
        )


def _choose_held_out(
    read: _Reader, data: str | Iterable[Any], judging: JudgingOptions, reading: DataOptions
) -> tuple[Batches, Callable[..., Batches]]:
    """Choose what the model is judged on, before and after, and what opens a share of it."""
    spec, reopen = data, functools.partial(read, data, samples=reading.samples, seed=reading.seed)
    if judging.eval_data is not None:
        spec, reopen = judging.eval_data, functools.partial(read, judging.eval_data)
    held_out = reopen()
    if held_out.has_labels is not False:
        return held_out, reopen
    if judging.keep_if_better:
        raise UsageError("--keep-if-better needs labels: give --eval-data with labels")
    reopen = functools.partial(read, spec, samples=_WITHOUT_LABELS)
    return reopen(), reopen


class _Samples:
    """Called with the samples done of one phase; tells who asked for the progress of the whole."""

    def __init__(self, tell: OnProgress, phase: str, total: int | None, *, phases: tuple[str, ...]) -> None:
        self._tell, self._phase, self._total, self._phases = tell, phase, total, phases
        self(0)

    def __call__(self, samples: int) -> None:
        self._tell(Progress(self._phase, samples, self._total, self._phases))


def _name(data: str | Iterable[Any] | None) -> str:
    return data if isinstance(data, str) else f"batches of {type(data).__name__}"
