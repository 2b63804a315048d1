"""Changes that new statistics make to the outputs of a model: all of them together, and those of single layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bntool.data.batches import Batch, cut_batch, move
from bntool.models.user_code import running_user_code
from bntool.modules.borrowing import borrow
from bntool.modules.calling import tensors_in
from bntool.modules.finding import find_batchnorm_modules, walk_modules
from bntool.recalibration.drift import find_first_parted
from bntool.recalibration.evaluation import take_first
from bntool.recalibration.new_statistics import Recalibration
from bntool.recalibration.pooled import has_finite_inputs, set_statistics

_SAMPLES = 32
_LAYERS = 5  # so many forwards more


@dataclass(frozen=True)
class OutputChange:
    """Outputs y with the stored and z with new statistics, of the same samples in eval mode.

    Attributes:
        relative: norm(z - y) / norm(y) over all elements of all floating outputs; None where outputs are not finite,
            all 0, or have other shapes than before.
        flipped: share of the samples with another top-1, 0 to 1; None where outputs are not (samples, classes).
        finite: whether all of z are.
    """

    relative: float | None
    flipped: float | None
    finite: bool


@dataclass(frozen=True)
class OutputChanges:
    """The changes that new statistics make to the outputs.

    Attributes:
        samples: how many the model was run on.
        finite: whether the outputs with the stored statistics are.
        together: all new statistics.
        alone: those of one layer only, by its name, the others being the stored ones: of the first layer in execution
            order that parted from the data, and of those that drifted most.
    """

    samples: int
    finite: bool
    together: OutputChange
    alone: Mapping[str, OutputChange]


def measure_output_changes(
    model: torch.nn.Module, batches: Iterable[Batch], recalibration: Recalibration
) -> OutputChanges | None:
    """Run a few samples with the stored statistics and with new ones; the model is given back as it was.

    Args:
        model: with the stored statistics.
        batches: of which the first without NaN or infinity is used, at most 32 samples of it.
        recalibration: of this model.

    Returns:
        None where there is no such batch.

    Raises:
        UserCodeError: the model or the data raised.
    """
    batch = next((batch for batch in batches if has_finite_inputs(batch)), None)
    if batch is None:
        return None
    batch = cut_batch(batch, _SAMPLES)
    modules, prefix = find_batchnorm_modules(model), recalibration.prefix
    names = list(recalibration.statistics)
    stored = _run(model, batch, {})

    def change(names: Iterable[str]) -> OutputChange:
        new = {modules[name]: recalibration.statistics[name] for name in names}
        return _compare(stored, _run(model, batch, new))

    worst = _choose(recalibration)
    return OutputChanges(
        samples=batch.samples,
        finite=_is_finite(stored),
        together=change(names),
        alone={layer: change([name]) for name in names if (layer := name.removeprefix(prefix)) in worst},
    )


def _choose(recalibration: Recalibration) -> set[str]:
    first = find_first_parted(recalibration.drifts)
    worst = sorted(recalibration.drifts, key=lambda drift: -drift.severity)
    worst = [drift for drift in worst if drift is not first]
    return {drift.layer for drift in ([first] if first else []) + worst[: _LAYERS - bool(first)]}


def _run(model: torch.nn.Module, batch: Batch, statistics: Mapping[torch.nn.Module, Any]) -> Any:
    """Run the model in eval mode, with some layers' statistics replaced; return its outputs on the CPU."""
    with borrow(model), torch.no_grad():
        for _, module in walk_modules(model):
            module.training = False
        for module, new in statistics.items():
            set_statistics(module, mean=new.mean, variance=new.variance)
        with running_user_code(f"running the model on {batch.description}"):
            output = batch.run(model)
        return move(output, device=torch.device("cpu"), dtype=torch.float64)


def _compare(before: Any, after: Any) -> OutputChange:
    old, new = _find_floating(before), _find_floating(after)
    finite = _is_finite(after)
    relative = None
    if old and finite and _is_finite(before) and [t.shape for t in old] == [t.shape for t in new]:
        size = math.hypot(*(float(t.norm()) for t in old))
        difference = math.hypot(*(float((z - y).norm()) for y, z in zip(old, new, strict=True)))
        relative = difference / size if size else None
    return OutputChange(relative, _count_flipped(take_first(before), take_first(after)), finite)


def _count_flipped(before: Any, after: Any) -> float | None:
    if not all(isinstance(t, torch.Tensor) and t.ndim == 2 and t.numel() for t in (before, after)):
        return None
    if before.shape != after.shape or before.shape[1] == 1:
        return None
    return float((before.argmax(dim=1) != after.argmax(dim=1)).double().mean())


def _find_floating(output: Any) -> list[torch.Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def _is_finite(output: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _find_floating(output))
