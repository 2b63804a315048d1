"""A model's graph as data: nodes that compute, and edges that say which channels go where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

from bntool.errors import CorruptFileError
from bntool.representation import list_first

if TYPE_CHECKING:
    from bntool.checkpoints.tensors import Tensor
    from bntool.graphs.architectures.recognition import Architecture


class Evidence(Enum):
    """The evidence for an edge."""

    TRACED = "traced"  # seen in a real forward: proof
    STORED = "stored"  # the file holds the graph that is run, as ONNX and Caffe do: proof
    DECLARED = "declared"  # the user said so
    ASSUMED = "assumed"  # a known architecture, recognised by keys and shapes


class NodeKind(Enum):
    """The operation of a node, as far as it matters for moving a scale and a shift through it."""

    CONVOLUTION = "convolution"
    CONV_TRANSPOSE = "transposed convolution"
    LINEAR = "linear"
    MATMUL = "matrix product"  # with a weight (..., in, out), channels last
    BATCH_NORM = "BatchNorm"
    ADD = "addition"  # of two computed tensors, each times its factor
    MAX_POOL = "max-pool"  # the maximum over positions: commutes with a positive scale and any shift
    AVERAGE = "average"  # weights over positions that sum to one: commutes with any scale and shift
    ACTIVATION = "activation"  # f(a x) = a f(x) for a > 0: ReLU, leaky ReLU, PReLU
    CHANNELWISE = "linear map of each channel"  # times a constant, zero padding, a fixed filter
    GATE = "gate"  # product of two computed tensors, the first of which is the data
    BIAS = "bias"  # addition of a parameter of its own, one element for each channel
    CONSTANT_SUM = "addition of a constant"
    INPUT = "input"
    OUTPUT = "output"
    OTHER = "other"

    @property
    def is_producer(self) -> bool:
        """Whether it has a weight that can absorb a scale per output channel."""
        return self in (NodeKind.CONVOLUTION, NodeKind.CONV_TRANSPOSE, NodeKind.LINEAR, NodeKind.MATMUL)

    @property
    def is_called_by_operator(self) -> bool:
        """Whether messages call it by its operation, such as ``relu``, instead of by its kind."""
        return self in _CALLED_BY_OPERATOR


_CALLED_BY_OPERATOR = (
    NodeKind.ACTIVATION,
    NodeKind.CHANNELWISE,
    NodeKind.GATE,
    NodeKind.BIAS,
    NodeKind.CONSTANT_SUM,
    NodeKind.OTHER,
)


class Owner(Enum):
    """The module that holds a BatchNorm's tensors, by what it does beside normalising."""

    WHOLE = "whole"  # nothing: the identity can take its place
    WITH_ACTIVATION = "with activation"  # its children ``drop`` and ``act`` run afterwards, as in timm's BatchNormAct2d
    PART = "part"  # something else, or no module is known: it cannot be taken out


@dataclass(frozen=True)
class Node:
    """One call of one operation.

    Attributes:
        index: position in order of execution.
        kind: what it computes.
        operator: PyTorch's name, e.g. ``aten.relu_``; for a declared node the layer's.
        layer: dotted path of the module that ran it, "" for the model itself.
        parameters: names of the parameters and buffers that it takes as they are, by role (``weight``, ``bias``,
            ``running_mean``, ``running_var``; ``factor`` or ``divisor`` of a linear map of each channel, one element
            for each or one for all).
        computed: roles that are given by a computed tensor, each with the names that it is computed from.
        unexplained: names of further tensors of its module, where nothing tells what is computed with them.
        channels: number of output channels.
        elements: of its output, where that was seen.
        groups: of a convolution.
        eps: of a BatchNorm.
        training: a BatchNorm that normalises by batch statistics.
        padded: a convolution that reads zeros beyond the border, or a transposed one that has output positions which
            not all of its taps meet.
        pads_itself: the module of the convolution adds these zeros, and could add other values.
        centred: a convolution whose outputs lie where its inputs do, with a tap in the middle of its kernel.
        strides: of a convolution without dilation whose kernel has a middle, which meets the first position: two of
            them with the same strides can be one. () for every other.
        factors: of the operands of an addition; of the parameter that is added; of the product and the bias of a
            linear; or of a linear map of each channel, one for all or one for each. () where they are one, and for a
            map whose factor is not known.
        owner: what else the module of a BatchNorm does.
        has_bias_slot: the owner of the weight reads ``self.bias`` too, so that one can be added.
        class_name: of the module that owns the parameters.
        new_bias: a name that is free for a bias, where that of its module's does not go without saying.
        ran: it was seen to run; else it is a module that did not, and that may read and feed what its relatives do.
    """

    index: int
    kind: NodeKind
    operator: str
    layer: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unexplained: tuple[str, ...] = ()
    channels: int = 0
    elements: int = 0
    groups: int = 1
    eps: float | None = None
    training: bool = False
    padded: bool = False
    pads_itself: bool = False
    centred: bool = False
    strides: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()
    owner: Owner = Owner.WHOLE
    has_bias_slot: bool = True
    class_name: str = ""
    new_bias: str = ""
    ran: bool = True

    def describe(self) -> str:
        """Describe the operation, and where it is, for people."""
        name = self.operator.removeprefix("aten.") if self.kind.is_called_by_operator else self.kind.value
        if self.kind in (NodeKind.INPUT, NodeKind.OUTPUT):
            return f"the model's {name}"
        return f"{name} ({self.layer})" if self.layer else name

    def describe_unexplained(self) -> str:
        """Say for people that other tensors belong to the module, of which nothing tells what they are for."""
        names = list_first(self.unexplained)
        return f"{names} belong to {self.describe()}, too, and nothing tells what is computed with that"


@dataclass(frozen=True)
class Edge:
    """Channels of one node's output that another node reads.

    Attributes:
        source, target: indices of nodes.
        port: which of the target's inputs; 0 is the data input of a producer.
        sources: channels of the source that are read.
        targets: for each of ``sources`` the channel of the target's input that it is; a pair for each meeting, so a
            channel may occur several times on either side. None where the target has no channels or everything meets
            everything.
        evidence: how it is known.
    """

    source: int
    target: int
    port: int
    sources: Sequence[int]
    targets: Sequence[int] | None
    evidence: Evidence = Evidence.TRACED


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor that one node reads and that the file does not hold as such; it is added to the file when it changes.

    Attributes:
        tensor: its elements.
        after: the tensor of the file that it follows then.
        is_copy: it is equal to that, which others read too; else it is computed.
    """

    tensor: Tensor
    after: str
    is_copy: bool


@dataclass(frozen=True)
class ModelGraph:
    """Nodes in order of execution, and the edges between them.

    Attributes:
        nodes: one for each call of an operation that computes; operations that only move elements are part of edges.
        edges: all that is known of who reads what.
        uses: for each parameter or buffer the nodes that read it, directly or through something computed from it.
        aliases: further names of a parameter or buffer whose module is registered under several names.
        tied: names of parameters that belong to several modules.
        evidence: how the graph is known.
        complete: every layer of the model that ran is in it; else only those declared.
        readers_known: it holds everything that reads what lies around its BatchNorms, and how; else only what decides
            whether their neighbours can take them.
        branches_at: the node at which Python first read a value of the data: what comes after it may differ for other
            inputs. None where that never happened.
        branches_in: where in the code that was, e.g. ``net.py:12``; "" where nothing tells.
        architectures: what was recognised, where the graph is assumed.
        ran: dotted paths of the modules that were called, where the graph is traced.
        modules: those of all modules, where the graph is traced.
        idle: what did not run and has or takes channels, BatchNorms aside: dotted paths, and how many, where the graph
            is traced.
        other_norms: dotted paths of modules with statistics that normalise otherwise, as their classes say.
        derived: tensors that nodes read and that the file does not hold by themselves, by name.
        needed_for: for tensors of the file that nothing else is made of, the derived ones that are made of them.
        overridable: parameters that are inputs of the program with a default: who calls it may give others.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    uses: Mapping[str, frozenset[int]]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()
    evidence: Evidence = Evidence.TRACED
    complete: bool = True
    readers_known: bool = True
    branches_at: int | None = None
    branches_in: str = ""
    architectures: tuple[Architecture, ...] = ()
    ran: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    idle: Mapping[str, frozenset[int]] = field(default_factory=dict)
    other_norms: frozenset[str] = frozenset()
    derived: Mapping[str, DerivedTensor] = field(default_factory=dict)
    needed_for: Mapping[str, frozenset[str]] = field(default_factory=dict)
    overridable: frozenset[str] = frozenset()

    @cached_property
    def _incoming(self) -> Mapping[int, tuple[Edge, ...]]:
        return _group(self.edges, key="target")

    @cached_property
    def _outgoing(self) -> Mapping[int, tuple[Edge, ...]]:
        return _group(self.edges, key="source")

    @cached_property
    def observed(self) -> ModelGraph:
        """The same graph without modules that did not run."""
        if all(node.ran for node in self.nodes):
            return self
        seen = (edge for edge in self.edges if self.nodes[edge.source].ran and self.nodes[edge.target].ran)
        return replace(self, edges=tuple(seen))

    def inputs(self, node: Node) -> tuple[Edge, ...]:
        """Return the edges into a node."""
        return self._incoming.get(node.index, ())

    def outputs(self, node: Node) -> tuple[Edge, ...]:
        """Return the edges out of a node, one for each node that reads what it computed."""
        return self._outgoing.get(node.index, ())

    @cached_property
    def batchnorms(self) -> Mapping[str, tuple[Node, ...]]:
        """The calls of each BatchNorm, by layer name, in order of first execution."""
        calls: dict[str, list[Node]] = {}
        for node in self.nodes:
            if node.kind is NodeKind.BATCH_NORM:
                calls.setdefault(node.layer, []).append(node)
        return {layer: tuple(nodes) for layer, nodes in calls.items()}

    def names_of(self, name: str) -> tuple[str, ...]:
        """Return all names of a parameter or buffer, when several modules share it."""
        return (name, *self.aliases.get(name, ()))


def shorten(channels: Sequence[int]) -> Sequence[int]:
    """Shorten channels to a range where they follow one another: it takes no memory and is compared at once."""
    if len(channels) and channels[-1] - channels[0] == len(channels) - 1:
        run = range(channels[0], channels[-1] + 1)
        if all(map(int.__eq__, channels, run)):
            return run
    return channels


def _group(edges: Sequence[Edge], *, key: str) -> Mapping[int, tuple[Edge, ...]]:
    groups: dict[int, list[Edge]] = {}
    for edge in edges:
        groups.setdefault(getattr(edge, key), []).append(edge)
    return {index: tuple(group) for index, group in groups.items()}


def check_lengths(layer: str, lengths: Iterable[int]) -> None:
    """Check that all vectors of a layer have the same length.

    Raises:
        CorruptFileError: they differ in length.
    """
    found = set(lengths)
    if len(found) > 1:
        raise CorruptFileError(f"its vectors have {' and '.join(map(str, sorted(found)))} elements", tensor=layer)
