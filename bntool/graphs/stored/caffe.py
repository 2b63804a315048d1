"""The graph of a Caffe net: bottoms and tops, with in-place layers told apart by order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bntool.batchnorm import DEFAULT_EPS
from bntool.checkpoints.caffe.blobs import CaffeContent
from bntool.checkpoints.caffe.layers import Layer, blobs_of
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.files import quote
from bntool.checkpoints.tensors import Tensor, count_elements
from bntool.errors import RefusedError
from bntool.graphs.graph import ModelGraph, NodeKind, check_lengths
from bntool.graphs.stored.builder import GraphBuilder

_CONVOLUTIONS = {
    "Convolution": NodeKind.CONVOLUTION,
    "DepthwiseConvolution": NodeKind.CONVOLUTION,
    "Deconvolution": NodeKind.CONV_TRANSPOSE,
}


def caffe_graph(checkpoint: Checkpoint) -> ModelGraph:
    """The layers of the net, BatchNorm and the Scale paired with it as one node.

    An InnerProduct with ``transpose`` has its weight as (in, out): as a transposed convolution has, and it is shown as
    one.

    Raises:
        RefusedError: the net is not given, or its layers cannot be told apart.
        CorruptFileError: vectors of one layer differ in length.
    """
    if checkpoint.content is None:
        raise RefusedError("a .caffemodel.h5 holds blobs only: give the net that it is run by with --prototxt NET")
    content = CaffeContent.of(checkpoint)
    names = Counter(layer.name for layer in content.wiring.layers if blobs_of(layer))
    for name, count in names.items():
        if count > 1 or not name:
            what = f"have the name {quote(name)}" if name else "without a name"
            raise RefusedError(f"{count} layers with blobs {what}: Caffe gives blobs to layers by name")
    return _Building(content, checkpoint.state_dicts[0].tensors).build()


class _Building:
    def __init__(self, content: CaffeContent, tensors: Mapping[str, Tensor]) -> None:
        self.content, self.tensors = content, tensors
        self.builder = GraphBuilder()
        self.wiring = content.deployed or content.wiring
        deployed = content.deployed is not None
        self.names = {layer.index: layer.name for layer in self.wiring.layers} if deployed else content.names
        positions = {name: index for index, name in self.names.items()}
        names = content.names
        self.scales = {  # by position in the wiring, which may be another than in the file
            positions[names[scale]]: positions[names[norm]]
            for norm, scale in content.scales.items()
            if names[scale] in positions and names[norm] in positions
        }
        self.norms = {names[index] for index in content.scale_factors}
        shared = Counter(name for layer in self.wiring.layers for name in set(layer.shared))
        self.shared = {name for name, count in shared.items() if count > 1}
        self.own: dict[str, dict[str, str]] = {}
        for key in content.blobs:
            layer_name, _, role = key.rpartition(".")
            self.own.setdefault(layer_name, {})[role] = key

    def build(self) -> ModelGraph:
        wiring = self.wiring
        nodes: dict[int, int] = {}
        outside = self.builder.add(NodeKind.INPUT, "input")
        for layer in wiring.layers:
            if layer.index in self.scales:
                nodes[layer.index] = nodes[self.scales[layer.index]]
                continue
            sources = [outside if source is None else nodes[source] for source in wiring.producers[layer.index]]
            facts = self._facts(layer)
            if "kind" in facts and "bias" in facts["parameters"]:
                bias = self.tensors[facts["parameters"]["bias"]]
                check_lengths(layer.name, [facts["channels"], count_elements(bias.shape)])
            kind = facts.pop("kind", NodeKind.OTHER)
            nodes[layer.index] = self.builder.add(kind, layer.type, inputs=sources, **facts)
        unread = [nodes[layer.index] for layer in wiring.layers if layer.tops and layer.index not in wiring.readers]
        self.builder.add(NodeKind.OUTPUT, "output", inputs=unread)
        return self.builder.finish()

    def _facts(self, layer: Layer) -> dict[str, Any]:
        name = self.names[layer.index]
        own = self.own.get(name, {})
        facts: dict[str, Any] = {"layer": name, "class_name": layer.type}
        is_tied = bool(self.shared.intersection(layer.shared))
        if is_tied or len(layer.tops) != 1 or len(layer.bottoms) != 1:
            return {**facts, "reads": list(own.values())}
        if (name in self.norms or layer.type == "BN") and "running_mean" in own:
            return {**facts, **self._batch_norm(layer, own)}
        if layer.type in _CONVOLUTIONS and "weight" in own:
            return {**facts, "parameters": own, **self._convolution(layer, self.tensors[own["weight"]].shape)}
        if layer.type == "InnerProduct" and "weight" in own:
            return {**facts, "parameters": own, **self._inner_product(layer, self.tensors[own["weight"]].shape)}
        return {**facts, "reads": list(own.values())}

    def _batch_norm(self, layer: Layer, own: Mapping[str, str]) -> dict[str, Any]:
        lengths = [count_elements(self.tensors[key].shape) for key in own.values()]
        check_lengths(layer.name, lengths)
        return {
            "kind": NodeKind.BATCH_NORM,
            "parameters": own,
            "channels": lengths[0],
            # BN is of PSPNet's fork, whose parameters are not known here
            "eps": layer.parameters.get("batch_norm_param.eps", DEFAULT_EPS) if layer.type != "BN" else None,
            # unless it is said otherwise, a net that is tested uses the stored statistics
            "training": layer.parameters.get("batch_norm_param.use_global_stats") is False,
        }

    def _convolution(self, layer: Layer, shape: tuple[int, ...]) -> dict[str, Any]:
        groups = int(layer.parameters.get("convolution_param.group", 1))
        if len(shape) < 3 or groups < 1 or shape[0] % groups or layer.parameters.get("convolution_param.axis", 1) != 1:
            return {}
        kind = _CONVOLUTIONS[layer.type]
        channels = shape[0] if kind is NodeKind.CONVOLUTION else shape[1] * groups
        padded = any(layer.parameters.get(f"convolution_param.{key}", 0) for key in ("pad", "pad_h", "pad_w"))
        padded = padded or kind is NodeKind.CONV_TRANSPOSE
        inputs = shape[1] * groups if kind is NodeKind.CONVOLUTION else shape[0]
        return {"kind": kind, "channels": channels, "input_channels": inputs, "groups": groups, "padded": padded}

    def _inner_product(self, layer: Layer, shape: tuple[int, ...]) -> dict[str, Any]:
        if len(shape) != 2 or layer.parameters.get("inner_product_param.axis", 1) != 1:
            return {}
        if layer.parameters.get("inner_product_param.transpose"):
            return {"kind": NodeKind.CONV_TRANSPOSE, "channels": shape[1], "input_channels": shape[0]}
        return {"kind": NodeKind.LINEAR, "channels": shape[0], "input_channels": shape[1]}
