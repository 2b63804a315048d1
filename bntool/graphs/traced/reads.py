"""The labels that nodes read; joined into edges when the forward has ended."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from bntool.graphs.graph import Edge, Node, NodeKind, shorten
from bntool.graphs.traced.labels import Meeting


class Reads:
    """The labels that each node read, and the node that each label belongs to."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._nodes: list[int] = []
        self._next = 0
        self._reads: dict[tuple[int, int], Meeting] = {}
        self._first: dict[int, Tensor] = {}
        self._uses: dict[str, set[int]] = {}

    def allocate(self, node: int, channels: int) -> int:
        """Reserve labels for the channels of a node's output; returns the first."""
        base = self._next
        self._bases.append(base)
        self._nodes.append(node)
        self._next += max(channels, 1)
        return base

    def add(self, node: int, port: int, meeting: Meeting, labels: Tensor | None = None) -> None:
        """Note that a node reads labels on one of its inputs."""
        self._reads[(node, port)] = meeting
        if port == 0 and labels is not None:
            self._first[node] = labels

    replace = add

    def node_of(self, labels: Sequence[int]) -> int | None:
        """Return the node that computed exactly these labels, as its first channels in order."""
        if not labels:
            return None
        position = bisect_right(self._bases, labels[0]) - 1
        base = self._bases[position]
        return self._nodes[position] if list(labels) == list(range(base, base + len(labels))) else None

    def of(self, node: int) -> Meeting | None:
        """Return what a node reads on its first input."""
        return self._reads.get((node, 0))

    def first(self, node: int) -> Tensor | None:
        """Return the labels that a node read on its first input."""
        return self._first.get(node)

    def use(self, node: int, names: Iterable[str]) -> None:
        """Note that a node reads parameters."""
        for name in names:
            self._uses.setdefault(name, set()).add(node)

    def join(
        self, nodes: list[Node], completed: Mapping[int, int]
    ) -> tuple[tuple[Node, ...], tuple[Edge, ...], dict[str, frozenset[int]]]:
        """Build the nodes, the edges and the uses of parameters.

        Args:
            nodes: in order of execution.
            completed: from a product to the sum that makes it a linear with bias, or a FrozenBatchNorm that computes by
                itself; where nothing else reads the product, the two become one node.
        """
        edges = [edge for (node, port), meeting in self._reads.items() for edge in self._edges(node, port, meeting)]
        broken = set()
        for product, total in completed.items():
            readers = {edge.target for edge in edges if edge.source == product}
            if readers == {total} and product not in broken:
                edges = [
                    replace(edge, target=total) if edge.target == product else edge
                    for edge in edges
                    if edge.source != product
                ]
                for users in self._uses.values():
                    if product in users:
                        users.discard(product)
                        users.add(total)
            else:
                broken.add(total)
                nodes[total] = replace(nodes[total], kind=NodeKind.OTHER)
        return tuple(nodes), tuple(edges), {name: frozenset(users) for name, users in self._uses.items()}

    def _edges(self, node: int, port: int, meeting: Meeting) -> Iterable[Edge]:
        """Group what meets there by the node that computed it, in the order in which these are met."""
        if not meeting.labels:
            return
        labels, channels = np.array(meeting.labels), None if meeting.channels is None else np.array(meeting.channels)
        positions = np.searchsorted(self._bases, labels, side="right") - 1
        order = np.argsort(positions, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(positions[order])) + 1)
        for group in sorted(groups, key=lambda group: int(group[0])):
            position = positions[group[0]]
            yield Edge(
                source=self._nodes[position],
                target=node,
                port=port,
                sources=shorten(tuple((labels[group] - self._bases[position]).tolist())),
                targets=None if channels is None else shorten(tuple(channels[group].tolist())),
            )
