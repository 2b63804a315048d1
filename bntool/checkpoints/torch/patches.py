"""Changes of elements only: which they are, and the bytes that they put over the storages of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.files import Chunk
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.tensors import StoredTensor, Tensor, swap_bytes
from bntool.errors import RefusedError
from bntool.plan import Record

Patches: TypeAlias = dict[str, list[tuple[StoredTensor, Tensor]]]


def collect_value_patches(checkpoint: Checkpoint, *, advice: str) -> Patches:
    """Return the tensors to put over each storage, by key of the storage.

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
    """Check that each tensor which shares bytes with the changed one equals it, before and after."""
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


def patch_storage(patches: list[tuple[StoredTensor, Tensor]], *, base: int) -> Iterator[tuple[int, Chunk]]:
    """Yield the bytes to put over a storage, in ascending order.

    Args:
        patches: stored tensors and what takes their place.
        base: where the storage begins, in terms of the offsets of the stored tensors' storages.
    """
    written: set[tuple[int, int]] = set()
    for stored, new in sorted(patches, key=lambda patch: patch[0].place):
        if stored.place in written:  # tied tensors that get equal elements
            continue
        written.add(stored.place)
        assert stored.storage is not None
        shift = stored.storage.offset - base
        if stored.is_contiguous and not stored.storage.big_endian:
            position = stored.byte_range[0] + shift
            for chunk in new.chunks():
                yield position, chunk
                position += len(chunk)
        else:
            from bntool.checkpoints import arrays

            position, data = arrays.place_in_span(stored, new)
            yield position + shift, data


def storage_bytes(tensor: Tensor, *, big_endian: bool) -> Iterator[Chunk]:
    """Yield the bytes of a new storage."""
    for chunk in tensor.chunks():
        yield swap_bytes(chunk, tensor.dtype.swapsize) if big_endian else chunk


def write_over_copy(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Copy a file whose tensors lie in it as they are, and put new elements over the old ones.

    Raises:
        RefusedError: something else than elements is to change.
    """
    patches = collect_value_patches(checkpoint, advice="convert it first with bntool convert CKPT --to torch -o NEW")
    file = checkpoint.file
    stream = output.open(path)
    file.copy_to(stream, offset=0, length=file.size)
    for changes in patches.values():
        for start, data in patch_storage(changes, base=0):  # nothing moves: offsets in the file count
            stream.seek(start)
            stream.write(data)
    stream.seek(0, 2)
