"""Changes of elements only, for the layouts whose structure is not written anew."""

from __future__ import annotations

from typing import TypeAlias

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.tensors import StoredTensor, Tensor
from bntool.errors import RefusedError
from bntool.plan import Record

Patches: TypeAlias = dict[str, list[tuple[StoredTensor, Tensor]]]


def collect_value_patches(checkpoint: Checkpoint, *, advice: str) -> Patches:
    """The tensors to put over each storage, by key of the storage.

    Args:
        advice: what to do instead, at the end of the sentence that refuses.

    Raises:
        RefusedError: something else than elements is to change, or a tensor shares bytes with one that stays.
    """
    for edit in checkpoint.edits:
        if isinstance(edit.step, Record) and not checkpoint.format.has_records:
            raise RefusedError(f"a {checkpoint.format.title} file has no place for a record; {advice}")
    patches: Patches = {}
    for state_dict in checkpoint.state_dicts:
        original = state_dict.stored
        if list(original) != list(state_dict.tensors):
            raise RefusedError(f"only elements can change in a {checkpoint.format.title} file, not its keys; {advice}")
        for name, tensor in state_dict.tensors.items():
            stored = original[name]
            if tensor is not stored:
                if not isinstance(stored, StoredTensor) or stored.storage is None or stored.overlaps_itself:
                    raise RefusedError("this tensor has no elements of its own to change", tensor=name)
                if tensor.dtype is not stored.dtype:
                    what = f"from {stored.dtype} to {tensor.dtype}"
                    raise RefusedError(
                        f"only elements can change in a {checkpoint.format.title} file, not a dtype {what}; {advice}",
                        tensor=name,
                    )
                _check_others(checkpoint, state_dict, name, stored)
                patches.setdefault(stored.storage.key, []).append((stored, tensor))
    _refuse_other_steps(checkpoint, advice)
    return patches


def _refuse_other_steps(checkpoint: Checkpoint, advice: str) -> None:
    from bntool.plan import RemoveEntry, SetAttribute

    for edit in checkpoint.edits:
        if isinstance(edit.step, SetAttribute | RemoveEntry):
            what = "attributes of modules" if isinstance(edit.step, SetAttribute) else "other entries"
            raise RefusedError(f"only elements can change in a {checkpoint.format.title} file, not {what}; {advice}")


def _check_others(checkpoint: Checkpoint, owner: StateDict, name: str, original: StoredTensor) -> None:
    """A tensor that shares bytes with the changed one must be its equal, before and after."""
    changed = owner.tensors[name]
    for state_dict in checkpoint.state_dicts:
        for other, stored in state_dict.stored.items():
            if (state_dict is owner and other == name) or not isinstance(stored, StoredTensor):
                continue
            if not _overlap(original, stored):
                continue
            same_view = (stored.place, stored.shape, stored.strides) == (
                original.place,
                original.shape,
                original.strides,
            )
            if not same_view or state_dict.tensors[other] != changed:
                raise RefusedError(f"it shares its memory with {other}, which would change with it", tensor=name)


def _overlap(one: StoredTensor, other: StoredTensor) -> bool:
    if one.storage is None or other.storage is None or one.storage.key != other.storage.key:
        return False
    (first, end), (start, last) = one.place, other.place
    return first < last and start < end
