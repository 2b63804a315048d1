"""The places of the weights in a file that numbers them: the groups of HDF5 that Keras makes for the layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from bntool.checkpoints.keras.model import KerasLayer, KerasModel
from bntool.checkpoints.keras.weights import to_snake_case

CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # the latter in Keras 2.12

HasWeights = Callable[[str, str], bool]  # of the path of a layer and the group that it would have


def group_of_layers(
    model: KerasModel, *, order: Mapping[str, tuple[str, ...]], root: str, has_weights: HasWeights
) -> dict[str, str]:
    """Return the group of every layer of a model, by the path of the layer.

    Args:
        order: how Keras counts the layers of each model, by the path of the model.
        root: the container of the layers, one of :data:`CONTAINERS`.
        has_weights: whether a layer has weights. Keras 2.12 lists those that have twice, and counts both.
    """
    groups: dict[str, str] = {}

    def number(one: KerasModel, path: str, inside: str) -> None:
        for layer, group in _number_layers(one, order[path], inside, has_weights if root != CONTAINERS[0] else None):
            groups[layer.path] = group
            if layer.model is not None:
                number(layer.model, layer.path, f"{group}/{root}")

    number(model, "", root)
    return groups


def orders_in_file(model: KerasModel) -> dict[str, tuple[str, ...]]:
    """Return the order of the layers as the file lists them, by the path of the model."""
    nested = {layer.path: layer.model for layer in model.walk() if layer.model is not None}
    return {path: tuple(layer.name for layer in one.layers) for path, one in {"": model, **nested}.items()}


def holds_any(datasets: Collection[str]) -> HasWeights:
    """Return whether a file with these datasets has weights of a layer: some lie in its group."""
    groups = {path[:end] for path in datasets for end, sign in enumerate(path) if sign == "/"}
    return lambda _, group: group in groups


def _number_layers(
    model: KerasModel, order: Sequence[str], inside: str, counts_twice: HasWeights | None
) -> Iterator[tuple[KerasLayer, str]]:
    """Yield the layers of a model, without those of nested models, and the group of each.

    Args:
        order: names of the layers, as Keras counts.
        inside: the group around them, e.g. ``layers``.
        counts_twice: the layers that are listed a second time.
    """
    by_name = {layer.name: layer for layer in model.layers}
    counts: dict[str, int] = {}
    for position, name in enumerate(order):
        layer = by_name[name]
        if not layer.is_layer or (model.is_sequential and position == 0 and layer.kind == "InputLayer"):
            continue
        class_name = to_snake_case(layer.class_name.rpartition(">")[2])  # Keras 2 writes package>class
        count = counts.get(class_name, 0)
        group = f"{inside}/{class_name}_{count}" if count else f"{inside}/{class_name}"
        counts[class_name] = count + (2 if counts_twice is not None and counts_twice(layer.path, group) else 1)
        yield layer, group
