"""Where inside a folded model the outputs of layers must still be those of the original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bntool.folding.planning import Fold, Level
from bntool.graphs.graph import ModelGraph, Node, NodeKind


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
