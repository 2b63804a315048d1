"""What each node does where tensors are stored as a (x + b): it absorbs, lets pass by a rule, or needs all as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bntool.folding.transforms.operations import Rule, Shift, find_rule
from bntool.graphs.graph import ModelGraph, Node, NodeKind

Weight = tuple[NodeKind, str]


@dataclass
class Roles:
    """The roles of the nodes of a graph.

    Attributes:
        graph: who feeds whom.
        identities: BatchNorms that are the identity, or that are to become it.
        absorbs: whether a convolution, linear, BatchNorm or bias can take what is left on either side of it.
    """

    graph: ModelGraph
    identities: Collection[str]
    absorbs: Callable[[Node], bool]
    _takes: dict[int, bool] = field(default_factory=dict)
    _rules: dict[int, Rule | None] = field(default_factory=dict)

    def is_identity(self, node: Node) -> bool:
        return node.kind is NodeKind.BATCH_NORM and node.layer in self.identities

    def takes(self, node: Node) -> bool:
        """Return whether a node absorbs what is left on either side of it."""
        known = self._takes.get(node.index)
        if known is None:
            known = self._takes[node.index] = self._can_take(node)
        return known

    def _can_take(self, node: Node) -> bool:
        kinds = (node.kind.is_producer and "weight" in node.parameters) or node.kind is NodeKind.BATCH_NORM
        return kinds and not self.is_identity(node) and self._is_known(node) and self.absorbs(node)

    def _is_known(self, node: Node) -> bool:
        """Return whether what was seen of a node holds for other inputs, too."""
        return node.ran and (self.graph.branches_at is None or node.index < self.graph.branches_at)

    def rule(self, node: Node) -> Rule | None:
        """Return what a node that does not take lets pass; None for nothing."""
        if node.index not in self._rules:
            rule = find_rule(node) if self._is_known(node) else None
            if rule is not None and rule.shift is Shift.FREE and not self.absorbs(node):
                rule = Rule(Shift.SAME, unscaled=True)  # its constant stays what it is
            self._rules[node.index] = rule
        return self._rules[node.index]

    def passes(self, node: Node, port: int) -> bool:
        """Return whether what a node reads there has to do with what it gives."""
        if self.is_identity(node):
            return port == 0
        rule = self.rule(node)
        return rule is not None and port in rule.ports

    def can_store_otherwise(self, node: Node) -> bool:
        """Return whether the output of a node may be stored otherwise."""
        return self.is_identity(node) or self.rule(node) is not None or self.takes(node)

    @cached_property
    def calls(self) -> Mapping[Weight, Sequence[Node]]:
        """The calls of each weight or BatchNorm that takes."""
        found: dict[Weight, list[Node]] = {}
        for node in self.graph.nodes:
            if self.takes(node):
                found.setdefault(_find_weight(node), []).append(node)
        return found

    def calls_with(self, node: Node) -> Sequence[Node]:
        """Return the calls that take the same as a node, with it; none where it does not take."""
        return self.calls[_find_weight(node)] if self.takes(node) else ()


def _find_weight(node: Node) -> Weight:
    """Name what the calls of one weight or BatchNorm have in common."""
    if node.kind is NodeKind.BATCH_NORM:
        return node.kind, node.layer
    return NodeKind.CONVOLUTION, node.parameters.get("weight", "")
