"""Where live tensors lie."""

from __future__ import annotations

import torch

from bntool.modules.memory import storage_key, storage_keys


def test_a_tensor_without_storage_hides_no_other() -> None:
    first, second = torch.ones(3), torch.ones(2, 2)
    given = [first, torch.eye(3).to_sparse(), second[0]]
    assert list(storage_keys(given)) == [storage_key(first), storage_key(second)]
