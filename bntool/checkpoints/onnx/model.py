"""The ONNX format: initializers, Constant nodes, and BatchNormalization nodes as layers in PyTorch's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bntool.batchnorm import DEFAULT_EPS
from bntool.checkpoints.checkpoint import Checkpoint, Content, Format, Loader, LoadingCode, ModuleInfo, StateDict
from bntool.checkpoints.containers.protobufs.reading import Buffer, Message
from bntool.checkpoints.containers.protobufs.writing import unused_name
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.onnx.graph import (
    METADATA,
    OPSETS,
    PRODUCER,
    STANDARD_DOMAINS,
    OnnxGraph,
    OnnxNode,
    read_graphs,
)
from bntool.checkpoints.onnx.tensors import ExternalData, is_external, read_tensor
from bntool.checkpoints.records import RECORD_KEY, parse_record
from bntool.checkpoints.tensors import Tensor

ROLES = ("weight", "bias", "running_mean", "running_var")  # in the order of the node's inputs, after the data
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

    def recognises(self, path: Path, head: bytes) -> bool:
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
    """Where a tensor of the state dict lies.

    Attributes:
        graph: that holds the initializer or Constant node.
        name: of it.
        message: its TensorProto.
        reader: the BatchNormalization node that the name in the state dict comes from, with its graph and the position
            of the input; None where the tensor has its own name.
    """

    graph: OnnxGraph
    name: str
    message: Message = field(repr=False)
    reader: tuple[OnnxGraph, OnnxNode, int] | None = None


@dataclass(frozen=True)
class OnnxContent(Content):
    """A model as it was read.

    Attributes:
        graphs: the main one first.
        places: where each tensor lies, by its name in the state dict.
        layers: the graph and node of each BatchNormalization layer, by name.
        external: the opened files beside the model.
        has_external: whether any tensor lies in such a file.
        opset: version of ONNX's own operators.
    """

    model: Message = field(repr=False)
    graphs: tuple[OnnxGraph, ...] = field(repr=False)
    places: Mapping[str, Place]
    layers: Mapping[str, tuple[OnnxGraph, OnnxNode]]
    external: ExternalData = field(repr=False)
    has_external: bool
    opset: int


def read_model(file: SourceFile, *, external: ExternalData) -> Checkpoint:
    """List what a model holds.

    Raises:
        CorruptFileError, UnsafeFileError
        UnreadableFileError: a file with its data is missing.
    """
    model = Message(Buffer(file), 0, file.size)
    graphs = read_graphs(model)
    reading = _Reading(graphs, external)
    has_external = any(is_external(message) for graph in graphs for message in graph.initializers.values())
    metadata = {entry.text(1): entry.text(2) for entry in model.messages(METADATA)}
    history = parse_record(metadata.get(RECORD_KEY))
    entries: dict[str, object] = {name: text for name, text in metadata.items() if name != RECORD_KEY}
    if model.last(PRODUCER) is not None:
        entries["producer_name"] = model.text(PRODUCER)
    opset = _opset(model)
    entries["opset"] = opset
    state_dict = StateDict("", "", reading.tensors, modules=reading.modules)
    return Checkpoint(
        file=file,
        format=OnnxWithExternalData() if has_external else Onnx(),
        state_dicts=(state_dict,) if reading.tensors else (),
        entries=entries,
        records={"": history} if history and reading.tensors else {},
        content=OnnxContent(model, graphs, reading.places, reading.layers, external, has_external, opset),
    )


def _opset(model: Message) -> int:
    versions = [entry.integer(2) for entry in model.messages(OPSETS) if entry.text(1) in STANDARD_DOMAINS]
    return versions[-1] if versions else 1


def _name_layer(node: OnnxNode) -> str:
    """As the module that was exported, where its statistics are named after one; else as the node, or its output."""
    owners = {name.removesuffix(f".{role}") for name, role in zip(node.inputs[3:], ROLES[2:], strict=True)}
    named = all(name.endswith(f".{role}") for name, role in zip(node.inputs[3:], ROLES[2:], strict=True))
    return owners.pop() if named and len(owners) == 1 else node.name or node.outputs[0]


class _Reading:
    """Gives every tensor its name: those of BatchNormalization nodes after the node, all others their own."""

    def __init__(self, graphs: tuple[OnnxGraph, ...], external: ExternalData) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, ModuleInfo] = {}
        self.places: dict[str, Place] = {}
        self.layers: dict[str, tuple[OnnxGraph, OnnxNode]] = {}
        self._external = external
        self._read: dict[tuple[int, str], Tensor] = {}
        for graph in graphs:
            for node in graph.nodes:
                if node.operator == "BatchNormalization" and len(node.inputs) == 5 and any(node.outputs[:1]):
                    self._add_layer(graph, node)
        used_otherwise = self._names_used_otherwise(graphs)
        of_layers = {(id(place.graph), place.name) for place in self.places.values()}
        for graph in graphs:
            for name, message in graph.initializers.items():
                if (id(graph), name) in used_otherwise or (id(graph), name) not in of_layers:
                    self._add(name, Place(graph, name, message))

    def _add_layer(self, graph: OnnxGraph, node: OnnxNode) -> None:
        layer = unused_name(_name_layer(node), self.layers)
        self.layers[layer] = (graph, node)
        for position, role in enumerate(ROLES, start=1):
            name = graph.resolve(node.inputs[position])
            found = graph.find(name)
            if found is not None:
                holder, message = found
                self._add(f"{layer}.{role}", Place(holder, name, message, (graph, node, position)))
        self.modules[layer] = ModuleInfo(
            "onnx.BatchNormalization",
            {
                "eps": node.number("epsilon", DEFAULT_EPS),
                "momentum": round(1.0 - node.number("momentum", _KEPT), 12),
                "training": bool(node.integer("training_mode", 0)),
            },
        )

    def _names_used_otherwise(self, graphs: tuple[OnnxGraph, ...]) -> set[tuple[int, str]]:
        """Constants that something else than a BatchNormalization node reads, or that a graph puts out."""
        used: set[tuple[int, str]] = set()
        layers = {id(node) for _, node in self.layers.values()}
        for graph in graphs:
            names = list(graph.outputs)
            for node in graph.nodes:
                names += node.inputs[:1] if id(node) in layers else node.inputs
            for name in names:
                found = graph.find(name)
                if found is not None:
                    used.add((id(found[0]), name))
        return used

    def _add(self, wanted: str, place: Place) -> None:
        name = unused_name(wanted, self.tensors)
        key = (id(place.graph), place.name)
        if key not in self._read:
            self._read[key] = read_tensor(place.message, key=place.name, external=self._external)
        self.tensors[name] = self._read[key]
        self.places[name] = place
