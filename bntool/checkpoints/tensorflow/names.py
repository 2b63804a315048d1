"""Names for the variables of a TensorFlow checkpoint, in PyTorch's words.

A checkpoint of TensorFlow 2 describes the Python objects that were saved (trackable_object_graph.proto): each variable
has the name that it was made with, and paths from the root. One of TensorFlow 1 has names only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bntool.checkpoints.checkpoint import ModuleInfo
from bntool.checkpoints.containers.json_texts import read_json
from bntool.checkpoints.containers.protobufs.reading import Buffer, Message
from bntool.checkpoints.containers.protobufs.writing import unused_name
from bntool.checkpoints.dtypes import INT64
from bntool.checkpoints.files import MemorySource
from bntool.checkpoints.other_names import TENSORFLOW_CLASS, TENSORFLOW_ROLES
from bntool.checkpoints.tensorflow.bundle import Bundle
from bntool.checkpoints.tensors import read_numbers
from bntool.errors import CorruptFileError, UnsafeFileError
from bntool.names import join_name

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_METADATA = "keras_metadata.pb"
_MAX_METADATA = 1 << 26
_COUNTERS = ("global_step", "save_counter")
_AVERAGE = "ExponentialMovingAverage"
_OPTIMIZER_SCALARS = ("beta1_power", "beta2_power")
# of objects: how an optimizer is held, and what it has that no layer has
_OPTIMIZER_EDGES = ("optimizer", "_optimizer")
_OPTIMIZER_PARTS = {"learning_rate", "_learning_rate"}


@dataclass(frozen=True)
class Naming:
    """The variables of the model by name.

    Attributes:
        variables: key in the file, by name in the state dict.
        averaged: the moving averages that TensorFlow 1 keeps beside variables, under the names of these.
        modules: the BatchNorm layers, with what the file says of them.
        entries: what the checkpoint is, its counters, and whether there are variables of an optimizer.
    """

    variables: Mapping[str, str]
    averaged: Mapping[str, str]
    modules: Mapping[str, ModuleInfo]
    entries: Mapping[str, Any]


def name_variables(bundle: Bundle) -> Naming:
    """Give every variable of a model its name; those of optimizers are left out.

    Raises:
        CorruptFileError, UnsafeFileError: the description of the objects is damaged.
    """
    text = bundle.read_text(_GRAPH)
    averages: dict[str, str] = {}
    configs: Mapping[str, Mapping[str, Any]] = {}
    if text is None:
        names, averages = _name_by_key(bundle)
        entries: dict[str, Any] = {"tensorflow": "variables by name, no graph"}
        has_optimizer = len(names) + len(averages) < len(bundle.tensors)
    else:
        objects = _Objects(text)
        names = objects.name(bundle)
        entries = {"tensorflow": "variables of objects, no graph"}
        has_optimizer = objects.has_optimizer
        if bundle.path.name == "variables.index":
            entries = {"tensorflow": "variables of a SavedModel, without its graph"}
            configs = dict(_read_configs(objects, names, bundle))
    if has_optimizer:
        entries["optimizer"] = "left out"
    for counter in _COUNTERS:
        key = names.pop(counter, None)
        if key is not None and bundle.tensors[key].dtype is INT64 and not bundle.tensors[key].shape:
            entries[counter] = int(read_numbers(bundle.tensors[key])[0])
    variables = _translate(names)
    modules = {
        layer: ModuleInfo(TENSORFLOW_CLASS, configs.get(layer, {}))
        for layer, role in (name.rpartition(".")[::2] for name in variables)
        if role == "running_var" and f"{layer}.running_mean" in variables
    }
    return Naming(variables, _translate(averages), modules, entries)


def _translate(names: Mapping[str, str]) -> dict[str, str]:
    translated: dict[str, str] = {}
    for name, key in names.items():
        layer, _, role = name.replace("/", ".").rpartition(".")
        role = TENSORFLOW_ROLES.get(role, role)
        translated[unused_name(join_name(layer, role), translated)] = key
    return translated


def _name_by_key(bundle: Bundle) -> tuple[dict[str, str], dict[str, str]]:
    """Return variables, and moving averages of them: what an optimizer keeps of a variable has its name with a part
    more.
    """
    names: dict[str, str] = {}
    averages: dict[str, str] = {}
    for key in bundle.tensors:
        owner, _, last = key.rpartition("/")
        if owner in bundle.tensors and last == _AVERAGE:
            averages[owner] = key
        elif owner not in bundle.tensors and key not in _OPTIMIZER_SCALARS:
            names[key] = key
    return names, averages


@dataclass
class _Object:
    """One node of the graph of objects.

    Attributes:
        children: by the name under which it holds them.
        values: its key in the file and the name that it was made with, by attribute.
    """

    children: dict[str, int] = field(default_factory=dict)
    values: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def is_optimizer(self) -> bool:
        return not _OPTIMIZER_PARTS.isdisjoint(self.children)


class _Objects:
    """The objects that were saved.

    Attributes:
        paths: of those that can be reached from the root without going through an optimizer, by number.
        has_optimizer: whether there is one.
    """

    def __init__(self, text: bytes) -> None:
        graph = Message(Buffer(MemorySource(text)), 0, len(text))
        self._nodes = []
        for message in graph.messages(1):
            node = _Object()
            for child in message.messages(1):
                node.children.setdefault(child.text(2), child.integer(1))
            for value in message.messages(2):
                node.values[value.text(1)] = (value.text(3), value.text(2))
            self._nodes.append(node)
        self.has_optimizer = any(node.is_optimizer for node in self._nodes)
        self.paths = dict(self._walk())

    def _walk(self) -> Iterator[tuple[int, str]]:
        """Walk over every object with its shortest path, breadth first."""
        waiting = deque([(0, "")] if self._nodes else [])
        seen = {0}
        while waiting:
            number, path = waiting.popleft()
            yield number, path
            for name, child in self._nodes[number].children.items():
                if not 0 <= child < len(self._nodes):
                    raise CorruptFileError(f"the objects name a number {child} of {len(self._nodes)}", tensor=_GRAPH)
                # keras.export.ExportArchive holds every variable twice
                is_copy = name == "_all_variables" and "variables" in self._nodes[number].children
                if child in seen or is_copy or name in _OPTIMIZER_EDGES or self._nodes[child].is_optimizer:
                    continue
                if len(path) + len(name) > 4096:
                    raise UnsafeFileError("a path of the objects is longer than 4096 characters", tensor=_GRAPH)
                seen.add(child)
                waiting.append((child, f"{path}/{name}" if path else name))

    def name(self, bundle: Bundle) -> dict[str, str]:
        """Return the key of each variable of the model by its name: the one it was made with, or else its path."""
        found: dict[str, tuple[str, str]] = {}  # path and the name it was made with, by key
        for number, path in self.paths.items():
            for attribute, (key, made_with) in self._nodes[number].values.items():
                if key in bundle.tensors and key not in found:
                    place = path if attribute == "VARIABLE_VALUE" else f"{path}/{attribute}"
                    found[key] = (place, made_with)
        usage = Counter(made_with for _, made_with in found.values())
        return {
            made_with if made_with and usage[made_with] == 1 else path: key for key, (path, made_with) in found.items()
        }

    def find(self, path: list[str]) -> _Object | None:
        """Return an object by the names on the way to it."""
        node = self._nodes[0] if self._nodes else None
        for name in path:
            number = node.children.get(name) if node is not None else None
            node = self._nodes[number] if number is not None else None
        return node

    def keys_of(self, node: _Object) -> Iterator[str]:
        """Yield keys of the variables that an object holds itself."""
        for child in node.children.values():
            for key, _ in self._nodes[child].values.values():
                yield key


def _read_configs(
    objects: _Objects, names: Mapping[str, str], bundle: Bundle
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the eps and momentum of BatchNorm layers that Keras 2 left beside the variables of a SavedModel."""
    found = bundle.folder.find(f"../{_METADATA}")
    if found is None:
        return
    layers = {key: name.replace("/", ".").rpartition(".")[0] for name, key in names.items()}
    with found as file:
        if file.size > _MAX_METADATA:
            raise UnsafeFileError(f"it has {file.size} bytes", path=file.path)
        text = file.read(0, file.size)
    try:
        for saved in Message(Buffer(MemorySource(text)), 0, len(text)).messages(1):
            config = _parse_config(saved.text(5))
            node = objects.find(saved.text(3).split(".")[1:]) if config else None
            key = next((key for key in objects.keys_of(node) if key in layers), None) if node is not None else None
            if key is not None:
                yield layers[key], config
    except (CorruptFileError, UnsafeFileError) as error:
        raise error.about(found.path) from None


def _parse_config(text: str) -> dict[str, Any]:
    """Parse eps and momentum from a layer's description; empty for other layers than BatchNorm."""
    layer = read_json(text, what="a layer's description", allow_nan=True)
    config = layer.get("config") if isinstance(layer, dict) else None
    if not isinstance(config, dict) or "moving_variance_initializer" not in config:
        return {}
    found: dict[str, Any] = {}
    if isinstance(config.get("epsilon"), float):
        found["eps"] = config["epsilon"]
    if isinstance(config.get("momentum"), float):
        found["momentum"] = round(1.0 - config["momentum"], 12)  # Keras says what is kept
    return found
