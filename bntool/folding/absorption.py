"""Finding where the scale and shift of a BatchNorm can go: back into what feeds it, or forward into what reads it.

y = scale * x + shift, per channel. Back: through additions (each branch takes the scale, one the shift), averages over
positions, and max-pools where every scale is positive, into convolutions and linears: W' = scale * W over their output
channels, b' = scale * b + shift. Everything on the way must be read by the next step alone, channel for channel.
Forward: through averages and max-pools into the input channels of every reader, W' = W * scale, b' = b + W shift; not
into zero padding, which stands for what the BatchNorm's shift would have filled.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bntool.folding.channels import Array, Integers, as_indices
from bntool.graphs.graph import Edge, ModelGraph, Node, NodeKind
from bntool.plan import SkipReason


class Blocked(Exception):  # noqa: N818 an answer, not an error of the program
    """A scale and shift cannot go where it was tried.

    Attributes:
        reason: which of the named reasons.
        detail: what was seen.
    """

    def __init__(self, reason: SkipReason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Absorption:
    """The part of a scale and shift that one call of a producer, an earlier BatchNorm or a consumer takes.

    Attributes:
        node: the call.
        channels: for each of its output channels (forward: input channels) the channel of the BatchNorm whose scale it
            takes, -1 for none.
        takes_shift: for each of these whether it takes the shift too.
        direct: nothing lies between, not even an addition or a pool.
        pooled: a max-pool lies between, which lets the scale pass since it is positive in every channel.
    """

    node: Node
    channels: Integers
    takes_shift: NDArray[np.bool_]
    direct: bool
    pooled: bool = False


@dataclass(frozen=True)
class Absorber:
    """A producer, an earlier BatchNorm or a consumer that takes a scale and shift, the same in each of its calls."""

    name: str  # of its weight; for a BatchNorm its layer
    absorption: Absorption


def find_producers(graph: ModelGraph, layer: str, *, scale: Array, removed: Collection[str]) -> list[Absorber]:
    """Find what feeds a BatchNorm and can take its scale and shift.

    Args:
        scale: of the BatchNorm; a max-pool passes only positive ones.
        removed: BatchNorms that are the identity by now.

    Raises:
        Blocked: there is nothing, or it is not exact.
    """
    found = _walk_all_back(graph.observed, layer, scale=scale, removed=removed)
    absorbers = _gather(graph.observed, found)
    if graph.observed is not graph:
        _walk_all_back(graph, layer, scale=scale, removed=removed)
    return absorbers


def _walk_all_back(graph: ModelGraph, layer: str, *, scale: Array, removed: Collection[str]) -> list[Absorption]:
    found: list[Absorption] = []
    seen: list[tuple[Edge, ...]] = []
    for call in graph.batchnorms[layer]:
        edges = graph.inputs(call)
        if any(len(edges) == len(known) and all(map(_read_alike, edges, known)) for known in seen):
            continue
        seen.append(edges)
        _walk_back(
            graph, call, 0, np.arange(call.channels), found, scale=scale, removed=removed, shift=True, direct=True
        )
    return found


def _read_alike(one: Edge, other: Edge) -> bool:
    """Return whether two calls read the same channels of the same output, as those on parts of a batch do."""
    return (one.source, one.port, one.sources, one.targets) == (other.source, other.port, other.sources, other.targets)


def find_consumers(
    graph: ModelGraph, layer: str, *, scale: Array, shift: Array, removed: Collection[str]
) -> list[Absorber]:
    """Find what reads a BatchNorm and can take its scale and shift on its input channels.

    Raises:
        Blocked: a reader cannot, or there is none.
    """
    found = _walk_all_forward(graph.observed, layer, scale=scale, shift=shift, removed=removed)
    if not found:
        raise Blocked(SkipReason.NOT_ADJACENT, "nothing reads its output")
    absorbers = _gather(graph.observed, found)
    if graph.observed is not graph:
        _walk_all_forward(graph, layer, scale=scale, shift=shift, removed=removed)
    return absorbers


def _walk_all_forward(
    graph: ModelGraph, layer: str, *, scale: Array, shift: Array, removed: Collection[str]
) -> list[Absorption]:
    found: list[Absorption] = []
    for call in graph.batchnorms[layer]:
        _walk_forward(graph, call, np.arange(call.channels), found, scale=scale, shift=shift, removed=removed)
    return found


def _walk_back(  # noqa: PLR0913, C901 what is carried along, and a list of cases
    graph: ModelGraph,
    reader: Node,
    port: int,
    wanted: Integers,
    found: list[Absorption],
    *,
    scale: Array,
    removed: Collection[str],
    shift: bool,
    direct: bool,
    pooled: bool = False,
    scale_alone: bool = False,
) -> None:
    """Follow one input of a node back; ``wanted`` is the BatchNorm's channel for each channel of that input.

    Args:
        scale_alone: what was passed lets no shift pass, so that the BatchNorm has to stay and add it.
    """
    edges = [edge for edge in graph.inputs(reader) if edge.port == port]
    if not edges:
        raise Blocked(SkipReason.NO_PRODUCER, "nothing is known of what feeds it")
    for edge in sorted(edges, key=lambda edge: _rank(graph.nodes[edge.source])):
        source = graph.nodes[edge.source]
        if source.kind is NodeKind.INPUT:
            raise Blocked(SkipReason.NO_PRODUCER, "it reads the model's input")
        if not source.ran:
            raise Blocked(SkipReason.SHARED_OUTPUT, f"{source.describe()} did not run here and may feed it, too")
        linear = source.kind is NodeKind.CHANNELWISE
        if not (_is_passed(source) or linear or source.kind.is_producer or source.kind is NodeKind.BATCH_NORM):
            _check_computed_behind(graph, source)
            raise Blocked(SkipReason.NOT_ADJACENT, f"{source.describe()} lies between")
        if source.kind.is_producer and not source.parameters:
            name_of(source)  # that its weight is computed says more than what its channels meet
        channels = _channels_back(edge, source, reader, wanted)
        _check_alone(graph, edge, source, reader, removed=removed)
        if source.kind.is_producer or (source.kind is NodeKind.BATCH_NORM and source.layer not in removed):
            if scale_alone and _takes_shift(source):
                raise Blocked(SkipReason.NOT_ADJACENT, f"{source.describe()} could take the shift, too")
            found.append(Absorption(source, channels, np.full(len(channels), shift), direct, pooled))
            continue
        if source.kind is NodeKind.MAX_POOL and not np.all(scale[channels[channels >= 0]] > 0):
            raise Blocked(SkipReason.NOT_ADJACENT, f"{source.describe()} lies between, and not every scale is positive")
        through = source.kind is NodeKind.BATCH_NORM
        follow = partial(
            _walk_back,
            scale=scale,
            removed=removed,
            direct=direct and through,
            pooled=pooled or source.kind is NodeKind.MAX_POOL,
            scale_alone=scale_alone or linear,
        )
        try:
            follow(graph, source, 0, channels, found, shift=shift and not linear)
        except Blocked as problem:
            if not linear:
                raise
            raise Blocked(SkipReason.NOT_ADJACENT, f"{source.describe()} lies between") from problem
        if source.kind is NodeKind.ADD:
            follow(graph, source, 1, channels, found, shift=False)


def _takes_shift(node: Node) -> bool:
    """Return whether a BatchNorm or a producer has a bias, or a place for one."""
    return node.has_bias_slot or "bias" in node.parameters or node.kind is NodeKind.BATCH_NORM


def _check_computed_behind(graph: ModelGraph, node: Node) -> None:
    """Name the computed weight behind a bias that is added by itself as the obstacle, if there is one.

    Raises:
        Blocked: it is.
    """
    edges = graph.inputs(node) if node.kind is NodeKind.BIAS else ()
    for source in (graph.nodes[edge.source] for edge in edges):
        if source.kind.is_producer and not source.parameters:
            name_of(source)


def _is_passed(node: Node) -> bool:
    """Return whether a scale and shift pass a node as they are."""
    return node.kind in (NodeKind.ADD, NodeKind.MAX_POOL, NodeKind.AVERAGE) and not node.factors


def _rank(node: Node) -> int:
    """Rank obstacles first: they give the plainest reasons."""
    return 1 if _is_passed(node) or node.kind.is_producer or node.kind is NodeKind.BATCH_NORM else 0


def _channels_back(edge: Edge, source: Node, reader: Node, wanted: Integers) -> Integers:
    if edge.targets is None:
        raise _mismatch(source, reader)
    sources, targets = as_indices(edge.sources), as_indices(edge.targets)
    if targets.size and targets.max() >= len(wanted):
        raise _mismatch(source, reader)
    channels = np.full(source.channels, -1)
    channels[sources] = wanted[targets]
    if not np.array_equal(channels[sources], wanted[targets]):
        raise _mismatch(source, reader)
    return channels


def _mismatch(source: Node, reader: Node) -> Blocked:
    return Blocked(
        SkipReason.AXIS_MISMATCH,
        f"one channel of {source.describe()} meets several channels of {reader.describe()}",
    )


def _check_alone(graph: ModelGraph, edge: Edge, source: Node, reader: Node, *, removed: Collection[str]) -> None:
    """Check that nothing else reads these channels, but for calls of the BatchNorm that is to go on all of them."""
    goes = reader.kind is NodeKind.BATCH_NORM and reader.layer not in removed
    mine = None
    for other in graph.outputs(source):
        if (other.target, other.port) == (reader.index, edge.port):
            continue
        node = graph.nodes[other.target]
        if goes and node.kind is NodeKind.BATCH_NORM and node.layer == reader.layer and _read_alike(edge, other):
            continue
        if mine is None:
            mine = np.zeros(source.channels, bool)
            mine[as_indices(edge.sources)] = True
        if mine[as_indices(other.sources)].any():
            how = "is also read by" if node.ran else "may also be read by"
            whom = node.describe() + ("" if node.ran else ", which did not run here")
            raise Blocked(SkipReason.SHARED_OUTPUT, f"the output of {source.describe()} {how} {whom}")


def _walk_forward(
    graph: ModelGraph,
    source: Node,
    given: Integers,
    found: list[Absorption],
    *,
    scale: Array,
    shift: Array,
    removed: Collection[str],
    pooled: bool = False,
) -> None:
    """Follow every reader; ``given`` is the BatchNorm's channel for each channel of the source, -1 for others."""
    for edge in graph.outputs(source):
        if np.all(given[as_indices(edge.sources)] < 0):
            continue
        reader = graph.nodes[edge.target]
        producer = reader.kind in (NodeKind.CONVOLUTION, NodeKind.LINEAR)
        if producer and edge.port != 0:
            raise Blocked(SkipReason.COMPUTED_WEIGHT, f"{reader.describe()} takes it as a weight")
        passes = reader.kind in (NodeKind.MAX_POOL, NodeKind.AVERAGE)
        if not producer and not passes and not (reader.kind is NodeKind.BATCH_NORM and reader.layer in removed):
            how = "reads its output" if reader.ran else "did not run here and may read its output"
            raise Blocked(SkipReason.NOT_ADJACENT, f"{reader.describe()} {how}")
        others = (graph.nodes[e.source] for e in graph.inputs(reader) if e.port == edge.port)
        idle = next((node for node in others if not node.ran), None)
        if idle is not None:
            what = f"{idle.describe()} did not run here and may feed {reader.describe()}, too"
            raise Blocked(SkipReason.SHARED_OUTPUT, what)
        channels = _channels_forward(graph, edge, source, reader, given)
        if producer:
            if reader.padded and np.any(shift[channels[channels >= 0]] != 0):
                raise Blocked(SkipReason.PADDED_CONSUMER, f"{reader.describe()} reads it with zeros beyond the border")
            found.append(Absorption(reader, channels, np.full(len(channels), True), direct=True, pooled=pooled))
            continue
        if reader.kind is NodeKind.MAX_POOL and not np.all(scale[channels[channels >= 0]] > 0):
            raise Blocked(SkipReason.NOT_ADJACENT, f"{reader.describe()} reads it, and not every scale is positive")
        onward = np.full(reader.channels, -1)
        onward[: len(channels)] = channels
        now = pooled or reader.kind is NodeKind.MAX_POOL
        _walk_forward(graph, reader, onward, found, scale=scale, shift=shift, removed=removed, pooled=now)


def _channels_forward(graph: ModelGraph, edge: Edge, source: Node, reader: Node, given: Integers) -> Integers:
    """Return the channel of the BatchNorm for each input channel of the reader, if that input holds nothing else."""
    siblings = [other for other in graph.inputs(reader) if other.port == edge.port]
    if any(other.targets is None for other in siblings):
        raise _mismatch(source, reader)
    extent = 1 + max(int(as_indices(other.targets or (0,)).max()) for other in siblings)
    channels = np.full(extent, -1)
    sources, targets = as_indices(edge.sources), as_indices(edge.targets or ())
    channels[targets] = given[sources]
    if not np.array_equal(channels[targets], given[sources]):
        raise _mismatch(source, reader)
    for other in siblings:
        if other is not edge and np.any(channels[as_indices(other.targets or ())] >= 0):
            raise _mismatch(source, reader)
    return channels


def _gather(graph: ModelGraph, found: Sequence[Absorption]) -> list[Absorber]:
    """Gather one absorber for each weight, if all its calls take the same and nothing else reads its parameters."""
    calls: dict[str, dict[int, Absorption]] = {}
    for absorption in found:
        node = absorption.node
        known = calls.setdefault(name_of(node), {})
        known[node.index] = _merge(known.get(node.index), absorption)
    absorbers = []
    for name, by_call in calls.items():
        first, *others = by_call.values()
        for role, parameter in first.node.parameters.items():
            if parameter in graph.tied:
                raise Blocked(SkipReason.REUSED, f"{parameter} belongs to several modules")
            users = graph.uses.get(parameter, frozenset())
            if users != by_call.keys():
                other = next((graph.nodes[i].describe() for i in sorted(users - by_call.keys())), "something else")
                what = f"the {role} of {first.node.describe()}" if first.node.layer else parameter
                raise Blocked(SkipReason.REUSED, f"{what} is also used elsewhere: {other}")
        for other_call in others:
            same = np.array_equal(first.channels, other_call.channels)
            if not same or (_takes_shift(first.node) and not np.array_equal(first.takes_shift, other_call.takes_shift)):
                raise Blocked(SkipReason.REUSED, f"calls of {first.node.describe()} meet it in different ways")
        absorbers.append(Absorber(name, first))
    return absorbers


def name_of(node: Node) -> str:
    """Name what the calls of one producer or BatchNorm have in common."""
    if node.kind is NodeKind.BATCH_NORM:
        return node.layer
    if node.unexplained:
        raise Blocked(SkipReason.COMPUTED_WEIGHT, node.describe_unexplained())
    weight = node.parameters.get("weight")
    if weight is None or "bias" in node.computed:
        role = "weight" if weight is None else "bias"
        sources = ", ".join(node.computed.get(role, ()))
        origin = f" from {sources}" if sources else ""
        raise Blocked(SkipReason.COMPUTED_WEIGHT, f"the {role} of {node.describe()} is computed{origin}")
    return weight


def _merge(known: Absorption | None, new: Absorption) -> Absorption:
    """Merge two ways into the same call, if they concern different channels."""
    if known is None:
        return new
    if np.any((known.channels >= 0) & (new.channels >= 0)):
        raise Blocked(SkipReason.REUSED, f"{new.node.describe()} would take it twice")
    mine = known.channels >= 0
    return Absorption(
        known.node,
        np.where(mine, known.channels, new.channels),
        np.where(mine, known.takes_shift, new.takes_shift),
        direct=False,
        pooled=known.pooled or new.pooled,
    )


def is_parallel_branch(graph: ModelGraph, layer: str) -> bool:
    """Return whether a BatchNorm lies beside a convolution of the same input, both added up, as in RepVGG.

    Such branches can be merged into one convolution, which changes modules and is not done in a file.
    """
    for call in graph.batchnorms[layer]:
        sums = _reach_sums(graph, call, {})
        for edge in graph.inputs(call) if sums else ():
            siblings = [graph.nodes[other.target] for other in graph.outputs(graph.nodes[edge.source])]
            if any(node.kind is NodeKind.CONVOLUTION and sums & _reach_sums(graph, node, {}) for node in siblings):
                return True
    return False


def _reach_sums(graph: ModelGraph, node: Node, seen: Mapping[int, None]) -> set[int]:
    """Return the additions that a node's output reaches through BatchNorms and additions."""
    found: set[int] = set()
    for edge in graph.outputs(node):
        reader = graph.nodes[edge.target]
        if reader.index in seen or reader.kind not in (NodeKind.ADD, NodeKind.BATCH_NORM):
            continue
        found |= {reader.index} if reader.kind is NodeKind.ADD else set()
        found |= _reach_sums(graph, reader, {**seen, reader.index: None})
    return found
