"""Writing an ONNX model with what changed; every node, tensor and field that no edit concerns is copied."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TypeAlias

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.protobufs.reading import Message
from bntool.checkpoints.containers.protobufs.writing import (
    Content,
    Edits,
    Piece,
    embed,
    integer_field,
    unused_name,
    write_content,
)
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.onnx.graph import (
    ATTRIBUTES,
    GRAPH_INPUTS,
    INPUTS,
    INT,
    IR_VERSION,
    METADATA,
    NAME,
    NODE_NAME,
    NODES,
    OPERATOR,
    OUTPUTS,
    TENSOR,
    VALUE_INFO,
    OnnxGraph,
    OnnxNode,
    find_uses,
)
from bntool.checkpoints.onnx.model import LayerNames, Onnx, OnnxContent, Place, name_layers, read_model
from bntool.checkpoints.onnx.tensors import (
    CODES,
    DATA_LOCATION,
    ELEMENTS,
    EXTERNAL_DATA,
    RAW_DATA,
    ExternalData,
    is_external,
)
from bntool.checkpoints.outputs import OutputFiles, check_output_differs
from bntool.checkpoints.records import RECORD_KEY
from bntool.checkpoints.saving import write_checked
from bntool.checkpoints.tensors import StoredTensor, Tensor, count_elements
from bntool.errors import RefusedError
from bntool.plan import AddTensor, Record, RemoveEntry, RemoveModule, SetAttribute

_ALIGNMENT = 4096  # of external data, so that it can be mapped
_TYPE, _INTEGER, _TENSOR = 20, 2, 4  # of an attribute: the number of the field, and what it says
_FIRST_THAT_BROADCASTS = 7  # version of ONNX's operators in which an addition does so without being told
_BIASED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

Use: TypeAlias = tuple[OnnxGraph, OnnxNode, int]


def write_model(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write the model, and the file with its large tensors where it has one.

    Raises:
        RefusedError: ONNX cannot hold an edit.
    """
    content = OnnxContent.of(checkpoint)
    changes = _Changes(checkpoint, content)
    if not content.has_external:
        changes.write(output.open(path))
        return
    data = path.with_name(f"{path.name}.data")
    for file in content.external.files.values():
        check_output_differs(file, data)
    changes.move_external_data(output.open(data), data.name)
    output.flush()
    relocated = _Relocated(changes, {data.name: output.temporary(data)})
    write_checked(dataclasses.replace(checkpoint, format=relocated), path, output)


class _Relocated(Onnx):
    """A model that is read back while the file beside it still has a temporary name."""

    def __init__(self, changes: _Changes, places: Mapping[str, Path]) -> None:
        self._changes = changes
        self._places = places

    def read(self, file: SourceFile) -> Checkpoint:
        return read_model(file, external=ExternalData(file, replaced=self._places))

    def write(self, checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
        del checkpoint
        self._changes.write(output.open(path))


class _Changes:
    """The changes that the edits of a checkpoint make to the messages of its file."""

    def __init__(self, checkpoint: Checkpoint, content: OnnxContent) -> None:
        self._checkpoint, self._content = checkpoint, content
        self._edits = Edits()
        self._uses = find_uses(content.graphs)
        self._copies = _find_copies(content)
        shown = (graph.find(name) for graph in content.graphs for name in graph.outputs)
        self._shown = {(id(found[0]), found[1]) for found in shown if found is not None}  # constants that are results
        self._inputs: dict[int, tuple[OnnxNode, list[str]]] = {}  # new inputs of nodes, by the position of the node
        self._outputs: dict[int, tuple[OnnxNode, list[str]]] = {}
        self._removed: set[int] = set()  # nodes, by position in the file
        self._copied: set[str] = set()  # what Identity nodes read that take the place of others
        self._names = {name for graph in content.graphs for name in (*graph.initializers, *graph.computed)}
        self._places = dict(content.places)
        self._own = {name: (g, n, place[1]) for place, (name, g, n) in content.own_inputs.items()}
        self._replaced: list[tuple[OnnxGraph, str]] = []  # what nodes read before they were given a constant instead
        if checkpoint.edits:
            self._plan()

    def write(self, stream: IO[bytes]) -> None:
        model = self._content.model
        write_content(self._edits.render(model), model.buffer.source, stream)

    def _plan(self) -> None:
        steps = [edit.step for edit in self._checkpoint.edits]
        if any(isinstance(step, SetAttribute | RemoveEntry) for step in steps):
            raise RefusedError("an ONNX model has no attributes to set: it is a program for inference, nothing trains")
        removed = {step.module for step in steps if isinstance(step, RemoveModule)}
        for name, (graph, node) in self._content.layers.items():
            if name in removed:
                self._take_out(graph, node)
        (state_dict,) = self._checkpoint.state_dicts
        self._set_tensors(state_dict.tensors, state_dict.stored)
        after = {step.name: step.after for step in steps if isinstance(step, AddTensor)}
        for name in state_dict.tensors:
            if name in after and name not in state_dict.stored:
                self._add_tensor(name, after[name], state_dict.tensors[name])
        self._remove_unread_nodes()
        self._remove_tensors(state_dict.stored.keys() - state_dict.tensors.keys())
        for number, lists in ((INPUTS, self._inputs), (OUTPUTS, self._outputs)):
            for position, (node, names) in lists.items():
                if position not in self._removed:
                    self._set_names(node, number, names)
        self._keep_names()
        if any(isinstance(step, Record) for step in steps):
            self._record()

    def _keep_names(self) -> None:
        """Let layers that stay keep their names where these would follow from others that are gone, or from old
        inputs.
        """
        own = {name for name, place in self._content.places.items() if place.reader is None}
        rest = {n: node for n, (_, node) in self._content.layers.items() if node.field.start not in self._removed}
        now = [
            LayerNames(node.name, self._output_names(node)[0], tuple(self._input_names(node)[3:]))
            for node in rest.values()
        ]
        for (layer, node), name in zip(rest.items(), name_layers(now, own), strict=True):
            if name != layer:
                self._edits.set_field(node.message, NODE_NAME, *embed(NODE_NAME, layer.encode()))

    def _take_out(self, graph: OnnxGraph, node: OnnxNode) -> None:
        """Remove a node: what its data came from now writes what it wrote, or else its readers read its data.

        Where both are needed under their names, an Identity node takes its place.
        """
        if any(node.outputs[1:]):
            raise RefusedError("it puts out statistics too", tensor=node.name)
        data, result = self._input_names(node)[0], node.outputs[0]
        self._removed.add(node.field.start)
        producer = next((n for n in graph.nodes if data in self._output_names(n)), None)
        inside = [g for g in self._content.graphs if g is graph or _is_within(g, graph)]  # who sees the result
        around = [*inside, *(g for g in self._content.graphs if _is_within(graph, g))]  # who may hold the data
        readers = [n for g in around for n in g.nodes if data in self._input_names(n)]
        shown = {name for g in around for name in g.outputs}
        is_needed = producer is None or data in shown or data in self._copied or bool(readers)
        if is_needed and result in shown:
            ends = (*embed(INPUTS, data.encode()), *embed(OUTPUTS, result.encode()))
            label = embed(NODE_NAME, node.name.encode()) if node.name else ()
            self._copied.add(data)
            copy = (*ends, *label, *embed(OPERATOR, b"Identity"))
            self._edits.replace(graph.message, node.field, *embed(NODES, *copy))
            return
        self._edits.replace(graph.message, node.field)
        if producer is not None and not is_needed:
            names = self._outputs.setdefault(producer.field.start, (producer, list(producer.outputs)))[1]
            names[names.index(data)] = result
            self._drop_infos(graph, VALUE_INFO, data)
            return
        for inner in inside:
            for reader in inner.nodes:
                if result in self._input_names(reader):
                    names = self._new_inputs(reader)
                    names[:] = [data if name == result else name for name in names]
        self._drop_infos(graph, VALUE_INFO, result)

    def _input_names(self, node: OnnxNode) -> list[str]:
        """Return the inputs of a node by now; none of one that is removed."""
        if node.field.start in self._removed:
            return []
        return self._inputs.get(node.field.start, (node, list(node.inputs)))[1]

    def _output_names(self, node: OnnxNode) -> list[str]:
        if node.field.start in self._removed:
            return []
        return self._outputs.get(node.field.start, (node, list(node.outputs)))[1]

    def _drop_infos(self, graph: OnnxGraph, number: int, name: str) -> None:
        for place in graph.message.all(number):
            if graph.message.message_of(place).text(1) == name:
                self._edits.replace(graph.message, place)

    def _set_names(self, node: OnnxNode, number: int, names: list[str]) -> None:
        found = node.message.all(number)
        pieces = [piece for name in names for piece in embed(number, name.encode())]
        if not found:
            self._edits.append(node.message, *pieces)
            return
        for place in found[1:]:
            self._edits.replace(node.message, place)
        self._edits.replace(node.message, found[0], *pieces)

    def _set_tensors(self, tensors: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
        """Put new elements in place; a constant that several share is copied for those that are to see others."""
        sharing: dict[tuple[int, str], list[str]] = {}
        for name in tensors:
            if name in source:
                place = self._content.places[name]
                sharing.setdefault((id(place.graph), place.name), []).append(name)
        for names in sharing.values():
            if all(tensors[name] is source[name] for name in names):
                continue
            names.sort(key=lambda name: self._content.places[name].reader is not None)
            first = self._content.places[names[0]]
            kept = source[names[0]]  # what the constant holds afterwards
            if first.message is not None and tensors[names[0]] is not source[names[0]]:
                self._set_elements(first.message, tensors[names[0]])
                kept = tensors[names[0]]
            for name in names:
                if tensors[name] is not kept:
                    self._give_own(self._content.places[name], tensors[name])

    def _set_elements(self, message: Message, tensor: Tensor) -> None:
        if is_external(message):
            return  # goes to the file beside the model
        for number in (*ELEMENTS, EXTERNAL_DATA, DATA_LOCATION):
            for place in message.all(number):
                self._edits.replace(message, place)
        self._edits.append(message, *embed(RAW_DATA, tensor))

    def _give_own(self, place: Place, tensor: Tensor) -> None:
        if place.reader is None or place.reader[0].call is not None:
            raise RefusedError("it lies in a function, which other calls may share", tensor=place.name)
        _, node, position = place.reader
        name = unused_name(place.name, self._names)
        self._names.add(name)
        self._edits.append(place.graph.message, *embed(5, *_make_tensor(name, tensor)))
        self._declare(place.graph, name, tensor)
        self._new_inputs(node)[position] = name

    def _new_inputs(self, node: OnnxNode) -> list[str]:
        return self._inputs.setdefault(node.field.start, (node, list(node.inputs)))[1]

    def _remove_tensors(self, names: set[str]) -> None:
        """Take out constants that nothing reads any more, with the Identity nodes that copied them."""
        places = {(id(p.graph), p.name): p for name in names if (p := self._content.places[name])}
        for key, place in places.items():
            is_read = place.reader is None or place.reader[1].field.start not in self._removed
            if place.message is None and not is_read:
                continue  # nodes computed it
            left = [use for use in self._uses.get(key, ()) if self._reads_as_before(*use)]
            if left and place.reader is None and all(self._is_parameter(*use) for use in left):
                continue  # it has the names of layers alone
            if place.message is None or left:
                if is_read:
                    raise RefusedError("a node still reads this tensor", tensor=place.name)
            elif key not in self._shown:
                self._remove_constant(place)
                for graph, node in self._copies.get(key, ()):
                    self._removed.add(node.field.start)
                    self._edits.replace(graph.message, node.field)
                    self._drop_infos(graph, VALUE_INFO, node.outputs[0])

    def _is_parameter(self, _: OnnxGraph, node: OnnxNode, position: int) -> bool:
        return position > 0 and any(node is layer for _, layer in self._content.layers.values())

    def _reads_as_before(self, _: OnnxGraph, node: OnnxNode, position: int) -> bool:
        names = self._input_names(node)
        return position < len(names) and names[position] == node.inputs[position]

    def _remove_constant(self, place: Place) -> None:
        constant = place.graph.constants.get(place.name)
        if constant is not None:
            self._edits.replace(place.graph.message, constant.field)
        else:
            assert place.message is not None
            assert place.message.parent is not None
            self._edits.replace(place.graph.message, place.message.parent[1])
            self._drop_infos(place.graph, GRAPH_INPUTS, place.name)
        self._drop_infos(place.graph, VALUE_INFO, place.name)

    def _add_tensor(self, wanted: str, after: str, tensor: Tensor) -> None:
        """Add a tensor for one input of one node, or a bias for the nodes whose weight is the tensor that it
        follows.
        """
        own = self._own.get(wanted)
        if own is not None:
            graph, node, position = own
            self._insert(wanted, self._places[after], tensor)
            self._places[wanted] = self._places[after]
            self._new_inputs(node)[position] = wanted
            self._replaced.append((graph, node.inputs[position]))
            return
        fitting = self._find_unbiased(after)
        if not fitting or wanted in self._names:
            what = (
                "the model uses this name for something else" if fitting else "the model has no place for this tensor"
            )
            raise RefusedError(what, tensor=wanted)
        self._insert(wanted, self._places[after], tensor)
        for graph, node in fitting:
            if node.operator == "MatMul":
                self._add_after(graph, node, wanted)
            else:
                self._new_inputs(node)[2:] = [wanted]

    def _find_unbiased(self, weight: str) -> list[tuple[OnnxGraph, OnnxNode]]:
        """Return the nodes with this weight, where all of them can have a bias."""
        own = self._own.get(weight)
        if own is not None:
            uses = [own]
        else:
            place = self._places.get(weight)
            uses = self._uses.get((id(place.graph), place.name), []) if place is not None and not place.reader else []
        for _, node, position in uses:
            if position != 1 or node.operator not in _BIASED or any(node.inputs[2:]):
                return []
        return [(graph, node) for graph, node, _ in uses]

    def _insert(self, name: str, place: Place, tensor: Tensor) -> None:
        """Insert a constant behind another one."""
        self._names.add(name)
        message = _make_tensor(name, tensor)
        constant = place.graph.constants.get(place.name)
        if constant is not None:
            node = (
                *embed(OUTPUTS, name.encode()),
                *embed(OPERATOR, b"Constant"),
                *_attribute("value", *embed(TENSOR, *message), code=_TENSOR),
            )
            self._edits.insert_after(place.graph.message, constant.field, *embed(1, *node))
        else:
            assert place.message is not None
            assert place.message.parent is not None
            self._edits.insert_after(place.graph.message, place.message.parent[1], *embed(5, *message))
            self._declare(place.graph, name, tensor)

    def _add_after(self, graph: OnnxGraph, node: OnnxNode, bias: str) -> None:
        """Add a bias by an addition behind a product, which has no place for one."""
        outputs = self._outputs.setdefault(node.field.start, (node, list(node.outputs)))[1]
        result = outputs[0]
        outputs[0] = unused_name(f"{result}/product", self._names)
        self._names.add(outputs[0])
        names = [*embed(INPUTS, outputs[0].encode()), *embed(INPUTS, bias.encode()), *embed(OUTPUTS, result.encode())]
        label = unused_name(f"{node.name or result}/bias", self._names)
        added = (*names, *embed(NODE_NAME, label.encode()), *embed(OPERATOR, b"Add"))
        if self._content.opset < _FIRST_THAT_BROADCASTS:
            added = (*added, *_attribute("broadcast", integer_field(INT, 1), code=_INTEGER))
        self._edits.insert_after(graph.message, node.field, *embed(NODES, *added))

    def _remove_unread_nodes(self) -> None:
        """Remove nodes that computed from constants what another constant now holds."""
        waiting = list(self._replaced)
        while waiting:
            graph, name = waiting.pop()
            found = _find_producer(graph, name)
            if found is None or found[1].field.start in self._removed:
                continue
            holder, node = found
            if any(self._is_read(holder, one) for one in self._output_names(node)):
                continue
            self._removed.add(node.field.start)
            self._edits.replace(holder.message, node.field)
            for one in node.outputs:
                self._drop_infos(holder, VALUE_INFO, one)
            waiting += [(holder, one) for one in node.inputs if one]

    def _is_read(self, graph: OnnxGraph, name: str) -> bool:
        """Return whether a node that is left reads a value, or it is a result."""
        if name in graph.outputs:
            return True
        inside = [one for one in self._content.graphs if one is graph or _is_within(one, graph)]
        if any(name in one.outputs for one in inside):
            return True
        return any(name in self._input_names(node) for one in inside for node in one.nodes)

    def _declare(self, graph: OnnxGraph, name: str, tensor: Tensor) -> None:
        """Declare an initializer as an input of the graph, as IR versions before 4 want it."""
        if self._content.model.integer(IR_VERSION) >= 4 or graph.parent is not None:
            return
        dims = [piece for extent in tensor.shape for piece in embed(1, integer_field(1, extent))]
        kind = (integer_field(1, CODES[tensor.dtype]), *embed(2, *dims))
        self._edits.append(graph.message, *embed(GRAPH_INPUTS, *embed(1, name.encode()), *embed(2, *embed(1, *kind))))

    def _record(self) -> None:
        model = self._content.model
        for place in model.all(METADATA):
            if model.message_of(place).text(1) == RECORD_KEY:
                self._edits.replace(model, place)
        text = json.dumps(self._checkpoint.records[""], separators=(",", ":")).encode()
        self._edits.append(model, *embed(METADATA, *embed(1, RECORD_KEY.encode()), *embed(2, text)))

    def move_external_data(self, stream: IO[bytes], location: str) -> None:
        """Write all tensors that lie beside the model into one new file, and say so in the model."""
        tensors: Mapping[str, Tensor] = {}
        if self._checkpoint.state_dicts:
            tensors = self._checkpoint.state_dicts[0].tensors
        written: set[tuple[int, str]] = set()
        for name, place in sorted(self._content.places.items(), key=lambda item: item[1].reader is not None):
            key = (id(place.graph), place.name)
            if name not in tensors or key in written or place.message is None or not is_external(place.message):
                continue
            written.add(key)
            offset = stream.tell() + -stream.tell() % _ALIGNMENT
            stream.write(bytes(offset - stream.tell()))
            tensor = tensors[name]
            if isinstance(tensor, StoredTensor) and isinstance(tensor.storage, object) and tensor.storage is not None:
                source = tensor.storage.source
                assert isinstance(source, SourceFile)
                source.copy_to(stream, offset=tensor.storage.offset, length=tensor.nbytes)
            else:
                for chunk in tensor.chunks():
                    stream.write(chunk)
            self._place_external(place.message, location, offset, tensor)

    def _place_external(self, message: Message, location: str, offset: int, tensor: Tensor) -> None:
        length = tensor.dtype.byte_count(count_elements(tensor.shape))
        for place in message.all(EXTERNAL_DATA):
            self._edits.replace(message, place)
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            self._edits.append(message, *embed(EXTERNAL_DATA, *embed(1, key.encode()), *embed(2, value.encode())))


def _find_producer(graph: OnnxGraph, name: str) -> tuple[OnnxGraph, OnnxNode] | None:
    """Return the node that puts out a value that a node of a graph sees; None for constants and inputs."""
    here: OnnxGraph | None = graph
    while here is not None:
        if name in here.initializers or name in here.inputs:
            return None
        if name in here.producers:
            return here, here.producers[name]
        here = here.parent
    return None


def _is_within(graph: OnnxGraph, other: OnnxGraph) -> bool:
    while graph.parent is not None:
        graph = graph.parent
        if graph is other:
            return True
    return False


def _find_copies(content: OnnxContent) -> Mapping[tuple[int, str], list[tuple[OnnxGraph, OnnxNode]]]:
    """Return the Identity nodes that copy each constant."""
    copies: dict[tuple[int, str], list[tuple[OnnxGraph, OnnxNode]]] = {}
    for graph in content.graphs:
        for node in graph.nodes:
            found = graph.find(node.inputs[0]) if node.operator == "Identity" and node.inputs else None
            if found is not None:
                copies.setdefault((id(found[0]), found[1]), []).append((graph, node))
    return copies


def _make_tensor(name: str, tensor: Tensor) -> Content:
    dims = b"".join(integer_field(1, extent) for extent in tensor.shape)
    head = dims + integer_field(2, CODES[tensor.dtype])
    return (head, *embed(8, name.encode()), *embed(RAW_DATA, tensor))


def _attribute(name: str, *value: Piece, code: int) -> Content:
    return embed(ATTRIBUTES, *embed(NAME, name.encode()), *value, integer_field(_TYPE, code))
