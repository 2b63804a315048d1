"""The graph of an ONNX model: the program itself, so that its edges are proof."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bntool.batchnorm import VECTORS
from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.containers.protobufs.reading import Message
from bntool.checkpoints.containers.protobufs.writing import unused_name
from bntool.checkpoints.onnx.graph import SUBGRAPH, SUBGRAPHS, OnnxGraph, OnnxNode
from bntool.checkpoints.onnx.model import OnnxContent
from bntool.checkpoints.tensors import count_elements
from bntool.graphs.graph import ModelGraph, NodeKind, check_lengths
from bntool.graphs.stored.builder import GraphBuilder

_KINDS = {
    "Conv": NodeKind.CONVOLUTION,
    "ConvTranspose": NodeKind.CONV_TRANSPOSE,
    "Gemm": NodeKind.LINEAR,
    "BatchNormalization": NodeKind.BATCH_NORM,
}
_FIRST_WITHOUT_IS_TEST = 7  # the opset from which BatchNormalization no longer has two modes by an attribute


def onnx_graph(checkpoint: Checkpoint) -> ModelGraph:
    """The nodes of the main graph, and who reads what.

    A Gemm with transB = 0 has its weight as (in, out): as a transposed convolution has, and it is shown as one.
    BatchNormalization nodes in nested graphs (branches, loops) are there, but nothing known feeds them.
    """
    return _Building(OnnxContent.of(checkpoint), checkpoint.state_dicts[0]).build()


class _Building:
    def __init__(self, content: OnnxContent, state_dict: StateDict) -> None:
        self.content, self.tensors, self.modules = content, state_dict.tensors, state_dict.modules
        self.builder = GraphBuilder()
        self.layers = {id(node): name for name, (_, node) in content.layers.items()}
        self.keys = {(id(p.graph), p.name): key for key, p in content.places.items() if p.reader is None}
        self.taken = {name for g in content.graphs for name in (*g.inputs, *g.initializers, *g.computed)} | set(
            self.tensors
        )
        self.nested: dict[int, list[OnnxGraph]] = {}
        for graph in content.graphs[1:]:
            outer = graph
            while outer.parent is not None and outer.parent is not content.graphs[0]:
                outer = outer.parent
            self.nested.setdefault(outer.message.start, []).append(graph)

    def build(self) -> ModelGraph:
        main = self.content.graphs[0]
        writers: dict[str, int] = {}
        for name in main.inputs:
            if name not in main.initializers:
                writers[name] = self.builder.add(NodeKind.INPUT, "input")
        for node in main.nodes:
            index = self._add(main, node, writers)
            writers.update(dict.fromkeys(filter(None, node.outputs), index))
        shown = [writers[name] for name in main.outputs if name in writers]
        constants = [self.keys[id(main), name] for name in main.outputs if (id(main), name) in self.keys]
        self.builder.add(NodeKind.OUTPUT, "output", inputs=shown, reads=constants)
        return self.builder.finish()

    def _add(self, graph: OnnxGraph, node: OnnxNode, writers: Mapping[str, int]) -> int:
        facts = self._facts(graph, node)
        kind = facts.pop("kind", NodeKind.OTHER)
        names = list(
            node.inputs[:1] if id(node) in self.layers else node.inputs
        )  # a layer has its own names for the rest
        inside = [g for attribute in node.attributes.values() for g in self._graphs_in(attribute)]
        for inner in inside:
            names += [*inner.outputs, *(name for nested in inner.nodes for name in nested.inputs)]
        reads = [self.keys[id(graph), name] for name in names if (id(graph), name) in self.keys]
        inputs = [writers[name] for name in names if name in writers]
        index = self.builder.add(kind, node.operator, inputs=inputs, reads=reads, **facts)
        for inner in inside:
            for nested in inner.nodes:
                if id(nested) in self.layers:
                    self.builder.add(NodeKind.BATCH_NORM, nested.operator, inputs=[index], **self._batch_norm(nested))
        for layer, call in self.content.called.items():
            if call is node:
                sources = (f"what {node.operator} is called with",)
                facts = {
                    "layer": layer,
                    "computed": dict.fromkeys(VECTORS, sources),
                    "eps": self.modules[layer].attributes["eps"],
                }
                self.builder.add(NodeKind.BATCH_NORM, node.operator, inputs=[index], **facts)
        return index

    def _graphs_in(self, attribute: Message) -> list[OnnxGraph]:
        fields = (*attribute.all(SUBGRAPH), *attribute.all(SUBGRAPHS))
        return [graph for place in fields for graph in self.nested.get(place.value_start, ())]

    def _facts(self, graph: OnnxGraph, node: OnnxNode) -> dict[str, Any]:
        if id(node) in self.layers:
            return {"kind": NodeKind.BATCH_NORM, **self._batch_norm(node)} if self._is_plain(node) else {}
        kind = _KINDS.get(node.operator)
        if kind is None or kind is NodeKind.BATCH_NORM or len(node.inputs) < 2 or len(node.outputs) != 1:
            return {}
        name = node.name or node.outputs[0]
        key = self.keys.get((id(graph), node.inputs[1]))
        if key is None:
            return {"kind": kind, "layer": name, "computed": {"weight": ()}}
        facts = self._producer(node, kind, self.tensors[key].shape)
        if facts:
            facts.update(layer=name, parameters={"weight": key}, class_name=node.operator)
            self._add_bias(graph, node, facts)
        return facts

    def _is_plain(self, node: OnnxNode) -> bool:
        return bool(node.integer("spatial", 1))

    def _batch_norm(self, node: OnnxNode) -> dict[str, Any]:
        layer = self.layers[id(node)]
        found = {role: f"{layer}.{role}" for role in VECTORS if f"{layer}.{role}" in self.content.places}
        own = {r: k for r, k in found.items() if (reader := self.content.places[k].reader) and reader[1] is node}
        if self.content.opset < _FIRST_WITHOUT_IS_TEST:
            training = not node.integer("is_test", 0)
        else:
            training = bool(node.integer("training_mode", 0)) or any(node.outputs[1:])
        lengths = [count_elements(self.tensors[key].shape) for key in own.values()]
        check_lengths(layer, lengths)
        return {
            "layer": layer,
            "parameters": own,
            "computed": {role: () for role in VECTORS if role not in own},  # by other nodes, from inputs of the model
            "channels": lengths[0] if lengths else 0,
            "eps": node.number("epsilon", 1e-5),
            "training": training,
            "class_name": "BatchNormalization",
        }

    def _producer(self, node: OnnxNode, kind: NodeKind, shape: tuple[int, ...]) -> dict[str, Any]:
        if kind is NodeKind.LINEAR:
            plain = node.number("alpha", 1.0) == node.number("beta", 1.0) == 1.0 and not node.integer("transA", 0)
            if not plain or len(shape) != 2:
                return {}
            if node.integer("transB", 0):
                return {"kind": kind, "channels": shape[0], "input_channels": shape[1]}
            return {"kind": NodeKind.CONV_TRANSPOSE, "channels": shape[1], "input_channels": shape[0]}
        if len(shape) < 3:
            return {}
        groups = node.integer("group", 1)
        channels = shape[0] if kind is NodeKind.CONVOLUTION else shape[1] * groups
        if groups < 1 or channels < 1 or shape[0] % groups:
            return {}
        padded = any(node.integers("pads")) or node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        return {
            "kind": kind,
            "channels": channels,
            "input_channels": shape[1] * groups if kind is NodeKind.CONVOLUTION else shape[0],
            "groups": groups,
            "padded": padded or kind is NodeKind.CONV_TRANSPOSE,
        }

    def _add_bias(self, graph: OnnxGraph, node: OnnxNode, facts: dict[str, Any]) -> None:
        """The bias, where it is one constant number for each channel; else it counts as computed."""
        if not any(node.inputs[2:]):
            facts["new_bias"] = unused_name(facts["parameters"]["weight"].removesuffix("weight") + "bias", self.taken)
            self.taken.add(facts["new_bias"])
            return
        key = self.keys.get((id(graph), node.inputs[2]))
        if key is not None and self.tensors[key].shape == (facts["channels"],):
            facts["parameters"]["bias"] = key
        else:
            facts["computed"] = {"bias": ()}
