"""The nodes and tensors of an ONNX model: who reads what by name, in the main graph and in those nested in it.

Field numbers are those of onnx.proto; nothing here needs the onnx package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from bntool.checkpoints.containers.protobufs.reading import Field, Message
from bntool.errors import CorruptFileError

# ModelProto
IR_VERSION, PRODUCER, GRAPH, OPSETS, METADATA = 1, 2, 7, 8, 14
# GraphProto
NODES, INITIALIZERS, GRAPH_INPUTS, GRAPH_OUTPUTS, VALUE_INFO, SPARSE_INITIALIZERS = 1, 5, 11, 12, 13, 15
# NodeProto
INPUTS, OUTPUTS, NODE_NAME, OPERATOR, ATTRIBUTES, DOMAIN = 1, 2, 3, 4, 5, 7
# AttributeProto
_NAME, FLOAT, INT, TENSOR, SUBGRAPH, FLOATS, INTS, SUBGRAPHS = 1, 2, 3, 5, 6, 7, 8, 11

_MOST_COPIES = 100  # one after the other
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """One node.

    Attributes:
        index: position in its graph.
        operator: e.g. ``Conv``; with the domain in front where it is not ONNX's own.
        attributes: the message of each, by name.
        field: of the node in its graph.
    """

    index: int
    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Message] = field(repr=False, compare=False)
    message: Message = field(repr=False, compare=False)
    field: Field = field(repr=False, compare=False)

    def integer(self, name: str, default: int) -> int:
        found = self.attributes.get(name)
        return default if found is None else found.integer(INT, 0)

    def number(self, name: str, default: float) -> float:
        found = self.attributes.get(name)
        return default if found is None else found.float32(FLOAT, 0.0)

    def integers(self, name: str) -> tuple[int, ...]:
        found = self.attributes.get(name)
        return () if found is None else found.integers(INTS)

    def text(self, name: str, default: str = "") -> str:
        found = self.attributes.get(name)
        return default if found is None else found.text(4)


@dataclass(frozen=True)
class OnnxGraph:
    """A graph and what it shows to the graphs nested in it.

    Attributes:
        nodes: in the order of the file, which is an order of execution.
        initializers: the TensorProto of each, by name; also of Constant nodes, by what they put out.
        constants: the Constant node of those that are not initializers.
        inputs, outputs: names; before IR version 4 every initializer is an input too.
        parent: the graph around it.
    """

    message: Message = field(repr=False)
    nodes: tuple[OnnxNode, ...]
    initializers: Mapping[str, Message] = field(repr=False)
    constants: Mapping[str, OnnxNode] = field(repr=False)
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parent: OnnxGraph | None = field(default=None, repr=False)

    @cached_property
    def computed(self) -> frozenset[str]:
        """What the inputs and nodes of this graph are called."""
        return frozenset(self.inputs).union(*(node.outputs for node in self.nodes))

    @cached_property
    def _copies(self) -> Mapping[str, str]:
        """What Identity nodes put out, and what they read."""
        return {n.outputs[0]: n.inputs[0] for n in self.nodes if n.operator == "Identity" and n.inputs and n.outputs}

    def resolve(self, name: str) -> str:
        """The name of what Identity nodes copied: exporters store equal tensors once, and copy them so."""
        for _ in range(_MOST_COPIES):
            if name not in self._copies:
                break
            name = self._copies[name]
        return name

    def find(self, name: str) -> tuple[OnnxGraph, Message] | None:
        """The constant of that name that a node of this graph sees, and the graph that holds it."""
        graph: OnnxGraph | None = self
        while graph is not None:
            if name in graph.initializers:
                return graph, graph.initializers[name]
            if name in graph.computed:
                return None  # hides one of that name further out
            graph = graph.parent
        return None


def read_graphs(model: Message) -> tuple[OnnxGraph, ...]:
    """The main graph, and then those nested in its nodes (the branches of If, the bodies of Loop and Scan).

    Raises:
        CorruptFileError: there is no graph, or one that ONNX forbids.
        UnsafeFileError: nested without end.
    """
    message = model.message(GRAPH)
    if message is None:
        raise CorruptFileError("the model holds no graph: truncated, or not an ONNX file")
    found: list[OnnxGraph] = []
    _read_graph(message, None, found)
    return tuple(found)


def _read_graph(message: Message, parent: OnnxGraph | None, found: list[OnnxGraph]) -> None:
    nodes = tuple(_read_node(index, message, one) for index, one in enumerate(message.all(NODES)))
    tensors: dict[str, Message] = {}
    for initializer in message.messages(INITIALIZERS):
        name = initializer.text(8)
        if name in tensors:
            raise CorruptFileError("two initializers have this name", tensor=name)
        tensors[name] = initializer
    constants: dict[str, OnnxNode] = {}
    for node in nodes:
        value = node.attributes.get("value") if node.operator == "Constant" and len(node.outputs) == 1 else None
        held = value.message(TENSOR) if value is not None else None
        if held is not None and node.outputs[0] not in tensors:
            tensors[node.outputs[0]] = held
            constants[node.outputs[0]] = node
    graph = OnnxGraph(
        message=message,
        nodes=nodes,
        initializers=tensors,
        constants=constants,
        inputs=tuple(info.text(1) for info in message.messages(GRAPH_INPUTS)),
        outputs=tuple(info.text(1) for info in message.messages(GRAPH_OUTPUTS)),
        parent=parent,
    )
    found.append(graph)
    for node in nodes:
        for attribute in node.attributes.values():
            for number in (SUBGRAPH, SUBGRAPHS):
                for inner in attribute.messages(number):
                    _read_graph(inner, graph, found)


def _read_node(index: int, graph: Message, place: Field) -> OnnxNode:
    message = graph.message_of(place)
    domain, operator = message.text(DOMAIN), message.text(OPERATOR)
    return OnnxNode(
        index=index,
        name=message.text(NODE_NAME),
        operator=operator if domain in STANDARD_DOMAINS else f"{domain}.{operator}",
        inputs=message.texts(INPUTS),
        outputs=message.texts(OUTPUTS),
        attributes={attribute.text(_NAME): attribute for attribute in message.messages(ATTRIBUTES)},
        message=message,
        field=place,
    )
