"""Labels of channels, followed through operations that only move elements.

Each element of each traced tensor carries a label: a number that names the node that computed it and its channel there.
An operation that moves elements (view, permute, split, cat, ...) is replayed on the labels themselves, with its real
arguments; so where every element went is seen, not derived, whatever the operation is called. Fresh labels vary along
one axis only and are expanded views, which cost no memory until an operation has to copy them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST_PAIRS = 1 << 14  # beyond, everything is said to meet everything


@dataclass(frozen=True)
class Meeting:
    """The labels that a node reads, and on which of its own channels it reads each.

    Attributes:
        labels: each pair once.
        channels: for each of ``labels`` the channel of the node; None where that is not known or too many pairs meet.
    """

    labels: tuple[int, ...]
    channels: tuple[int, ...] | None

    def from_channel(self, first: int) -> Meeting:
        """Return the same for a reader whose channels begin with another one than 0."""
        if not first or self.channels is None:
            return self
        return Meeting(self.labels, tuple(first + channel for channel in self.channels))


def fresh_labels(shape: Sequence[int], *, axis: int, base: int) -> Tensor:
    """Return labels of a newly computed tensor: ``base`` plus the position along ``axis``."""
    if not shape:
        return torch.full((), base, dtype=torch.int32, device="cpu")
    along = [1] * len(shape)
    along[axis] = shape[axis]
    return torch.arange(base, base + shape[axis], dtype=torch.int32, device="cpu").view(along).expand(tuple(shape))


def varying_axis(labels: Tensor, *, default: int) -> int:
    """Return the axis along which labels vary; ``default`` if they vary along several or none."""
    compact = _compact(labels)
    axes = [axis for axis, extent in enumerate(compact.shape) if extent > 1]
    if len(axes) == 1:
        return axes[0]
    return min(default, max(labels.dim() - 1, 0))


def meet(labels: Tensor, *, axis: int | None) -> Meeting:
    """Find what a reader sees whose channels lie along ``axis``; None if it has no channels."""
    compact = _compact(labels)
    if axis is None or labels.dim() <= axis:
        return Meeting(tuple(torch.unique(compact).tolist()), None)
    extent = labels.shape[axis]
    if compact.numel() == 1:
        return Meeting((int(compact),) * extent, tuple(range(extent)))
    if compact.numel() == compact.shape[axis]:
        return Meeting(tuple(compact.flatten().tolist()), tuple(range(extent)))
    rows = compact.movedim(axis, 0).flatten(1)
    if rows.shape[0] == 1:
        rows = rows.expand(extent, -1)
    found: list[tuple[int, int]] = []
    for channel, row in enumerate(rows):
        found.extend((int(label), channel) for label in torch.unique(row).tolist())
        if len(found) > _MOST_PAIRS:
            return Meeting(tuple(torch.unique(compact).tolist()), None)
    return Meeting(tuple(label for label, _ in found), tuple(channel for _, channel in found))


def replay(function: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> list[Tensor] | None:
    """Apply an operation that moves elements to labels; None if that is not possible."""
    name = function.overloadpacket.__name__
    try:
        if name in ("view", "_unsafe_view", "_reshape_alias", "view_copy"):
            return [torch.reshape(arguments[0], tuple(arguments[1]))]
        if name in _SAME:
            return [arguments[0]]
        if name == "cat":
            return [_cat(list(arguments[0]), *arguments[1:], **keywords)]
        if name == "unfold_copy":
            return None
        result = function(*arguments, **{key: value for key, value in keywords.items() if key != "memory_format"})
    except (RuntimeError, TypeError, IndexError, NotImplementedError):
        return None
    results = list(result) if isinstance(result, list | tuple) else [result]
    return results if all(isinstance(item, Tensor) for item in results) else None


# elements stay where they are
_SAME = frozenset(("clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "positive"))


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    tensors = [tensor for tensor in tensors if tensor.shape != (0,)]  # torch's legacy: empty vectors are ignored
    axis = dim % tensors[0].dim()
    if all(_varies_only_along(tensor, axis) for tensor in tensors):  # the usual case, without touching every element
        rows = torch.cat([tensor.movedim(axis, 0).flatten(1)[:, 0] for tensor in tensors])
        shape = list(tensors[0].shape)
        shape[axis] = rows.numel()
        return rows.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
    return torch.cat(tensors, axis)


def _varies_only_along(labels: Tensor, axis: int) -> bool:
    if labels.numel() == 0:
        return False
    return all(labels.shape[i] == 1 or labels.stride(i) == 0 for i in range(labels.dim()) if i != axis)


def _compact(labels: Tensor) -> Tensor:
    """Shorten every axis along which labels do not vary to one element."""
    for axis in range(labels.dim()):
        if labels.shape[axis] <= 1:
            continue
        first = labels.narrow(axis, 0, 1)
        if labels.stride(axis) == 0 or bool((labels == first).all()):
            labels = first
    return labels
