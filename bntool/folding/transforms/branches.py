"""Identity branches: a BatchNorm beside a convolution of the same input, both added up, as in RepVGG and MobileOne.

s x + t + conv(x) = x + conv'(x): the tap in the middle of the kernel takes s - 1, the bias takes t. The branch stays,
as the identity, so that the file fits the unmodified model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from bntool.folding.channels import as_indices, is_whole
from bntool.graphs.graph import ModelGraph, Node, NodeKind, Owner


@dataclass(frozen=True)
class IdentityBranch:
    """A BatchNorm that a convolution beside it can take over.

    Attributes:
        call: of the BatchNorm.
        convolution: reads the same, and reaches the same sum.
        factor: of the BatchNorm in that sum, in relation to the convolution's.
        passed: BatchNorms between the convolution and the sum, whose outputs change with it.
    """

    call: Node
    convolution: Node
    factor: float
    passed: tuple[str, ...]


@dataclass(frozen=True)
class _Way:
    factor: float
    passed: tuple[str, ...]


def find_branch(
    graph: ModelGraph, layer: str, *, removed: Collection[str], absorbs: Callable[[Node], bool]
) -> IdentityBranch | None:
    """Return the convolution that can take a BatchNorm that lies beside it; None where there is none.

    Args:
        removed: BatchNorms that are the identity by now.
        absorbs: whether a convolution is called once, has its tensors to itself and a place for a bias.
    """
    calls = graph.batchnorms[layer]
    if len(calls) != 1 or calls[0].owner is Owner.PART:
        return None
    call = calls[0]
    sums = _find_sums(graph, call, removed)
    read = _shape_of_reads(graph, call) if sums and not _is_late(graph, call) else None
    if read is None:
        return None
    for convolution in find_siblings(graph, call):
        fits = convolution.centred and convolution.channels == call.channels and not _is_late(graph, convolution)
        if not fits or _shape_of_reads(graph, convolution) != read or not absorbs(convolution):
            continue
        for index, way in _find_sums(graph, convolution, removed).items():
            if index in sums:
                mine = sums[index]
                return IdentityBranch(call, convolution, mine.factor / way.factor, (*mine.passed, *way.passed))
    return None


def find_siblings(graph: ModelGraph, call: Node) -> Iterator[Node]:
    found: dict[int, Node] = {}
    for edge in graph.inputs(call):
        for other in graph.outputs(graph.nodes[edge.source]):
            reader = graph.nodes[other.target]
            if reader.kind is NodeKind.CONVOLUTION and other.port == 0:
                found[reader.index] = reader
    yield from found.values()


def _is_late(graph: ModelGraph, node: Node) -> bool:
    return graph.branches_at is not None and node.index > graph.branches_at


def _shape_of_reads(graph: ModelGraph, node: Node) -> object:
    """Describe which channels of what a node reads, in a form that can be compared; None where they are not told
    apart.
    """
    edges = [edge for edge in graph.inputs(node) if edge.port == 0]
    if not edges or any(edge.targets is None for edge in edges):
        return None
    sources = np.concatenate([as_indices(edge.sources) for edge in edges])
    targets = np.concatenate([as_indices(edge.targets or ()) for edge in edges])
    nodes = np.repeat([edge.source for edge in edges], [len(edge.sources) for edge in edges])
    if not np.array_equal(np.sort(targets), np.arange(node.channels)):
        return None
    order = np.argsort(targets)
    return nodes[order].tobytes(), sources[order].tobytes()


def _find_sums(graph: ModelGraph, node: Node, removed: Collection[str]) -> dict[int, _Way]:
    """Return the additions that a node's output reaches, all of it and by one way, and its factor in each."""
    sums: dict[int, _Way] = {}
    way = _Way(1.0, ())
    while True:
        edges = graph.outputs(node)
        if len(edges) != 1 or not is_whole(edges[0], node):
            return sums
        reader = graph.nodes[edges[0].target]
        if reader.kind is NodeKind.ADD and reader.ran and reader.channels == node.channels:
            factor = way.factor * (reader.factors[edges[0].port] if reader.factors else 1.0)
            others = [edge for edge in graph.inputs(reader) if edge.port == edges[0].port]
            if not factor or len(others) != 1:
                return sums
            way = _Way(factor, way.passed)
            sums[reader.index] = way
        elif reader.kind is NodeKind.CHANNELWISE and len(reader.factors) == 1 and reader.channels == node.channels:
            way = _Way(way.factor * reader.factors[0], way.passed)
        elif reader.kind is NodeKind.BATCH_NORM and reader.layer in removed and len(graph.inputs(reader)) == 1:
            way = _Way(way.factor, (*way.passed, reader.layer))
        else:
            return sums
        node = reader
