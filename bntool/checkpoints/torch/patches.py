"""The bytes that an edited checkpoint puts over the storages of a torch file."""

from __future__ import annotations

from collections.abc import Iterator

from bntool.checkpoints.files import Chunk
from bntool.checkpoints.tensors import StoredTensor, Tensor, swap_bytes


def patch_storage(patches: list[tuple[StoredTensor, Tensor]], *, base: int) -> Iterator[tuple[int, Chunk]]:
    """The bytes to put over a storage, in ascending order.

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
    """The bytes of a new storage."""
    for chunk in tensor.chunks():
        yield swap_bytes(chunk, tensor.dtype.swapsize) if big_endian else chunk
