"""What can take scales and shifts: the parameters of nodes, with all that they took before."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from bntool.checkpoints.checkpoint import StateDict
from bntool.folding.absorption import Blocked
from bntool.folding.channels import Array
from bntool.folding.producers import Addend, Producer, read_addend, read_parameter, read_producer
from bntool.folding.scale_and_shift import ScaleAndShift
from bntool.folding.transforms.channel_transforms import read_factors
from bntool.graphs.graph import ModelGraph, Node, NodeKind

Target = Producer | ScaleAndShift | Addend


@dataclass
class Targets:
    """The parameters of a graph that nothing else uses.

    Attributes:
        graph, state_dict: what is folded.
        transforms: every BatchNorm that may be changed, as it is by now.
        producers: convolutions and linears that have taken something.
        removed: BatchNorms that are the identity by now.
        branches: BatchNorms that convolutions beside them take.
    """

    graph: ModelGraph
    state_dict: StateDict
    transforms: Mapping[str, ScaleAndShift]
    producers: Mapping[str, Producer]
    removed: Collection[str]
    branches: Collection[str]
    _known: dict[str, Producer | Addend | None] = field(default_factory=dict, init=False)
    _calls: dict[str, set[int]] = field(default_factory=dict, init=False)  # of the weights

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            if node.kind.is_producer and "weight" in node.parameters:
                self._calls.setdefault(node.parameters["weight"], set()).add(node.index)

    def read(self, node: Node) -> Target | None:
        """Return a node's parameters with all that they took before; None where something else uses them."""
        if node.kind is NodeKind.BATCH_NORM:
            own = self.transforms.get(node.layer)
            usable = own is not None and (own.can_absorb or node.layer in self.branches)
            return own if usable and node.layer not in self.removed else None
        name = name_of(node)
        if name not in self._known:
            self._known[name] = self._read_parameters(node)
        return self._known[name]

    def _read_parameters(self, node: Node) -> Producer | Addend | None:
        weight = node.parameters.get("weight")
        calls = {node.index} if node.kind is NodeKind.BIAS else self._calls.get(weight or "", set())
        names = node.parameters.values()
        if node.kind is not NodeKind.BIAS and (weight is None or "bias" in node.computed):
            return None
        if any(name in self.graph.tied or self.graph.uses.get(name, frozenset()) != calls for name in names):
            return None
        end = len(self.graph.nodes) if self.graph.branches_at is None else self.graph.branches_at
        if any(index > end or not _is_read_alike(self.graph.nodes[index], node) for index in calls):
            return None  # other inputs may not come to one of them, or it takes the weight otherwise
        try:
            if node.kind is NodeKind.BIAS:
                return read_addend(node, self.state_dict)
            return self.producers.get(weight or "") or read_producer(node, self.state_dict)
        except Blocked:
            return None

    def absorbs(self, node: Node) -> bool:
        """Return whether a node can take what is left on either side of it."""
        return self.read(node) is not None

    def takes_shift(self, node: Node) -> bool:
        """Return whether it can take a shift, too."""
        target = self.read(node)
        return not isinstance(target, Producer) or target.can_take_shift

    def takes_branch(self, node: Node) -> bool:
        """Return whether a convolution can take a BatchNorm beside it."""
        return self.is_called_once(node) and self.absorbs(node) and self.takes_shift(node)

    def is_called_once(self, node: Node) -> bool:
        """Return whether nothing else is computed with the weight of a node."""
        return len(self._calls.get(node.parameters.get("weight", ""), ())) == 1

    def find_factors(self, node: Node) -> Array | None:
        """Return the factors of a linear map of each channel, also where they are a parameter of the file; None where
        they are not known, or the forward does something else with that parameter, which may change it.
        """
        known = read_factors(node)
        found = [(role, name) for role, name in node.parameters.items() if role in ("factor", "divisor")]
        if known is not None or not found:
            return known
        ((role, name),) = found
        users = (self.graph.nodes[index] for index in self.graph.uses.get(name, frozenset()))
        if name in self.graph.tied or not all(
            name in user.parameters.values() and user.kind is not NodeKind.OTHER for user in users
        ):
            return None
        try:
            numbers = read_parameter(name, self.state_dict)
        except Blocked:
            return None
        if role == "divisor":
            with np.errstate(divide="ignore", over="ignore"):
                numbers = 1 / numbers
        return numbers if np.isfinite(numbers).all() else None

    def changes_padding(self, node: Node) -> bool:
        """Return whether the module that pads with zeros is called as a module, and pads nothing else."""
        return node.pads_itself and node.layer in self.graph.ran


def name_of(node: Node) -> str:
    """Name the parameter of a node that takes something."""
    return node.parameters.get("bias" if node.kind is NodeKind.BIAS else "weight", "")


def _is_read_alike(one: Node, other: Node) -> bool:
    """Return whether two calls take the same parameters in the same way: their channels lie on the same axes, and a
    bias that the weight gains is added in both or in none.
    """
    attributes = ("kind", "groups", "parameters", "factors", "has_bias_slot")
    return all(getattr(one, name) == getattr(other, name) for name in attributes)
