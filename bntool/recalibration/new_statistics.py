"""New statistics from what layers have seen: a plan, and how far the stored ones were off."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bntool.batchnorm import COUNTER
from bntool.data.policies import LeftOut
from bntool.errors import RefusedError, UsageError
from bntool.plan import Operation, Plan, SetTensor, Skip, SkipReason, Values
from bntool.recalibration.batch_tree import Measured
from bntool.recalibration.drift import LayerDrift, measure_drift
from bntool.recalibration.moments import Array, Tally, take_apart
from bntool.recalibration.options import Method, Precision
from bntool.representation import html_repr, short_repr

Pair = tuple[Array, Array]  # running_mean and running_var


@dataclass
class Measurement:
    """The measurement of a run over all batches.

    Attributes:
        tallies: by layer, in the order in which the layers were first called.
        samples: how many went through.
        batches: how many.
        left_out: batches that held NaN or infinity and were skipped.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    samples: int = 0
    batches: int = 0
    left_out: list[LeftOut] = field(default_factory=list)

    @classmethod
    def of(cls, measured: Measured, channels: Mapping[str, int]) -> Measurement:
        """Make a measurement of what batches gave, by layer.

        Args:
            channels: of each layer, in the order in which they stand side by side.
        """
        names, tallies = list(channels), {}
        if measured.tally is not None:
            apart = take_apart(measured.tally, list(channels.values()))
            tallies = {names[index]: apart[index] for index in measured.order if apart[index].calls}
        return cls(tallies, measured.samples, measured.batches, list(measured.left_out))

    def check(self, batches_description: str) -> None:
        """Refuse an empty measurement.

        Raises:
            UsageError: there was no batch at all.
            RefusedError: every batch was left out.
        """
        if self.batches:
            return
        if self.left_out:
            count = sum(left_out.samples for left_out in self.left_out)
            raise RefusedError(f"no sample is left: {count} were left out, first {self.left_out[0].reason}")
        raise UsageError(f"{batches_description} gave no batch")


@dataclass(frozen=True)
class Statistics:
    """New running statistics of a layer.

    Attributes:
        mean, variance: float64 arrays of shape (channels,); the variance is the unbiased one, as PyTorch stores it.
        calls: for num_batches_tracked.
        eps: of the layer, which is added to the variance.
    """

    mean: Array
    variance: Array
    calls: int
    eps: float

    __repr__ = short_repr


@dataclass(frozen=True)
class Recalibration:
    """The changes that recalibrating would make, and how far the stored statistics were off.

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
    _repr_html_ = html_repr


@dataclass(frozen=True)
class LayerFacts:
    """The facts on a layer that was to be measured, beside what it has seen.

    Attributes:
        name: as reports have it.
        names: all under which the model has it, as plans have them.
        channels: how many.
        eps: what it adds to its variance.
        dtype: PyTorch's name of the dtype of its statistics in the live model.
        has_counter: whether it has a num_batches_tracked.
    """

    name: str
    names: tuple[str, ...]
    channels: int
    eps: float
    dtype: str
    has_counter: bool


@dataclass(frozen=True)
class Paths:
    """The layers that ran in a way that was noticed, by their names in the live model.

    Attributes:
        called: those that were called.
        read: those whose statistics were read by code outside of them.
        reused: those that one forward calls more than once, how often, where no statistics hold for all calls.
        only_in_train: those that run in train mode alone, as far as that was tried.
    """

    called: Collection[str] = ()
    read: Collection[str] = ()
    reused: Mapping[str, int] = field(default_factory=dict)
    only_in_train: Collection[str] = ()


@dataclass(frozen=True)
class Blend:
    """The rule from what a layer has seen to its new running_mean and running_var."""

    old: Mapping[str, Pair]
    method: Method
    prior: float

    def measure(self, tally: Tally) -> Pair:
        """Return the statistics of the data alone."""
        if self.method is Method.PAPER:
            return tally.means.mean, tally.variances / tally.calls
        return tally.pooled.mean, tally.pooled.unbiased_variance

    def __call__(self, name: str, tally: Tally, samples: int) -> Pair:
        mean, variance = self.measure(tally)
        if not self.prior:
            return mean, variance
        share = self.prior / (self.prior + samples)
        old_mean, old_variance = self.old[name]
        if not (np.isfinite(old_mean).all() and np.isfinite(old_variance).all()):
            raise RefusedError("the stored statistics are not finite: they cannot serve as a prior", tensor=name)
        return share * old_mean + (1 - share) * mean, share * old_variance + (1 - share) * variance


def check_prior(prior: float) -> None:
    """Check that the weight of old statistics can be one.

    Raises:
        UsageError
    """
    if prior < 0 or not math.isfinite(prior):
        raise UsageError("the prior is a number of samples, at least 0", value=prior)


def conclude(
    measurement: Measurement,
    layers: Mapping[str, LayerFacts],
    blend: Blend,
    paths: Paths,
    *,
    skips: Sequence[Skip] = (),
    memory: int | None = None,
    precision: Precision = Precision.MODEL,
    prefix: str = "",
) -> Recalibration:
    """Conclude from a measurement what the layers of a model get.

    Args:
        measurement: of the layers, and perhaps of others.
        layers: by their names in the live model.
        blend: how new statistics are computed.
        paths: how layers ran that have no new statistics.
        skips: layers that were not to be measured, and why.
        memory, precision, prefix: see :class:`Recalibration`.

    Raises:
        RefusedError: stored statistics that are not finite are to serve as a prior.
    """
    tallies = {name: tally for name, tally in measurement.tallies.items() if tally.positions > 1 and name in layers}
    new = {
        name: Statistics(*blend(name, tally, measurement.samples), calls=tally.calls, eps=layers[name].eps)
        for name, tally in tallies.items()
    }
    drifts = (
        measure_drift(
            layers[name].name,
            stored=blend.old[name],
            measured=blend.measure(tally),
            tally=tally,
            eps=layers[name].eps,
        )
        for name, tally in tallies.items()
    )
    return Recalibration(
        plan=Plan(
            operation=Operation.RECALIBRATE,
            steps=tuple(_make_steps(layers, new)),
            skips=(*skips, *_explain_skips(measurement, layers, paths, method=blend.method)),
            layers=tuple(layers[name].name for name in new),
        ),
        method=blend.method,
        prior=blend.prior,
        statistics=new,
        drifts=tuple(drifts),
        samples=measurement.samples,
        batches=measurement.batches,
        left_out=tuple(measurement.left_out),
        memory=memory,
        precision=precision,
        prefix=prefix,
    )


def _explain_skips(
    measurement: Measurement, layers: Mapping[str, LayerFacts], paths: Paths, *, method: Method
) -> Iterator[Skip]:
    """Explain why layers that were to be measured have no new statistics."""
    for name, calls in paths.reused.items():
        detail = f"called {calls} times in a forward: no statistics were found that hold for all calls; pooled can do"
        yield Skip(layers[name].name, SkipReason.REUSED, f"{detail} that")
    for name, facts in layers.items():
        tally = measurement.tallies.get(name)
        if name in paths.reused or (tally is not None and tally.positions > 1):
            continue
        if tally is not None:
            yield Skip(facts.name, SkipReason.TOO_FEW_SAMPLES, "one value for each channel has no variance")
        elif name in paths.called:
            detail = "it ran, and was given nothing that it was seen to normalise by its statistics"
            yield Skip(facts.name, SkipReason.NOT_RECOGNISED, detail)
        elif name in paths.read:
            way = "; pooled lets it run in train mode" if method is Method.EXACT else ""
            detail = f"in eval mode it does not run: other code of the forward reads its statistics{way}"
            yield Skip(facts.name, SkipReason.NOT_RECOGNISED, detail)
        elif name in paths.only_in_train:
            detail = (
                "no batch came through it in eval mode, in which statistics are measured; in train mode one does: code "
                "of the model goes another way there, such as auxiliary heads, or train() and eval() that merge weights"
            )
            yield Skip(facts.name, SkipReason.NEVER_REACHED, detail)
        else:
            yield Skip(facts.name, SkipReason.NEVER_REACHED, "no batch came through it")


def _make_steps(layers: Mapping[str, LayerFacts], statistics: Mapping[str, Statistics]) -> Iterator[SetTensor]:
    for name, new in statistics.items():
        for path in layers[name].names:
            stem = f"{path}." if path else ""
            shape = tuple(new.mean.shape)
            yield SetTensor(stem + "running_mean", Values(tuple(new.mean.tolist()), shape))
            yield SetTensor(stem + "running_var", Values(tuple(new.variance.tolist()), shape))
            if layers[name].has_counter:
                yield SetTensor(stem + COUNTER, Values((new.calls,), ()))
