"""Recomputing running statistics from data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from bntool.batchnorm import COUNTER, STATISTICS
from bntool.choices import choose
from bntool.data.batches import Batch, Batches, as_batches, find_placement
from bntool.data.policies import OnBadData
from bntool.errors import RefusedError, UsageError
from bntool.models.exported import check_has_layers
from bntool.models.user_code import running_user_code
from bntool.modules.borrowing import Borrowed, borrow, is_switching
from bntool.modules.finding import (
    check_is_model,
    describe_unread_statistics,
    find_batchnorm_modules,
    find_eps,
    find_names,
    find_wrapper_prefix,
    walk_modules,
)
from bntool.names import remove_prefix
from bntool.plan import Skip, SkipReason
from bntool.progress import OnWarning, Progress, ignore, tell_notebook
from bntool.recalibration.batch_tree import BatchTree
from bntool.recalibration.dtype_limits import check_holds
from bntool.recalibration.exact.reading import reading_batches
from bntool.recalibration.exact.repeated_calls import NotSettledError
from bntool.recalibration.exact.sweep import measure_exact
from bntool.recalibration.layers import check_can_be_set, choose_layers, find_layers_of_train_mode
from bntool.recalibration.moments import Tally
from bntool.recalibration.new_statistics import (
    Blend,
    LayerFacts,
    Measurement,
    Pair,
    Paths,
    Recalibration,
    check_prior,
    conclude,
)
from bntool.recalibration.options import Method, Precision, check_memory
from bntool.recalibration.pooled import Keeper, OnProgress, Run, count_channels, measure_pooled, set_statistics
from bntool.recalibration.ranks import find_ranks, isolate_forwards


def plan_recalibration(  # noqa: PLR0913 each is an option of the command
    model: torch.nn.Module,
    batches: Batches | Iterable[Any],
    *,
    layers: Sequence[str] = (),
    method: Method = Method.POOLED,
    prior: float = 0.0,
    on_bad_data: OnBadData = OnBadData.STOP,
    on_progress: OnProgress | None = None,
    fit_memory: bool = False,
    memory: int | str | None = None,
    on_forecast: OnWarning = ignore,
    precision: Precision = Precision.MODEL,
    prefix: str | None = None,
    keeper: SelectionKeeper | None = None,
) -> Recalibration:
    """Run batches through a model and plan new running statistics for its BatchNorm layers.

    Only the selected layers normalise anew; everything else is in eval mode, dropout included. The model is given back
    exactly as it was.

    Args:
        model: with the weights that the statistics are for.
        batches: :class:`Batches`, or any iterable of tensors, tuples (input, labels) or dicts.
        layers: globs on layer names; none for all but the layers that the model itself keeps frozen.
        method: how the statistics are computed.
        prior: for how many samples the old statistics count: new = (prior * old + samples * measured) / (prior +
            samples), for mean and variance (Schneider et al. 2020, arXiv 2006.16971, equation 3).
        on_bad_data: what to do about a batch that holds NaN or infinity.
        on_progress: called with the number of samples done.
        fit_memory: let the method exact use fewer samples where not all fit into memory, instead of refusing.
        memory: what activations may take in memory with the method exact, in bytes or as ``2GB``; what does not fit is
            set aside in a file. None for what there is, and no file.
        on_forecast: called, where ``memory`` is given, with a sentence about the time and memory that it will take.
        precision: bfloat16 runs the forwards under autocast: faster where the processor has instructions for it, and
            approximate.
        prefix: what names of the plan go without; None for that of wrappers.
        keeper: of what the methods pooled and paper measure.

    Raises:
        UsageError: no batch came, a glob selects nothing, or exact statistics are asked for in bfloat16.
        RefusedError: no layer can be recalibrated, or a batch holds NaN or infinity, or see ``docs/recalibration.md``.
        UserCodeError: the model or the data raised.
    """
    check_prior(prior)
    if method is Method.EXACT and precision is not Precision.MODEL:
        raise UsageError(f"exact statistics cannot be computed in {precision.value}, which is approximate")
    memory = check_memory(memory, method=method, fit_memory=fit_memory)
    given = as_batches(batches)
    check_has_layers(model, "the model")
    prefix = find_wrapper_prefix(model) if prefix is None else prefix
    with _select(model, layers, prefix=prefix, method=method) as selection:
        blend = Blend(selection.stored, method=method, prior=prior)
        run = selection.run(on_bad_data=on_bad_data, on_progress=on_progress)
        needed: int | None = None
        reused: dict[str, int] = {}
        if method is Method.EXACT:
            measurement, needed, reused = _measure_exact(
                run, given, blend, fit_memory=fit_memory, memory=memory, on_forecast=on_forecast
            )
            measurement.left_out[:0] = given.bad_inputs
        else:
            measurement = Measurement.of(
                _measure_pooled(run, given, selection, keeper, precision=precision).finish(), selection.channels
            )
    measurement.check(given.description)
    idle = selection.layers.keys() - measurement.tallies.keys() - run.called - run.read - reused.keys()
    only_in_train = find_layers_of_train_mode(model, idle, selection.shown) if idle else ()
    return conclude(
        measurement,
        selection.layers,
        blend,
        Paths(run.called, run.read, reused, only_in_train),
        skips=selection.skips,
        memory=needed,
        precision=precision,
        prefix=prefix,
    )


def measure_share(  # noqa: PLR0913 as plan_recalibration
    model: torch.nn.Module,
    batches: Batches,
    *,
    layers: Sequence[str] = (),
    method: Method = Method.POOLED,
    on_bad_data: OnBadData = OnBadData.STOP,
    on_progress: OnProgress | None = None,
    precision: Precision = Precision.MODEL,
    prefix: str | None = None,
    keeper: SelectionKeeper,
) -> BatchTree:
    """Measure a share of a list of batches, to be merged with the others.

    Args and errors are those of :func:`plan_recalibration`.
    """
    prefix = find_wrapper_prefix(model) if prefix is None else prefix
    with _select(model, layers, prefix=prefix, method=method) as selection:
        run = selection.run(on_bad_data=on_bad_data, on_progress=on_progress)
        return _measure_pooled(run, batches, selection, keeper, precision=precision)


@dataclass(frozen=True)
class Selection:
    """The layers of a borrowed model that are to be measured, and what is known of them before.

    Attributes:
        model: that they belong to, in eval mode.
        borrowed: to add hooks through.
        modules: the layers, by their names in the live model.
        layers: facts about each of them.
        skips: layers that are left alone.
        stored: the statistics of each before, float64.
        called, read, shown: see :class:`~bntool.recalibration.pooled.Run`; they are filled while it runs.
    """

    model: torch.nn.Module
    borrowed: Borrowed
    modules: Mapping[str, torch.nn.Module]
    layers: Mapping[str, LayerFacts]
    skips: Sequence[Skip]
    stored: Mapping[str, Pair]
    called: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    shown: list[Batch] = field(default_factory=list)

    @property
    def channels(self) -> dict[str, int]:
        """The number of channels of each layer."""
        return {name: facts.channels for name, facts in self.layers.items()}

    def run(self, *, on_bad_data: OnBadData, on_progress: OnProgress | None) -> Run:
        """Run the batches and return the measurement of this selection."""
        return Run(
            self.model,
            self.borrowed,
            self.modules,
            on_bad_data=on_bad_data,
            on_progress=on_progress,
            called=self.called,
            read=self.read,
            shown=self.shown,
        )


class SelectionKeeper(Keeper, Protocol):
    """Keeps what is measured, so that measuring can be resumed, or merged with other measurements."""

    def begin(self, selection: Selection) -> BatchTree:
        """Begin when the layers to measure are known; return what was measured of them before."""


@contextlib.contextmanager
def _select(model: torch.nn.Module, globs: Sequence[str], *, prefix: str, method: Method) -> Iterator[Selection]:
    """Borrow a model, and choose the layers to measure."""
    with borrow(model) as borrowed, torch.no_grad():
        chosen, skips = choose_layers(model, globs, prefix=prefix)
        check_can_be_set(model, chosen)
        _enter_eval_mode(model)
        stored = {name: _copy_statistics(module) for name, module in chosen.items()}
        isolate_forwards(model, borrowed, method=method)
        yield Selection(model, borrowed, chosen, _describe_layers(model, chosen, prefix), skips, stored)


def _describe_layers(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], prefix: str
) -> dict[str, LayerFacts]:
    names = find_names(model)
    channels = count_channels(modules)
    return {
        name: LayerFacts(
            name=name.removeprefix(prefix),
            names=tuple(remove_prefix(path, prefix) for path in names[module]),
            channels=width,
            eps=find_eps(module),
            dtype=_name_dtype(module),
            has_counter=module._buffers.get(COUNTER) is not None,
        )
        for (name, module), width in zip(modules.items(), channels, strict=True)
    }


def _name_dtype(module: torch.nn.Module) -> str:
    return str(module._buffers["running_var"].dtype).removeprefix("torch.")  # type: ignore[union-attr]


def _measure_pooled(
    run: Run, batches: Batches, selection: Selection, keeper: SelectionKeeper | None, *, precision: Precision
) -> BatchTree:
    tree = BatchTree() if keeper is None else keeper.begin(selection)
    with _compute_in(precision, run.model):
        return measure_pooled(run, batches, tree, keeper)


def _enter_eval_mode(model: torch.nn.Module) -> None:
    """Put every module into eval mode, whatever its own eval() does; that is called too, for it may merge weights.

    Raises:
        UserCodeError: it raised.
    """
    modules = [module for _, module in walk_modules(model)]
    if any(map(is_switching, modules)):
        with running_user_code("eval() of the model"):
            model.eval()
    for module in modules:
        module.training = False


def recalibrate(  # noqa: PLR0913 as plan_recalibration
    model: torch.nn.Module,
    batches: Batches | Iterable[Any],
    *,
    method: Method | str = Method.POOLED,
    layers: Sequence[str] = (),
    prior: float = 0.0,
    on_bad_data: OnBadData | str = OnBadData.STOP,
    on_progress: OnProgress | None = None,
    fit_memory: bool = False,
    memory: int | str | None = None,
    on_forecast: OnWarning = ignore,
    precision: Precision | str = Precision.MODEL,
) -> Recalibration:
    """Give the BatchNorm layers of a live model the statistics of data; all else is given back as it was.

    Examples:
        >>> bntool.recalibrate(model, loader, method="exact")

    Args and errors are those of :func:`plan_recalibration`. If it raises, the statistics are the old ones.
    """
    check_is_model(model, for_files="recalibrate_checkpoint")
    given = as_batches(batches)
    if on_progress is None:
        phase = f"{choose(Method, method, option='method').value} statistics"

        def on_progress(samples: int) -> None:
            tell_notebook(Progress(phase, samples, given.samples))

    result = plan_recalibration(
        model,
        given,
        layers=layers,
        method=choose(Method, method, option="method"),
        prior=prior,
        on_bad_data=choose(OnBadData, on_bad_data, option="on_bad_data"),
        on_progress=on_progress,
        fit_memory=fit_memory,
        memory=memory,
        on_forecast=on_forecast,
        precision=choose(Precision, precision, option="precision"),
    )
    if not result.statistics:
        firsts = {skip.reason: skip for skip in reversed(result.plan.skips)}
        reasons = "; ".join(
            f"{skip.layer}: {skip.reason.value}{f' ({skip.detail})' * bool(skip.detail)}" for skip in firsts.values()
        )
        reasons = reasons or describe_unread_statistics(model) or "the model has none"
        frozen = any(skip.reason is SkipReason.FROZEN for skip in result.plan.skips)
        advice = "; layers=['*'] selects frozen ones, too" if frozen else ""
        raise RefusedError(f"no BatchNorm layer could be recalibrated: {reasons}{advice}")
    check_live_statistics(model, result)
    set_live_statistics(model, result)
    return result


def check_live_statistics(model: torch.nn.Module, recalibration: Recalibration) -> None:
    """Check new statistics against the dtypes of the live model that they were computed for.

    Raises:
        RefusedError: one of them cannot hold a new variance.
    """
    modules = find_batchnorm_modules(model)
    for name, statistics in recalibration.statistics.items():
        check_holds(statistics.variance.tolist(), _name_dtype(modules[name]), eps=statistics.eps, layer=name)


def _measure_exact(
    run: Run, batches: Batches, blend: Blend, *, fit_memory: bool, memory: int | None, on_forecast: OnWarning
) -> tuple[Measurement, int | None, dict[str, int]]:
    """Measure by the method ``exact``; return the measurement, the memory forecast for it, and layers called more than
    once, which are left alone.
    """
    limits: Any = {"cut": fit_memory, "memory": memory, "on_forecast": on_forecast}
    with reading_batches(run, batches, find_ranks(), **limits) as read:
        reused: dict[str, int] = {}
        few: dict[str, Tally] = {}  # one value for each channel: they keep their statistics; what follows sees those
        if read.shown is None:
            return Measurement(), None, reused
        needed = read.shown.forecast.need(read.samples, read.largest)
        while True:
            left_alone = reused.keys() | few.keys()
            others = replace(run, layers={name: layer for name, layer in run.layers.items() if name not in left_alone})
            try:
                measurement = measure_exact(others, read.batches, blend, read.shown)
            except NotSettledError as error:
                reused.update(error.calls)
                continue
            new = {name: tally for name, tally in measurement.tallies.items() if tally.positions < 2}
            few.update(new)
            if not new:
                measurement.tallies.update(few)
                return measurement, needed if memory is None else min(needed, memory), reused


def set_live_statistics(model: torch.nn.Module, recalibration: Recalibration) -> None:
    """Write new statistics into the live model that they were computed for."""
    modules = find_batchnorm_modules(model)
    for name, statistics in recalibration.statistics.items():
        module = modules[name]
        set_statistics(module, mean=statistics.mean, variance=statistics.variance)
        counter = module._buffers.get(COUNTER)
        if counter is not None:
            counter.fill_(statistics.calls)


def _compute_in(precision: Precision, model: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    if precision is Precision.MODEL:
        return contextlib.nullcontext()
    device, _ = find_placement(model)
    return torch.autocast("cpu" if device is None else device.type, dtype=torch.bfloat16)


def _copy_statistics(module: torch.nn.Module) -> Pair:
    mean, variance = (module._buffers[role] for role in STATISTICS)
    assert mean is not None
    assert variance is not None
    return mean.detach().cpu().double().clone().numpy(), variance.detach().cpu().double().clone().numpy()
