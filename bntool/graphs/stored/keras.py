"""The graph of a Keras model: its configuration says which layer reads what, so that edges are proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bntool.batchnorm import STATISTICS
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.keras.content import KerasContent
from bntool.checkpoints.keras.model import KerasLayer, KerasModel, Reference, calls_in_order, order_layers
from bntool.checkpoints.keras.weights import BATCH_NORMS, CONVOLUTIONS, DEPTHWISE, KERNELS, SEPARABLE, TRANSPOSED
from bntool.checkpoints.tensors import Tensor, count_elements
from bntool.errors import CorruptFileError, RefusedError, UnsafeFileError
from bntool.graphs.graph import ModelGraph, NodeKind, Owner, check_lengths
from bntool.graphs.stored.builder import GraphBuilder

MAX_CALLS = 200_000  # of layers, each call of a nested model counted anew
_LAST = -1
_SAME_RANK = ("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "Dropout", "Dense", "Add", "Multiply",
              "Rescaling", *BATCH_NORMS)  # fmt: skip


def keras_graph(checkpoint: Checkpoint) -> ModelGraph:
    """The layers that the outputs need, those of nested models in their place.

    Raises:
        RefusedError: the file does not say how the layers are connected.
        CorruptFileError: the graph goes in circles, or vectors of one layer differ in length.
        UnsafeFileError: nested models that call each other without measure.
    """
    content = KerasContent.of(checkpoint)
    if content.model is None:
        raise RefusedError(
            "the file holds weights only, neither the graph of the model nor eps: give the configuration of the model "
            "(what model.to_json() says, or a .keras or .h5 file of it) with --keras-config FILE"
            if content.config is None
            else "the layers of this model are connected by Python code of its own, which is not in the file"
        )
    if not content.model.is_connected:
        raise RefusedError(
            f"the model is a {content.model.kind}, which is no class of Keras: its own code, which is not in the file, "
            "may do more than its layers; fold the model inside it, saved as a keras.Model"
        )
    return _Building(content, content.model, checkpoint.state_dicts[0].tensors).build()


class _Building:
    def __init__(self, content: KerasContent, model: KerasModel, tensors: Mapping[str, Tensor]) -> None:
        self.content, self.model, self.tensors = content, model, tensors
        self.builder = GraphBuilder()
        self.owners = {layer.path: owner for owner, layer in content.names.layers.items()}
        self.own: dict[str, dict[str, str]] = {}
        for key in tensors:
            owner, _, role = key.rpartition(".")
            self.own.setdefault(owner, {})[role] = key
        self.ranks: dict[int, int] = {}  # dimensions of what a node computes, where that is known
        self.calls = 0

    def build(self) -> ModelGraph:
        outputs = self._add_model(self.model, [], training=False)
        self.builder.add(NodeKind.OUTPUT, "output", inputs=outputs)
        return self.builder.finish()

    def _add_model(self, model: KerasModel, inputs: Sequence[int], *, training: bool) -> list[int]:
        """Add the calls of a model's layers; the nodes of its outputs.

        Args:
            inputs: nodes of what a nested model is called with.
            training: it is told to compute as in training.
        """
        if model.is_sequential:
            return self._add_sequence(model, inputs, training=training)
        calls = calls_in_order(model)
        if calls is None:
            raise CorruptFileError("the layers of the model read each other in a circle")
        values: dict[Reference, int] = {}
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
            for number, node in enumerate(self._add_layer(layer, sources, training=told, stays=stays)):
                values[name, call, number] = node
            for _, _, number in (r for r in self._readers(model) if r[:2] == (name, call)):
                values.setdefault((name, call, number), values[name, call, 0])
        return [values[reference] for reference in model.outputs if reference in values]

    def _readers(self, model: KerasModel) -> Sequence[Reference]:
        return [r for layer in model.layers for call in layer.calls for r in call if r[2]] + [
            r for r in model.outputs if r[2]
        ]

    def _add_sequence(self, model: KerasModel, inputs: Sequence[int], *, training: bool) -> list[int]:
        nodes = list(inputs)
        for position, layer in enumerate(model.layers):
            if layer.kind == "InputLayer" and nodes:
                continue
            first = not nodes and layer.kind != "InputLayer"
            if first:  # formerly the first layer carried the shape of the input
                shape = layer.config.get("batch_input_shape")
                nodes = [self._add_input(shape)]
            nodes = self._add_layer(layer, nodes, training=training, stays=first and position == 0)
        return nodes

    def _is_numbered_as_expected(self, model: KerasModel) -> bool:
        """Whether the file numbers its layers as we would: only then numbers can be given anew."""
        return order_layers(model) == tuple(layer.name for layer in model.layers)

    def _add_input(self, shape: object) -> int:
        node = self.builder.add(NodeKind.INPUT, "input")
        if isinstance(shape, list):
            self.ranks[node] = len(shape)
        return node

    def _add_layer(self, layer: KerasLayer, sources: Sequence[int], *, training: bool, stays: bool) -> list[int]:
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise UnsafeFileError(f"the models of the file call more than {MAX_CALLS} layers")
        if layer.model is not None and not layer.model.is_connected:
            return [self._add_unconnected(layer, layer.model, sources)]
        if layer.model is not None:
            return self._add_model(layer.model, sources, training=training) or [self._add_other(layer, sources)]
        if layer.kind == "InputLayer":
            return [self._add_input(layer.config.get("batch_shape", layer.config.get("batch_input_shape")))]
        own = self.own.get(self.owners.get(layer.path, ""), {})
        plain = len(sources) == 1
        if plain and layer.kind in BATCH_NORMS and own.keys() >= set(STATISTICS):
            return [self._add_batch_norm(layer, own, sources[0], training=training, stays=stays)]
        if plain and layer.kind in KERNELS and "weight" in own and not layer.config.get("lora_rank"):
            return [self._add_producer(layer, own, sources[0])]
        return [self._add_other(layer, sources)]

    def _add_unconnected(self, layer: KerasLayer, model: KerasModel, sources: Sequence[int]) -> int:
        """A nested model whose own code, which is not in the file, calls its layers: it lies around each of them."""
        inside = {one.path: self.own.get(self.owners.get(one.path, ""), {}) for one in model.walk()}
        norms = [one for one in model.walk() if one.kind in BATCH_NORMS and inside[one.path].keys() >= set(STATISTICS)]
        reads = [key for path, own in inside.items() if path not in {one.path for one in norms} for key in own.values()]
        kind = f"the own code of {model.kind}"
        node = self.builder.add(NodeKind.OTHER, kind, inputs=sources, reads=reads, layer=layer.path, class_name=kind)
        for one in norms:
            self._add_batch_norm(one, inside[one.path], node, training=False, stays=True)
        return node

    def _add_other(self, layer: KerasLayer, sources: Sequence[int]) -> int:
        own = self.own.get(self.owners.get(layer.path, ""), {})
        node = self.builder.add(
            NodeKind.OTHER, layer.kind, inputs=sources, reads=own.values(), layer=layer.path,
            class_name=layer.kind,
        )  # fmt: skip
        rank = self.ranks.get(sources[0]) if sources and layer.kind in _SAME_RANK else None
        if layer.kind == "Flatten" or (layer.kind.startswith("Global") and not layer.config.get("keepdims")):
            rank = 2
        if rank is not None:
            self.ranks[node] = rank
        return node

    def _add_batch_norm(
        self, layer: KerasLayer, own: Mapping[str, str], source: int, *, training: bool, stays: bool
    ) -> int:
        lengths = [count_elements(self.tensors[key].shape) for key in own.values()]
        check_lengths(layer.path, lengths)
        axis, rank = layer.config.get("axis", _LAST), self._rank_of_input(layer, source)
        axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
        eps = layer.config.get("epsilon", 1e-3)
        node = self.builder.add(
            NodeKind.BATCH_NORM,
            layer.kind,
            inputs=[source],
            layer=layer.path,
            class_name=layer.kind,
            parameters=own,
            channels=lengths[0],
            eps=float(eps) if isinstance(eps, int | float) else None,
            training=training or bool(layer.config.get("mode")),  # of Keras 1: not 0 are statistics of the batch
            owner=Owner.PART if stays else Owner.WHOLE,
            axis=_normalise(axis, rank),
        )
        if rank is not None:
            self.ranks[node] = rank
        return node

    def _rank_of_input(self, layer: KerasLayer, source: int) -> int | None:
        if source in self.ranks:
            return self.ranks[source]
        build = layer.entry.get("build_config")
        shape = build.get("input_shape") if isinstance(build, dict) else None
        return len(shape) if isinstance(shape, list) else None

    def _add_producer(self, layer: KerasLayer, own: Mapping[str, str], source: int) -> int:
        shape = self.tensors[own["weight"]].shape
        space = KERNELS[layer.kind]
        if len(shape) != max(space + 2, 2):
            return self._add_other(layer, [source])
        rank = space + 2 if space else self._rank_of_input(layer, source)
        first = space and layer.config.get("data_format") == "channels_first"
        facts: dict[str, Any] = {
            "layer": layer.path,
            "class_name": layer.kind,
            "axis": _normalise(1 if first else _LAST, rank),
            "padded": layer.config.get("padding", "valid") != "valid",
        }
        weight = {role: own[role] for role in ("weight", "bias") if role in own}
        if layer.kind in SEPARABLE:  # two convolutions, one after the other
            source = self._add_depthwise(layer, own, source, facts)
            facts["padded"] = False
        if layer.kind in DEPTHWISE:
            node = self._add_depthwise(layer, own, source, facts)
        else:
            groups = self._groups(layer) if layer.kind in CONVOLUTIONS else 1
            transposed = layer.kind in TRANSPOSED
            kind = NodeKind.CONV_TRANSPOSE if transposed else NodeKind.CONVOLUTION if space else NodeKind.LINEAR
            channels, inputs = (shape[1], shape[0]) if transposed else (shape[0], shape[1] * groups)
            node = self.builder.add(
                kind, layer.kind, inputs=[source], parameters=weight, channels=channels, groups=groups,
                input_channels=inputs, **facts,
            )  # fmt: skip
        if "bias" in own:
            check_lengths(layer.path, [self._channels(layer, shape), count_elements(self.tensors[own["bias"]].shape)])
        if rank is not None:
            self.ranks[node] = rank
        return self._add_activation(layer, node, rank)

    def _channels(self, layer: KerasLayer, shape: Sequence[int]) -> int:
        return shape[1] if layer.kind in TRANSPOSED else shape[0]

    def _groups(self, layer: KerasLayer) -> int:
        groups = layer.config.get("groups", 1)
        return groups if isinstance(groups, int) and groups > 0 else 1

    def _add_depthwise(self, layer: KerasLayer, own: Mapping[str, str], source: int, facts: Mapping[str, Any]) -> int:
        """One convolution for each input channel: of a DepthwiseConv, or the first half of a SeparableConv."""
        half = layer.kind in SEPARABLE
        key = own.get("depthwise_weight") if half else own["weight"]
        if key is None:
            return self._add_other(layer, [source])
        channels = self.tensors[key].shape[0]
        multiplier = layer.config.get("depth_multiplier", 1)
        groups = channels // multiplier if isinstance(multiplier, int) and multiplier > 0 else channels
        parameters = {"weight": key} if half else {role: own[role] for role in ("weight", "bias") if role in own}
        return self.builder.add(
            NodeKind.CONVOLUTION, layer.kind, inputs=[source], parameters=parameters, channels=channels,
            groups=groups, input_channels=groups, has_bias_slot=not half, **facts,
        )  # fmt: skip

    def _add_activation(self, layer: KerasLayer, node: int, rank: int | None) -> int:
        """What a convolution or Dense applies to its result itself."""
        activation = layer.config.get("activation")
        if activation in (None, "linear"):
            return node
        name = activation if isinstance(activation, str) else "activation"
        after = self.builder.add(NodeKind.OTHER, name, inputs=[node], layer=layer.path, class_name=layer.kind)
        if rank is not None:
            self.ranks[after] = rank
        return after


def _normalise(axis: object, rank: int | None) -> int:
    """The axis counted from the end, where that can be told; positive numbers are axes of an unknown rank."""
    if not isinstance(axis, int):
        return 1 << 30  # several axes, or none: never the axis of a producer
    return axis - rank if rank is not None and axis >= 0 else axis


def _names(references: Sequence[Reference]) -> set[str]:
    return {name for name, _, _ in references}
