"""Finding where inside a folded model the outputs of layers must still be those of the original."""

from __future__ import annotations

from collections.abc import Iterator

from bntool.folding.folds import Fold, Level
from bntool.folding.planning import FoldPlan
from bntool.graphs.graph import ModelGraph, Node, NodeKind


def find_points(graph: ModelGraph, plan: FoldPlan) -> dict[str, str]:
    """Map each folded BatchNorm to the module whose output does not change, or is known to be stored otherwise.

    The output of a BatchNorm stays, unless a later one is folded through it, or what took it goes forward. One that is
    folded into what reads it has its effect there. One that is folded into a branch beside it has it in their sum,
    which is no module.
    """
    forward = {fold.layer for fold in plan.folds if fold.level is Level.FORWARD}
    back = [fold for fold in plan.folds if fold.level in (Level.DIRECT, Level.THROUGH, Level.BATCHNORM)]
    scaled = {layer for fold in back for layer in (*fold.into, *_passed(graph, fold))}
    points = {fold.layer: fold.layer for fold in back if fold.layer not in scaled and forward.isdisjoint(fold.into)}
    for fold in plan.folds:
        if fold.layer in forward:
            reader = next((layer for layer in fold.into if layer not in scaled), None)
            if reader is not None:
                points[fold.layer] = reader
        elif fold.level is Level.TRANSFORM and fold.layer not in scaled:
            points[fold.layer] = fold.layer
    return {layer: at for layer, at in points.items() if at not in plan.changed}


def _passed(graph: ModelGraph, fold: Fold) -> Iterator[str]:
    """Yield the BatchNorms between a folded one and what took its scale."""
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
