"""The smallest part of a traced graph from which `plan_fold` takes the same decisions, whatever the tensors hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from bntool.folding.absorption import Blocked, find_producers
from bntool.folding.deploy.forms import find_blocks
from bntool.folding.deploy.merging import find_inside
from bntool.folding.transforms.branches import find_siblings
from bntool.folding.transforms.channel_transforms import ChannelTransforms
from bntool.graphs.graph import Edge, ModelGraph, Node, NodeKind
from catalogue.writing import format_runs

_MOST_RUNS = 64  # of channels; an edge that takes more to write says that every channel meets every one
_PASSING = (NodeKind.ADD, NodeKind.MAX_POOL, NodeKind.AVERAGE, NodeKind.BATCH_NORM)


def reduce_graph(graph: ModelGraph, architecture: str = "") -> ModelGraph:
    """The nodes and edges that deciding needs, numbered anew in order of execution.

    A BatchNorm that its producer can always take directly needs that edge alone. For every other one, what is walked
    is kept: back to what could take it, forward to what could, everybody who reads what lies on the way, and the
    branches beside it; and everything that may be stored otherwise because of it, with all that reads it. All is kept
    of blocks that a deploy form merges.

    Args:
        architecture: its name.
    """
    edges: dict[int, Edge] = {}
    nodes = {node.index for calls in graph.batchnorms.values() for node in calls}
    others: list[str] = []
    for layer, calls in graph.batchnorms.items():
        walked = _direct(graph, layer)
        if walked is None:
            others.append(layer)
            walked = [edge for call in calls for edge in _walk(graph, call)]
        edges.update((id(edge), edge) for edge in walked)
    system = _transform(graph, others)
    edges.update((id(edge), edge) for edge in _find_transformed(graph, system))
    blocks = _find_blocks(graph, (architecture,))
    edges.update((id(edge), edge) for node in blocks for edge in (*graph.inputs(node), *graph.outputs(node)))
    graph = _forget_what_does_not_matter(graph, others, {node.index for node in blocks}, system.bases)
    nodes |= {index for edge in edges.values() for index in (edge.source, edge.target)}
    uses = {}
    for name in _names(graph, nodes):
        uses[name] = graph.uses.get(name, frozenset())
        nodes |= uses[name]
    if graph.branches_at is not None:
        nodes.add(graph.branches_at)
    numbers = {index: number for number, index in enumerate(sorted(nodes))}
    kept = tuple(dataclasses.replace(graph.nodes[index], index=number) for index, number in numbers.items())
    moved = sorted(
        (
            dataclasses.replace(_simplify(edge), source=numbers[edge.source], target=numbers[edge.target])
            for edge in edges.values()
        ),
        key=lambda edge: (edge.target, edge.port),
    )
    names = set(uses)
    return dataclasses.replace(
        graph,
        nodes=kept,
        edges=tuple(moved),
        uses={name: frozenset(numbers[index] for index in users) for name, users in uses.items()},
        aliases={name: others for name, others in graph.aliases.items() if name in names},
        tied=graph.tied & names,
        branches_at=None if graph.branches_at is None else numbers[graph.branches_at],
    )


def _simplify(edge: Edge) -> Edge:
    """The same edge with its pairs of channels in the order that takes least to write."""
    if edge.targets is None:
        return edge
    pairs = list(zip(edge.sources, edge.targets, strict=True))
    orders = [pairs, sorted(pairs), sorted(pairs, key=lambda pair: pair[::-1])]
    best = min(orders, key=lambda order: sum(map(_count_runs, zip(*order, strict=True))))
    sources, targets = (tuple(side) for side in zip(*best, strict=True))
    if max(_count_runs(sources), _count_runs(targets)) > _MOST_RUNS:
        return dataclasses.replace(edge, sources=tuple(sorted(set(sources))), targets=None)
    return dataclasses.replace(edge, sources=sources, targets=targets)


def _count_runs(numbers: Sequence[int]) -> int:
    return format_runs(numbers).count("+") + 1


def _names(graph: ModelGraph, nodes: set[int]) -> Iterator[str]:
    for index in nodes:
        yield from graph.nodes[index].parameters.values()


def _direct(graph: ModelGraph, layer: str) -> list[Edge] | None:
    """The edges from its producer, if nothing but those matters."""
    scale = np.ones(graph.batchnorms[layer][0].channels)
    try:
        absorbers = find_producers(graph, layer, scale=scale, removed=())
    except Blocked:
        return None
    edges = [edge for call in graph.batchnorms[layer] for edge in graph.inputs(call)]
    alone = all(len(graph.inputs(call)) == 1 for call in graph.batchnorms[layer])
    plain = len(absorbers) == 1 and absorbers[0].absorption.direct
    return edges if alone and plain and all(graph.nodes[e.source].kind.is_producer for e in edges) else None


def _transform(graph: ModelGraph, layers: Sequence[str]) -> ChannelTransforms:
    """What may be stored otherwise because of these BatchNorms, all others being the identity."""
    gone = graph.batchnorms.keys() - set(layers)
    return ChannelTransforms(graph, frozenset(layers), gone, lambda _: True, lambda _: True)


def _find_transformed(graph: ModelGraph, system: ChannelTransforms) -> Iterator[Edge]:
    """The edges around what may be stored otherwise."""
    for index in system.bases:
        node = graph.nodes[index]
        yield from graph.outputs(node)
        if not node.kind.is_producer:
            yield from graph.inputs(node)
        readers = [graph.nodes[edge.target] for edge in graph.outputs(node)]
        for reader in (node, *readers):
            calls = system.roles.calls_with(reader) or (reader,)
            for call in calls if reader is not node or len(calls) > 1 else ():
                yield from graph.inputs(call)


def _find_blocks(graph: ModelGraph, architectures: Collection[str]) -> Sequence[Node]:
    """What the deploy form of a network merges."""
    names = [name for node in graph.nodes for name in node.parameters.values()]
    return [
        node
        for block in find_blocks(names, architectures)
        for node in find_inside(graph, block.holds, block.module).values()
    ]


def _forget_what_does_not_matter(
    graph: ModelGraph, layers: Sequence[str], merged: Collection[int], transformed: Collection[int]
) -> ModelGraph:
    """How a convolution lies on what it reads matters only beside a branch that it could take, or be merged with.

    A parameter that channels are multiplied by matters only in what is merged or stored otherwise.
    """
    calls = (call for layer in layers for call in graph.batchnorms[layer])
    beside = {node.index for call in calls for node in find_siblings(graph, call)}
    used = {*merged, *transformed}
    nodes = tuple(
        dataclasses.replace(
            node,
            centred=node.centred and node.index in {*beside, *merged},
            strides=node.strides if node.index in merged else (),
            parameters={} if node.kind is NodeKind.CHANNELWISE and node.index not in used else node.parameters,
        )
        for node in graph.nodes
    )
    return dataclasses.replace(graph, nodes=nodes)


def _walk(graph: ModelGraph, call: Node) -> Iterator[Edge]:
    yield from _walk_back(graph, call, set())
    yield from _walk_forward(graph, call, set())
    for edge in graph.inputs(call):  # branches beside it
        for other in graph.outputs(graph.nodes[edge.source]):
            reader = graph.nodes[other.target]
            if reader.kind is NodeKind.CONVOLUTION:
                yield from graph.inputs(reader)
                yield from _walk_to_sums(graph, reader, set())
    yield from _walk_to_sums(graph, call, set())


def _walk_back(graph: ModelGraph, reader: Node, seen: set[int]) -> Iterator[Edge]:
    if reader.index in seen:
        return
    seen.add(reader.index)
    ports = (0, 1) if reader.kind is NodeKind.ADD else (0,)
    for edge in graph.inputs(reader):
        if edge.port not in ports:
            continue
        yield edge
        source = graph.nodes[edge.source]
        if source.kind.is_producer or source.kind in _PASSING:
            yield from graph.outputs(source)
        if source.kind in _PASSING:
            yield from _walk_back(graph, source, seen)


def _walk_forward(graph: ModelGraph, source: Node, seen: set[int]) -> Iterator[Edge]:
    if source.index in seen:
        return
    seen.add(source.index)
    for edge in graph.outputs(source):
        reader = graph.nodes[edge.target]
        yield edge
        if reader.kind.is_producer or reader.kind in _PASSING:
            yield from (other for other in graph.inputs(reader) if other.port == edge.port)
        if reader.kind in (NodeKind.MAX_POOL, NodeKind.AVERAGE, NodeKind.BATCH_NORM):
            yield from _walk_forward(graph, reader, seen)


def _walk_to_sums(graph: ModelGraph, source: Node, seen: set[int]) -> Iterator[Edge]:
    if source.index in seen:
        return
    seen.add(source.index)
    for edge in graph.outputs(source):
        reader = graph.nodes[edge.target]
        yield edge
        if reader.kind in (NodeKind.ADD, NodeKind.BATCH_NORM, NodeKind.CHANNELWISE):
            yield from (other for other in graph.inputs(reader) if other.port == edge.port)
            yield from _walk_to_sums(graph, reader, seen)
