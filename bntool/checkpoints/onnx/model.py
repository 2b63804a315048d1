"""The ONNX format: initializers, Constant nodes, and BatchNormalization nodes as layers in PyTorch's words."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bntool.batchnorm import DEFAULT_EPS, STATISTICS, VECTORS
from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import (
    Checkpoint,
    Content,
    Format,
    GlobalName,
    GlobalTrust,
    Loader,
    LoadingCode,
    ModuleInfo,
    NotUnderstood,
    StateDict,
)
from bntool.checkpoints.containers.protobufs.reading import Buffer, Message
from bntool.checkpoints.containers.protobufs.writing import unused_name
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.onnx.constants import Constants
from bntool.checkpoints.onnx.graph import (
    GRAPH,
    METADATA,
    OPSETS,
    PRODUCER,
    SPARSE_INITIALIZERS,
    STANDARD_DOMAINS,
    OnnxGraph,
    OnnxNode,
    find_normalisation,
    find_normalising,
    normalises_by_batch,
    operators_of_functions,
    read_calls,
    read_graphs,
)
from bntool.checkpoints.onnx.inlining import inline_functions
from bntool.checkpoints.onnx.tensors import ExternalData, is_external, read_tensor
from bntool.checkpoints.records import RECORD_KEY, parse_record
from bntool.checkpoints.tensors import Tensor
from bntool.errors import UnknownFormatError

# of other domains than ONNX's: of ONNX Runtime for training, of its extensions, and a compiled program
_ACTING = {
    **dict.fromkeys(("PythonOp", "PythonOpGrad", "PyOp", "PyCustomOp"), GlobalTrust.SUSPICIOUS),
    **dict.fromkeys(("ATen", "ATenGrad", "EPContext"), GlobalTrust.UNKNOWN),
}
_SPARSE_VALUES, _TENSOR_NAME = 1, 8  # of SparseTensorProto, of TensorProto
_CORE_ML = (200, 4000)  # numbers of the fields in which its Model holds one kind of model or another
_FIELDS = {b"\x0a", b"\x12"}  # how the MetaGraphDef of a SavedModel begins, where ONNX has the name of a program
# what inputs of nodes are, in PyTorch's words, where these may be constants
_OWN = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), ("", "weight", "bias")),
    "MatMul": ("weight", "weight"),
    **dict.fromkeys(("Add", "Sub"), ("bias", "bias")),
    "Sum": ("bias",) * 8,
}
_LISTED = 4  # functions that a sentence names
_KEPT = 0.9  # the default of BatchNormalization's momentum: the share that is kept


class Onnx(Format):
    """A model; its tensors lie in the file."""

    name = "onnx"
    title = "ONNX"
    writer = "onnx.writing:write_model"
    is_pytorch = False
    loader = Loader.ONNX_RUNTIME
    loading = LoadingCode(("import onnxruntime", "session = onnxruntime.InferenceSession({path})"))
    graph_reader = "bntool.graphs.stored.onnx:onnx_graph"
    is_for_inference = True

    def recognises(self, path: Location, head: bytes) -> bool:
        # ModelProto.ir_version, then one of its other fields
        return path.suffix == ".onnx" or (
            head[:1] == b"\x08" and head[2:3] in b"\x12\x1a\x22\x28\x32\x3a\x42" and len(head) > 2
        )

    def read(self, file: SourceFile) -> Checkpoint:
        return read_model(file, external=ExternalData(file))


class OnnxWithExternalData(Onnx):
    """A model with its large tensors in files beside it."""

    single_file = False

    def check_unchanged(self, checkpoint: Checkpoint) -> None:
        super().check_unchanged(checkpoint)
        for file in OnnxContent.of(checkpoint).external.files.values():
            file.check_unchanged()


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a tensor of the state dict.

    Attributes:
        graph: that holds the initializer or Constant node.
        name: of it.
        message: its TensorProto; None where nodes compute the value from constants.
        reader: the BatchNormalization node that the name in the state dict comes from, with its graph and the position
            of the input; None where the tensor has its own name.
    """

    graph: OnnxGraph
    name: str
    message: Message | None = field(repr=False)
    reader: tuple[OnnxGraph, OnnxNode, int] | None = None


@dataclass(frozen=True)
class OnnxContent(Content):
    """A model as it was read.

    Attributes:
        model: with functions that normalise written out where they are called.
        graphs: the main one first.
        places: where each tensor lies, by its name in the state dict.
        layers: the graph and node of each BatchNormalization layer, by name, but for
        called: those in functions that are not written out, by name: the node of a graph that calls them.
        external: the opened files beside the model.
        has_external: whether any tensor lies in such a file.
        opset: version of ONNX's own operators.
    """

    model: Message = field(repr=False)
    graphs: tuple[OnnxGraph, ...] = field(repr=False)
    places: Mapping[str, Place]
    layers: Mapping[str, tuple[OnnxGraph, OnnxNode]]
    called: Mapping[str, OnnxNode]
    external: ExternalData = field(repr=False)
    has_external: bool
    opset: int

    @cached_property
    def own_inputs(self) -> Mapping[tuple[int, int], tuple[str, OnnxGraph, OnnxNode]]:
        """Inputs of nodes that can be given a tensor of their own, by where the node lies and the position.

        Each with the name of that tensor, and the graph and node.
        """
        taken = {name for graph in self.graphs for name in (*graph.inputs, *graph.initializers, *graph.computed)}
        taken |= self.places.keys()
        found: dict[tuple[int, int], tuple[str, OnnxGraph, OnnxNode]] = {}
        for graph in self.graphs:
            for node in graph.nodes:
                roles = _OWN.get(node.operator, ())
                for position, role in enumerate(roles[: len(node.inputs)]):
                    if role and node.inputs[position]:
                        name = unused_name(f"{node.name or node.outputs[0]}.{role}", taken)
                        taken.add(name)
                        found[node.field.start, position] = (name, graph, node)
        return found


def read_model(file: SourceFile, *, external: ExternalData) -> Checkpoint:
    """List what a model holds.

    Raises:
        CorruptFileError, UnsafeFileError
        UnreadableFileError: a file with its data is missing.
    """
    model = Message(Buffer(file), 0, file.size)
    _check_format(model)
    graphs = read_graphs(model)
    acting = tuple(_find_acting(model, graphs))
    inlined = inline_functions(model, graphs)
    if inlined is not None:
        file.notes = (*file.notes, _describe_inlining([name for _, name, _ in find_normalising(model)]))
        model, graphs = inlined, read_graphs(inlined)
    opset = _opset(model)
    reading = _Reading(graphs, read_calls(model, graphs), external, opset)
    has_external = any(is_external(message) for graph in graphs for message in graph.initializers.values())
    metadata = {entry.text(1): entry.text(2) for entry in model.messages(METADATA)}
    history = parse_record(metadata.get(RECORD_KEY))
    entries: dict[str, object] = {name: text for name, text in metadata.items() if name != RECORD_KEY}
    if model.last(PRODUCER) is not None:
        entries["producer_name"] = model.text(PRODUCER)
    entries["opset"] = opset
    state_dict = StateDict("", "", reading.tensors, modules=reading.modules)
    return Checkpoint(
        file=file,
        format=OnnxWithExternalData() if has_external else Onnx(),
        state_dicts=(state_dict,) if reading.tensors or reading.modules else (),
        globals=acting,
        not_understood=tuple(reading.not_understood),
        entries=entries,
        records={"": history} if history and reading.tensors else {},
        content=OnnxContent(
            model, graphs, reading.places, reading.layers, reading.called, external, has_external, opset
        ),
    )


def _describe_inlining(functions: Sequence[str]) -> str:
    """Describe what a file lacks after it is written again."""
    more = len(functions) - _LISTED
    listed = ", ".join(map(quote, functions[:_LISTED])) + (f" and {more} more" if more > 0 else "")
    calls = "calls of the function" if len(functions) == 1 else "calls of the functions"
    return f"{calls} {listed} are read as the nodes inside: a file that is written has these instead"


def _check_format(model: Message) -> None:
    """Tell models of other formats that begin as ONNX's do by their fields.

    Raises:
        UnknownFormatError: it is one of Core ML or TensorFlow.
    """
    if model.last(GRAPH) is not None:
        return
    numbers = {one.number for one in model.fields}
    if any(_CORE_ML[0] <= number <= _CORE_ML[1] for number in numbers):
        raise UnknownFormatError(
            "this is a Core ML model (.mlmodel), which bntool does not read; give it the checkpoint that this was made "
            "from"
        )
    starts = {model.buffer.read(one.value_start, min(one.length, 1)) for one in model.all(PRODUCER)}
    if numbers <= {1, PRODUCER} and starts & _FIELDS:
        raise UnknownFormatError(
            "this is the graph of a TensorFlow SavedModel (saved_model.pb); name the folder that it lies in"
        )


def _find_acting(model: Message, graphs: Iterable[OnnxGraph]) -> Iterator[GlobalName]:
    """Yield operators of runtimes that run Python, or a program that the file holds, in graphs and functions; once
    each.
    """
    operators = {node.operator: None for graph in graphs for node in graph.nodes}
    operators |= dict.fromkeys(operators_of_functions(model))
    for operator in operators:
        domain, _, name = operator.rpartition(".")
        if domain and name in _ACTING:
            yield GlobalName(operator, called=True, trust=_ACTING[name])


def _opset(model: Message) -> int:
    versions = [entry.integer(2) for entry in model.messages(OPSETS) if entry.text(1) in STANDARD_DOMAINS]
    return versions[-1] if versions else 1


@dataclass(frozen=True, slots=True)
class LayerNames:
    """The names that the name of a layer depends on: of its node, of its output and of its statistics."""

    node: str
    output: str
    statistics: tuple[str, ...]

    @property
    def wanted(self) -> str:
        """The name that a layer should have: that of the exported module, where its statistics are named after one;
        else that of the node, or its output.

        A node with the name of the module and ``@2`` is one more that shares the tensors of the module.
        """
        owners = set()
        for name, role in zip(self.statistics, STATISTICS, strict=True):
            owners.add(name.removesuffix(f".{role}") if name.endswith(f".{role}") else None)
        owner = owners.pop()
        if owner is None or owners or re.fullmatch(rf"{re.escape(owner)}@\d+", self.node):
            return self.node or self.output
        return owner


def name_layers(layers: Iterable[LayerNames], constants: Container[str]) -> list[str]:
    """Name each layer, such that no tensor of it has the name of a constant that something else uses."""
    names: dict[str, None] = {}
    for layer in layers:
        name, number = layer.wanted, 1
        while name in names or any(f"{name}.{role}" in constants for role in VECTORS):
            number += 1
            name = f"{layer.wanted}@{number}"
        names[name] = None
    return list(names)


class _Reading:
    """Gives every tensor its name: those of BatchNormalization nodes after the node, all others their own."""

    def __init__(
        self, graphs: tuple[OnnxGraph, ...], calls: tuple[OnnxGraph, ...], external: ExternalData, opset: int
    ) -> None:
        self._opset = opset
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, ModuleInfo] = {}
        self.places: dict[str, Place] = {}
        self.layers: dict[str, tuple[OnnxGraph, OnnxNode]] = {}
        self.called: dict[str, OnnxNode] = {}
        self.not_understood: list[NotUnderstood] = []
        self._external = external
        self._constants = Constants(external)
        self._read: dict[tuple[int, str], Tensor] = {}
        nodes = [(graph, node) for graph in (*graphs, *calls) for node in graph.nodes if self._is_layer(node)]
        used_otherwise, of_layers = _find_uses_of_constants(graphs, nodes)
        own = [
            (graph, name)
            for graph in graphs
            for name in graph.initializers
            if (id(graph), name) in used_otherwise or (id(graph), name) not in of_layers
        ]
        names = name_layers([_names_of(graph, node) for graph, node in nodes], {name for _, name in own})
        for layer, (graph, node) in zip(names, nodes, strict=True):
            self._add_layer(layer, graph, node)
        for graph, name in own:
            self._add(name, Place(graph, name, graph.initializers[name]))

    def _is_layer(self, node: OnnxNode) -> bool:
        """Return whether a node is a BatchNormalization as ONNX defines it; others that are named so are noted."""
        is_standard, by_position = node.operator == "BatchNormalization", not node.integer("spatial", 1)
        if is_standard and len(node.inputs) == 5 and any(node.outputs[:1]) and not by_position:
            return True
        found = find_normalisation(node)
        if found:
            name = node.name or next(iter(node.outputs), "")
            given = f"{len(node.inputs)} inputs" if is_standard else "no operator of ONNX"
            given = "statistics of each position (spatial=0)" if is_standard and by_position else given
            self.not_understood.append(NotUnderstood(name, f"a node of {found}, with {given}"))
        return False

    def _add_layer(self, layer: str, graph: OnnxGraph, node: OnnxNode) -> None:
        attributes: dict[str, object] = {
            "eps": node.number("epsilon", DEFAULT_EPS),
            "momentum": round(1.0 - node.number("momentum", _KEPT), 12),
            "training": normalises_by_batch(node, self._opset),
        }
        if graph.call is None:
            self.layers[layer] = (graph, node)
        else:
            self.called[layer] = graph.call
            attributes["fixed"] = (
                f"it lies in a function, {graph.call.operator}, for another version of ONNX's operators than the model"
            )
        unknown = []
        for position, role in enumerate(VECTORS, start=1):
            found = graph.find(node.inputs[position])
            if found is not None:
                holder, name = found
                reader = (graph, node, position)
                self._add(f"{layer}.{role}", Place(holder, name, holder.initializers[name], reader))
            elif not self._add_computed(f"{layer}.{role}", graph, node, position):
                unknown.append(f"{role} is {_describe_source(graph, node.inputs[position])}")
        if unknown:
            self.not_understood.append(NotUnderstood(layer, f"its {', its '.join(unknown)}"))
        self.modules[layer] = ModuleInfo("onnx.BatchNormalization", attributes, has_statistics=True)

    def _add_computed(self, key: str, graph: OnnxGraph, node: OnnxNode, position: int) -> bool:
        tensor = self._constants.compute(graph, node.inputs[position])
        if tensor is None:
            return False
        name = unused_name(key, self.tensors)
        self.tensors[name] = tensor
        self.places[name] = Place(graph, node.inputs[position], None, (graph, node, position))
        return True

    def _add(self, wanted: str, place: Place) -> None:
        assert place.message is not None
        name = unused_name(wanted, self.tensors)
        key = (id(place.graph), place.name)
        if key not in self._read:
            self._read[key] = read_tensor(place.message, key=place.name, external=self._external)
        self.tensors[name] = self._read[key]
        self.places[name] = place


def _names_of(graph: OnnxGraph, node: OnnxNode) -> LayerNames:
    """Return the names of a layer; in the body of a function all are named after the call."""
    if graph.call is None:
        return LayerNames(node.name, node.outputs[0], node.inputs[3:])
    prefix = graph.call.name or graph.call.outputs[0]
    return LayerNames(f"{prefix}/{node.name or node.outputs[0]}", "", ("", ""))


def _find_uses_of_constants(
    graphs: Sequence[OnnxGraph], layers: Sequence[tuple[OnnxGraph, OnnxNode]]
) -> tuple[set[tuple[int, str]], set[tuple[int, str]]]:
    """Return the constants that something else than a parameter of a layer uses, and those that are such parameters.

    Identity nodes are no use: what reads their copy is.
    """
    chosen = {id(node) for _, node in layers}
    otherwise: set[tuple[int, str]] = set()
    for graph in graphs:
        names = list(graph.outputs)
        for node in graph.nodes:
            if node.operator != "Identity":
                names += node.inputs[:1] if id(node) in chosen else node.inputs
        otherwise.update((id(found[0]), found[1]) for name in names if (found := graph.find(name)) is not None)
    parameters = ((graph, name) for graph, node in layers for name in node.inputs[1:])
    of_layers = {(id(found[0]), found[1]) for graph, name in parameters if (found := graph.find(name)) is not None}
    return otherwise, of_layers


def _describe_source(graph: OnnxGraph, name: str) -> str:
    """Describe where a parameter comes from that is no tensor which could be read."""
    if not name:
        return "left out"
    place = graph.place_of(name)
    if place is None:
        around: OnnxGraph | None = graph
        while around is not None:
            if name in _list_sparse(around):
                return "stored as a sparse tensor, which is not read"
            around = around.parent
        return f"nowhere in the file ({quote(name)})"
    holder, own = place
    node = holder.producers.get(own)
    if node is not None:
        return f"computed by {node.operator}"
    return "an input of the model" if holder.parent is None else "given to the body that it lies in"


def _list_sparse(graph: OnnxGraph) -> set[str]:
    tensors = graph.message.messages(SPARSE_INITIALIZERS) if graph.call is None else ()
    return {values.text(_TENSOR_NAME) for one in tensors if (values := one.message(_SPARSE_VALUES)) is not None}
