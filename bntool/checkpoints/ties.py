"""Tensors that a file holds once and names several times: a change of one would be a change of all."""

from __future__ import annotations

from collections.abc import Collection

from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.tensors import StoredTensor


def find_tied(state_dict: StateDict, names: Collection[str]) -> frozenset[str]:
    """Which of the tensors are another tensor of the state dict, too: a module loads both into one parameter."""
    twins: dict[tuple[object, ...], list[str]] = {}
    for full, tensor in state_dict.tensors.items():
        if isinstance(tensor, StoredTensor) and tensor.storage is not None and tensor.numel:
            memory = id(tensor.storage.source), tensor.storage.offset, tensor.byte_range, tensor.shape, tensor.strides
            twins.setdefault(memory, []).append(full)
    tied = {full for together in twins.values() if len(together) > 1 for full in together}
    return frozenset(name for name in names if state_dict.full_name(name) in tied)
