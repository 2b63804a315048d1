"""Recomputing running statistics from data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bntool.batchnorm import STATISTICS
from bntool.choices import choose
from bntool.data.batches import Batches, LeftOut, as_batches, find_placement
from bntool.data.policies import OnBadData
from bntool.errors import RefusedError, UsageError
from bntool.models.user_code import running_user_code
from bntool.modules.borrowing import borrow, is_switching
from bntool.modules.finding import find_batchnorm_modules, find_eps, find_names, find_wrapper_prefix, walk_modules
from bntool.plan import Operation, Plan, SetTensor, Skip, SkipReason, Values
from bntool.recalibration.drift import LayerDrift, measure_drift
from bntool.recalibration.dtype_limits import check_holds
from bntool.recalibration.exact.first_forward import read_what_fits
from bntool.recalibration.exact.repeated_calls import NotSettledError
from bntool.recalibration.exact.sweep import measure_exact
from bntool.recalibration.layers import check_can_be_set, choose_layers
from bntool.recalibration.options import Method, Precision
from bntool.recalibration.pooled import Measurement, OnProgress, Run, Tally, measure_pooled, set_statistics
from bntool.recalibration.ranks import find_ranks, isolate_forwards
from bntool.representation import short_repr

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Statistics:
    """New running statistics of a layer.

    Attributes:
        mean, variance: float64, shape (channels,); the variance is the unbiased one, as PyTorch stores it.
        calls: for num_batches_tracked.
        eps: of the layer, which is added to the variance.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    calls: int
    eps: float


@dataclass(frozen=True)
class Recalibration:
    """What recalibrating would change, and how far the stored statistics were off.

    Attributes:
        plan: the new statistics as steps, and the layers left alone.
        method: how they were computed.
        prior: how many samples the old statistics counted for.
        statistics: the new statistics by layer, named as in the live model.
        drifts: how far stored and measured statistics lie apart, in execution order.
        samples, batches: how many were used.
        left_out: samples that were skipped, and why.
        memory: bytes that the method exact was forecast to need; None for the others.
        precision: what the forwards computed in; bfloat16 makes the statistics approximate.
        prefix: what names of the live model have before those of the plan.
    """

    plan: Plan
    method: Method
    prior: float
    statistics: Mapping[str, Statistics]
    drifts: tuple[LayerDrift, ...]
    samples: int
    batches: int
    left_out: tuple[LeftOut, ...] = ()
    memory: int | None = None
    precision: Precision = Precision.MODEL
    prefix: str = ""

    __repr__ = short_repr


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
    precision: Precision = Precision.MODEL,
    prefix: str | None = None,
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
        precision: bfloat16 runs the forwards under autocast: faster where the processor has instructions for it, and
            approximate.
        prefix: what names of the plan go without; None for that of wrappers.

    Raises:
        UsageError: no batch came, a glob selects nothing, or exact statistics are asked for in bfloat16.
        RefusedError: no layer can be recalibrated, or a batch holds NaN or infinity, or see ``docs/recalibration.md``.
        UserCodeError: the model or the data raised.
    """
    if prior < 0 or not math.isfinite(prior):
        raise UsageError("the prior is a number of samples, at least 0", value=prior)
    if method is Method.EXACT and precision is not Precision.MODEL:
        raise UsageError(f"exact statistics cannot be computed in {precision.value}, which is approximate")
    given = as_batches(batches)
    prefix = find_wrapper_prefix(model) if prefix is None else prefix
    with borrow(model) as borrowed, torch.no_grad():
        chosen, skips = choose_layers(model, layers, prefix=prefix)
        check_can_be_set(model, chosen)
        _enter_eval_mode(model)
        stored = {name: _copy_statistics(module) for name, module in chosen.items()}
        blend = _Blend(stored, method=method, prior=prior)
        isolate_forwards(model, borrowed, method=method)
        run = Run(model, borrowed, chosen, on_bad_data=on_bad_data, on_progress=on_progress)
        memory: int | None = None
        reused: dict[str, int] = {}
        if method is Method.EXACT:
            measurement, memory, reused = _measure_exact(run, given, blend, fit_memory=fit_memory)
        else:
            with _compute_in(precision, model):
                measurement = measure_pooled(run, given)
    replace(measurement, left_out=[*given.bad_inputs, *measurement.left_out]).check(given.description)
    tallies = {name: tally for name, tally in measurement.tallies.items() if tally.pooled.count > 1 and name in chosen}
    new = {
        name: Statistics(*blend(name, tally, measurement.samples), calls=tally.calls, eps=find_eps(chosen[name]))
        for name, tally in tallies.items()
    }
    drifts = (
        measure_drift(
            name.removeprefix(prefix),
            stored=stored[name],
            measured=blend.measure(tally),
            tally=tally,
            eps=new[name].eps,
        )
        for name, tally in tallies.items()
    )
    return Recalibration(
        plan=Plan(
            operation=Operation.RECALIBRATE,
            steps=tuple(_make_steps(model, chosen, new, prefix=prefix)),
            skips=(*skips, *_explain_skips(run, measurement, reused, method=method, prefix=prefix)),
            layers=tuple(name.removeprefix(prefix) for name in new),
        ),
        method=method,
        prior=prior,
        statistics=new,
        drifts=tuple(drifts),
        samples=measurement.samples,
        batches=measurement.batches,
        left_out=(*given.bad_inputs, *measurement.left_out),
        memory=memory,
        precision=precision,
        prefix=prefix,
    )


def _enter_eval_mode(model: torch.nn.Module) -> None:
    """Every module, whatever its own eval() does; that is asked too, for it may merge weights.

    Raises:
        UserCodeError: it raised.
    """
    modules = [module for _, module in walk_modules(model)]
    if any(map(is_switching, modules)):
        with running_user_code("eval() of the model"):
            model.eval()
    for module in modules:
        module.training = False


def _explain_skips(
    run: Run,
    measurement: Measurement,
    reused: Mapping[str, int],
    *,
    method: Method,
    prefix: str,
) -> Iterator[Skip]:
    """Why selected layers have no new statistics."""
    for name, calls in reused.items():
        detail = f"called {calls} times in a forward: no statistics were found that hold for all calls; pooled can do"
        yield Skip(name.removeprefix(prefix), SkipReason.REUSED, f"{detail} that")
    for name in run.layers:
        tally = measurement.tallies.get(name)
        if name in reused or (tally is not None and tally.pooled.count > 1):
            continue
        layer = name.removeprefix(prefix)
        if tally is not None:
            yield Skip(layer, SkipReason.TOO_FEW_SAMPLES, "one value for each channel has no variance")
        elif name in run.called:
            yield Skip(
                layer,
                SkipReason.NOT_RECOGNISED,
                "it ran, and was given nothing that it was seen to normalise by its statistics",
            )
        elif name in run.read:
            way = "; pooled lets it run in train mode" if method is Method.EXACT else ""
            detail = f"in eval mode it does not run: other code of the forward reads its statistics{way}"
            yield Skip(layer, SkipReason.NOT_RECOGNISED, detail)
        else:
            yield Skip(layer, SkipReason.NEVER_REACHED, "no batch came through it")


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
    precision: Precision | str = Precision.MODEL,
) -> Recalibration:
    """Give the BatchNorm layers of a live model the statistics of data; all else is given back as it was.

    Examples:
        >>> bntool.recalibrate(model, loader, method="exact")

    Args and errors are those of :func:`plan_recalibration`. If it raises, the statistics are the old ones.
    """
    result = plan_recalibration(
        model,
        batches,
        layers=layers,
        method=choose(Method, method, option="method"),
        prior=prior,
        on_bad_data=choose(OnBadData, on_bad_data, option="on_bad_data"),
        on_progress=on_progress,
        fit_memory=fit_memory,
        precision=choose(Precision, precision, option="precision"),
    )
    if not result.statistics:
        reasons = ", ".join(sorted({skip.reason.value for skip in result.plan.skips})) or "the model has none"
        frozen = any(skip.reason is SkipReason.FROZEN for skip in result.plan.skips)
        advice = "; layers=['*'] selects frozen ones, too" if frozen else ""
        raise RefusedError(f"no BatchNorm layer could be recalibrated: {reasons}{advice}")
    check_live_statistics(model, result)
    set_live_statistics(model, result)
    return result


def check_live_statistics(model: torch.nn.Module, recalibration: Recalibration) -> None:
    """Hold new statistics against the dtypes of the live model that they were computed for.

    Raises:
        RefusedError: one of them cannot hold a new variance.
    """
    modules = find_batchnorm_modules(model)
    for name, statistics in recalibration.statistics.items():
        check_holds(statistics.variance, modules[name]._buffers["running_var"], eps=statistics.eps, layer=name)


def _measure_exact(
    run: Run, batches: Batches, blend: _Blend, *, fit_memory: bool
) -> tuple[Measurement, int | None, dict[str, int]]:
    """What was measured, the memory forecast for that, and layers called more than once that are left alone."""
    read, first_forward = read_what_fits(run, batches, find_ranks(), cut=fit_memory)
    reused: dict[str, int] = {}
    few: dict[str, Tally] = {}  # one value for each channel: they keep their statistics, and what follows sees those
    if first_forward is None:
        return Measurement(), None, reused
    memory = first_forward.forecast.need(sum(b.samples for b in read), max((b.samples for b in read), default=0))
    while True:
        left_alone = reused.keys() | few.keys()
        others = replace(run, layers={name: layer for name, layer in run.layers.items() if name not in left_alone})
        try:
            measurement = measure_exact(others, read, blend, first_forward)
        except NotSettledError as error:
            reused.update(error.calls)
            continue
        new = {name: tally for name, tally in measurement.tallies.items() if tally.pooled.count < 2}
        few.update(new)
        if not new:
            measurement.tallies.update(few)
            return measurement, memory, reused


def set_live_statistics(model: torch.nn.Module, recalibration: Recalibration) -> None:
    """Write new statistics into the live model that they were computed for."""
    modules = find_batchnorm_modules(model)
    for name, statistics in recalibration.statistics.items():
        module = modules[name]
        set_statistics(module, mean=statistics.mean, variance=statistics.variance)
        counter = module._buffers.get(_COUNTER)
        if counter is not None:
            counter.fill_(statistics.calls)


@dataclass(frozen=True)
class _Blend:
    """From what a layer has seen to its new running_mean and running_var."""

    old: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    method: Method
    prior: float

    def measure(self, tally: Tally) -> tuple[torch.Tensor, torch.Tensor]:
        """The statistics of the data alone."""
        if self.method is Method.PAPER:
            return tally.means.mean, tally.variances / tally.calls
        return tally.pooled.mean, tally.pooled.unbiased_variance

    def __call__(self, name: str, tally: Tally, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        mean, variance = self.measure(tally)
        if not self.prior:
            return mean, variance
        share = self.prior / (self.prior + samples)
        old_mean, old_variance = self.old[name]
        if not (torch.isfinite(old_mean).all() and torch.isfinite(old_variance).all()):
            raise RefusedError("the stored statistics are not finite: they cannot serve as a prior", tensor=name)
        return share * old_mean + (1 - share) * mean, share * old_variance + (1 - share) * variance


def _compute_in(precision: Precision, model: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    if precision is Precision.MODEL:
        return contextlib.nullcontext()
    device, _ = find_placement(model)
    return torch.autocast("cpu" if device is None else device.type, dtype=torch.bfloat16)


def _copy_statistics(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    mean, variance = (module._buffers[role] for role in STATISTICS)
    assert mean is not None
    assert variance is not None
    return mean.detach().cpu().double().clone(), variance.detach().cpu().double().clone()


def _make_steps(
    model: torch.nn.Module,
    modules: Mapping[str, torch.nn.Module],
    statistics: Mapping[str, Statistics],
    *,
    prefix: str,
) -> Iterator[SetTensor]:
    names = find_names(model)
    for first_name, new in statistics.items():
        module = modules[first_name]
        for name in names[module]:
            stem = (name + ".").removeprefix(prefix) if name else ""
            shape = tuple(new.mean.shape)
            yield SetTensor(stem + "running_mean", Values(tuple(new.mean.tolist()), shape))
            yield SetTensor(stem + "running_var", Values(tuple(new.variance.tolist()), shape))
            if module._buffers.get(_COUNTER) is not None:
                yield SetTensor(stem + _COUNTER, Values((new.calls,), ()))
