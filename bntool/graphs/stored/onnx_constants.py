"""The constants that nodes of an ONNX model read, and under which names they can be changed for a node alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from bntool.checkpoints.onnx.computed_tensors import ComputedTensors
from bntool.checkpoints.onnx.graph import OnnxGraph, OnnxNode, find_uses
from bntool.checkpoints.onnx.model import OnnxContent
from bntool.checkpoints.tensors import Tensor
from bntool.graphs.graph import DerivedTensor

Place: TypeAlias = tuple[int, str]  # a graph and a name in it
Use: TypeAlias = tuple[OnnxGraph, OnnxNode, int]

_MOST_STEPS = 64  # between a tensor and what is computed from it


class _IsComputed(Protocol):
    def __call__(self, graph: OnnxGraph, node: OnnxNode) -> bool: ...


class OnnxConstants:
    """Names the tensors that nodes read.

    A tensor of the file that one node reads has its own name. One that several read gets a name for each of them, and
    so does what nodes compute from constants: such a tensor comes into the file when it changes.

    Attributes:
        derived: the tensors that are not in the file by themselves, by name.
    """

    def __init__(self, content: OnnxContent, tensors: Mapping[str, Tensor]) -> None:
        self._content, self._tensors = content, tensors
        self.computed = ComputedTensors(content.external)
        self.derived: dict[str, DerivedTensor] = {}
        self._layers = {id(node) for _, node in content.layers.values()}
        self._keys = {(id(p.graph), p.name): key for key, p in content.places.items() if p.reader is None}
        # but for parameters of layers, which have names of their own in any case
        self._uses = {
            place: [use for use in uses if not self._is_parameter(use)]
            for place, uses in find_uses(content.graphs).items()
        }
        self._shown = {find_place(graph, name) for graph in content.graphs for name in graph.outputs}
        self._norms = _find_norms(content)

    def _is_parameter(self, use: Use) -> bool:
        return id(use[1]) in self._layers and use[2] > 0

    def key_of(self, graph: OnnxGraph, name: str) -> str | None:
        """Return the name in the file of a constant that a node reads as it is."""
        place = graph.find(name) if name else None
        return self._keys.get((id(place[0]), place[1])) if place is not None else None

    def keys_of(self, graph: OnnxGraph, names: Sequence[str]) -> list[str]:
        """Return the keys of the names that have one."""
        return [key for key in (self.key_of(graph, name) for name in names) if key is not None]

    def tensor(self, key: str) -> Tensor:
        """Return a tensor by the name that is given here."""
        derived = self.derived.get(key)
        return derived.tensor if derived is not None else self._tensors[key]

    def is_alone(self, graph: OnnxGraph, name: str) -> bool:
        """Return whether one node alone reads a tensor of the file, and it is no result of a graph."""
        place = find_place(graph, name)
        return place not in self._shown and len(self._uses.get(place, ())) == 1

    def name_inputs(self, graph: OnnxGraph, node: OnnxNode, inputs: Mapping[str, int]) -> dict[str, str | None]:
        """Return the tensors of a convolution or matrix product by role; None where nothing is known of the
        elements.
        """
        shares = self._shares_batch_norm(graph, node, inputs)
        found: dict[str, str | None] = {}
        for role, position in inputs.items():
            name = node.inputs[position]
            key = self.key_of(graph, name)
            own = key is not None and (self.is_alone(graph, name) or shares)
            found[role] = key if own else self.derive(graph, node, position)
        return found

    def derive(
        self, graph: OnnxGraph, node: OnnxNode, position: int, shape: tuple[int, ...] | None = None
    ) -> str | None:
        """Return the name of a tensor that one node reads as its own; None where nothing is known of its elements.

        Args:
            shape: that it is to have, whose other elements repeat it; None for its own.
        """
        name, key = node.inputs[position], self.key_of(graph, node.inputs[position])
        tensor = self._tensors[key] if key is not None else None
        is_copy = tensor is not None and (shape is None or tuple(tensor.shape) == shape)
        if not is_copy:
            tensor = self.computed.tensor(graph, name, shape)
        if tensor is None:
            return None
        after = key or self._find_source(graph, name) or self._find_visible(graph)
        own = self._content.own_inputs.get((node.field.start, position), ("",))[0]
        if after is None or not own:
            return None
        self.derived[own] = DerivedTensor(tensor, after, is_copy=is_copy)
        return own

    def _find_source(self, graph: OnnxGraph, name: str, steps: int = _MOST_STEPS) -> str | None:
        """Return a tensor of the file that a value is computed from."""
        place = graph.place_of(name)
        if place is None or not steps:
            return None
        if place[1] in place[0].initializers:
            return self._keys.get((id(place[0]), place[1]))
        node = place[0].producers.get(place[1])
        names = node.inputs if node is not None else ()
        found = (self._find_source(place[0], one, steps - 1) for one in names if one)
        return next((key for key in found if key is not None), None)

    def _find_visible(self, graph: OnnxGraph) -> str | None:
        """Find any tensor of the file that nodes of a graph can read, for what is computed from none."""
        for key, place in self._content.places.items():
            found = graph.find(place.name) if place.reader is None else None
            if found is not None and found[0] is place.graph and found[1] == place.name:
                return key
        return None

    def _shares_batch_norm(self, graph: OnnxGraph, node: OnnxNode, inputs: Mapping[str, int]) -> bool:
        """Return whether all nodes with this weight are the same layer, with the same BatchNormalization behind
        each.
        """
        wanted = [find_place(graph, node.inputs[position]) for position in inputs.values()]
        uses = self._uses.get(wanted[0], ())
        after = self._norms.get((id(graph), node.outputs[0]))
        if after is None or len(uses) < 2 or any(place in self._shown for place in wanted):
            return False
        for other_graph, other, _ in uses:
            if other.operator != node.operator or len(other.inputs) != len(node.inputs):
                return False
            theirs = [find_place(other_graph, other.inputs[position]) for position in inputs.values()]
            if theirs != wanted or self._norms.get((id(other_graph), other.outputs[0])) != after:
                return False
        return all(len(self._uses.get(place, ())) == len(uses) for place in wanted)

    def find_needed(self, is_computed: _IsComputed) -> Iterator[tuple[str, frozenset[str]]]:
        """Yield the tensors of the file that are there for derived ones alone, with the names of these.

        Args:
            is_computed: whether a node computes from constants alone.
        """
        readers: dict[Place, list[Use]] = {}
        for graph in self._content.graphs:
            for node in graph.nodes:
                for position, name in enumerate(node.inputs if node.operator != "Identity" else ()):
                    use = (graph, node, position)
                    if name and not self._is_parameter(use):
                        readers.setdefault(find_place(graph, name), []).append(use)
        search = _Needed(self.derived, self._shown, self._content, readers, is_computed)
        for place, key in self._keys.items():
            if names := search.find(place, _MOST_STEPS):
                yield key, frozenset(names)


@dataclass(frozen=True)
class _Needed:
    """Follows a tensor of the file through what is computed from it."""

    derived: Mapping[str, DerivedTensor]
    shown: Collection[Place]
    content: OnnxContent
    readers: Mapping[Place, Sequence[Use]]
    is_computed: _IsComputed

    def find(self, place: Place, steps: int) -> set[str] | None:
        """Return the derived tensors that a value becomes part of; None where something else reads the value, too."""
        if place in self.shown or not steps:
            return None
        names: set[str] = set()
        for graph, node, position in self.readers.get(place, ()):
            own = self.content.own_inputs.get((node.field.start, position), ("",))[0]
            if own in self.derived:
                names.add(own)
                continue
            if not self.is_computed(graph, node):
                return None
            for one in node.outputs:
                more = self.find((id(graph), one), steps - 1)
                if more is None:
                    return None
                names |= more
        return names


def find_place(graph: OnnxGraph, name: str) -> Place:
    """Find where a value comes from, through copies."""
    found = graph.place_of(name)
    return (id(found[0]), found[1]) if found is not None else (0, "")


def _find_norms(content: OnnxContent) -> dict[Place, tuple[object, ...]]:
    """Map each value that only a BatchNormalization reads to the four tensors and the epsilon of that node."""
    readers: dict[Place, list[OnnxNode]] = {}
    for graph in content.graphs:
        for node in graph.nodes:
            for name in node.inputs:
                readers.setdefault((id(graph), name), []).append(node)
    found: dict[Place, tuple[object, ...]] = {}
    for graph, node in content.layers.values():
        key = (id(graph), node.inputs[0])
        if readers.get(key) == [node]:
            places = [find_place(graph, name) for name in node.inputs[1:]]
            found[key] = (*places, node.number("epsilon", 1e-5))
    return found
