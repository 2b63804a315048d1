"""How good a model is on labelled data, and how much its outputs change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from bntool.data.batches import Batch, find_tensors, split_batch
from bntool.errors import RefusedError, UsageError
from bntool.layers.borrowing import borrow
from bntool.layers.modules import walk_modules
from bntool.models.user_code import import_object, is_factory_spec, running_user_code
from bntool.operations.passes import has_finite_inputs

_TOP = {"top1": 1, "top5": 5}


@dataclass(frozen=True)
class Metric:
    """A number for outputs and labels; larger is better.

    Attributes:
        name: for people.
        compute: takes all outputs and all labels, concatenated.
    """

    name: str
    compute: Callable[[Any, Any], float] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """What a model does with data.

    Attributes:
        metric: its name.
        value: None where there were no labels.
        samples: how many.
        predictions: class indices, where outputs have the shape (samples, classes); else None.
        labels: in the same order; None where there were none.
        finite: whether all outputs are.
    """

    metric: str
    value: float | None
    samples: int
    predictions: torch.Tensor | None = field(repr=False)
    labels: torch.Tensor | None = field(default=None, repr=False)
    finite: bool = True


def parse_metric(spec: str) -> Metric:
    """``top1``, ``top5``, or ``file.py:function``: a function of all outputs and labels that returns a number.

    Raises:
        UsageError: it is none of these.
        UserCodeError: importing the user's function raised.
    """
    if spec in _TOP:
        k = _TOP[spec]
        return Metric(spec, lambda outputs, labels: measure_top(outputs, labels, k=k))
    if is_factory_spec(spec):
        function = import_object(spec)
        if not callable(function):
            raise UsageError(f"--metric {spec} is not a function")

        def compute(outputs: Any, labels: Any) -> float:
            with running_user_code(f"the metric {spec}"):
                return float(function(outputs, labels))

        return Metric(spec.rpartition(":")[2], compute)
    raise UsageError(f"--metric {spec!r} is not known; it can be top1, top5, or FILE.py:function")


def measure_top(outputs: torch.Tensor, labels: torch.Tensor, *, k: int) -> float:
    """Share of samples whose label is among the k largest outputs, 0 to 1.

    A sample whose outputs are not finite counts as wrong.

    Args:
        outputs: shape (samples, classes).
        labels: class indices, shape (samples,).
        k: at most the number of classes.

    Raises:
        UsageError: the shapes do not fit together.
    """
    if outputs.ndim != 2 or tuple(labels.shape) != (outputs.shape[0],) or labels.is_floating_point():
        raise UsageError(
            f"top-{k} needs outputs (samples, classes) and as many class indices; the outputs are "
            f"{list(outputs.shape)}, the labels {list(labels.shape)} {labels.dtype}; give --metric FILE.py:function"
        )
    best = outputs.topk(min(k, outputs.shape[1]), dim=1).indices
    right = (best == labels.to(best.device).unsqueeze(1)).any(dim=1) & torch.isfinite(outputs).all(dim=1)
    return float(right.double().mean())


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    metric: Metric,
    skip_bad_inputs: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run a model in eval mode over batches; it is given back as it was.

    Args:
        model: what to run.
        batches: with or without labels.
        metric: what to compute from outputs and labels.
        skip_bad_inputs: leave out batches whose inputs hold NaN or infinity.
        on_progress: called with the number of samples done.

    Raises:
        UsageError: there is no batch, or outputs and labels do not fit the metric.
        RefusedError: only some of the batches have labels.
        UserCodeError: the model or the metric raised.
    """
    outputs, labels, samples = [], [], 0
    with borrow(model), torch.no_grad():
        for _, module in walk_modules(model):
            module.training = False
        for item in batches:
            batch = item if isinstance(item, Batch) else split_batch(item, source="the data", position=samples)
            if skip_bad_inputs and not has_finite_inputs(batch):
                continue
            with running_user_code(f"running the model on {batch.description}"):
                output = next(find_tensors(batch.run(model)), None)
            if output is None:
                raise UsageError("the model returns no tensor that could be evaluated")
            outputs.append(output.float().cpu())
            if isinstance(batch.labels, torch.Tensor):
                labels.append(batch.labels.cpu())
            samples += batch.samples
            if on_progress is not None:
                on_progress(samples)
    if not outputs:
        raise UsageError("the evaluation data gave no batch")
    if labels and len(labels) < len(outputs):
        raise RefusedError("only some batches of the evaluation data have labels")
    everything = torch.cat(outputs) if len({tuple(o.shape[1:]) for o in outputs}) == 1 and outputs[0].ndim else None
    if labels and everything is None:
        raise UsageError("outputs of the batches differ in shape and cannot be evaluated together")
    targets = torch.cat(labels) if labels else None
    value = metric.compute(everything, targets) if targets is not None else None
    is_classifier = everything is not None and everything.ndim == 2
    return Evaluation(
        metric=metric.name,
        value=value,
        samples=samples,
        predictions=everything.argmax(dim=1) if is_classifier and everything is not None else None,
        labels=targets,
        finite=all(bool(torch.isfinite(output).all()) for output in outputs),
    )


def count_flipped(before: Evaluation, after: Evaluation) -> float | None:
    """Share of samples that are predicted as another class, 0 to 1.

    None where outputs are not classes, or where the data came in another order the second time.
    """
    if before.predictions is None or after.predictions is None or before.samples != after.samples:
        return None
    if before.labels is not None and after.labels is not None and not torch.equal(before.labels, after.labels):
        return None
    return float((before.predictions != after.predictions).double().mean())


def is_better(before: Evaluation, after: Evaluation) -> bool:
    """Whether the metric grew.

    Raises:
        UsageError: there were no labels to tell.
    """
    if before.value is None or after.value is None:
        raise UsageError("--keep-if-better needs labels: give --eval-data with labels")
    if math.isnan(before.value):
        return not math.isnan(after.value)
    return after.value > before.value
