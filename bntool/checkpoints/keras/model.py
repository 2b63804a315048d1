"""The configuration of a Keras model: layers, nested models, and which layer reads what another wrote.

Both ways to write it are read: that of Keras 3 (``__keras_tensor__`` with a ``keras_history``) and that of Keras 2 and
tf_keras (``[layer, node, tensor, {arguments}]``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from bntool.checkpoints.containers.json_texts import read_json
from bntool.checkpoints.keras.keras_1 import translate_layer
from bntool.errors import CorruptFileError, UnsafeFileError
from bntool.names import join_name

MAX_CONFIG = 1 << 28
MAX_LAYERS = 100_000
MAX_NESTING = 32
_PACKAGES = ("keras", "tf_keras", "tensorflow")  # that Keras's own classes are in
_MODELS = ("Functional", "Model", "Sequential")

Reference: TypeAlias = tuple[str, int, int]  # layer, which call of it, which of its outputs


@dataclass(frozen=True)
class KerasLayer:
    """One layer of a model.

    Attributes:
        name: as in the model.
        path: the same with the names of the models around it, joined by dots.
        class_name, module: of its class.
        kind: the class, where it is Keras's own; else a name that no class of Keras has: its code is not in the file.
        config: what its constructor takes.
        calls: for each call what it reads, in order; of a Sequential model nothing.
        trains: for each call whether it is told to compute as in training, whatever the model does.
        model: the layers inside, where the layer is a model itself.
        is_distributed: it lies in a TimeDistributed, which calls it for each element of the second axis; ``kind`` and
            ``config`` are those of the layer inside.
        is_keras_1: it is written as Keras 1 does; ``kind`` and ``config`` are in the words of Keras 2.
        entry: the JSON object that all this was read from.
    """

    name: str
    path: str
    class_name: str
    module: str
    kind: str
    config: Mapping[str, Any] = field(repr=False)
    calls: tuple[tuple[Reference, ...], ...]
    trains: tuple[bool, ...]
    model: KerasModel | None
    entry: Any = field(repr=False, compare=False)
    is_distributed: bool = False
    is_keras_1: bool = False

    @property
    def own_config(self) -> Any:
        """The JSON object of what the constructor takes, that of the layer inside a TimeDistributed."""
        return self.entry["config"]["layer"]["config"] if self.is_distributed else self.entry["config"]

    @property
    def shared_number(self) -> int | None:
        """The number that Keras 3 gives a layer which is in several models, the same in each; other layers may have
        one, too.
        """
        number = self.entry.get("shared_object_id")
        return number if isinstance(number, int) else None

    @property
    def is_layer(self) -> bool:
        """Whether it can have weights: functions of ``keras.ops`` take part in a graph, but are no layers."""
        return not self.module.startswith(("keras.src.ops", "keras.ops"))


@dataclass(frozen=True)
class KerasModel:
    """A Functional or Sequential model.

    Attributes:
        kind: the class of Keras, or a name that no class of Keras has, as in a layer.
        is_sequential: each layer reads the one before it.
        layers: in the order of the file.
        inputs, outputs: of a Functional model.
        entry: the JSON object that holds ``layers``.
        counts_own, counts_own_shown: nested models whose calls the file counts from one, where layers read them and
            where the outputs are named; here all are counted from zero.
    """

    kind: str
    is_sequential: bool
    layers: tuple[KerasLayer, ...]
    inputs: tuple[Reference, ...]
    outputs: tuple[Reference, ...]
    entry: Any = field(repr=False, compare=False)
    counts_own: frozenset[str] = frozenset()
    counts_own_shown: frozenset[str] = frozenset()

    @property
    def is_connected(self) -> bool:
        """Whether its layers say all that it computes; a subclass may have a forward of its own."""
        return self.kind in _MODELS

    def walk(self) -> Iterator[KerasLayer]:
        """Yield all layers, those of nested models after the model that holds them."""
        for layer in self.layers:
            yield layer
            if layer.model is not None:
                yield from layer.model.walk()


def _find_kind(entry: Mapping[str, Any]) -> str:
    """Return the class of Keras that an object is of; for other classes what they are registered as, or where they lie.

    A class that was registered wins over Keras's own, whatever its name; Keras 1 and 2 write the name alone.
    """
    class_name, registered = str(entry.get("class_name", "")), entry.get("registered_name")
    module = entry.get("module", "keras")
    is_own = isinstance(module, str) and module.split(".")[0] in _PACKAGES
    if is_own and registered in (None, "", class_name):
        return class_name
    return registered if isinstance(registered, str) and ">" in registered else f"{module or 'custom'}.{class_name}"


def parse_config(data: bytes | str) -> Any:
    """Return the JSON of a configuration.

    Raises:
        CorruptFileError: it is none.
        UnsafeFileError: it is absurdly large.
    """
    if len(data) > MAX_CONFIG:
        raise UnsafeFileError(f"the configuration of the model has {len(data)} bytes, above the limit of {MAX_CONFIG}")
    return read_json(data, what="the configuration of the model", allow_nan=True)


def read_model(config: Any) -> KerasModel | None:
    """Return the model that a configuration describes; None for one whose layers are made by code of its own.

    Raises:
        CorruptFileError: it contradicts itself.
        UnsafeFileError: it is built to exhaust memory.
    """
    try:
        return _read_model(config, "", 0)
    except RecursionError as error:
        raise CorruptFileError("the configuration of the model is nested too deeply") from error


def _read_model(entry: Any, path: str, depth: int) -> KerasModel | None:
    config = entry.get("config") if isinstance(entry, dict) else None
    if isinstance(config, list) and entry.get("class_name") == "Sequential":  # Keras before 2.2.3
        config = {"layers": config}
    layers = config.get("layers") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(layers, list) or not all(isinstance(one, dict) for one in layers):
        return None
    is_sequential = "output_layers" not in config
    if is_sequential and not _is_sequential(entry, layers):
        return None
    if depth > MAX_NESTING or len(layers) > MAX_LAYERS:
        raise UnsafeFileError(f"a model of {len(layers)} layers, {depth} models deep")
    names = [_name_of(one) for one in layers]
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise CorruptFileError("two layers of a model have this name", tensor=twice)
    known = frozenset(names)
    read = tuple(_read_layer(one, name, path, known, depth) for one, name in zip(layers, names, strict=True))
    inputs = tuple(_reference(found) for found in find_references(config.get("input_layers"), known))
    outputs = tuple(_reference(found) for found in find_references(config.get("output_layers"), known))
    model = _count_calls_from_zero(KerasModel(_find_kind(entry), is_sequential, read, inputs, outputs, config))
    _check_references(model)
    return model


def _is_sequential(entry: Mapping[str, Any], layers: Sequence[Any]) -> bool:
    """Tell a model with the layers of a Sequential: a subclass has a name of its own, and is written without calls all
    the same.
    """
    return entry.get("class_name") == "Sequential" or not any("inbound_nodes" in one for one in layers)


def _name_of(entry: Mapping[str, Any]) -> str:
    config = entry.get("config")
    name = entry.get("name") or (config.get("name") if isinstance(config, dict) else None)
    if not isinstance(name, str):
        raise CorruptFileError("a layer of the model has no name")
    return name


def _read_layer(entry: Any, name: str, path: str, known: frozenset[str], depth: int) -> KerasLayer:
    full = join_name(path, name)
    nodes = _nodes_of(entry)
    config = entry.get("config")
    module = entry.get("module")
    inside = _find_inside(entry, config)
    kind = _find_kind(entry if inside is None else inside)
    own = inside["config"] if inside is not None else config if isinstance(config, dict) else {}
    translated = translate_layer(kind, own)
    return KerasLayer(
        name=name,
        path=full,
        class_name=str(entry.get("class_name", "")),
        module=module if isinstance(module, str) else "",
        kind=translated[0] if translated else kind,
        config=translated[1] if translated else own,
        calls=tuple(tuple(_reference(found) for found in find_references(node, known)) for node in nodes),
        trains=tuple(_is_told_to_train(node) for node in nodes),
        model=_read_model(entry, full, depth + 1),
        entry=entry,
        is_distributed=inside is not None,
        is_keras_1=translated is not None,
    )


def _find_inside(entry: Any, config: Any) -> Any:
    """Return the layer that a TimeDistributed calls; None where it is a model, or this is another layer."""
    if _find_kind(entry) != "TimeDistributed" or not isinstance(config, dict):
        return None
    inside = config.get("layer")
    if not isinstance(inside, dict) or not isinstance(inside.get("config"), dict):
        return None
    return None if "layers" in inside["config"] else inside


def _nodes_of(entry: Any) -> list[Any]:
    """Return what a layer's entry says of its calls."""
    nodes = entry.get("inbound_nodes")
    return nodes if isinstance(nodes, list) else []


def find_references(value: Any, known: frozenset[str]) -> Iterator[list[Any]]:
    """Yield the lists ``[layer, call, output, ...]`` in a part of a configuration, in the order in which Keras reads
    them.
    """
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            config = value.get("config")
            yield from find_references(config.get("keras_history") if isinstance(config, dict) else None, known)
            return
        for key in sorted(value, key=str):
            yield from find_references(value[key], known)
    elif isinstance(value, list):
        if len(value) in (3, 4) and isinstance(value[0], str) and _are_counts(value[1:3]) and value[0] in known:
            yield value
            if len(value) == 4:
                yield from find_references(value[3], known)
            return
        for item in value:
            yield from find_references(item, known)


def _is_told_to_train(node: Any) -> bool:
    if isinstance(node, dict):
        return any((key == "training" and bool(item)) or _is_told_to_train(item) for key, item in node.items())
    return isinstance(node, list) and any(_is_told_to_train(item) for item in node)


def _are_counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _reference(found: Sequence[Any]) -> Reference:
    return (found[0], found[1], found[2])


def _count_calls_from_zero(model: KerasModel) -> KerasModel:
    """Return the model with references that count the calls of every layer from zero.

    A nested model starts with a call of its own that is not written down, and that Keras counts: Keras 3 where an
    output is a Functional model's, tf_keras wherever it is read. Every call that is written down is read.
    """
    nested = {layer.name: layer.model for layer in model.layers if layer.model is not None}
    if any(isinstance(node, dict) for layer in model.layers for node in _nodes_of(layer.entry)):
        shown = frozenset(name for name, inner in nested.items() if not inner.is_sequential)
        return replace(model, outputs=_shift(model.outputs, shown), counts_own_shown=shown)
    inside = [reference for layer in model.layers for call in layer.calls for reference in call]
    counted = nested.keys() - {name for name, call, _ in (*inside, *model.outputs) if call == 0}
    layers = (replace(one, calls=tuple(_shift(call, counted) for call in one.calls)) for one in model.layers)
    return replace(
        model,
        layers=tuple(layers),
        outputs=_shift(model.outputs, counted),
        counts_own=frozenset(counted),
        counts_own_shown=frozenset(counted),
    )


def _shift(references: Sequence[Reference], counted: Collection[str]) -> tuple[Reference, ...]:
    return tuple((name, max(call - (name in counted), 0), output) for name, call, output in references)


def _check_references(model: KerasModel) -> None:
    """Check that every call that is read exists; the calls of inputs are not written down."""
    calls = {layer.name: max(len(layer.calls), 1) for layer in model.layers}
    for references in (model.inputs, model.outputs, *(call for layer in model.layers for call in layer.calls)):
        for name, call, _ in references:
            if call >= calls[name]:
                raise CorruptFileError(f"call {call} of it is read, which is not there", tensor=name)


def calls_in_order(model: KerasModel) -> tuple[tuple[str, int], ...] | None:
    """Return the calls of layers that the outputs of a Functional model need, each after those that it reads.

    Returns:
        None where the graph goes in circles.
    """
    parents = _parents(model)
    finished: dict[tuple[str, int], None] = {}
    for name, call, _ in model.outputs:
        if not _walk_back((name, call), parents, {}, finished):
            return None
    return tuple(finished)


def _parents(model: KerasModel) -> Mapping[tuple[str, int], Sequence[tuple[str, int]]]:
    return {
        (layer.name, i): [(name, number) for name, number, _ in call]
        for layer in model.layers
        for i, call in enumerate(layer.calls or ((),))
    }


def _first_seen(model: KerasModel) -> dict[str, int]:
    """Return the layers, numbered in the order in which a walk back from the outputs first meets them."""
    seen: dict[str, int] = {}
    finished: dict[tuple[str, int], None] = {}
    parents = _parents(model)
    for name, call, _ in model.outputs:
        _walk_back((name, call), parents, seen, finished)
    return seen


def order_layers(model: KerasModel) -> tuple[str, ...] | None:
    """Return the names of the layers in the order in which Keras numbers them when it loads the model.

    By their distance from the outputs, the farthest first, and then in the order in which a depth-first walk from the
    outputs meets them: what ``map_graph`` of Keras and ``_map_graph_network`` of tf_keras do.

    Returns:
        None where the graph goes in circles.
    """
    if model.is_sequential:
        return tuple(layer.name for layer in model.layers)
    calls = calls_in_order(model)
    if calls is None:
        return None
    parents, seen = _parents(model), _first_seen(model)
    depth_of_call: dict[tuple[str, int], int] = {}
    depth_of_layer: dict[str, int] = {}
    for node in reversed(calls):
        depth = max(depth_of_call.get(node, 0), depth_of_layer.get(node[0], 0))
        depth_of_call[node] = depth_of_layer[node[0]] = depth
        for parent in parents[node]:
            depth_of_call[parent] = max(depth + 1, depth_of_call.get(parent, 0))
    for name, _, _ in model.inputs:  # inputs that no output needs
        if name not in depth_of_layer:
            depth_of_layer[name], seen[name] = 0, -1
    return tuple(sorted(depth_of_layer, key=lambda name: (-depth_of_layer[name], seen[name])))


def _walk_back(
    start: tuple[str, int],
    parents: Mapping[tuple[str, int], Sequence[tuple[str, int]]],
    seen: dict[str, int],
    finished: dict[tuple[str, int], None],
) -> bool:
    """Walk back depth first, without recursion; False where the graph goes in circles."""
    if start in finished:
        return True
    seen.setdefault(start[0], len(seen))
    waiting = [(start, iter(parents[start]))]
    open_nodes = {start}
    while waiting:
        node, rest = waiting[-1]
        parent = next(rest, None)
        if parent is None:
            waiting.pop()
            open_nodes.discard(node)
            finished[node] = None
        elif parent in open_nodes:
            return False
        elif parent not in finished:
            seen.setdefault(parent[0], len(seen))
            open_nodes.add(parent)
            waiting.append((parent, iter(parents[parent])))
    return True
