"""The nodes and tensors of an ONNX model: who reads what by name, in the main graph and in those nested in it.

Field numbers are those of onnx.proto; nothing here needs the onnx package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from bntool.checkpoints.containers.protobufs.reading import Field, Message
from bntool.errors import CorruptFileError, UnsafeFileError

# ModelProto
IR_VERSION, PRODUCER, GRAPH, OPSETS, METADATA, FUNCTIONS = 1, 2, 7, 8, 14, 25
# GraphProto
NODES, INITIALIZERS, GRAPH_INPUTS, GRAPH_OUTPUTS, VALUE_INFO, SPARSE_INITIALIZERS = 1, 5, 11, 12, 13, 15
# NodeProto
INPUTS, OUTPUTS, NODE_NAME, OPERATOR, ATTRIBUTES, DOMAIN = 1, 2, 3, 4, 5, 7
# AttributeProto
NAME, FLOAT, INT, TENSOR, SUBGRAPH, FLOATS, INTS, SUBGRAPHS, REFERENCE = 1, 2, 3, 5, 6, 7, 8, 11, 21
# FunctionProto
FORMALS, RESULTS, BODY, FUNCTION_OPSETS, DEFAULTS = 4, 5, 7, 9, 11
_FUNCTION_KEY, _NODE_KEY = (10, 1, 13), (DOMAIN, OPERATOR, 8)  # domain, name, overload

_MOST_COPIES = 100  # one after the other
MAX_CALLS = 10_000  # of functions of a model, those inside functions counted for each call
MAX_FUNCTION_DEPTH = 16
STANDARD_DOMAINS = ("", "ai.onnx")
_FIRST_WITHOUT_IS_TEST = 7
_SHOWN = 40  # characters of a text of a model
_NORMALISATION = re.compile(r"batch_?norm|spatial_?bn|(?:sync|frozen|inplace)_?a?bn", re.IGNORECASE)


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
        bindings: of a call of a function: where each formal input comes from, as a graph and a name in it.
        call: of a call of a function: the node that calls, or that calls the function around it.
    """

    message: Message = field(repr=False)
    nodes: tuple[OnnxNode, ...]
    initializers: Mapping[str, Message] = field(repr=False)
    constants: Mapping[str, OnnxNode] = field(repr=False)
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parent: OnnxGraph | None = field(default=None, repr=False)
    bindings: Mapping[str, tuple[OnnxGraph, str]] = field(default_factory=dict, repr=False)
    call: OnnxNode | None = field(default=None, repr=False)

    @cached_property
    def producers(self) -> Mapping[str, OnnxNode]:
        """The node that puts out each value."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def computed(self) -> frozenset[str]:
        """The names of this graph's inputs and of what its nodes give."""
        return frozenset(self.inputs).union(*(node.outputs for node in self.nodes))

    @cached_property
    def _copies(self) -> Mapping[str, str]:
        """The outputs of Identity nodes, and what each copies."""
        return {n.outputs[0]: n.inputs[0] for n in self.nodes if n.operator == "Identity" and n.inputs and n.outputs}

    def resolve(self, name: str) -> str:
        """Return the name of what Identity nodes copied: exporters store equal tensors once, and copy them so."""
        for _ in range(_MOST_COPIES):
            if name not in self._copies:
                break
            name = self._copies[name]
        return name

    def place_of(self, name: str) -> tuple[OnnxGraph, str] | None:
        """Find where a value that a node of this graph reads comes from, through copies: a graph, and its name
        there.
        """
        graph: OnnxGraph | None = self
        while graph is not None:
            name = graph.resolve(name)
            if name in graph.initializers:
                return graph, name
            if name in graph.bindings:
                graph, name = graph.bindings[name]
            elif name in graph.computed:
                return graph, name  # hides one of that name further out
            else:
                graph = graph.parent
        return None

    def find(self, name: str) -> tuple[OnnxGraph, str] | None:
        """Return the graph that holds a constant that a node of this graph sees, and its name there; None for
        others.
        """
        place = self.place_of(name)
        return place if place is not None and place[1] in place[0].initializers else None


def find_uses(graphs: Iterable[OnnxGraph]) -> Mapping[tuple[int, str], list[tuple[OnnxGraph, OnnxNode, int]]]:
    """Return the nodes that read each constant, also through Identity nodes, by the graph that holds it and its name.

    Each with its graph, and the position of the input.
    """
    uses: dict[tuple[int, str], list[tuple[OnnxGraph, OnnxNode, int]]] = {}
    for graph in graphs:
        for node in graph.nodes:
            for position, name in enumerate(node.inputs if node.operator != "Identity" else ()):
                found = graph.find(name) if name else None
                if found is not None:
                    uses.setdefault((id(found[0]), found[1]), []).append((graph, node, position))
    return uses


def read_graphs(model: Message) -> tuple[OnnxGraph, ...]:
    """Return the main graph, and then those nested in its nodes (the branches of If, the bodies of Loop and Scan).

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


def read_calls(model: Message, graphs: Sequence[OnnxGraph]) -> tuple[OnnxGraph, ...]:
    """Return the bodies of the functions that a model holds, one for each call, with what it is called with.

    Raises:
        UnsafeFileError: functions that call each other without measure.
    """
    functions = find_normalising(model)
    calls: list[OnnxGraph] = []
    waiting: list[tuple[OnnxGraph, OnnxNode, OnnxNode | None, int]]
    waiting = [(graph, node, None, 0) for graph in graphs for node in graph.nodes] if functions else []
    while waiting:
        graph, node, outermost, depth = waiting.pop(0)
        function = functions.get(key_of_call(node.message))
        if function is None:
            continue
        if depth > MAX_FUNCTION_DEPTH or len(calls) > MAX_CALLS:
            raise UnsafeFileError("the functions of the model call each other without measure")
        bodies = _read_call(function, graph, node, outermost or node)
        calls += bodies
        waiting += [(body, inner, outermost or node, depth + 1) for body in bodies for inner in body.nodes]
    return tuple(calls)


def normalises_by_batch(node: OnnxNode, opset: int) -> bool:
    """Return whether a BatchNormalization is in training mode.

    Args:
        opset: its version of ONNX's own operators: the mode was an attribute before 7, then the number of outputs, and
            is an attribute again since 14.
    """
    if opset < _FIRST_WITHOUT_IS_TEST:
        return not node.integer("is_test", 0)
    return bool(node.integer("training_mode", 0)) or any(node.outputs[1:])


def find_normalisation(node: OnnxNode) -> str:
    """Return the operator or text by which a node looks like BatchNorm, "" where it does not. The text is looked for in
    the attributes of operators that are not ONNX's own, where those that stand for an operator of PyTorch or for Python
    name it.
    """
    if is_normalisation(node.operator):
        return node.operator
    if "." not in node.operator:
        return ""
    texts = (node.text(name) for name in node.attributes)
    return next((f"{node.operator} ({text[:_SHOWN]})" for text in texts if is_normalisation(text)), "")


def is_normalisation(operator: str) -> bool:
    """Return whether an operator, of whatever domain, is named after batch normalisation."""
    return bool(_NORMALISATION.search(operator))


def _key(message: Message, fields: tuple[int, int, int]) -> tuple[str, ...]:
    domain, *rest = (message.text(number) for number in fields)
    return ("" if domain in STANDARD_DOMAINS else domain, *rest)


def key_of_call(node: Message) -> tuple[str, ...]:
    """Return the domain, name and overload of what a node calls: a function of the model, or an operator."""
    return _key(node, _NODE_KEY)


def operators_of_functions(model: Message) -> Iterator[str]:
    """Yield the operators of all nodes in functions, with the domain in front where it is not ONNX's own."""
    for function in model.messages(FUNCTIONS):
        for node in _nodes_below(function, BODY):
            domain, name, _ = key_of_call(node)
            yield f"{domain}.{name}" if domain else name


def _nodes_below(message: Message, number: int = NODES) -> Iterator[Message]:
    """Yield the nodes of a graph or function, and of the graphs nested in them."""
    for node in message.messages(number):
        yield node
        for attribute in node.messages(ATTRIBUTES):
            for field_number in (SUBGRAPH, SUBGRAPHS):
                for inner in attribute.messages(field_number):
                    yield from _nodes_below(inner)


def find_normalising(model: Message) -> dict[tuple[str, ...], Message]:
    """Return the functions of a model in which something is normalised, there or in a function that they call."""
    functions = {_key(message, _FUNCTION_KEY): message for message in model.messages(FUNCTIONS)}
    calls = {key: {key_of_call(node) for node in _nodes_below(body, BODY)} for key, body in functions.items()}
    chosen = {key for key, called in calls.items() if any(is_normalisation(name) for _, name, _ in called)}
    while more := {key for key, called in calls.items() if key not in chosen and called & chosen}:
        chosen |= more
    return {key: functions[key] for key in chosen}


def _read_call(function: Message, graph: OnnxGraph, node: OnnxNode, call: OnnxNode) -> list[OnnxGraph]:
    """Return the body of a function as one node calls it, and the graphs nested in it."""
    given = dict(node.attributes)
    for default in function.messages(DEFAULTS):
        given.setdefault(default.text(NAME), default)
    formals = function.texts(FORMALS)
    bindings = {formal: (graph, actual) for formal, actual in zip(formals, node.inputs, strict=False) if actual}
    found: list[OnnxGraph] = []
    _read_graph(function, None, found, bindings=bindings, call=call, given=given)
    return found


def _read_graph(
    message: Message,
    parent: OnnxGraph | None,
    found: list[OnnxGraph],
    *,
    bindings: Mapping[str, tuple[OnnxGraph, str]] | None = None,
    call: OnnxNode | None = None,
    given: Mapping[str, Message] | None = None,
) -> None:
    """Read a graph, or the body of a function with its bindings, and those nested in its nodes.

    Args:
        given: the attributes that a function is called with.
    """
    is_body = bindings is not None
    nodes = tuple(_read_node(index, message, one) for index, one in enumerate(message.all(BODY if is_body else NODES)))
    if given is not None:
        nodes = tuple(_fill_in(node, given) for node in nodes)
    tensors: dict[str, Message] = {}
    for initializer in () if is_body else message.messages(INITIALIZERS):
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
        inputs=() if is_body else tuple(info.text(1) for info in message.messages(GRAPH_INPUTS)),
        outputs=message.texts(RESULTS) if is_body else tuple(i.text(1) for i in message.messages(GRAPH_OUTPUTS)),
        parent=parent,
        bindings=bindings or {},
        call=call,
    )
    found.append(graph)
    for node in nodes:
        for attribute in node.attributes.values():
            for number in (SUBGRAPH, SUBGRAPHS):
                for inner in attribute.messages(number):
                    _read_graph(inner, graph, found, call=call, given=given)


def _fill_in(node: OnnxNode, given: Mapping[str, Message]) -> OnnxNode:
    """Return a node of a function with the attributes that it refers to."""
    attributes = {
        name: given.get(attribute.text(REFERENCE)) if attribute.last(REFERENCE) is not None else attribute
        for name, attribute in node.attributes.items()
    }
    return replace(node, attributes={name: one for name, one in attributes.items() if one is not None})


def _read_node(index: int, graph: Message, place: Field) -> OnnxNode:
    message = graph.message_of(place)
    domain, operator = message.text(DOMAIN), message.text(OPERATOR)
    return OnnxNode(
        index=index,
        name=message.text(NODE_NAME),
        operator=operator if domain in STANDARD_DOMAINS else f"{domain}.{operator}",
        inputs=message.texts(INPUTS),
        outputs=message.texts(OUTPUTS),
        attributes={attribute.text(NAME): attribute for attribute in message.messages(ATTRIBUTES)},
        message=message,
        field=place,
    )
