"""Tensors that a file holds once and names several times: a change of one would be a change of all."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.tensors import StoredTensor, Tensor


def elements_of(tensor: Tensor | None) -> Hashable:
    """Return a key that is equal for tensors made of the same elements of a file in the same order; None without
    elements.
    """
    if not isinstance(tensor, StoredTensor) or tensor.storage is None or not tensor.numel:
        return None
    storage = tensor.storage
    return id(storage.source), storage.offset, tensor.byte_range, tensor.shape, tensor.strides, tensor.dtype


def find_first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each further name of a tensor to its first name."""
    known: dict[Hashable, str] = {}
    first = {}
    for name, tensor in tensors.items():
        elements = elements_of(tensor)
        if elements is not None and known.setdefault(elements, name) != name:
            first[name] = known[elements]
    return first


def find_tied(state_dict: StateDict, names: Collection[str]) -> frozenset[str]:
    """Find the tensors that a module loads into one parameter together with another tensor of the state dict."""
    first = find_first_names(state_dict.tensors)
    tied = first.keys() | first.values()
    return frozenset(name for name in names if state_dict.full_name(name) in tied)
