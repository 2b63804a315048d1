"""Collecting the nodes and edges of a graph that a file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from bntool.graphs.graph import Edge, Evidence, ModelGraph, Node, NodeKind


class GraphBuilder:
    """Collects nodes and edges. Every edge carries all channels of its source, each to the one of its number."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._edges: list[tuple[int, int, int]] = []
        self._uses: dict[str, set[int]] = {}
        self._inputs: dict[int, int] = {}  # input channels of producers
        self._axes: dict[int, int] = {}  # where channels lie, of those that may differ

    def add(
        self, kind: NodeKind, operator: str, *, inputs: Iterable[int] = (), reads: Iterable[str] = (), **facts: Any
    ) -> int:
        """Add a node; its index.

        Args:
            inputs: the nodes whose outputs it reads, in order.
            reads: names of parameters that it reads, beside those in its facts.
            facts: fields of :class:`~bntool.graphs.graph.Node`, ``input_channels`` of a producer, and the ``axis`` of
                its channels where formats allow several.
        """
        index = len(self._nodes)
        self._inputs[index] = facts.pop("input_channels", 0)
        if (axis := facts.pop("axis", None)) is not None:
            self._axes[index] = axis
        self._nodes.append(Node(index, kind, operator, **facts))
        for port, source in enumerate(inputs):
            self._edges.append((source, index, port))
        for name in (*reads, *facts.get("parameters", {}).values()):
            self._uses.setdefault(name, set()).add(index)
        return index

    def finish(self) -> ModelGraph:
        nodes = self._with_channels()
        edges = []
        for source, target, port in self._edges:
            channels, reader = nodes[source].channels, nodes[target]
            wanted = reader.channels if reader.kind is NodeKind.BATCH_NORM else self._inputs[target]
            # Caffe's InnerProduct reads all positions of all channels: then one channel is many inputs
            same_axis = self._axes.get(source) == self._axes.get(target, self._axes.get(source))
            targets = range(channels) if channels == wanted and same_axis else None
            edges.append(Edge(source, target, port, range(channels), targets, Evidence.STORED))
        uses = {name: frozenset(indices) for name, indices in self._uses.items()}
        return ModelGraph(tuple(nodes), tuple(edges), uses=uses, evidence=Evidence.STORED)

    def _with_channels(self) -> list[Node]:
        """Nodes of other kinds have as many channels as the BatchNorm that reads them."""
        nodes = list(self._nodes)
        for source, target, _ in self._edges:
            if not nodes[source].channels and nodes[target].kind is NodeKind.BATCH_NORM:
                nodes[source] = dataclasses.replace(nodes[source], channels=nodes[target].channels)
        return [node if node.channels else dataclasses.replace(node, channels=1) for node in nodes]
