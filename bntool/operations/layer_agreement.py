"""Where inside a folded model the outputs of layers must still be those of the original, and how well they agree."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bntool.graphs.graph import ModelGraph, Node, NodeKind
from bntool.layers.modules import find_wrapper_prefix, walk_modules
from bntool.operations.folding import Fold, Level

Seen = Mapping[str, Sequence[torch.Tensor]]


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


def find_points(graph: ModelGraph, folds: Sequence[Fold]) -> dict[str, str]:
    """For each folded BatchNorm the module whose output does not change, where there is one.

    The output of a BatchNorm stays, unless a later one is folded through it, or what took it goes forward. One that is
    folded into what reads it has its effect there.
    """
    forward = {fold.layer for fold in folds if fold.level is Level.FORWARD}
    back = [fold for fold in folds if fold.layer not in forward]
    scaled = {layer for fold in back for layer in (*fold.into, *_passed(graph, fold))}
    points = {fold.layer: fold.layer for fold in back if fold.layer not in scaled and forward.isdisjoint(fold.into)}
    for fold in folds:
        reader = next((layer for layer in fold.into if layer not in scaled), None)
        if fold.layer in forward and reader is not None:
            points[fold.layer] = reader
    return points


def _passed(graph: ModelGraph, fold: Fold) -> Iterator[str]:
    """The BatchNorms between a folded one and what took its scale."""
    pending: list[Node] = list(graph.batchnorms[fold.layer])
    met = {node.index for node in pending}
    while pending:
        for edge in graph.inputs(pending.pop()):
            source = graph.nodes[edge.source]
            if source.index in met or source.kind.is_producer:
                continue
            met.add(source.index)
            if source.kind is NodeKind.BATCH_NORM:
                yield source.layer
                if source.layer in fold.into:
                    continue
            pending.append(source)


@contextlib.contextmanager
def watch(model: nn.Module, layers: Collection[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect what modules give for the first sample of a batch, call by call, while the model runs.

    Args:
        layers: names of modules, without the prefix of wrappers.
    """
    prefix = find_wrapper_prefix(model)
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
    points: Mapping[str, str], exact: tuple[Seen, Seen] | None, stored: tuple[Seen, Seen]
) -> list[LayerAgreement]:
    """The largest error of each layer.

    Args:
        points: from :func:`find_points`.
        exact: what was seen in float64 of the original and of the folded model; None where they do not run in it.
        stored: the same in the dtype of the file.
    """
    return [
        LayerAgreement(
            layer,
            at,
            exact=math.nan if exact is None else _largest_error(exact[0].get(at, ()), exact[1].get(at, ())),
            stored=_largest_error(stored[0][at], stored[1].get(at, ())),
        )
        for layer, at in points.items()
        if at in stored[0]  # not where its module is never called
    ]


def _largest_error(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return math.nan
    return max((relative_error(a, b) for a, b in zip(expected, found, strict=True)), default=math.nan)


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference in relation to the largest magnitude expected; NaN where one is NaN."""
    if expected.numel() == 0:
        return 0.0
    magnitude = float(expected.double().abs().max())
    difference = float((expected.double() - found.double()).abs().max())
    if math.isnan(difference) or math.isnan(magnitude):
        return math.nan
    return difference / magnitude if magnitude > 0 else 0.0 if difference == 0 else math.inf
