"""Collecting the nodes and edges of a graph that a file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bntool.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from bntool.graphs.graph import DerivedTensor, Edge, Evidence, ModelGraph, Node, NodeKind
from bntool.graphs.stored.values import Extent, Integers, Shape, Value, read_along

FLOATS = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)
_SKIPPED = Extent(1)


class GraphBuilder:
    """Collects nodes, and which of their channels others read."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._edges: list[Edge] = []
        self._uses: dict[str, set[int]] = {}
        self._bases: list[int] = []  # the number of the first channel of each node
        self._channels = 0
        self._symbols = 0

    # nodes

    def add(
        self,
        kind: NodeKind,
        operator: str,
        *,
        inputs: Iterable[Value | tuple[Value, Integers | None] | None] = (),
        reads: Iterable[str] = (),
        channels: int = 1,
        **facts: Any,
    ) -> int:
        """Add a node; its index.

        Args:
            inputs: what it reads, in order, None where that is a constant; with the channels that meet each of its
                own, where these are told apart.
            reads: names of parameters that it reads, beside those in its facts.
            channels: of its output.
            facts: fields of :class:`~bntool.graphs.graph.Node`.
        """
        index = len(self._nodes)
        self._nodes.append(Node(index, kind, operator, channels=channels, **facts))
        self._bases.append(self._channels)
        self._channels += channels
        for port, one in enumerate(inputs):
            if one is not None:
                value, labels = one if isinstance(one, tuple) else (one, _rows(one))
                self._connect(value, labels, index, port, told_apart=isinstance(one, tuple))
        for name in (*reads, *facts.get("parameters", {}).values()):
            self._uses.setdefault(name, set()).add(index)
        return index

    def _connect(self, value: Value, labels: Integers | None, target: int, port: int, *, told_apart: bool) -> None:
        if labels is None or not labels.size:
            for source in value.sources:
                channels = range(self._nodes[source].channels)
                self._edges.append(Edge(source, target, port, channels, None, Evidence.STORED))
            return
        places = np.repeat(np.arange(len(labels)), labels.shape[1])
        flat = labels.reshape(-1)
        owners = np.searchsorted(self._bases, flat, side="right") - 1
        for source in dict.fromkeys(owners.tolist()):
            mine = owners == source
            sources = flat[mine] - self._bases[source]
            if not told_apart:  # what it reads, whatever it does with it
                read = _as_range(np.unique(sources))
                self._edges.append(Edge(source, target, port, read, None, Evidence.STORED))
                continue
            self._edges.append(Edge(source, target, port, _as_range(sources), _as_range(places[mine]), Evidence.STORED))

    # what they give

    def unknown(self) -> Extent:
        """Make an extent that nothing tells."""
        self._symbols += 1
        return Extent(1, (f"?{self._symbols}",))

    def unknowns(self, count: int) -> Shape:
        return tuple(self.unknown() for _ in range(count))

    def give(self, node: int, shape: Shape | None, axis: int | None = None, *, dtype: object = None) -> Value:
        """Return the value that a node gives.

        Args:
            axis: where its channels lie; None where that is not known.
        """
        channels = self._nodes[node].channels
        if shape is not None and axis is not None and -len(shape) <= axis < len(shape):
            axis %= len(shape)
            fits = shape[axis] == Extent(channels)
        else:
            fits = shape is None and axis == 1
        if axis is None or not fits:
            return Value((node,), shape, dtype=dtype)
        labels = (self._bases[node] + np.arange(channels)).reshape(-1, 1)
        return Value((node,), shape, (axis,), labels, dtype=dtype)

    def add_elementwise(
        self, kind: NodeKind, operator: str, value: Value, *, shape: Shape | None = None, **facts: Any
    ) -> Value:
        """Add a node that computes each channel from that one channel of its input, and return its output.

        Args:
            shape: of the output, where it has other positions than the input.
        """
        given = value.with_extents(shape)
        labels = value.labels
        if labels is None:
            node = self.add(kind, operator, inputs=[value], **facts)
            return Value((node,), given.shape, dtype=value.dtype)
        rows = labels.reshape(-1, labels.shape[-1])
        node = self.add(kind, operator, inputs=[(value, rows)], channels=len(rows), **facts)
        return self._renumber(node, given, labels.shape[:-1])

    def _renumber(self, node: int, value: Value, extents: tuple[int, ...]) -> Value:
        labels = self._bases[node] + np.arange(int(np.prod(extents))).reshape(*extents, 1)
        return dataclasses.replace(value, sources=(node,), labels=labels)

    def add_joint(self, kind: NodeKind, operator: str, left: Value, right: Value, **facts: Any) -> Value:
        """Add a node that joins two tensors element by element, with those of fewer elements repeated."""
        shape = broadcast(left, right)
        dtype = left.dtype if left.dtype == right.dtype else None
        first = left if left.labels is not None else right
        same = left.spread is None and right.spread is None
        if shape is None or first.labels is None or not same or first.shape is None:
            node = self.add(kind, operator, inputs=[left, right], **facts)
            return Value((node,), shape, dtype=dtype)
        ahead = len(shape) - len(first.shape)
        axes = tuple(axis + ahead for axis in first.axes)
        if any(not shape[axis].is_known for axis in axes):
            node = self.add(kind, operator, inputs=[left, right], **facts)
            return Value((node,), shape, dtype=dtype)
        extents = tuple(shape[axis].number for axis in axes)
        count = int(np.prod(extents))
        rows = [_spread_over(value, shape, axes, extents) for value in (left, right)]
        inputs = [
            (value, None if row is None else row.reshape(count, -1))
            for value, row in zip((left, right), rows, strict=True)
        ]
        node = self.add(kind, operator, inputs=inputs, channels=count, **facts)
        return self._renumber(node, Value((node,), shape, axes, dtype=dtype), extents)

    def channels_of(self, value: Value, axis: int, count: int) -> tuple[Value, Integers | None]:
        """Return a value as a node reads it that has its channels along an axis, and which channels it reads there."""
        found = read_along(value, axis, count)
        one = bool(value.sources) and all(self._nodes[source].channels == 1 for source in value.sources)
        if found is None and value.labels is None and one:  # each stands for all that it gives
            found = np.tile([self._bases[source] for source in value.sources], (count, 1))
        return value, found

    def node(self, index: int) -> Node:
        return self._nodes[index]

    def finish(
        self,
        *,
        derived: Mapping[str, DerivedTensor] | None = None,
        needed_for: Mapping[str, frozenset[str]] | None = None,
        overridable: Iterable[str] = (),
    ) -> ModelGraph:
        """Return the graph, with what :class:`~bntool.graphs.graph.ModelGraph` says of tensors."""
        uses = {name: frozenset(indices) for name, indices in self._uses.items()}
        return ModelGraph(
            tuple(self._nodes),
            tuple(self._edges),
            uses=uses,
            evidence=Evidence.STORED,
            derived=derived or {},
            needed_for=needed_for or {},
            overridable=frozenset(overridable),
        )


def broadcast(left: Value, right: Value) -> Shape | None:
    """Return the shape of two tensors joined element by element; None where that is not known."""
    if left.shape is None or right.shape is None:
        return None
    rank = max(len(left.shape), len(right.shape))
    padded = [(*[_SKIPPED] * (rank - len(one)), *one) for one in (left.shape, right.shape)]
    shape = []
    for mine, theirs in zip(*padded, strict=True):
        if mine == theirs or theirs == Extent(1):
            shape.append(mine)
        elif mine == Extent(1):
            shape.append(theirs)
        elif mine.is_known:  # the other is one or the same
            shape.append(mine)
        elif theirs.is_known:
            shape.append(theirs)
        else:
            shape.append(Extent(1, (f"joint {mine.unknown} {theirs.unknown}",)))
    return tuple(shape)


def _spread_over(value: Value, shape: Shape, axes: tuple[int, ...], extents: tuple[int, ...]) -> Integers | None:
    """Return the labels of an operand at each place along the axes of the result; None where they are not told
    apart.
    """
    if value.labels is None or value.shape is None:
        return None
    ahead = len(shape) - len(value.shape)
    if tuple(axis + ahead for axis in value.axes) != axes:
        return None
    if any(mine not in (1, whole) for mine, whole in zip(value.labels.shape, extents, strict=False)):
        return None
    return np.broadcast_to(value.labels, (*extents, value.labels.shape[-1]))


def _rows(value: Value) -> Integers | None:
    return None if value.labels is None else value.labels.reshape(-1, 1)


def _as_range(channels: Integers) -> Sequence[int]:
    """Convert channels to a range where they are one, which takes no memory."""
    first = int(channels[0])
    if np.array_equal(channels, np.arange(first, first + len(channels))):
        return range(first, first + len(channels))
    return tuple(channels.tolist())
