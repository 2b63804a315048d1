"""The graph of a Keras model: its configuration says which layer reads what, so that edges are proof."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bntool.batchnorm import STATISTICS
from bntool.checkpoints.arrays import to_float64
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.pickles.nodes import text_of
from bntool.checkpoints.keras.applications import describe_relatives
from bntool.checkpoints.keras.content import KerasContent, find_version
from bntool.checkpoints.keras.keras_1 import EPS_BELOW_ROOT_SINCE, has_unnamed_models
from bntool.checkpoints.keras.model import KerasLayer, KerasModel, Reference, calls_in_order, order_layers
from bntool.checkpoints.keras.weights import BATCH_NORMS, CONVOLUTIONS, DEPTHWISE, KERNELS, SEPARABLE, TRANSPOSED
from bntool.checkpoints.tensors import Tensor, count_elements, read_bytes
from bntool.errors import CorruptFileError, RefusedError, UnsafeFileError
from bntool.graphs.graph import ModelGraph, NodeKind, Owner, check_lengths
from bntool.graphs.stored.builder import FLOATS, GraphBuilder
from bntool.graphs.stored.values import (
    Extent,
    Shape,
    Value,
    concatenate,
    fill_in,
    read_along,
    reshape,
    size_of,
    transpose,
)
from bntool.graphs.transposed_convolutions import Axis, meets_all_taps

MAX_CALLS = 200_000  # of layers, each call of a nested model counted anew
_LAST = -1
_FROZEN_SINCE = (2, 4)  # the first version that was TensorFlow's alone; (2, 2) may be of TensorFlow 1
_CONV_AVERAGES = ("nearest", "bilinear")
_DROPOUTS = ("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianDropout", "GaussianNoise",
             "AlphaDropout")  # fmt: skip
_KEEPS_SHAPE = ("ELU", "Softmax", "Rescaling", "Activation", "ReLU", "LeakyReLU", "LayerNormalization",
                "UnitNormalization", "GroupNormalization")  # fmt: skip
_ACTIVATIONS = ("relu", "leaky_relu")  # f(a x) = a f(x) for a > 0


def keras_graph(checkpoint: Checkpoint) -> ModelGraph:
    """Return the layers that the outputs need, those of nested models in their place.

    Raises:
        RefusedError: the file does not say how the layers are connected.
        CorruptFileError: the graph goes in circles, or vectors of one layer differ in length.
        UnsafeFileError: nested models that call each other without measure.
    """
    content = KerasContent.of(checkpoint)
    if content.model is None:
        raise RefusedError(
            f"the file holds weights only, neither the graph of the model nor eps{_describe_relatives(content)}: give "
            "the configuration of the model (what model.to_json() says, or a .keras or .h5 file of it) with "
            "--keras-config FILE"
            if content.config is None
            else "models inside of this one have no names in it, so that layers and weights are not matched"
            if has_unnamed_models(content.config)
            else "the layers of this model are connected by Python code of its own, which is not in the file"
        )
    if not content.model.is_connected:
        raise RefusedError(
            f"the model is a {content.model.kind}, which is no class of Keras: its own code, which is not in the file, "
            "may do more than its layers; fold the model inside it, saved as a keras.Model"
        )
    if any(layer.is_keras_1 and layer.kind in BATCH_NORMS for layer in content.model.walk()):
        _check_version(find_version(content.config, content.hdf5))
    version = text_of(checkpoint.entries.get("keras_version")) or ""
    return _Building(content, content.model, checkpoint.state_dicts[0].tensors, version=version).build()


def _describe_relatives(content: KerasContent) -> str:
    found = describe_relatives(content)
    return f" ({found})" if found else ""


def _check_version(version: tuple[int, ...] | None) -> None:
    """Refuse versions of Keras 1 that normalise otherwise."""
    if version is None:
        raise RefusedError(
            "the model is of Keras 1, and nothing says of which version: before 1.0.8 BatchNorms computed otherwise; "
            'add "keras_version": "1.2.2" (or what it is) beside class_name in the JSON of the model'
        )
    if version < EPS_BELOW_ROOT_SINCE:
        said = ".".join(map(str, version))
        raise RefusedError(
            f"the model is of Keras {said}: before 1.0.8 BatchNorms divided otherwise, by running_std + eps or "
            "sqrt(running_std) + eps"
        )


class _Building:
    def __init__(
        self, content: KerasContent, model: KerasModel, tensors: Mapping[str, Tensor], *, version: str
    ) -> None:
        self.content, self.model, self.tensors = content, model, tensors
        self.version = tuple(int(one) for one in re.findall(r"\d+", version)[:2])
        self.builder = GraphBuilder()
        self.owners = {layer.path: owner for owner, layer in content.names.layers.items()}
        self.own: dict[str, dict[str, str]] = {}
        for key in tensors:
            owner, _, role = key.rpartition(".")
            self.own.setdefault(owner, {})[role] = key
        numbers = Counter(layer.shared_number for layer in model.walk())
        self.shared = {layer.path for layer in model.walk() if layer.shared_number and numbers[layer.shared_number] > 1}
        self.calls = 0

    def build(self) -> ModelGraph:
        outputs = self._add_model(self.model, [], training=False)
        self.builder.add(NodeKind.OUTPUT, "output", inputs=outputs)
        return self.builder.finish()

    def _add_model(self, model: KerasModel, inputs: Sequence[Value], *, training: bool) -> list[Value]:
        """Add the calls of a model's layers; what its outputs hold.

        Args:
            inputs: what a nested model is called with.
            training: it is told to compute as in training.
        """
        if model.is_sequential:
            return self._add_sequence(model, inputs, training=training)
        calls = calls_in_order(model)
        if calls is None:
            raise CorruptFileError("the layers of the model read each other in a circle")
        values: dict[Reference, Value] = {}
        values.update(zip(model.inputs, inputs, strict=False))
        layers = {layer.name: layer for layer in model.layers}
        in_order = self._is_numbered_as_expected(model)
        for name, call in calls:
            layer = layers[name]
            if (name, call, 0) in values:
                continue
            read = layer.calls[call] if layer.calls else ()
            sources = [values[reference] for reference in read if reference in values]
            told = training or (layer.trains[call] if layer.trains else False)
            stays = not in_order or (model is self.model and len(model.outputs) > 1 and name in _names(model.outputs))
            for number, value in enumerate(self._add_layer(layer, sources, training=told, stays=stays)):
                values[name, call, number] = value
            for _, _, number in (r for r in self._readers(model) if r[:2] == (name, call)):
                values.setdefault((name, call, number), values[name, call, 0])
        return [values[reference] for reference in model.outputs if reference in values]

    def _readers(self, model: KerasModel) -> Sequence[Reference]:
        return [r for layer in model.layers for call in layer.calls for r in call if r[2]] + [
            r for r in model.outputs if r[2]
        ]

    def _add_sequence(self, model: KerasModel, inputs: Sequence[Value], *, training: bool) -> list[Value]:
        values = list(inputs)
        for position, layer in enumerate(model.layers):
            if layer.kind == "InputLayer" and values:
                continue
            first = not values and layer.kind != "InputLayer"
            if first:  # formerly the first layer carried the shape of the input
                values = [self._add_input(layer.config.get("batch_input_shape"))]
            values = self._add_layer(layer, values, training=training, stays=first and position == 0)
        return values

    def _is_numbered_as_expected(self, model: KerasModel) -> bool:
        """Return whether the file numbers its layers as we would: only then numbers can be given anew."""
        return order_layers(model) == tuple(layer.name for layer in model.layers)

    def _add_input(self, shape: object) -> Value:
        index = self.builder.add(NodeKind.INPUT, "input")
        if not isinstance(shape, list):
            return Value((index,))
        return Value((index,), tuple(Extent(one) if isinstance(one, int) else self.builder.unknown() for one in shape))

    def _add_layer(self, layer: KerasLayer, sources: Sequence[Value], *, training: bool, stays: bool) -> list[Value]:
        """Add one call of a layer; what it gives, in the dtype that it computes in."""
        given = self._call(layer, sources, training=training, stays=stays)
        if layer.model is not None:
            return given
        dtype = None if layer.kind == "InputLayer" else _find_dtype(layer)
        return [dataclasses.replace(value, dtype=dtype) for value in given]

    def _call(  # noqa: PLR0911 a list of cases
        self, layer: KerasLayer, sources: Sequence[Value], *, training: bool, stays: bool
    ) -> list[Value]:
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise UnsafeFileError(f"the models of the file call more than {MAX_CALLS} layers")
        if layer.model is not None:
            return self._add_nested(layer, layer.model, sources, training=training)
        if layer.kind == "InputLayer":
            return [self._add_input(layer.config.get("batch_shape", layer.config.get("batch_input_shape")))]
        own = self._own(layer)
        if layer.path in self.shared:
            return [self._add_shared(layer, own, sources)]
        if len(sources) == 1 and layer.kind in BATCH_NORMS and own.keys() >= set(STATISTICS):
            return [self._add_batch_norm(layer, own, sources[0], training=training, stays=stays)]
        if len(sources) == 1 and layer.kind in KERNELS and "weight" in own and not layer.config.get("lora_rank"):
            return [self._add_producer(layer, own, sources[0])]
        operation = _LAYERS.get(layer.kind) if layer.is_layer else None
        several = len(sources) > 1 and layer.kind not in _JOINING
        if operation is None or not sources or several or (own and layer.kind != "PReLU"):
            return [self._add_other(layer, sources)]
        if layer.kind in _DROPOUTS and training:
            return [self._pass(NodeKind.OTHER, layer, sources[0])]
        if layer.is_distributed and layer.kind not in _DISTRIBUTED:
            return [self._add_other(layer, sources)]
        return [operation(self, layer, sources)]

    def _own(self, layer: KerasLayer) -> Mapping[str, str]:
        return self.own.get(self.owners.get(layer.path, ""), {})

    def _add_unconnected(self, layer: KerasLayer, model: KerasModel, sources: Sequence[Value]) -> Value:
        """Add a nested model whose own code, which is not in the file, calls its layers: it lies around each of
        them.
        """
        inside = {one.path: self._own(one) for one in model.walk()}
        norms = [one for one in model.walk() if one.kind in BATCH_NORMS and inside[one.path].keys() >= set(STATISTICS)]
        reads = [key for path, own in inside.items() if path not in {one.path for one in norms} for key in own.values()]
        kind = f"the own code of {model.kind}"
        node = self.builder.add(NodeKind.OTHER, kind, inputs=sources, reads=reads, layer=layer.path, class_name=kind)
        for one in norms:
            self._add_batch_norm(one, inside[one.path], Value((node,)), training=False, stays=True)
        return Value((node,))

    def _add_shared(self, layer: KerasLayer, own: Mapping[str, str], sources: Sequence[Value]) -> Value:
        """Add a layer that another model of the file has, too: what is right for one of them may be wrong for the
        other.
        """
        if layer.kind not in BATCH_NORMS or not own.keys() >= set(STATISTICS):
            return self._add_other(layer, sources)
        kind = "a layer that is in several models"
        node = self.builder.add(NodeKind.OTHER, kind, inputs=sources, layer=layer.path, class_name=kind)
        return self._add_batch_norm(layer, own, Value((node,)), training=False, stays=True)

    def _add_nested(
        self, layer: KerasLayer, model: KerasModel, sources: Sequence[Value], *, training: bool
    ) -> list[Value]:
        if not model.is_connected:
            return [self._add_unconnected(layer, model, sources)]
        return self._add_model(model, sources, training=training) or [self._add_other(layer, sources)]

    def _facts(self, layer: KerasLayer) -> dict[str, Any]:
        return {"layer": layer.path, "class_name": layer.kind}

    def _add_other(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        reads = self._own(layer).values()
        if len(sources) == 1 and layer.kind in _KEEPS_SHAPE:
            return self._pass(NodeKind.OTHER, layer, sources[0])
        node = self.builder.add(NodeKind.OTHER, layer.kind, inputs=sources, reads=reads, **self._facts(layer))
        return Value((node,))

    def _pass(
        self, kind: NodeKind, layer: KerasLayer, value: Value, *, shape: Shape | None = None, **facts: Any
    ) -> Value:
        """Add a layer that gives each channel anew."""
        facts = {**self._facts(layer), **facts}
        return self.builder.add_elementwise(
            kind, layer.kind, value, shape=shape, reads=self._own(layer).values(), **facts
        )

    def _add_batch_norm(
        self, layer: KerasLayer, own: Mapping[str, str], value: Value, *, training: bool, stays: bool
    ) -> Value:
        lengths = [count_elements(self.tensors[key].shape) for key in own.values()]
        check_lengths(layer.path, lengths)
        count = lengths[0]
        axis, rank = layer.config.get("axis", _LAST), self._rank_of(layer, value)
        axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
        place = _normalise(axis, rank, first=int(layer.is_distributed))
        if value.shape is None and rank is not None:
            value = dataclasses.replace(value, shape=self.builder.unknowns(rank))
        eps = layer.config.get("epsilon", 1e-3)
        dtype = _find_dtype(layer)
        stays = stays or (value.dtype is not None and dtype is not None and value.dtype != dtype)  # it converts, too
        node = self.builder.add(
            NodeKind.BATCH_NORM,
            layer.kind,
            inputs=[self.builder.channels_of(value, place, count)],
            parameters=own,
            channels=count,
            eps=float(eps) if isinstance(eps, int | float) else None,
            training=self._uses_batch(layer, training=training),
            owner=Owner.PART if stays else Owner.WHOLE,
            **self._facts(layer),
        )
        shape = value.shape
        if shape is not None and -len(shape) <= place < len(shape):
            place %= len(shape)
            shape = (*shape[:place], Extent(count), *shape[place + 1 :])
        return self.builder.give(node, shape, place)

    def _uses_batch(self, layer: KerasLayer, *, training: bool) -> bool:
        """Return whether it normalises by the batch when the model predicts.

        A layer that is not trainable never does since TensorFlow 2 and in Keras 3, also where it is called with
        training=True; the modes of Keras 1 that are not 0 do.
        """
        is_frozen = layer.config.get("trainable") is False and self.version >= _FROZEN_SINCE
        return (training and not is_frozen) or bool(layer.config.get("mode"))

    def _rank_of(self, layer: KerasLayer, value: Value) -> int | None:
        if value.shape is not None:
            return len(value.shape)
        build = layer.entry.get("build_config")
        shape = build.get("input_shape") if isinstance(build, dict) else None
        return len(shape) if isinstance(shape, list) else None

    def _add_producer(self, layer: KerasLayer, own: Mapping[str, str], value: Value) -> Value:
        shape = self.tensors[own["weight"]].shape
        space = KERNELS[layer.kind]
        rank = space + 2 + layer.is_distributed if space else self._rank_of(layer, value)
        if len(shape) != max(space + 2, 2):
            return self._add_other(layer, [value])
        first = space and layer.config.get("data_format") == "channels_first"
        axis = -(space + 1) if first else _LAST
        taps = shape[2:]
        if layer.kind in SEPARABLE and "depthwise_weight" in own:
            taps = self.tensors[own["depthwise_weight"]].shape[2:]
        # a kernel of one tap never reaches beyond the border
        padded = layer.config.get("padding", "valid") != "valid" and any(extent > 1 for extent in taps)
        if layer.kind in SEPARABLE:  # two convolutions, one after the other
            value, padded = self._add_first_half(layer, own, value, axis, padded=padded), False
        groups, multiplier = self._groups(layer), 1
        transposed = layer.kind in TRANSPOSED
        if transposed:
            strides = _per_axis(layer.config.get("strides"), space)
            one = strides is not None and layer.config.get("output_padding") is None
            axes = zip(shape[2:], strides or (), strict=False)
            padded = not one or not meets_all_taps(Axis(size, stride=stride) for size, stride in axes)
        kind = NodeKind.CONV_TRANSPOSE if transposed else NodeKind.CONVOLUTION if space else NodeKind.LINEAR
        if layer.kind in DEPTHWISE:
            channels, multiplier = shape[0], self._multiplier(layer, shape[0])
            groups = inputs = channels // multiplier
        else:
            channels, inputs = (shape[1], shape[0]) if transposed else (shape[0], shape[1] * groups)
        weight = {role: own[role] for role in ("weight", "bias") if role in own}
        node = self.builder.add(
            kind,
            layer.kind,
            inputs=[self.builder.channels_of(value, axis, inputs)],
            parameters=weight,
            channels=channels,
            groups=groups,
            padded=padded,
            **self._facts(layer),
        )
        if "bias" in own:
            check_lengths(layer.path, [channels, count_elements(self.tensors[own["bias"]].shape)])
        moves, kernel = bool(space) and layer.kind not in SEPARABLE, shape[2:] if space and not transposed else ()
        after = self._shape_after(layer, value, rank, axis, channels, moves=moves, kernel=kernel if moves else ())
        result = self.builder.give(node, after, axis)
        return self._add_activation(layer, result)

    def _shape_after(
        self,
        layer: KerasLayer,
        value: Value,
        rank: int | None,
        axis: int,
        channels: int,
        *,
        moves: bool,
        kernel: Sequence[int] = (),
    ) -> Shape | None:
        """Return the shape of what a convolution or Dense gives: its positions are others, or the same.

        Args:
            kernel: its extents, where they tell how many positions there are.
        """
        if rank is None:
            return None
        shape = list(self.builder.unknowns(rank))
        if value.shape is not None and len(value.shape) == rank:
            shape = [value.shape[0], *shape[1:]] if moves else list(value.shape)
            if kernel:
                first = rank - len(kernel) - (axis == _LAST)
                extents = value.shape[first : first + len(kernel)]
                shape[first : first + len(kernel)] = self._slide(layer, kernel, extents)
        shape[axis] = Extent(channels)
        return tuple(shape)

    def _slide(self, layer: KerasLayer, window: Sequence[int], extents: Shape) -> Shape:
        """Slide a window over some axes; return the positions."""
        count, padding = len(window), layer.config.get("padding", "valid")
        strides = _per_axis(layer.config.get("strides"), count) or tuple(window)  # a pool's own
        dilations = _per_axis(layer.config.get("dilation_rate", 1), count)
        if dilations is None or padding not in ("valid", "same", "causal") or len(extents) != count:
            return self.builder.unknowns(len(extents))
        found = []
        for extent, size, stride, dilation in zip(extents, window, strides, dilations, strict=True):
            reach = dilation * (size - 1) + 1 if padding == "valid" else 1
            number = (extent.number - reach) // stride + 1
            found.append(Extent(number) if extent.is_known and number > 0 else self.builder.unknown())
        return tuple(found)

    def _groups(self, layer: KerasLayer) -> int:
        groups = layer.config.get("groups", 1) if layer.kind in CONVOLUTIONS else 1
        return groups if isinstance(groups, int) and groups > 0 else 1

    def _multiplier(self, layer: KerasLayer, channels: int) -> int:
        multiplier = layer.config.get("depth_multiplier", 1)
        return multiplier if isinstance(multiplier, int) and 0 < multiplier <= channels else 1

    def _add_first_half(
        self, layer: KerasLayer, own: Mapping[str, str], value: Value, axis: int, *, padded: bool
    ) -> Value:
        """Add the first half of a SeparableConv: a fixed filter of each channel, without a bias."""
        key = own.get("depthwise_weight")
        tensor = self.tensors[key] if key is not None else None
        if key is None or tensor is None or tensor.dtype not in FLOATS:
            return self._add_other(layer, [value])
        channels = tensor.shape[0]
        multiplier = self._multiplier(layer, channels)
        taps = to_float64(read_bytes(tensor), tensor.dtype).reshape(channels, -1).sum(axis=1)
        factors = () if padded or not np.isfinite(taps).all() else tuple(taps.tolist())
        read = read_along(value, axis, channels // multiplier)
        rows = None if read is None else np.repeat(read, multiplier, axis=0)
        node = self.builder.add(
            NodeKind.CHANNELWISE,
            layer.kind,
            inputs=[(value, rows)],
            reads=[key],
            channels=channels,
            factors=factors,
            **self._facts(layer),
        )
        rank = KERNELS[layer.kind] + 2 + layer.is_distributed
        after = self._shape_after(layer, value, rank, axis, channels, moves=True, kernel=tensor.shape[2:])
        return self.builder.give(node, after, axis)

    def _add_activation(self, layer: KerasLayer, value: Value) -> Value:
        """Add the activation that a convolution or Dense applies to its result itself."""
        activation = layer.config.get("activation")
        if activation in (None, "linear"):
            return value
        name = activation if isinstance(activation, str) else "activation"
        kind = NodeKind.ACTIVATION if name in _ACTIVATIONS else NodeKind.OTHER
        return self.builder.add_elementwise(kind, name, value, **self._facts(layer))

    # layers without weights

    def same(self, _: KerasLayer, sources: Sequence[Value]) -> Value:
        """Hand on what the layer reads."""
        return sources[0]

    def activation(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Add an Activation, by the name of its function."""
        name = layer.config.get("activation")
        if name == "linear":
            return sources[0]
        return self._pass(NodeKind.ACTIVATION if name in _ACTIVATIONS else NodeKind.OTHER, layer, sources[0])

    def relu(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Add a ReLU without a limit."""
        plain = layer.config.get("max_value") is None and not layer.config.get("threshold")
        return self._pass(NodeKind.ACTIVATION if plain else NodeKind.OTHER, layer, sources[0])

    def leaky(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Add a LeakyReLU or PReLU."""
        return self._pass(NodeKind.ACTIVATION, layer, sources[0])

    def pool(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Add a pool; padding does not count in Keras's averages."""
        value, kind = sources[0], NodeKind.MAX_POOL if "Max" in layer.kind else NodeKind.AVERAGE
        space = int(re.sub(r"\D", "", layer.kind) or 0)
        axis = _find_axis(layer, space)
        first = 1 + layer.is_distributed
        if value.shape is None or len(value.shape) != space + 1 + first or not _lies_along(value, axis, first):
            return self._add_other(layer, sources)
        whole = layer.kind.startswith("Global")
        shape = [Extent(1) if whole else self.builder.unknown() for _ in value.shape]
        window = _per_axis(layer.config.get("pool_size"), space)
        if window is not None and not whole:
            start = first + (axis != _LAST)
            shape[start : start + space] = self._slide(layer, window, value.shape[start : start + space])
        shape[:first], shape[axis] = value.shape[:first], value.shape[axis]
        given = self._pass(kind, layer, value, shape=tuple(shape))
        return given if not whole or layer.config.get("keepdims") else reshape(given, (*shape[:first], shape[axis]))

    def upsample(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Add an interpolation whose weights sum to one."""
        return self._move(NodeKind.AVERAGE if layer.config.get("interpolation", "nearest") in _CONV_AVERAGES
                          else NodeKind.OTHER, layer, sources)  # fmt: skip

    def pad(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Add a padding with zeros."""
        return self._move(NodeKind.CHANNELWISE, layer, sources)

    def crop(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Add a crop, which keeps fewer positions."""
        return self._move(NodeKind.AVERAGE, layer, sources)

    def _move(self, kind: NodeKind, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        value, space = sources[0], int(layer.kind[-2])
        axis = _find_axis(layer, space)
        first = 1 + layer.is_distributed
        if value.shape is None or len(value.shape) != space + 1 + first or not _lies_along(value, axis, first):
            return self._add_other(layer, sources)
        shape = list(self.builder.unknowns(len(value.shape)))
        shape[:first], shape[axis] = value.shape[:first], value.shape[axis]
        return self._pass(kind, layer, value, shape=tuple(shape))

    def join(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Add an Add, Subtract, Average or Multiply."""
        ranks = {value.rank for value in sources}
        if len(sources) < 2 or len(ranks) > 1 or (layer.kind in ("Multiply", "Subtract") and len(sources) != 2):
            return self._add_other(layer, sources)
        total, facts = sources[0], self._facts(layer)
        if layer.kind == "Multiply":
            return self.builder.add_joint(NodeKind.GATE, layer.kind, total, sources[1], **facts)
        if layer.kind == "Subtract":
            return self.builder.add_joint(NodeKind.ADD, layer.kind, total, sources[1], factors=(1.0, -1.0), **facts)
        for value in sources[1:]:
            total = self.builder.add_joint(NodeKind.ADD, layer.kind, total, value, **facts)
        if layer.kind == "Average":
            total = self._pass(NodeKind.CHANNELWISE, layer, total, factors=(1 / len(sources),))
        return total

    def concatenate(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Join along the last axis, where the layer says nothing else."""
        axis = layer.config.get("axis", _LAST)
        return concatenate(sources, axis) if isinstance(axis, int) else self._add_other(layer, sources)

    def flatten(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Flatten all axes but the first, channels last."""
        value, first = sources[0], 1 + layer.is_distributed
        if value.shape is None or len(value.shape) < first:
            return self._add_other(layer, sources)
        if layer.config.get("data_format") == "channels_first" and len(value.shape) > first:
            value = transpose(value, (*range(first), *range(first + 1, len(value.shape)), first))
        shape = value.shape or ()
        return reshape(value, (*shape[:first], size_of(shape[first:])))

    def reshape(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Reshape each sample."""
        value, wanted = sources[0], layer.config.get("target_shape")
        if value.shape is None or not isinstance(wanted, list) or not all(isinstance(one, int) for one in wanted):
            return self._add_other(layer, sources)
        rest = fill_in(
            [None if one == -1 else Extent(one) for one in wanted], size_of(value.shape[1:]), self.builder.unknown
        )
        return reshape(value, (value.shape[0], *rest))

    def permute(self, layer: KerasLayer, sources: Sequence[Value]) -> Value:
        """Return the axes of each sample in another order."""
        order = layer.config.get("dims")
        if not isinstance(order, list) or not all(isinstance(one, int) for one in order):
            return self._add_other(layer, sources)
        return transpose(sources[0], (0, *order))


def _find_dtype(layer: KerasLayer) -> str | None:
    """Return the name of the dtype that a layer computes in; None where its configuration does not say it plainly."""
    policy = layer.config.get("dtype")
    inside = policy.get("config") if isinstance(policy, dict) else None
    name = inside.get("name") if isinstance(inside, dict) else policy
    return name.removeprefix("mixed_") if isinstance(name, str) else None


def _per_axis(value: object, count: int) -> tuple[int, ...] | None:
    """Return a number for each axis, or one for all of them; None where it is something else."""
    numbers = list(value) if isinstance(value, list | tuple) else [value] * count
    found = tuple(one for one in numbers if isinstance(one, int) and one > 0)
    return found if len(found) == len(numbers) == count else None


def _find_axis(layer: KerasLayer, space: int) -> int:
    return -(space + 1) if layer.config.get("data_format") == "channels_first" else _LAST


def _lies_along(value: Value, axis: int, first: int) -> bool:
    """Return whether channels lie along no other axis than this and the first ones."""
    rank = len(value.shape or ())
    return value.spread is None and all(one < first or one == axis % rank for one in value.axes)


def _normalise(axis: object, rank: int | None, *, first: int) -> int:
    """Return the axis counted from the end, where that can be told; positive numbers are axes of an unknown rank.

    Args:
        first: axes before those that it is counted among.
    """
    if not isinstance(axis, int):
        return 1 << 30  # several axes, or none: never the axis of a producer
    return axis + first - rank if rank is not None and axis >= 0 else axis


_POOLS = tuple(f"{kind}{digit}D" for kind in ("MaxPooling", "AveragePooling", "GlobalMaxPooling",
                                              "GlobalAveragePooling") for digit in "123")  # fmt: skip
_JOINING = ("Add", "Subtract", "Average", "Multiply", "Concatenate")
_MOVED = tuple(f"{kind}{digit}D" for kind in ("UpSampling", "ZeroPadding", "Cropping") for digit in "123")
_DISTRIBUTED = (*_DROPOUTS, *_POOLS, *_MOVED, "Activation", "ReLU", "LeakyReLU", "ActivityRegularization", "Flatten")
_LAYERS: Mapping[str, Callable[[_Building, KerasLayer, Sequence[Value]], Value]] = {
    **dict.fromkeys((*_DROPOUTS, "ActivityRegularization", "Identity"), _Building.same),
    **dict.fromkeys(_POOLS, _Building.pool),
    **dict.fromkeys((f"UpSampling{digit}D" for digit in "123"), _Building.upsample),
    **dict.fromkeys((f"ZeroPadding{digit}D" for digit in "123"), _Building.pad),
    **dict.fromkeys((f"Cropping{digit}D" for digit in "123"), _Building.crop),
    **dict.fromkeys(_JOINING[:4], _Building.join),
    "Activation": _Building.activation,
    "ReLU": _Building.relu,
    "LeakyReLU": _Building.leaky,
    "PReLU": _Building.leaky,
    "Concatenate": _Building.concatenate,
    "Flatten": _Building.flatten,
    "Reshape": _Building.reshape,
    "Permute": _Building.permute,
}


def _names(references: Sequence[Reference]) -> set[str]:
    return {name for name, _, _ in references}
