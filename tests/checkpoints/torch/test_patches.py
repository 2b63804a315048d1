"""Bytes that are put over storages."""

from __future__ import annotations

from bntool.checkpoints.dtypes import FLOAT32
from bntool.checkpoints.files import MemorySource
from bntool.checkpoints.tensors import LiteralTensor, Storage, StoredTensor
from bntool.checkpoints.torch.patches import patch_storage


def test_views_of_one_storage_that_begin_at_different_bytes() -> None:
    """Files from before torch 0.4 give views of a storage its key: both tensors cover bytes 0 to 8 of their view."""
    source = MemorySource(bytes(32))
    patches = []
    for offset, values in ((24, (3.0, 4.0)), (8, (1.0, 2.0))):
        storage = Storage(source, offset, 8, "0")
        stored = StoredTensor(FLOAT32, (2,), (1,), 0, storage)
        patches.append((stored, LiteralTensor.from_numbers(values, dtype=FLOAT32, shape=(2,))))
    found = list(patch_storage(patches, base=8))
    assert [place for place, _ in found] == [0, 16]
    assert [data for _, data in found] == [new.data for _, new in reversed(patches)]
