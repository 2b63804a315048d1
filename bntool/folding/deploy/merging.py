"""One convolution for branches that read one tensor and are summed up: convolutions, BatchNorms, and the tensor itself.

The same for linears, also with a BatchNorm before.

The sum of convolutions of one stride is the convolution with the sum of their kernels, smaller ones in the middle of
the largest; the identity is a kernel with one in the middle (Ding et al. 2021, *RepVGG*, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from bntool.checkpoints.arrays import to_float64
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.tensors import StoredTensor, read_bytes
from bntool.folding.absorption import Blocked
from bntool.folding.channels import Array, is_whole
from bntool.folding.producers import FOLDABLE
from bntool.folding.scale_and_shift import ScaleAndShift
from bntool.graphs.graph import ModelGraph, Node, NodeKind
from bntool.plan import SkipReason

ReadBatchNorm = Callable[[Node], ScaleAndShift]


@dataclass(frozen=True)
class Sum:
    """The linear function that branches compute of the tensor which they all read.

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
        """Find the element in the middle of the kernel that weighs each channel itself."""
        channel, taps = np.arange(shape[0]), math.prod(shape[2:])
        return (channel * shape[1] + channel % shape[1]) * taps + taps // 2


def merge_branches(
    graph: ModelGraph, inside: Collection[int], state_dict: StateDict, read_batchnorm: ReadBatchNorm
) -> Sum:
    """Return the sum that some nodes compute.

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
# for each node that is read its index, channels of it, and the channels of the input that these are
_Read: TypeAlias = tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]


@dataclass
class _Merging:
    graph: ModelGraph
    inside: frozenset[int]
    state_dict: StateDict
    read_batchnorm: ReadBatchNorm
    source: _Read = ()
    parts: dict[int, _Part] = field(default_factory=dict)
    inputs: dict[int, Array] = field(default_factory=dict)

    def merge(self) -> Sum:
        end = self._find_end()
        self.source = self._find_source()
        part = self._walk(end)
        used = self.parts.keys() | {end.index}
        if used != self.inside:
            unused = self.graph.nodes[min(self.inside - used)]
            raise Blocked(SkipReason.NOT_ADJACENT, f"{unused.describe()} is no part of their sum")
        kernels = [(self.graph.nodes[index], factor) for index, factor in part.factors.items() if index != _ITSELF]
        ordered = sorted(kernels, key=lambda kernel: -math.prod(self._shape(kernel[0])[2:]))
        channels = end.channels
        inputs = tuple(self.inputs.get(node.index) for node, _ in ordered)
        result = Sum(tuple(ordered), inputs, part.factors.get(_ITSELF, np.zeros(channels)), part.bias)
        self._check_kernels(result)
        return result

    def _find_end(self) -> Node:
        """Return the node whose output all others need; nothing else needs a part of them."""
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

    def _find_source(self) -> _Read:
        """Find what all branches read and none of them gives: channels of one tensor, or of several that are one by
        then.
        """
        found: dict[_Read, Node] = {}
        names: dict[int, None] = {}
        for index in sorted(self.inside):
            node = self.graph.nodes[index]
            for port in {edge.port for edge in self.graph.inputs(node)}:
                read = self._read_port(node, port)
                outside = [source for source, _, _ in read if source not in self.inside]
                if outside:
                    found.setdefault(read, node)
                    names.update(dict.fromkeys(outside))
        if not found:
            raise Blocked(SkipReason.NO_PRODUCER, "its branches read nothing that is known")
        read = next(iter(found))
        if len(found) != 1:
            what = ", ".join(self.graph.nodes[index].describe() for index in names)
            raise Blocked(SkipReason.NO_PRODUCER, f"its branches read different channels of {what}")
        channels = [channel for _, _, targets in read for channel in targets]
        if channels != list(range(len(channels))):
            raise Blocked(SkipReason.AXIS_MISMATCH, f"{found[read].describe()} reads channels in another order")
        return read

    def _read_port(self, node: Node, port: int) -> _Read:
        edges = (edge for edge in self.graph.inputs(node) if edge.port == port)
        read = [(edge.source, tuple(edge.sources), tuple(edge.targets or ())) for edge in edges]
        return tuple(sorted(read, key=lambda one: one[2]))

    def _walk(self, node: Node) -> _Part:
        if node.index in self.parts:
            raise Blocked(SkipReason.SHARED_OUTPUT, f"{node.describe()} is read twice")
        self.parts[node.index] = part = self._walk_inside(node)
        return part

    def _walk_inside(self, node: Node) -> _Part:
        if node.kind in (NodeKind.CONVOLUTION, NodeKind.LINEAR):
            return self._start(node)
        before = self._walk_back(node, 0)
        if node.kind is NodeKind.BATCH_NORM:
            own = self.read_batchnorm(node)
            scaled = before.times(own.scale)
            return _Part(scaled.factors, scaled.bias + own.shift)
        if node.kind is NodeKind.ADD:
            factors = node.factors or (1.0, 1.0)
            other = self._walk_back(node, 1)
            return before.times(factors[0]).plus(other.times(factors[1]))
        if node.kind is NodeKind.CHANNELWISE and node.factors:
            return before.times(np.array(node.factors))  # one for all channels, or one for each
        if node.kind is NodeKind.CHANNELWISE and "factor" in node.parameters:
            self._check_own(node)
            return before.times(self._read_vector(node.parameters["factor"]))
        raise Blocked(SkipReason.NOT_ADJACENT, f"{node.describe()} lies between")

    def _walk_back(self, node: Node, port: int) -> _Part:
        """Return what a node reads on an input."""
        read = self._read(node, port)
        if read is not None:
            return self._walk(read)
        return _Part({_ITSELF: np.ones(node.channels)}, np.zeros(node.channels))

    def _start(self, node: Node) -> _Part:
        """Return a convolution or linear that reads the tensor; a linear also by way of a BatchNorm."""
        bias, read = self._read_bias(node), self._read(node, 0)
        if node.kind is NodeKind.LINEAR and read is not None and read.kind is NodeKind.BATCH_NORM:
            own = self.read_batchnorm(read)
            self.parts[read.index] = _Part({}, own.shift)
            self.inputs[node.index] = own.scale
            bias = bias + self._read_weight(node) @ own.shift
            read = self._read(read, 0)
        if read is not None:
            raise Blocked(SkipReason.NOT_ADJACENT, f"{node.describe()} reads another branch")
        return _Part({node.index: np.ones(node.channels)}, bias)

    def _read(self, node: Node, port: int) -> Node | None:
        """Return the branch that a node reads on an input, all of it; None for the tensor that all branches read."""
        ports = {edge.port for edge in self.graph.inputs(node)}
        expected = {0, 1} if node.kind is NodeKind.ADD else {0}
        read = self._read_port(node, port)
        if ports != expected:
            raise Blocked(SkipReason.NOT_ADJACENT, f"{node.describe()} reads more than one tensor")
        convolves = node.kind in (NodeKind.CONVOLUTION, NodeKind.LINEAR)
        if read == self.source:
            if not convolves and node.channels != self.source_channels:
                raise Blocked(SkipReason.AXIS_MISMATCH, f"{node.describe()} reads its input in another way")
            return None
        if len(read) != 1:
            raise Blocked(SkipReason.NOT_ADJACENT, f"{node.describe()} reads more than one tensor")
        (edge,) = (edge for edge in self.graph.inputs(node) if edge.port == port)
        source = self.graph.nodes[edge.source]
        if not is_whole(edge, source) or not (convolves or source.channels == node.channels):
            raise Blocked(SkipReason.AXIS_MISMATCH, f"{node.describe()} reads other channels of {source.describe()}")
        return source

    @property
    def source_channels(self) -> int:
        return sum(len(channels) for _, channels, _ in self.source)

    # tensors

    def _shape(self, node: Node) -> tuple[int, ...]:
        return tuple(self.state_dict.tensor(node.parameters["weight"]).shape)

    def _read_weight(self, node: Node) -> Array:
        tensor = self.state_dict.tensor(node.parameters["weight"])
        return to_float64(read_bytes(tensor), tensor.dtype).reshape(tensor.shape)

    def _read_bias(self, node: Node) -> Array:
        self._check_own(node)
        if "weight" not in node.parameters:
            raise Blocked(SkipReason.COMPUTED_WEIGHT, f"the weight of {node.describe()} is computed")
        name = node.parameters.get("bias")
        return np.zeros(node.channels) if name is None else self._read_vector(name)

    def _read_vector(self, name: str) -> Array:
        tensor = self.state_dict.tensor(name)
        return to_float64(read_bytes(tensor), tensor.dtype).reshape(-1)

    def _check_own(self, node: Node) -> None:
        """Check that nothing else uses the parameters of a convolution or product, and that they can be calculated
        with.
        """
        if node.computed:
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

    def _check_kernels(self, result: Sum) -> None:
        """Check that all kernels have one grid and fit into the largest one."""
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
        elsewhere = first.kind is NodeKind.LINEAR or strided or first.channels != self.source_channels
        if np.any(result.identity) and elsewhere:
            raise Blocked(SkipReason.AXIS_MISMATCH, f"{first.describe()} lies differently on what it reads")


def find_inside(graph: ModelGraph, holds: Callable[[str], bool], module: str) -> Mapping[int, Node]:
    """Return the nodes of a block: those with parameters in its branches, and what the block itself sums up of them."""
    found: dict[int, Node] = {}
    for node in graph.nodes:
        own = [name for name in node.parameters.values() if holds(name)]
        sums = node.kind in (NodeKind.ADD, NodeKind.CHANNELWISE) and (node.layer == module or holds(node.layer))
        if own or (sums and any(edge.source in found for edge in graph.inputs(node))):
            found[node.index] = node
    return found
