"""Evaluating how good a model is on labelled data, and how much its outputs change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bntool.data.batches import Batch, Batches, move, split_batch
from bntool.data.policies import LeftOut, OnBadData
from bntool.errors import RefusedError, UsageError
from bntool.models.user_code import import_object, is_factory_spec, running_user_code
from bntool.modules.borrowing import borrow
from bntool.modules.calling import tensors_in
from bntool.modules.finding import walk_modules
from bntool.recalibration.new_statistics import Measurement
from bntool.recalibration.pooled import accept, describe_bad, has_finite_inputs

_TOP = {"top1": 1, "top5": 5}


@dataclass(frozen=True)
class Metric:
    """A number for outputs and labels; larger is better.

    Attributes:
        name: for people.
        compute: takes all outputs and all labels.
        find_misfit: takes outputs and labels of one batch; why the metric is not for such, None where it is.
        is_asked_for: by the user; else data that it is not for are simply not measured.
    """

    name: str
    compute: Callable[[Any, Any], float] = field(repr=False)
    find_misfit: Callable[[Any, Any], str | None] = field(default=lambda _outputs, _labels: None, repr=False)
    is_asked_for: bool = True


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a model on data.

    Attributes:
        metric: its name.
        value: None where there were no labels, or none that the metric is for.
        samples: how many.
        predictions: class indices, where outputs have the shape (samples, classes); else None.
        labels: in the same order; None where there were none.
        finite: whether all outputs are.
        outputs: how many classes the model tells apart; None where outputs are not classes.
        note: why there is no value although there are labels.
        left_out: batches that held NaN or infinity.
    """

    metric: str
    value: float | None
    samples: int
    predictions: torch.Tensor | None = field(repr=False)
    labels: torch.Tensor | None = field(default=None, repr=False)
    finite: bool = True
    outputs: int | None = None
    note: str | None = None
    left_out: tuple[LeftOut, ...] = ()


def parse_metric(spec: str | None) -> Metric:
    """Parse ``top1``, ``top5`` or ``file.py:function``; None is top1 where it fits.

    The user's function is called once, with all outputs and all labels, and returns a number; larger is better. Outputs
    are a float32 tensor on the CPU, (samples, ...), and labels a tensor, where the model and the data give tensors that
    can be concatenated (of a tuple or dict of outputs the first); else lists with one entry for each batch.

    Raises:
        UsageError: it is none of these.
        UserCodeError: importing the user's function raised.
    """
    if spec is None or spec in _TOP:
        k = _TOP[spec or "top1"]

        def find_misfit(outputs: Any, labels: Any) -> str | None:
            return find_top_misfit(outputs, labels, k=k)

        def compute_top(outputs: Any, labels: Any) -> float:
            return measure_top(outputs, labels, k=k)

        return Metric(spec or "top1", compute_top, find_misfit, is_asked_for=spec is not None)
    if is_factory_spec(spec):
        function = import_object(spec)
        if not callable(function):
            raise UsageError(f"--metric {spec} is not a function")

        def compute(outputs: Any, labels: Any) -> float:
            with running_user_code(f"the metric {spec}"):
                result = function(outputs, labels)
            try:
                return float(result)
            except (TypeError, ValueError, RuntimeError):
                raise UsageError(
                    f"the metric {spec} returned {type(result).__name__}; one number is needed, larger is better"
                ) from None

        return Metric(spec.rpartition(":")[2], compute)
    raise UsageError(f"--metric {spec!r} is not known; it can be top1, top5, or FILE.py:function")


def find_top_misfit(outputs: Any, labels: Any, *, k: int) -> str | None:
    """Explain why outputs and labels are not classes; None where they are."""
    is_scores = isinstance(outputs, torch.Tensor) and outputs.ndim == 2
    is_indices = isinstance(labels, torch.Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    if is_scores and is_indices and tuple(labels.shape) in ((outputs.shape[0],), (outputs.shape[0], 1)):
        return None
    return (
        f"top-{k} needs outputs (samples, classes) and as many class indices; the outputs are {_describe(outputs)}, "
        f"the labels {_describe(labels)}; give --metric FILE.py:function"
    )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return f"of type {type(value).__name__}"


def measure_top(outputs: torch.Tensor, labels: torch.Tensor, *, k: int) -> float:
    """Measure the share of samples whose label is among the k largest outputs, 0 to 1.

    A sample whose outputs are not finite counts as wrong.

    Args:
        outputs: shape (samples, classes).
        labels: class indices, shape (samples,) or (samples, 1).
        k: at most the number of classes.

    Raises:
        UsageError: the shapes do not fit together, or labels count other classes than there are outputs.
    """
    misfit = find_top_misfit(outputs, labels, k=k)
    if misfit is not None:
        raise UsageError(misfit)
    labels = labels.reshape(-1).to(outputs.device)
    check_labels(outputs, labels)
    best = outputs.topk(min(k, outputs.shape[1]), dim=1).indices
    right = (best == labels.unsqueeze(1)).any(dim=1) & torch.isfinite(outputs).all(dim=1)
    return float(right.double().mean())


def check_labels(outputs: torch.Tensor, labels: torch.Tensor) -> None:
    """Check class indices against the number of outputs.

    Raises:
        UsageError: a label is no index of an output.
    """
    wrong = labels[(labels < 0) | (labels >= outputs.shape[1])]
    if len(wrong):
        raise UsageError(
            f"there is a label {int(wrong[0])}, but the model has {outputs.shape[1]} outputs, for the classes 0 to "
            f"{outputs.shape[1] - 1}: the labels are of another model or data set"
        )


@dataclass
class Collection:
    """Outputs and labels of the batches so far.

    Attributes:
        metric: what they are for.
        outputs, labels: of each batch, or of several in a row together.
        samples, batches, labelled: how many there were; the last counts batches with labels.
        finite, note: see :class:`Evaluation`.
        left_out: batches that held NaN or infinity.
        position: all batches before it, in the list of all, are collected.
    """

    metric: Metric
    outputs: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    samples: int = 0
    batches: int = 0
    labelled: int = 0
    finite: bool = True
    note: str | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    position: int = 0

    def add(self, output: Any, batch: Batch) -> None:
        """Add what the model gives for a batch."""
        output = take_first(move(output, device=torch.device("cpu"), dtype=torch.float32))
        labels = _to_tensor(batch.labels)
        self.finite &= all(bool(torch.isfinite(t).all()) for t in tensors_in(output) if t.is_floating_point())
        if labels is not None and self.note is None:
            self._check(output, labels)
        is_scores = isinstance(output, torch.Tensor) and output.ndim == 2
        # scores are small; other outputs may be large, and are of use to a metric only
        self.outputs.append(output if is_scores or (labels is not None and self.note is None) else None)
        if labels is not None:
            self.labels.append(labels)
            self.labelled += 1
        self.samples += batch.samples
        self.batches += 1

    def _check(self, output: Any, labels: Any) -> None:
        self.note = self.metric.find_misfit(output, labels)
        if self.note is not None and self.metric.is_asked_for:
            raise UsageError(self.note)
        if self.note is None and self.metric.name in _TOP:
            check_labels(output, labels)

    def evaluate(self) -> Evaluation:
        """Evaluate the model on all of the data.

        Raises:
            RefusedError: only some batches have labels.
        """
        if self.labelled and self.labelled < self.batches:
            raise RefusedError("only some batches of the evaluation data have labels")
        outputs, labels = join(self.outputs), join(self.labels) if self.labels else None
        is_scores = isinstance(outputs, torch.Tensor) and outputs.ndim == 2
        has_value = labels is not None and self.note is None
        return Evaluation(
            metric=self.metric.name,
            value=self.metric.compute(outputs, labels) if has_value else None,
            samples=self.samples,
            predictions=outputs.argmax(dim=1) if is_scores and outputs.shape[1] else None,
            labels=labels if isinstance(labels, torch.Tensor) else None,
            finite=self.finite,
            outputs=outputs.shape[1] if is_scores else None,
            note=self.note,
            left_out=tuple(self.left_out),
        )


def take_first(output: Any) -> Any:
    """Return the first tensor of a tuple or dict of outputs (logits, before auxiliary ones); else what it is."""
    values = list(output.values()) if isinstance(output, Mapping) else output
    if not isinstance(values, list | tuple):
        return output
    # beside what is no output: ``loss=None``, where there were no labels
    given = [value for value in values if value is not None]
    return given[0] if given and isinstance(given[0], torch.Tensor) else output


def _to_tensor(labels: Any) -> Any:
    """Convert a list of numbers to a tensor; anything else stays as it is."""
    if isinstance(labels, list | tuple) and labels and all(isinstance(label, int | float) for label in labels):
        return torch.tensor(labels, device="cpu")
    return move(labels, device=torch.device("cpu"), dtype=None)


def join(parts: list[Any]) -> Any:
    """Join pieces to one tensor where that is possible, else to a list."""
    tensors = [part for part in parts if isinstance(part, torch.Tensor) and part.ndim]
    if len(tensors) == len(parts) and len({(t.shape[1:], t.dtype) for t in tensors}) == 1:
        return torch.cat(tensors)
    return parts


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    metric: Metric,
    on_bad_data: OnBadData | None = None,
    on_progress: Callable[[int], None] | None = None,
    collected: Collection | None = None,
    after_batch: Callable[[Collection], None] | None = None,
) -> Evaluation:
    """Run a model in eval mode over batches; it is given back as it was.

    Args:
        model: what to run.
        batches: with or without labels.
        metric: what to compute from outputs and labels.
        on_bad_data: what to do about batches whose inputs hold NaN or infinity; None to run them.
        on_progress: called with the number of samples done.
        collected: of the batches before these, of an earlier call; grows.
        after_batch: called with what is collected, after each batch.

    Raises:
        UsageError: there is no batch, or outputs and labels do not fit the metric.
        RefusedError: only some of the batches have labels, or all were left out, or one is bad (``OnBadData.STOP``).
        UserCodeError: the model or the metric raised.
    """
    collected = Collection(metric) if collected is None else collected
    source = getattr(batches, "description", "the data to evaluate on")
    with borrow(model), torch.no_grad():
        for _, module in walk_modules(model):
            module.training = False
        for item in batches:
            batch = item if isinstance(item, Batch) else split_batch(item, source=source, position=collected.samples)
            batch = batch.fit(model)
            collected.position = collected.position + 1 if batch.position is None else batch.position + 1
            if on_bad_data is not None and not has_finite_inputs(batch):
                collected.left_out.append(accept(describe_bad(batch), on_bad_data))
                continue
            with running_user_code(f"running the model on {batch.description}"):
                output = batch.run(model)
            collected.add(output, batch)
            if on_progress is not None:
                on_progress(collected.samples)
            if after_batch is not None:
                after_batch(collected)
    if not collected.batches:
        unread = batches.bad_inputs if isinstance(batches, Batches) else ()
        Measurement(left_out=[*unread, *collected.left_out]).check(source)
    return collected.evaluate()


def count_flipped(before: Evaluation, after: Evaluation) -> float | None:
    """Measure the share of samples that are predicted as another class, 0 to 1.

    None where outputs are not classes, or where the data came in another order the second time.
    """
    if before.predictions is None or after.predictions is None or before.samples != after.samples:
        return None
    if before.labels is not None and after.labels is not None and not torch.equal(before.labels, after.labels):
        return None
    return float((before.predictions != after.predictions).double().mean())


def find_other_data(before: Evaluation, after: Evaluation) -> str | None:
    """Describe a difference that proves that the second evaluation read other data; None where there is none.

    Data that come in another order are the same. Only labels that are one whole number for each sample are looked at.
    """
    if before.samples != after.samples:
        return f"the evaluation data gave {before.samples:,} samples before, and {after.samples:,} after"
    one, other = before.labels, after.labels
    if one is None or other is None or one.is_floating_point() or one.numel() > before.samples:
        return None
    is_same = torch.equal(one.flatten().sort().values, other.flatten().sort().values)
    return None if is_same else "the evaluation data gave other labels before than after"


def is_better(before: Evaluation, after: Evaluation) -> bool:
    """Return whether the metric grew.

    Raises:
        UsageError: there were no labels to tell.
        RefusedError: they were measured on other data.
    """
    if before.value is None or after.value is None:
        raise UsageError("--keep-if-better needs labels: give --eval-data with labels")
    difference = find_other_data(before, after)
    if difference is not None:
        raise RefusedError(f"--keep-if-better compares on the same data, but {difference}")
    if math.isnan(before.value):
        return not math.isnan(after.value)
    return after.value > before.value
