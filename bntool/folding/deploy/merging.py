"""One convolution for branches that read one tensor and are summed up: convolutions, BatchNorms, and the tensor itself.

The same for linears, also with a BatchNorm before.

The sum of convolutions of one stride is the convolution with the sum of their kernels, smaller ones in the middle of
the largest; the identity is a kernel with one in the middle (Ding et al. 2021, *RepVGG*, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from bntool.checkpoints.arrays import to_float64
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.tensors import StoredTensor, read_bytes
from bntool.folding.absorption import Array, Blocked
from bntool.folding.producers import FOLDABLE
from bntool.folding.scale_and_shift import ScaleAndShift
from bntool.folding.transforms.channel_transforms import is_whole
from bntool.graphs.graph import ModelGraph, Node, NodeKind
from bntool.plan import SkipReason

ReadBatchNorm = Callable[[Node], ScaleAndShift]


@dataclass(frozen=True)
class Sum:
    """What branches make of the tensor that they all read.

    Attributes:
        kernels: convolutions and linears, the largest kernel first, with the factors of their output channels.
        inputs: of each of them the factors of its input channels; None for ones.
        identity: factor of each channel of the tensor itself.
        bias: what is added to each channel.
    """

    kernels: tuple[tuple[Node, Array], ...]
    inputs: tuple[Array | None, ...]
    identity: Array
    bias: Array

    @property
    def first(self) -> Node:
        return self.kernels[0][0]

    def find_places(self, shape: tuple[int, ...]) -> np.ndarray:
        """Of each channel the element in the middle of the kernel that weighs the channel itself."""
        channel, taps = np.arange(shape[0]), math.prod(shape[2:])
        return (channel * shape[1] + channel % shape[1]) * taps + taps // 2


def merge_branches(
    graph: ModelGraph, inside: Collection[int], state_dict: StateDict, read_batchnorm: ReadBatchNorm
) -> Sum:
    """The sum that some nodes compute.

    Args:
        inside: indices of the nodes: convolutions, BatchNorms, additions.
        read_batchnorm: scale and shift of one.

    Raises:
        Blocked: they are not branches that read one tensor and are summed up, or something else needs a part of them.
    """
    return _Merging(graph, frozenset(inside), state_dict, read_batchnorm).merge()


@dataclass
class _Part:
    """A sum while it is made: factors by index of the convolution, and of the tensor itself under -1."""

    factors: dict[int, Array]
    bias: Array

    def times(self, scale: Array | float) -> _Part:
        return _Part({key: value * scale for key, value in self.factors.items()}, self.bias * scale)

    def plus(self, other: _Part) -> _Part:
        together = dict(self.factors)
        for key, value in other.factors.items():
            together[key] = together[key] + value if key in together else value
        return _Part(together, self.bias + other.bias)


_ITSELF = -1


@dataclass
class _Merging:
    graph: ModelGraph
    inside: frozenset[int]
    state_dict: StateDict
    read_batchnorm: ReadBatchNorm
    parts: dict[int, _Part] = field(default_factory=dict)
    inputs: dict[int, Array] = field(default_factory=dict)

    def merge(self) -> Sum:
        end = self._find_end()
        source = self._find_source()
        part = self._walk(end, source)
        used = self.parts.keys() | {end.index}
        if used != self.inside:
            unused = self.graph.nodes[min(self.inside - used)]
            raise Blocked(SkipReason.NOT_ADJACENT, f"{unused.describe()} is no part of their sum")
        kernels = [(self.graph.nodes[index], factor) for index, factor in part.factors.items() if index != _ITSELF]
        ordered = sorted(kernels, key=lambda kernel: -math.prod(self._shape(kernel[0])[2:]))
        channels = end.channels
        inputs = tuple(self.inputs.get(node.index) for node, _ in ordered)
        result = Sum(tuple(ordered), inputs, part.factors.get(_ITSELF, np.zeros(channels)), part.bias)
        self._check_kernels(result, source)
        return result

    def _find_end(self) -> Node:
        """The node whose output all others need; nothing else needs a part of them."""
        graph, ends = self.graph, []
        for index in sorted(self.inside):
            node = graph.nodes[index]
            if not node.ran or (graph.branches_at is not None and index >= graph.branches_at):
                raise Blocked(SkipReason.DATA_DEPENDENT, f"{node.describe()} may compute something else")
            readers = {edge.target for edge in graph.outputs(node)}
            if not readers <= self.inside or not readers:
                ends.append(node)
        if len(ends) != 1:
            what = " and ".join(node.describe() for node in ends) or "nothing"
            raise Blocked(SkipReason.SHARED_OUTPUT, f"{what} of its branches is read outside of them")
        if {edge.target for edge in graph.outputs(ends[0])} & self.inside:
            raise Blocked(SkipReason.SHARED_OUTPUT, f"{ends[0].describe()} is read inside and outside of its branches")
        return ends[0]

    def _find_source(self) -> Node:
        edges = [edge for index in self.inside for edge in self.graph.inputs(self.graph.nodes[index])]
        sources = {edge.source for edge in edges} - self.inside
        if len(sources) != 1:
            names = ", ".join(self.graph.nodes[index].describe() for index in sorted(sources))
            raise Blocked(SkipReason.NO_PRODUCER, f"its branches read {names or 'nothing that is known'}")
        return self.graph.nodes[sources.pop()]

    def _walk(self, node: Node, source: Node) -> _Part:
        if node.index == source.index:
            return _Part({_ITSELF: np.ones(node.channels)}, np.zeros(node.channels))
        if node.index in self.parts:
            raise Blocked(SkipReason.SHARED_OUTPUT, f"{node.describe()} is read twice")
        self.parts[node.index] = part = self._walk_inside(node, source)
        return part

    def _walk_inside(self, node: Node, source: Node) -> _Part:
        if node.kind in (NodeKind.CONVOLUTION, NodeKind.LINEAR):
            return self._start(node, source)
        before = self._walk(self._read(node, 0), source)
        if node.kind is NodeKind.BATCH_NORM:
            own = self.read_batchnorm(node)
            scaled = before.times(own.scale)
            return _Part(scaled.factors, scaled.bias + own.shift)
        if node.kind is NodeKind.ADD:
            factors = node.factors or (1.0, 1.0)
            other = self._walk(self._read(node, 1), source)
            return before.times(factors[0]).plus(other.times(factors[1]))
        if node.kind is NodeKind.CHANNELWISE and node.factors:
            return before.times(np.array(node.factors))  # one for all channels, or one for each
        raise Blocked(SkipReason.NOT_ADJACENT, f"{node.describe()} lies between")

    def _start(self, node: Node, source: Node) -> _Part:
        """A convolution or linear that reads the tensor; a linear also by way of a BatchNorm."""
        bias, read = self._read_bias(node), self._read(node, 0, convolves=True)
        if node.kind is NodeKind.LINEAR and read.kind is NodeKind.BATCH_NORM and read.index in self.inside:
            own = self.read_batchnorm(read)
            self.parts[read.index] = _Part({}, own.shift)
            self.inputs[node.index] = own.scale
            bias = bias + self._read_weight(node) @ own.shift
            read = self._read(read, 0)
        if read.index != source.index:
            raise Blocked(SkipReason.NOT_ADJACENT, f"{node.describe()} reads another branch")
        return _Part({node.index: np.ones(node.channels)}, bias)

    def _read(self, node: Node, port: int, *, convolves: bool = False) -> Node:
        """What a node reads on an input: all of one tensor."""
        edges = [edge for edge in self.graph.inputs(node) if edge.port == port]
        ports = {edge.port for edge in self.graph.inputs(node)}
        expected = {0, 1} if node.kind is NodeKind.ADD else {0}
        if len(edges) != 1 or ports != expected:
            raise Blocked(SkipReason.NOT_ADJACENT, f"{node.describe()} reads more than one tensor")
        source = self.graph.nodes[edges[0].source]
        if not is_whole(edges[0], source) or not (convolves or source.channels == node.channels):
            raise Blocked(SkipReason.AXIS_MISMATCH, f"{node.describe()} reads other channels of {source.describe()}")
        return source

    # tensors

    def _shape(self, node: Node) -> tuple[int, ...]:
        return tuple(self.state_dict.tensor(node.parameters["weight"]).shape)

    def _read_weight(self, node: Node) -> Array:
        tensor = self.state_dict.tensor(node.parameters["weight"])
        return to_float64(read_bytes(tensor), tensor.dtype).reshape(tensor.shape)

    def _read_bias(self, node: Node) -> Array:
        self._check_own(node)
        name = node.parameters.get("bias")
        if name is None:
            return np.zeros(node.channels)
        tensor = self.state_dict.tensor(name)
        return to_float64(read_bytes(tensor), tensor.dtype)

    def _check_own(self, node: Node) -> None:
        """Nothing else uses the parameters of a convolution, and they can be calculated with."""
        if "weight" not in node.parameters or node.computed:
            raise Blocked(SkipReason.COMPUTED_WEIGHT, f"the weight of {node.describe()} is computed")
        for name in node.parameters.values():
            shared = name in self.graph.tied or len(self.graph.names_of(name)) > 1
            if shared or self.graph.uses.get(name, frozenset()) != {node.index}:
                raise Blocked(SkipReason.REUSED, f"{name} is also used elsewhere")
            if self.state_dict.full_name(name) not in self.state_dict.tensors:
                raise Blocked(SkipReason.COMPUTED_WEIGHT, f"{name} is not in the state dict")
            tensor = self.state_dict.tensor(name)
            wrapper = tensor.wrapper if isinstance(tensor, StoredTensor) else None
            if wrapper or tensor.dtype not in FOLDABLE:
                raise Blocked(SkipReason.UNSUPPORTED_DTYPE, f"{name} is {wrapper or tensor.dtype}")

    def _check_kernels(self, result: Sum, source: Node) -> None:
        """All kernels have one grid, and fit into the largest one."""
        if not result.kernels:
            raise Blocked(SkipReason.NO_PRODUCER, "none of its branches is a convolution")
        first = result.first
        most, dtype = self._shape(first), self.state_dict.tensor(first.parameters["weight"]).dtype
        for node, _ in result.kernels:
            shape = self._shape(node)
            alike = node.kind is first.kind and (node.strides, node.groups, len(shape), shape[:2]) == (
                first.strides, first.groups, len(most), most[:2],
            )  # fmt: skip
            fits = alike and all(size <= extent for size, extent in zip(shape[2:], most[2:], strict=True))
            if not fits or (node.kind is NodeKind.CONVOLUTION and not node.strides):
                what = f"{node.describe()} and {first.describe()}"
                raise Blocked(SkipReason.AXIS_MISMATCH, f"{what} lie differently on what they read")
            if self.state_dict.tensor(node.parameters["weight"]).dtype is not dtype:
                raise Blocked(SkipReason.UNSUPPORTED_DTYPE, f"{node.describe()} is of another dtype")
        strided = any(step != 1 for step in first.strides)
        if np.any(result.identity) and (first.kind is NodeKind.LINEAR or strided or first.channels != source.channels):
            raise Blocked(SkipReason.AXIS_MISMATCH, f"{first.describe()} lies differently on what it reads")


def find_inside(graph: ModelGraph, holds: Callable[[str], bool], module: str) -> Mapping[int, Node]:
    """The nodes of a block: those with parameters in its branches, and what is summed up in the block itself."""
    found: dict[int, Node] = {}
    for node in graph.nodes:
        own = [name for name in node.parameters.values() if holds(name)]
        sums = node.layer == module and node.kind in (NodeKind.ADD, NodeKind.CHANNELWISE)
        if own or sums:
            found[node.index] = node
    return found
