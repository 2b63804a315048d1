"""Checking whether weights are those of a model: its configuration against the variables of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bntool.checkpoints.files import quote
from bntool.checkpoints.keras.content import OPTIMIZERS, KerasContent, WeightsLayout
from bntool.checkpoints.keras.model import KerasLayer, KerasModel
from bntool.checkpoints.keras.weights import (
    BATCH_NORMS,
    DEPTHWISE,
    KERNELS,
    SEPARABLE,
    TRANSPOSED,
    expected_variables,
)
from bntool.checkpoints.tensors import Tensor, describe_shape
from bntool.errors import CorruptFileError

_PLAIN_POLICIES = ("DTypePolicy", "FloatDTypePolicy", "Policy")  # layers of others keep more than their variables


def describe_misfit(content: KerasContent) -> str:
    """Describe how the weights of a file contradict the configuration that it holds; "" where they belong together."""
    if content.model is None or not content.model.is_connected or not content.names.tensors:
        return ""
    fact = find_misfit(content, content.model)
    return f"the weights of this file are not those of its configuration: {fact}" if fact else ""


def find_misfit(content: KerasContent, model: KerasModel) -> str:
    """Return the first fact by which number or shapes of variables contradict a configuration; "" where none does.

    Raises:
        CorruptFileError: vectors of one layer differ in length.
    """
    names = content.names
    owners = {layer.path: owner for owner, layer in names.layers.items()}
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in names.tensors.items():
        owner, _, role = name.rpartition(".")
        own.setdefault(owner, {})[role] = tensor
    stray = _find_stray(content) if content.layout is WeightsLayout.NUMBERED else _find_unowned(content, model, own)
    held = {layer.shared_number for layer in model.walk() if owners.get(layer.path, "") in own}
    for layer in _walk_connected(model):
        expected = expected_variables(layer)
        if expected is None or not _is_plain(layer):
            continue
        tensors = own.get(owners.get(layer.path, ""), {})
        if not tensors and (layer.shared_number in held - {None} or _is_unclear(content, layer)):
            continue
        if len(tensors) != len(expected):
            fact = f"layer {quote(layer.path)} has {len(expected)} variables there, and {len(tensors)} in the file"
            return f"{fact}, which holds {stray} of no layer" if stray else fact
        fact = _compare_shapes(layer, tensors)
        if fact:
            return fact
    return f"the file holds {stray}, which belongs to no layer there" if stray else ""


def _walk_connected(model: KerasModel) -> Iterator[KerasLayer]:
    """Yield all layers but those of nested models with code of their own, which may make more or others."""
    for layer in model.layers:
        yield layer
        if layer.model is not None and layer.model.is_connected:
            yield from _walk_connected(layer.model)


def _is_plain(layer: KerasLayer) -> bool:
    """Return whether a layer keeps its variables as they are: quantized ones have scales, and others."""
    policy = layer.config.get("dtype")
    if isinstance(policy, dict):
        return policy.get("class_name") in _PLAIN_POLICIES
    return not isinstance(policy, str) or "_from_" not in policy


def _is_unclear(content: KerasContent, layer: KerasLayer) -> bool:
    """Return whether names of weights may not tell that they are this layer's, as those inside of nested models."""
    return content.layout is WeightsLayout.NAMED and "." in layer.path


def _find_stray(content: KerasContent) -> str:
    """Return a dataset where numbered weights of layers lie, which no layer reads; "" where there is none.

    Beside that container Keras keeps what models and layers have as attributes.
    """
    root = content.root
    for path in content.hdf5.datasets:
        if path.startswith(tuple(f"{name}/" for name in OPTIMIZERS)):
            continue
        group = path
        while group and group not in content.groups:
            group = group.rpartition("/")[0]
        layer = content.groups.get(group)
        inside = path.removeprefix(f"{group}/") if group else path
        if layer is None or layer.model is not None:
            connected = layer is None or layer.model is None or layer.model.is_connected
            if connected and inside.startswith(f"{root}/"):
                return quote(path)
            continue
        expected = expected_variables(layer)
        if expected is not None and _is_plain(layer) and inside not in {f"vars/{i}" for i in range(len(expected))}:
            return quote(path)
    return ""


def _find_unowned(content: KerasContent, model: KerasModel, own: Mapping[str, object]) -> str:
    """Return an owner of named weights that the model has no layer for; "" where there is none."""
    paths = tuple(f"{layer.path}." for layer in model.walk())
    for owner in own:
        if owner not in content.names.layers and not owner.startswith(paths) and owner != "top_level_model_weights":
            return quote(owner)
    return ""


def _compare_shapes(layer: KerasLayer, tensors: Mapping[str, Tensor]) -> str:
    if layer.kind in BATCH_NORMS:
        if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
            raise CorruptFileError("vectors of one layer differ in length", tensor=layer.path)
        return ""
    weight, space = tensors.get("weight"), KERNELS[layer.kind]
    if weight is None:
        return f"the file holds no kernel of layer {quote(layer.path)}"
    wanted = layer.config.get("filters" if space else "units")
    found = weight.shape[1 if layer.kind in TRANSPOSED else 0] if len(weight.shape) > 1 else None
    if layer.kind not in DEPTHWISE and isinstance(wanted, int) and found != wanted:
        return f"layer {quote(layer.path)} makes {wanted} channels there, and {found} in the file"
    window = layer.config.get("kernel_size")
    kernel = tensors.get("depthwise_weight", weight) if layer.kind in SEPARABLE else weight
    if isinstance(window, list | tuple) and list(kernel.shape[2:]) != list(window):
        return (
            f"layer {quote(layer.path)} has the kernel size {describe_shape(_whole(window))} there, and "
            f"{describe_shape(kernel.shape[2:])} in the file"
        )
    return ""


def _whole(window: Sequence[object]) -> list[int]:
    return [extent if isinstance(extent, int) else 0 for extent in window]
