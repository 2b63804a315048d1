"""The memory of live tensors: which of them share elements, and whether these were written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that names the storage of a tensor while that storage lives.

    Raises:
        NotImplementedError: it has none, as sparse tensors.
    """
    return int(tensor.untyped_storage()._cdata)


def storage_keys(tensors: Iterable[torch.Tensor]) -> Iterator[int]:
    """Yield the storages of tensors, without those that have none: sparse tensors."""
    for tensor in tensors:
        try:
            key = storage_key(tensor)
        except NotImplementedError:
            continue
        yield key


def share_elements(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether what is written to one tensor may be seen in another, by the bytes from first to last element."""
    spans = _find_span(first), _find_span(second)
    if spans[0] is None or spans[1] is None or first.device != second.device:
        return False
    (a, b), (c, d) = spans[0], spans[1]
    return a < d and c < b


def lie_at_one_place(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have the same elements in memory; True where torch cannot tell: sparse ones."""
    try:
        return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.dtype == second.dtype
    except RuntimeError:
        return True


def count_writes(tensor: torch.Tensor) -> int:
    """Count how often the elements were written to; 0 for tensors of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _find_span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Find where elements begin and end; None where there is no memory: sparse, nested, meta or wrapped by
    torch.func.
    """
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # torch has no way to ask
        return None
    if not start or not tensor.numel():
        return None
    steps = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (steps + 1) * tensor.element_size()
