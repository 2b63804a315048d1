"""The graph of a Caffe net: bottoms and tops, with in-place layers told apart by order."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bntool.batchnorm import DEFAULT_EPS
from bntool.checkpoints.arrays import to_float64
from bntool.checkpoints.caffe.blob_names import can_remove
from bntool.checkpoints.caffe.blobs import CaffeContent
from bntool.checkpoints.caffe.layers import UNKNOWN, Layer, blobs_of
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.files import quote
from bntool.checkpoints.tensors import Tensor, count_elements, read_bytes
from bntool.errors import RefusedError
from bntool.graphs.graph import ModelGraph, NodeKind, Owner, check_lengths
from bntool.graphs.stored.builder import FLOATS, GraphBuilder
from bntool.graphs.stored.values import Extent, Shape, Spread, Value, concatenate, reshape, size_of, take, transpose

_CONVOLUTIONS = {
    "Convolution": NodeKind.CONVOLUTION,
    "DepthwiseConvolution": NodeKind.CONVOLUTION,
    "Deconvolution": NodeKind.CONV_TRANSPOSE,
}
_KEEPS_SHAPE = ("Sigmoid", "TanH", "ELU", "Softmax", "Exp", "Log", "LRN", "BNLL", "MVN", "Swish", "ReLU6")


def caffe_graph(checkpoint: Checkpoint) -> ModelGraph:
    """Return the layers of the net, BatchNorm and the Scale paired with it as one node.

    An InnerProduct with ``transpose`` has its weight as (in, out), and is shown as a matrix product.

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
        self.scale_of = {norm: scale for scale, norm in self.scales.items()}
        self.norms = {names[index] for index in content.scale_factors}
        shared = Counter(name for layer in self.wiring.layers for name in set(layer.shared))
        self.shared = {name for name, count in shared.items() if count > 1}
        self.own: dict[str, dict[str, str]] = {}
        for key in content.blobs:
            layer_name, _, role = key.rpartition(".")
            self.own.setdefault(layer_name, {})[role] = key
        self.values: dict[tuple[int, str], Value] = {}  # by layer and top

    def build(self) -> ModelGraph:
        wiring = self.wiring
        outside = Value((self.builder.add(NodeKind.INPUT, "input"),))
        for layer in wiring.layers:
            sources = [
                outside if source is None else self.values.get((source, bottom), Value())
                for source, bottom in zip(wiring.producers[layer.index], layer.bottoms, strict=True)
            ]
            given = sources[:1] if layer.index in self.scales else self._add(layer, sources)
            self.values.update({(layer.index, top): value for top, value in zip(layer.tops, given, strict=False)})
        read = {
            (source, bottom)
            for layer in wiring.layers
            for source, bottom in zip(wiring.producers[layer.index], layer.bottoms, strict=True)
        }
        unread = [value for place, value in self.values.items() if place not in read]
        self.builder.add(NodeKind.OUTPUT, "output", inputs=unread)
        return self.builder.finish()

    def _add(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:  # noqa: PLR0911 a list of cases
        name = self.names[layer.index]
        own = self.own.get(name, {})
        is_tied = bool(self.shared.intersection(layer.shared))
        operation = _LAYERS.get(layer.type)
        joins = len(sources) == 1 or layer.type in ("Eltwise", "Concat")
        if not is_tied and operation is not None and not own and sources and joins:
            return operation(self, layer, sources)
        if not is_tied and len(layer.tops) == 1 and len(layer.bottoms) == 1:
            if (name in self.norms or layer.type == "BN") and "running_mean" in own:
                return [self._add_batch_norm(layer, own, sources[0])]
            if layer.type in _CONVOLUTIONS and "weight" in own:
                return [self._add_convolution(layer, own, sources[0])]
            if layer.type == "InnerProduct" and "weight" in own:
                return [self._add_inner_product(layer, own, sources[0])]
            if layer.type in ("Scale", "Bias"):
                return [self._add_scale(layer, own, sources[0])]
            if layer.type == "PReLU":
                return [self._pass(NodeKind.ACTIVATION, layer, sources[0])]
        return self._add_other(layer, sources)

    def _facts(self, layer: Layer) -> dict[str, Any]:
        return {"layer": self.names[layer.index], "class_name": layer.type}

    def _reads(self, layer: Layer) -> list[str]:
        return list(self.own.get(self.names[layer.index], {}).values())

    def _add_other(self, layer: Layer, sources: Sequence[Value], *, shape: Shape | None = None) -> list[Value]:
        index = self.builder.add(
            NodeKind.OTHER, layer.type, inputs=sources, reads=self._reads(layer), **self._facts(layer)
        )
        return [Value((index,), shape) for _ in layer.tops]

    def _pass(self, kind: NodeKind, layer: Layer, value: Value, *, shape: Shape | None = None, **facts: Any) -> Value:
        """Add a layer that gives each channel anew."""
        facts = {**self._facts(layer), **facts}
        return self.builder.add_elementwise(kind, layer.type, value, shape=shape, reads=self._reads(layer), **facts)

    # layers with blobs

    def _add_batch_norm(self, layer: Layer, own: Mapping[str, str], value: Value) -> Value:
        lengths = [count_elements(self.tensors[key].shape) for key in own.values()]
        check_lengths(layer.name, lengths)
        count = lengths[0]
        last = self.wiring.layers[self.scale_of.get(layer.index, layer.index)]
        index = self.builder.add(
            NodeKind.BATCH_NORM,
            layer.type,
            inputs=[self.builder.channels_of(value, 1, count)],
            channels=count,
            parameters=own,
            # BN is of PSPNet's fork, whose parameters are not known here
            eps=layer.parameters.get("batch_norm_param.eps", DEFAULT_EPS) if layer.type != "BN" else None,
            # unless it is said otherwise, a net that is tested uses the stored statistics
            training=layer.parameters.get("batch_norm_param.use_global_stats") is False,
            owner=Owner.WHOLE if can_remove(self.wiring, layer, last) else Owner.PART,
            **self._facts(layer),
        )
        shape = value.shape
        if shape is not None and len(shape) > 1:
            shape = (shape[0], Extent(count), *shape[2:])
        return self.builder.give(index, shape, 1)

    def _add_convolution(self, layer: Layer, own: Mapping[str, str], value: Value) -> Value:
        shape = self.tensors[own["weight"]].shape
        groups = int(layer.parameters.get("convolution_param.group", 1))  # type: ignore[arg-type]
        plain = len(shape) >= 3 and layer.parameters.get("convolution_param.axis", 1) == 1
        if not plain or groups < 1 or shape[0] % groups:
            return self._add_other(layer, [value])[0]
        kind = _CONVOLUTIONS[layer.type]
        channels = shape[0] if kind is NodeKind.CONVOLUTION else shape[1] * groups
        inputs = shape[1] * groups if kind is NodeKind.CONVOLUTION else shape[0]
        self._check_bias(layer, own, channels)
        index = self.builder.add(
            kind,
            layer.type,
            inputs=[self.builder.channels_of(value, 1, inputs)],
            channels=channels,
            parameters=own,
            groups=groups,
            padded=_reads_borders(layer, kind, shape),
            **self._facts(layer),
        )
        batch = value.shape[0] if value.shape else self.builder.unknown()
        return self.builder.give(index, (batch, Extent(channels), *self.builder.unknowns(len(shape) - 2)), 1)

    def _add_inner_product(self, layer: Layer, own: Mapping[str, str], value: Value) -> Value:
        """Add an InnerProduct, which reads all positions of all channels: one channel is then many inputs."""
        shape = self.tensors[own["weight"]].shape
        if len(shape) != 2 or layer.parameters.get("inner_product_param.axis", 1) != 1:
            return self._add_other(layer, [value])[0]
        transposed = bool(layer.parameters.get("inner_product_param.transpose"))
        kind = NodeKind.MATMUL if transposed else NodeKind.LINEAR
        channels, inputs = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        self._check_bias(layer, own, channels)
        flat = _flatten(value, self.builder)
        index = self.builder.add(
            kind,
            layer.type,
            inputs=[self.builder.channels_of(flat, 1, inputs)],
            channels=channels,
            parameters=own,
            **self._facts(layer),
        )
        batch = value.shape[0] if value.shape else self.builder.unknown()
        return self.builder.give(index, (batch, Extent(channels)), 1)

    def _check_bias(self, layer: Layer, own: Mapping[str, str], channels: int) -> None:
        if "bias" in own:
            check_lengths(layer.name, [channels, count_elements(self.tensors[own["bias"]].shape)])

    def _add_scale(self, layer: Layer, own: Mapping[str, str], value: Value) -> Value:
        """Add a Scale that no BatchNorm is paired with, or a Bias: times a number for each channel, plus another."""
        prefix = "scale_param" if layer.type == "Scale" else "bias_param"
        place = layer.parameters.get(f"{prefix}.axis", 1), layer.parameters.get(f"{prefix}.num_axes", 1)
        count = value.labels.shape[0] if value.labels is not None and value.axes == (1,) else -1
        fits = all(count_elements(self.tensors[key].shape) == count for key in own.values())
        plain = all(self.tensors[key].dtype in FLOATS for key in own.values())
        if place != (1, 1) or not own or not fits or not plain or value.spread is not None:
            return self._add_other(layer, [value])[0]
        facts = self._facts(layer)
        if "weight" in own:
            tensor = self.tensors[own["weight"]]
            factors = tuple(to_float64(read_bytes(tensor), tensor.dtype).tolist())
            factors = factors if np.isfinite(factors).all() else ()
            value = self.builder.add_elementwise(
                NodeKind.CHANNELWISE, layer.type, value, reads=[own["weight"]], factors=factors, **facts
            )
        if "bias" in own:
            parameters = {"bias": own["bias"]}
            value = self.builder.add_elementwise(NodeKind.BIAS, layer.type, value, parameters=parameters, **facts)
        return value

    # layers without blobs

    def same(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:
        """Hand on what the layer reads; a Dropout of a fork may scale, or drop when it is tested, too."""
        if f"dropout_param.{UNKNOWN}" in layer.parameters:
            return self.other(layer, sources)
        return [sources[0] for _ in layer.tops]

    def other(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:
        """Add a layer that keeps the shape and lets nothing pass."""
        if len(sources) != 1 or len(layer.tops) != 1:
            return self._add_other(layer, sources)
        return [self._pass(NodeKind.OTHER, layer, sources[0])]

    def activation(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:
        """Add a ReLU, also a leaky one."""
        return [self._pass(NodeKind.ACTIVATION, layer, sources[0])]

    def join(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:
        """Add an Eltwise: a sum with factors, or a product."""
        operation = layer.parameters.get("eltwise_param.operation", "SUM")
        coefficients = layer.parameters.get("eltwise_param.coeff", (1.0,) * len(sources))
        facts = self._facts(layer)
        if operation == "PROD" and len(sources) == 2:
            return [self.builder.add_joint(NodeKind.GATE, layer.type, sources[0], sources[1], **facts)]
        known = f"eltwise_param.{UNKNOWN}" not in layer.parameters
        if operation != "SUM" or not known or not isinstance(coefficients, tuple) or len(coefficients) != len(sources):
            return self._add_other(layer, sources)
        total, factor = sources[0], float(coefficients[0])
        for value, other in zip(sources[1:], coefficients[1:], strict=True):
            factors = (factor, float(other)) if (factor, other) != (1, 1) else ()
            total = self.builder.add_joint(NodeKind.ADD, layer.type, total, value, factors=factors, **facts)
            factor = 1.0
        if factor != 1:
            total = self._pass(NodeKind.CHANNELWISE, layer, total, factors=(factor,))
        return [total]

    def concat(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:
        """Join along the channels, where the layer says nothing else."""
        axis = layer.parameters.get("concat_param.axis", layer.parameters.get("concat_param.concat_dim", 1))
        return [concatenate(sources, int(axis))]  # type: ignore[arg-type]

    def split_channels(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:
        """Split along the channels."""
        value, count = sources[0], len(layer.tops)
        axis = int(layer.parameters.get("slice_param.axis", layer.parameters.get("slice_param.slice_dim", 1)))  # type: ignore[arg-type]
        points = layer.parameters.get("slice_param.slice_point", ())
        shape = value.shape
        if shape is None or not -len(shape) <= axis < len(shape) or not isinstance(points, tuple):
            return self._add_other(layer, sources)
        whole = shape[axis]
        if not points and whole.is_known and not whole.number % count:
            points = tuple(whole.number // count * number for number in range(1, count))
        if not whole.is_known or len(points) != count - 1:
            return [take(value, axis, None, self.builder.unknown()) for _ in layer.tops]
        limits = [0, *(int(point) for point in points), whole.number]
        if limits != sorted(limits):
            return self._add_other(layer, sources)
        return [take(value, axis, range(start, end), Extent(end - start)) for start, end in itertools.pairwise(limits)]

    def pool(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:
        """Add a pool; zeros beyond the border count in Caffe's averages, so that only a scale passes then."""
        value, kind = sources[0], layer.parameters.get("pooling_param.pool", "MAX")
        shape = value.shape
        if shape is None or len(layer.tops) != 1 or kind not in ("MAX", "AVE") or any(axis > 1 for axis in value.axes):
            return self._add_other(layer, sources)
        whole = bool(layer.parameters.get("pooling_param.global_pooling"))
        rest = (Extent(1),) * (len(shape) - 2) if whole else self.builder.unknowns(len(shape) - 2)
        found = NodeKind.MAX_POOL if kind == "MAX" else NodeKind.AVERAGE
        if kind == "AVE" and not whole and _is_padded(layer, "pooling_param"):
            found = NodeKind.CHANNELWISE
        return [self._pass(found, layer, value, shape=(*shape[:2], *rest))]

    def flatten(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:
        """Flatten all axes from the second on, where nothing else is said."""
        axes = layer.parameters.get("flatten_param.axis", 1), layer.parameters.get("flatten_param.end_axis", -1)
        return [_flatten(sources[0], self.builder)] if axes == (1, -1) else [sources[0].without_labels()]

    def power(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:
        """Add a Power, (shift + scale x) to the power of one."""
        power, scale, shift = (
            float(layer.parameters.get(f"power_param.{name}", default))  # type: ignore[arg-type]
            for name, default in (("power", 1.0), ("scale", 1.0), ("shift", 0.0))
        )
        if power != 1:
            return self.other(layer, sources)
        value = self._pass(NodeKind.CHANNELWISE, layer, sources[0], factors=(scale,)) if scale != 1 else sources[0]
        return [self._pass(NodeKind.CONSTANT_SUM, layer, value) if shift else value]

    def shuffle(self, layer: Layer, sources: Sequence[Value]) -> list[Value]:
        """Shuffle the channels."""
        value, groups = sources[0], int(layer.parameters.get("shuffle_channel_param.group", 1))  # type: ignore[arg-type]
        shape = value.shape
        if shape is None or len(shape) < 2 or not shape[1].is_known or groups < 1 or shape[1].number % groups:
            return self._add_other(layer, sources)
        split = (shape[0], Extent(groups), Extent(shape[1].number // groups), *shape[2:])
        order = (0, 2, 1, *range(3, len(split)))
        return [reshape(transpose(reshape(value, split), order), shape)]


def _flatten(value: Value, builder: GraphBuilder) -> Value:
    """Flatten all axes but the first."""
    shape = value.shape
    if shape is None:  # whatever else there is, channels come first
        lies = Spread.RUNS if value.labels is not None else None
        return dataclasses.replace(value, shape=builder.unknowns(2), spread=lies)
    return value.without_labels() if not shape else reshape(value, (shape[0], size_of(shape[1:])))


def _reads_borders(layer: Layer, kind: NodeKind, shape: tuple[int, ...]) -> bool:
    """Return whether positions of the output meet a part of the kernel only."""
    if kind is not NodeKind.CONV_TRANSPOSE:
        return _is_padded(layer, "convolution_param")
    strides = (layer.parameters.get(f"convolution_param.{key}", 1) for key in ("stride", "stride_h", "stride_w"))
    return any(extent != 1 for extent in shape[2:]) or any(stride != 1 for stride in strides)


def _is_padded(layer: Layer, message: str) -> bool:
    return any(layer.parameters.get(f"{message}.{key}", 0) for key in ("pad", "pad_h", "pad_w"))


_LAYERS: Mapping[str, Callable[[_Building, Layer, Sequence[Value]], list[Value]]] = {
    **dict.fromkeys(("Dropout", "Split"), _Building.same),
    **dict.fromkeys(_KEEPS_SHAPE, _Building.other),
    **dict.fromkeys(("ReLU", "AbsVal"), _Building.activation),
    "Eltwise": _Building.join,
    "Concat": _Building.concat,
    "Slice": _Building.split_channels,
    "Pooling": _Building.pool,
    "Flatten": _Building.flatten,
    "Power": _Building.power,
    "ShuffleChannel": _Building.shuffle,
}
