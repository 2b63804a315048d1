"""Finding where the identity in the place of a BatchNorm has to copy: it hands on the very tensor that it is given."""

from __future__ import annotations

from collections.abc import Collection

from bntool.graphs.graph import ModelGraph, Node, NodeKind


def has_to_copy(graph: ModelGraph, layer: str, *, gone: Collection[str]) -> bool:
    """Return whether something writes into the output of a BatchNorm, or into its input, while the other is still
    needed.

    Args:
        gone: the BatchNorms in whose place the identity is.
    """
    calls = graph.batchnorms[layer]
    if all(is_private(graph, call) for call in calls):
        return False
    sources = [graph.nodes[edge.source] for call in calls for edge in graph.inputs(call) if edge.port == 0]
    pending, seen = [*calls, *sources], {node.index for node in (*calls, *sources)}
    while pending:
        node = pending.pop()
        for edge in graph.outputs(node):
            reader = graph.nodes[edge.target]
            if reader.operator.endswith("_") and (edge.port == 0 or reader.kind is NodeKind.OTHER):
                return True
            if reader.kind is NodeKind.BATCH_NORM and reader.layer in gone and reader.index not in seen:
                seen.add(reader.index)
                pending.append(reader)
    return False


def is_private(graph: ModelGraph, node: Node) -> bool:
    """Return whether nothing else reads what a node reads."""
    sources = [graph.nodes[edge.source] for edge in graph.inputs(node)]
    readers = {edge.target for source in sources for edge in graph.outputs(source)}
    return readers == {node.index} and not any(source.kind is NodeKind.INPUT for source in sources)
