"""The agreement of the outputs of layers inside a changed model with those of the original."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bntool.modules.finding import find_name_prefix, walk_modules
from bntool.verification.stored_outputs import StoredOutput

LayerOutputs = Mapping[str, Sequence[torch.Tensor]]


@dataclass(frozen=True)
class LayerAgreement:
    """One BatchNorm that was folded; errors are relative to the largest magnitude of the output.

    Attributes:
        layer: the BatchNorm.
        at: the module whose output was compared: itself or what took its place, or what reads it.
        exact: error of the same fold in float64; NaN where the model does not run in float64.
        stored: error in the dtype of the file.
    """

    layer: str
    at: str
    exact: float
    stored: float


@contextlib.contextmanager
def watch(model: nn.Module, layers: Collection[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect what modules compute for the first sample of a batch, call by call, while the model runs.

    Args:
        layers: names of modules, as a plan has them.
    """
    prefix = find_name_prefix(model, [f"{layer}." for layer in layers])
    wanted = {prefix + layer: layer for layer in layers}
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for path, module in walk_modules(model):
        if path in wanted:

            def keep(_module: nn.Module, _inputs: Any, output: Any, layer: str = wanted[path]) -> None:
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    seen.setdefault(layer, []).append(output[:1].detach().clone())

            handles.append(module.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def compare_layers(
    points: Mapping[str, str],
    exact: tuple[LayerOutputs, LayerOutputs] | None,
    stored: tuple[LayerOutputs, LayerOutputs],
    transforms: Mapping[str, StoredOutput] | None = None,
) -> list[LayerAgreement]:
    """Return the largest error of each layer.

    Args:
        points: from :func:`~bntool.folding.unchanged_outputs.find_points`.
        exact: what was seen in float64 of the original and of the folded model; None where they do not run in it.
        stored: the same in the dtype of the file.
        transforms: by module how the folded model stores its output; what it stands for is compared.
    """
    known = transforms or {}

    def error(outputs: tuple[LayerOutputs, LayerOutputs], at: str) -> float:
        return _largest_error(outputs[0].get(at, ()), outputs[1].get(at, ()), known.get(at))

    return [
        LayerAgreement(layer, at, exact=math.nan if exact is None else error(exact, at), stored=error(stored, at))
        for layer, at in points.items()
        if at in stored[0]  # not where its module is never called
    ]


def _largest_error(
    expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], transform: StoredOutput | None
) -> float:
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return math.nan
    meant = found if transform is None else [_undo(tensor, transform) for tensor in found]
    return max((relative_error(a, b) for a, b in zip(expected, meant, strict=True)), default=math.nan)


def _undo(stored: torch.Tensor, transform: StoredOutput) -> torch.Tensor:
    """Return the output x of a layer, from a (x + b) as it is stored."""
    shape = [1] * stored.dim()
    shape[transform.axis] = -1
    scale, shift = (
        torch.tensor(values, dtype=torch.float64, device=stored.device).view(shape)
        for values in (transform.scale, transform.shift)
    )
    return stored.double() / scale - shift


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest difference in relation to the largest magnitude expected; NaN where one is NaN."""
    if expected.numel() == 0:
        return 0.0
    magnitude = float(expected.double().abs().max())
    difference = float((expected.double() - found.double()).abs().max())
    if math.isnan(difference) or math.isnan(magnitude):
        return math.nan
    return difference / magnitude if magnitude > 0 else 0.0 if difference == 0 else math.inf
