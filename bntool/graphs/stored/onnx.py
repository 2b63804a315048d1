"""The graph of an ONNX model: the program itself, so that its edges are proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bntool.batchnorm import VECTORS
from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.containers.protobufs.reading import Message
from bntool.checkpoints.containers.protobufs.writing import unused_name
from bntool.checkpoints.onnx.graph import (
    GRAPH_INPUTS,
    IR_VERSION,
    SUBGRAPH,
    SUBGRAPHS,
    OnnxGraph,
    OnnxNode,
    normalises_by_batch,
)
from bntool.checkpoints.onnx.model import OnnxContent
from bntool.checkpoints.onnx.tensors import DTYPES
from bntool.checkpoints.tensors import count_elements
from bntool.graphs.graph import ModelGraph, NodeKind, check_lengths
from bntool.graphs.stored.builder import GraphBuilder
from bntool.graphs.stored.onnx_constants import OnnxConstants
from bntool.graphs.stored.onnx_operators import JOINING, OPERATORS, Call, Extents, slide
from bntool.graphs.stored.values import Extent, Shape, Value
from bntool.graphs.transposed_convolutions import Axis, meets_all_taps

Array = NDArray[Any]

_KINDS = {
    "Conv": NodeKind.CONVOLUTION,
    "ConvTranspose": NodeKind.CONV_TRANSPOSE,
    "Gemm": NodeKind.LINEAR,
    "MatMul": NodeKind.MATMUL,
}
_FUNCTION = "a function for another version of ONNX's operators than the model, is called with"
_SHORT = 4096  # elements of what is computed from shapes
_SHAPE_FREE = ("Shape", "Size", "ConstantOfShape", "EyeLike")  # they look at the shape of what they are given alone


def onnx_graph(checkpoint: Checkpoint) -> ModelGraph:
    """Return the nodes of the main graph and of those nested in it, and who reads what.

    A Gemm with transB = 0 has its weight as (in, out), as a MatMul has, and it is shown as one.
    BatchNormalization nodes in functions that could not be written out are there, but nothing known feeds them.
    """
    return _Building(OnnxContent.of(checkpoint), checkpoint.state_dicts[0]).build()


class _Building:
    def __init__(self, content: OnnxContent, state_dict: StateDict) -> None:
        self.content, self.tensors, self.modules = content, state_dict.tensors, state_dict.modules
        self.builder = GraphBuilder()
        self.layers = {id(node): name for name, (_, node) in content.layers.items()}
        self.taken = {name for g in content.graphs for name in (*g.inputs, *g.initializers, *g.computed)} | set(
            self.tensors
        )
        self.constants = OnnxConstants(content, self.tensors)
        self.values: dict[tuple[int, str], Value] = {}
        self.extents: dict[tuple[int, str], Extents] = {}
        self.numbers: dict[tuple[int, str], Array] = {}  # computed from shapes alone, of which everything is known
        self.nested: dict[int, list[OnnxGraph]] = {}
        for graph in content.graphs[1:]:
            self.nested.setdefault(graph.message.start, []).append(graph)

    def build(self) -> ModelGraph:
        main = self.content.graphs[0]
        self._add_inputs(main)
        for node in main.nodes:
            self._add(main, node)
        shown = [value for name in main.outputs if (value := self._value(main, name)) is not None]
        reads = self.constants.keys_of(main, main.outputs)
        self.builder.add(NodeKind.OUTPUT, "output", inputs=shown, reads=reads)
        derived = self.constants.derived
        needed_for = dict(self.constants.find_needed(self._is_constant)) if derived else {}
        return self.builder.finish(derived=derived, needed_for=needed_for, overridable=self._list_overridable(main))

    def _list_overridable(self, main: OnnxGraph) -> Iterator[str]:
        """Yield the tensors that are inputs, too; before IR version 4 all of them had to be."""
        if self.content.model.integer(IR_VERSION) >= 4:
            for name, place in self.content.places.items():
                if place.graph is main and place.name in main.inputs:
                    yield name

    def _is_constant(self, graph: OnnxGraph, node: OnnxNode) -> bool:
        """Return whether a node computes from constants alone."""
        return not any((id(graph), name) in self.values for name in node.outputs)

    def _add_inputs(self, graph: OnnxGraph) -> None:
        shapes = _read_shapes(graph.message)
        for name in graph.inputs:
            if name not in graph.initializers:
                index = self.builder.add(NodeKind.INPUT, "input")
                shape, dtype = shapes.get(name, (None, None))
                self.values[id(graph), name] = Value((index,), shape, dtype=dtype)

    # what nodes see under a name

    def _value(self, graph: OnnxGraph, name: str) -> Value | None:
        """Return the value of that name; None for constants."""
        here: OnnxGraph | None = graph
        while here is not None:
            found = self.values.get((id(here), name))
            if found is not None or name in here.initializers:
                return found
            here = here.parent
        return None

    def _constant(self, graph: OnnxGraph, name: str) -> Array | None:
        """Return the elements of what is computed from constants, and from shapes of which everything is known."""
        here: OnnxGraph | None = graph
        while here is not None:
            if (id(here), name) in self.numbers:
                return self.numbers[id(here), name]
            here = here.parent
        if not name or self._value(graph, name) is not None:
            return None
        return self.constants.computed.small(graph, name)

    def _extents(self, graph: OnnxGraph, name: str) -> Extents | None:
        """Return the numbers of a tensor of integers, where these are known or extents of something else."""
        here: OnnxGraph | None = graph
        while here is not None:
            if (id(here), name) in self.extents:
                return self.extents[id(here), name]
            here = here.parent
        found = self._constant(graph, name)
        if found is None or found.ndim > 1 or found.dtype.kind not in "iu":
            return None
        return tuple(Extent(int(one)) for one in found.reshape(-1))

    # nodes

    def _add(self, graph: OnnxGraph, node: OnnxNode) -> None:
        values = tuple(self._value(graph, name) if name else None for name in node.inputs)
        given = self._call(graph, node, values)
        for name, value in zip(node.outputs, given, strict=False):
            if name:
                self.values[id(graph), name] = value
        for layer, call in self.content.called.items():
            if call is node:
                self._add_called(layer, node, given)

    def _call(self, graph: OnnxGraph, node: OnnxNode, values: tuple[Value | None, ...]) -> list[Value]:
        """Return what a node gives; nothing of one that computes from constants alone."""
        inside = [g for attribute in node.attributes.values() for g in self._graphs_in(attribute)]
        if id(node) in self.layers and self._is_plain(node):
            return [self._add_batch_norm(node, values)]
        if inside:
            return self._add_with_graphs(graph, node, values, inside)
        if node.operator in _SHAPE_FREE and any(value is not None for value in values):
            self._note_shape(graph, node, values)
            self._note_numbers(graph, node)
            filled = self._extents(graph, node.inputs[0]) if node.operator == "ConstantOfShape" else None
            return [Value((), filled) for _ in node.outputs]
        alone = all(value is None for value in values)
        if node.operator == "Constant" or (alone and self.constants.computed.is_known(graph, node.outputs)):
            return []
        if node.operator in _KINDS and len(node.inputs) >= 2 and len(node.outputs) == 1:
            return self._add_producer(graph, node, values)
        self._note_extents(graph, node)
        if not any(value is not None and value.sources for value in values):
            self._note_numbers(graph, node)
        return self._add_passing(graph, node, values)

    def _add_passing(self, graph: OnnxGraph, node: OnnxNode, values: tuple[Value | None, ...]) -> list[Value]:
        names = node.inputs[:1] if id(node) in self.layers else node.inputs  # a layer has its own names for the rest
        call = Call(
            node=node,
            opset=self.content.opset,
            builder=self.builder,
            values=values,
            constant=lambda position: self._constant(graph, node.inputs[position]),
            extents=lambda position: self._extents(graph, node.inputs[position]),
            bias=lambda position, value, constant, factor: self._add_bias_node(
                graph, node, position, value, constant, factor
            ),
            reads=tuple(self.constants.keys_of(graph, names)),
        )
        operation = OPERATORS.get(node.operator)
        read = [value for value in values if value is not None]
        if read and not any(value.sources for value in read):
            return [Value() for _ in node.outputs]  # it depends on shapes alone
        others = any(value is not None and value.sources for value in values[1:])
        if operation is None or not read or (others and node.operator not in JOINING):
            return call.other()
        return operation(call)

    def _note_shape(self, graph: OnnxGraph, node: OnnxNode, values: Sequence[Value | None]) -> None:
        shape = values[0].shape if values and values[0] is not None else None
        if node.operator == "Shape" and shape is not None:
            end = node.integer("end", len(shape)) if "end" in node.attributes else None
            found = shape[node.integer("start", 0) : end]
            self.extents[id(graph), node.outputs[0]] = found
            self._note_known(graph, node, found, (len(found),))

    def _note_known(self, graph: OnnxGraph, node: OnnxNode, extents: Extents, shape: tuple[int, ...]) -> None:
        """Note the numbers of a part of a shape, if everything is known of them."""
        if all(one.is_known for one in extents):
            numbers = np.asarray([one.number for one in extents], "i8").reshape(shape)
            self.numbers[id(graph), node.outputs[0]] = numbers

    def _note_numbers(self, graph: OnnxGraph, node: OnnxNode) -> None:
        """Note what a node computes from shapes and constants, if all of these are known."""
        key = (id(graph), node.outputs[0])
        if key in self.numbers:
            return
        given = [self._constant(graph, name) for name in node.inputs if name]
        if any(one is None or one.size > _SHORT for one in given):
            return
        found = self.constants.computed.run(node, [one for one in given if one is not None])
        if found is not None and found.size <= _SHORT:
            self.numbers[key] = found

    def _note_extents(self, graph: OnnxGraph, node: OnnxNode) -> None:
        """Note the parts of a shape, until something is reshaped to it."""
        if node.operator not in ("Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Cast", "Identity"):
            return
        parts = [self._extents(graph, name) for name in node.inputs]
        found: Extents | None = None
        if node.operator == "Concat":
            if all(part is not None for part in parts):
                found = tuple(one for part in parts for one in part or ())
        elif not parts or parts[0] is None:
            return
        elif node.operator == "Gather":
            places = self._constant(graph, node.inputs[1])
            if places is not None and all(-len(parts[0]) <= place < len(parts[0]) for place in places.reshape(-1)):
                found = tuple(parts[0][int(place)] for place in places.reshape(-1))
                self._note_known(graph, node, found, places.shape)
        elif node.operator == "Slice":
            limits = [self._constant(graph, name) for name in node.inputs[1:]]
            if len(limits) >= 2 and all(one is not None and one.size == 1 for one in limits):
                numbers = [int(one.reshape(())) for one in limits if one is not None]
                found = parts[0][numbers[0] : numbers[1] : numbers[3] if len(numbers) > 3 else 1]
                self._note_known(graph, node, found, (len(found),))
        else:
            found = parts[0]
        if found is not None:
            self.extents[id(graph), node.outputs[0]] = found

    # nested graphs and functions

    def _graphs_in(self, attribute: Message) -> list[OnnxGraph]:
        fields = (*attribute.all(SUBGRAPH), *attribute.all(SUBGRAPHS))
        return [graph for place in fields for graph in self.nested.get(place.value_start, ())]

    def _add_with_graphs(
        self, graph: OnnxGraph, node: OnnxNode, values: Sequence[Value | None], inside: Sequence[OnnxGraph]
    ) -> list[Value]:
        """Add an If, Loop or Scan: what their graphs are handed and what they give is read by the node around them."""
        results: list[Value | None] = list(values)
        reads = self.constants.keys_of(graph, node.inputs)
        for inner in inside:
            shapes = _read_shapes(inner.message)
            for name in inner.inputs:
                if name not in inner.initializers:
                    index = self.builder.add(NodeKind.OTHER, f"what {node.operator} hands to its body", reads=reads)
                    self.values[id(inner), name] = Value((index,), None, dtype=shapes.get(name, (None, None))[1])
            for nested in inner.nodes:
                self._add(inner, nested)
            results += [self._value(inner, name) for name in inner.outputs]
            reads += self.constants.keys_of(inner, inner.outputs)
        index = self.builder.add(NodeKind.OTHER, node.operator, inputs=results, reads=reads)
        return [Value((index,), None) for _ in node.outputs]

    def _add_called(self, layer: str, node: OnnxNode, given: Sequence[Value]) -> None:
        facts = {
            "layer": layer,
            "computed": dict.fromkeys(VECTORS, (f"what {node.operator}, {_FUNCTION}",)),
            "eps": self.modules[layer].attributes["eps"],
        }
        self.builder.add(NodeKind.BATCH_NORM, node.operator, inputs=given[:1], **facts)

    # BatchNormalization

    def _is_plain(self, node: OnnxNode) -> bool:
        return bool(node.integer("spatial", 1))

    def _add_batch_norm(self, node: OnnxNode, values: Sequence[Value | None]) -> Value:
        facts = self._batch_norm(node)
        data = values[0] or Value()
        count = facts["channels"]
        computed = [value for value in values[1:] if value is not None]
        index = self.builder.add(
            NodeKind.BATCH_NORM, node.operator, inputs=[self.builder.channels_of(data, 1, count), *computed], **facts
        )
        shape = data.shape
        if shape is not None and len(shape) > 1:
            shape = (shape[0], Extent(count), *shape[2:])
        return self.builder.give(index, shape, 1, dtype=data.dtype)

    def _batch_norm(self, node: OnnxNode) -> dict[str, Any]:
        layer = self.layers[id(node)]
        found = {role: f"{layer}.{role}" for role in VECTORS if f"{layer}.{role}" in self.content.places}
        own = {r: k for r, k in found.items() if (reader := self.content.places[k].reader) and reader[1] is node}
        lengths = [count_elements(self.tensors[key].shape) for key in own.values()]
        check_lengths(layer, lengths)
        return {
            "layer": layer,
            "parameters": own,
            "computed": {role: () for role in VECTORS if role not in own},  # by other nodes, from inputs of the model
            "channels": lengths[0] if lengths else 1,
            "eps": node.number("epsilon", 1e-5),
            "training": normalises_by_batch(node, self.content.opset),
            "class_name": "BatchNormalization",
        }

    # what has a weight

    def _add_producer(self, graph: OnnxGraph, node: OnnxNode, values: tuple[Value | None, ...]) -> list[Value]:
        is_product = node.operator == "MatMul"
        position = 0 if is_product and values[0] is None else 1  # of the weight
        data = values[1 - position]
        if data is None or values[position] is not None:
            return self._add_passing(graph, node, values) if is_product else self._add_unknown(graph, node, values)
        inputs = {"weight": position, **({"bias": 2} if not is_product and any(node.inputs[2:]) else {})}
        keys = self.constants.name_inputs(graph, node, inputs)
        key = keys["weight"]
        weight = self.constants.tensor(key) if key is not None else None
        if key is None or weight is None:
            return self._add_unknown(graph, node, values)
        facts = self._kernel(node, weight.shape) if node.operator.startswith("Conv") else {}
        facts = facts or self._matrix(node, position, weight.shape)
        if not facts:
            return self._add_passing(graph, node, values)
        axis, count = facts.pop("axis"), facts.pop("input_channels")
        facts.update(layer=node.name or node.outputs[0], parameters={"weight": key}, class_name=node.operator)
        shape = self._shape_after(node, data, position, facts["channels"], weight.shape)
        self._add_bias(graph, node, keys, facts)
        read = [self.builder.channels_of(data, axis, count), None, *values[2:]]
        index = self.builder.add(facts.pop("kind"), node.operator, inputs=read, **facts)
        return [self.builder.give(index, shape, axis, dtype=weight.dtype)]

    def _add_unknown(self, graph: OnnxGraph, node: OnnxNode, values: Sequence[Value | None]) -> list[Value]:
        """Add a convolution or matrix product with a weight that is no constant, or of which nothing is known."""
        place = graph.place_of(node.inputs[1])
        source = place[0].producers.get(place[1]) if place is not None else None
        origin = (f"what {source.operator} puts out",) if source is not None else ()
        facts: dict[str, Any] = {"layer": node.name or node.outputs[0], "computed": {"weight": origin}}
        reads = self.constants.keys_of(graph, node.inputs)
        index = self.builder.add(_KINDS[node.operator], node.operator, inputs=values, reads=reads, **facts)
        return [Value((index,), None)]

    def _matrix(self, node: OnnxNode, position: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the facts of a Gemm, or of a MatMul with a weight before or behind the data."""
        if len(shape) != 2 or node.operator not in ("Gemm", "MatMul") or node.integer("transA", 0):
            return {}
        first, second = shape
        if node.operator == "MatMul" and position == 1:
            return {"kind": NodeKind.MATMUL, "channels": second, "input_channels": first, "axis": -1}
        by_row = {"kind": NodeKind.LINEAR, "channels": first, "input_channels": second}
        if node.operator == "MatMul":
            return {**by_row, "axis": -2, "has_bias_slot": False}
        factors = (node.number("alpha", 1.0), node.number("beta", 1.0))
        more: dict[str, Any] = {"axis": -1, "has_bias_slot": factors[1] != 0}
        if factors != (1.0, 1.0):
            more["factors"] = factors
        if node.integer("transB", 0):
            return {**by_row, **more}
        return {"kind": NodeKind.MATMUL, "channels": second, "input_channels": first, **more}

    def _kernel(self, node: OnnxNode, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the facts of a convolution."""
        kind, groups = _KINDS[node.operator], node.integer("group", 1)
        if len(shape) < 3 or groups < 1 or shape[0] % groups or not shape[0] * shape[1]:
            return {}
        fills = node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID")  # by what a kernel of one tap never needs
        padded = any(node.integers("pads")) or (fills and any(extent > 1 for extent in shape[2:]))
        facts: dict[str, Any] = {"kind": kind, "groups": groups, "axis": 1}
        if kind is NodeKind.CONV_TRANSPOSE:
            return {
                **facts,
                "channels": shape[1] * groups,
                "input_channels": shape[0],
                "padded": not _meets_all_taps(node, shape),
            }
        return {
            **facts,
            "channels": shape[0],
            "input_channels": shape[1] * groups,
            "padded": padded,
            "centred": _is_centred(node, shape),
        }

    def _shape_after(
        self, node: OnnxNode, data: Value, position: int, channels: int, weight: tuple[int, ...]
    ) -> Shape | None:
        shape = data.shape
        if node.operator == "MatMul":
            if shape is None or len(shape) < (1 if position else 2):
                return None
            return (*shape[:-1], Extent(channels)) if position else (*shape[:-2], Extent(channels), shape[-1])
        batch = shape[0] if shape else self.builder.unknown()
        if node.operator == "Gemm":
            return (batch, Extent(channels))
        rest = shape[2:] if shape is not None and len(shape) == len(weight) else None
        if node.operator == "Conv" and rest is not None:
            return (batch, Extent(channels), *slide(node, weight[2:], rest, self.builder))
        return (batch, Extent(channels), *self.builder.unknowns(len(weight) - 2))

    def _add_bias(
        self, graph: OnnxGraph, node: OnnxNode, keys: Mapping[str, str | None], facts: dict[str, Any]
    ) -> None:
        """Add the bias, where it is one constant number for each channel; else it counts as computed."""
        if "bias" not in keys:
            stem = facts["parameters"]["weight"].removesuffix("weight")
            facts["new_bias"] = unused_name(f"{stem}bias", self.taken)
            self.taken.add(facts["new_bias"])
            return
        if not facts.get("has_bias_slot", True):
            return  # it is multiplied by zero
        key, count = keys["bias"], facts["channels"]
        shape = tuple(self.constants.tensor(key).shape) if key is not None else ()
        if key is not None and count_elements(shape) == 1 and shape != (count,):
            key, shape = self.constants.derive(graph, node, 2, (count,)), (count,)
        if key is not None and count_elements(shape) == count == shape[-1]:
            facts["parameters"]["bias"] = key
        else:
            facts["computed"] = {"bias": ()}

    def _add_bias_node(
        self, graph: OnnxGraph, node: OnnxNode, position: int, value: Value, constant: Array, factor: float
    ) -> Value:
        """Add an addition of one constant number for each channel, as a parameter that can take a shift."""
        assert value.labels is not None
        assert value.shape is not None
        (axis,), count = value.axes, value.labels.shape[0]
        key = self.constants.key_of(graph, node.inputs[position])
        if key is None or constant.size != count or not self.constants.is_alone(graph, node.inputs[position]):
            whole = self._constant(graph, node.inputs[position])
            stored = whole.shape if whole is not None and whole.size == count else constant.shape
            shape = stored if constant.size == count else (count, *[1] * (len(value.shape) - 1 - axis))
            key = self.constants.derive(graph, node, position, tuple(shape))
        facts: dict[str, Any] = {"parameters": {"bias": key}} if key is not None else {}
        if factor != 1:
            facts["factors"] = (factor,)
        kind = NodeKind.BIAS if key is not None else NodeKind.CONSTANT_SUM
        return self.builder.add_elementwise(kind, node.operator, value, **facts)


def _meets_all_taps(node: OnnxNode, shape: tuple[int, ...]) -> bool:
    """Return whether each output position of a transposed convolution meets all taps, as far as its attributes say."""
    count = len(shape) - 2
    strides, dilations, more = (
        node.integers(name) or (default,) * count
        for name, default in (("strides", 1), ("dilations", 1), ("output_padding", 0))
    )
    pads = node.integers("pads") or (0,) * (2 * count)
    plain = node.text("auto_pad", "NOTSET") == "NOTSET" and not node.integers("output_shape")
    if not plain or len(pads) != 2 * count or not len(strides) == len(dilations) == len(more) == count:
        return False
    return meets_all_taps(map(Axis, shape[2:], strides, dilations, pads[:count], pads[count:], more))


def _is_centred(node: OnnxNode, shape: tuple[int, ...]) -> bool:
    kernel = shape[2:]
    count = len(kernel)
    dilations = node.integers("dilations") or (1,) * count
    pads = node.integers("pads") or (0,) * (2 * count)
    plain = node.text("auto_pad", "NOTSET") == "NOTSET" and set(node.integers("strides")) <= {1}
    if not plain or len(dilations) != count or len(pads) != 2 * count:
        return False
    wanted = tuple(dilation * (extent - 1) // 2 for dilation, extent in zip(dilations, kernel, strict=True))
    return all(extent % 2 for extent in kernel) and tuple(pads) == wanted * 2


def _read_shapes(message: Message) -> Mapping[str, tuple[Shape | None, object]]:
    """Read the shapes and dtypes of a graph's inputs."""
    found: dict[str, tuple[Shape | None, object]] = {}
    for info in message.messages(GRAPH_INPUTS):
        kind = info.message(2)
        tensor = kind.message(1) if kind is not None else None
        shape = tensor.message(2) if tensor is not None else None
        extents: list[Extent] = []
        for number, one in enumerate(shape.messages(1) if shape is not None else ()):
            size = one.integer(1) if one.last(1) is not None else 0
            name = f"={one.text(2)}" if one.text(2) else f"{number} of {info.text(1)}"
            extents.append(Extent(size) if size > 0 else Extent(1, (name,)))
        dtype = DTYPES.get(tensor.integer(1)) if tensor is not None else None
        found[info.text(1)] = (tuple(extents) if shape is not None else None, dtype)
    return found
