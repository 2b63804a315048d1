"""Arrays whose rows are read when they are asked for: one row is one sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.tensors import LiteralTensor, StoredTensor, count_elements
from bntool.data.columns import FOUND, INPUT_KEYS, LABEL_KEYS, Columns
from bntool.errors import UsageError
from bntool.modules.loading import to_torch

_SHOWN = 8
_LARGEST = (1 << 63) - 1
# torch calculates with no unsigned numbers of more than a byte: they are widened
_WIDENED = {"u2": np.int32, "u4": np.int64, "u8": np.int64}


class Rows(Protocol):
    """An array by its first dimension."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """Read these rows, in ascending order, into memory of their own."""
        ...


class ArrayRows:
    """Rows of a numpy array, mapped or in memory."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        self.shape: tuple[int, ...] = array.shape

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        return to_calculable(self._array[np.asarray(rows)])


class UnusableRows:
    """An array that holds something else than plain numbers.

    Args:
        shape: of the array.
        what: it holds, in words.
    """

    def __init__(self, shape: tuple[int, ...], what: str) -> None:
        self.shape = shape
        self._what = what

    def explain(self, name: str) -> str:
        """Say why the array of this name cannot be used."""
        return f"the array {name!r} holds {self._what}; plain numbers are needed"

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        raise TypeError(f"{len(rows)} rows of what holds {self._what}")


class LiveRows:
    """Rows of a tensor in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.shape: tuple[int, ...] = tuple(tensor.shape)

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        return self._tensor[torch.tensor(rows, device="cpu")]


class StoredRows:
    """Rows of a tensor of a file, read from where they lie."""

    def __init__(self, tensor: StoredTensor, checkpoint: Checkpoint) -> None:
        self._tensor = tensor
        self._checkpoint = checkpoint  # keeps the file open
        self.shape: tuple[int, ...] = tuple(tensor.shape)

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        tensor, storage = self._tensor, self._tensor.storage
        if storage is None or tensor.wrapper or storage.big_endian or tensor.dtype.bits < 8:
            return to_torch(tensor)[torch.tensor(rows, device="cpu")]
        if not tensor.is_contiguous:  # channels last, for one
            return torch.stack([to_torch(self._row(row)) for row in rows])
        start, _ = tensor.byte_range
        size = count_elements(self.shape[1:]) * tensor.dtype.itemsize
        data = b"".join(
            storage.source.read(storage.offset + start + first * size, count * size) for first, count in _runs(rows)
        )
        return to_torch(LiteralTensor(tensor.dtype, (len(rows), *self.shape[1:]), data))

    def _row(self, row: int) -> StoredTensor:
        tensor = self._tensor
        return replace(
            tensor,
            shape=tensor.shape[1:],
            strides=tensor.strides[1:],
            storage_offset=tensor.storage_offset + row * tensor.strides[0],
        )


class StackedRows:
    """Rows that lie in several arrays of one shape: one sample in each, or a batch in each."""

    def __init__(self, parts: Sequence[Rows], *, are_batches: bool) -> None:
        first = parts[0].shape
        self._parts = parts
        self._places = [(p, row) for p, part in enumerate(parts) for row in range(part.shape[0] if are_batches else 1)]
        self._are_batches = are_batches
        self.shape: tuple[int, ...] = (len(self._places), *(first[1:] if are_batches else first))

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        if self._are_batches:
            return torch.cat([self._parts[p].read([row]) for p, row in (self._places[index] for index in rows)])
        # a sample is read whole: all the rows that its array has
        return torch.stack([self._parts[index].read(range(self._parts[index].shape[0])) for index in rows])


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield neighbouring rows as (first, count)."""
    first, count = rows[0], 1
    for row in rows[1:]:
        if row == first + count:
            count += 1
        else:
            yield first, count
            first, count = row, 1
    yield first, count


def to_calculable(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return the elements of a new array as a tensor, in a dtype that torch calculates with."""
    if array.dtype.str[1:] == "u8" and array.size and array.max() > _LARGEST:
        raise UsageError(f"whole numbers of at most {_LARGEST} are needed", value=int(array.max()))
    dtype = _WIDENED.get(array.dtype.str[1:], array.dtype.newbyteorder("="))
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))


def choose_arrays(arrays: Mapping[str, Rows], path: object, columns: Columns = FOUND) -> tuple[Rows, Rows | None]:
    """Return the inputs and the labels among named arrays.

    Where the user does not name them, inputs are under ``images``, ``x``, ``data`` and the like, or the only array that
    can be; labels under ``labels``, ``y``, ``targets`` and the like.

    Raises:
        UsageError: no array can be the inputs, or which is not told, or there are not as many labels.
    """
    for name in columns.named:
        if name not in arrays:
            raise UsageError(f"there is no array {name!r}, but {', '.join(list(arrays)[:_SHOWN])}", path=path)
    found = next((key for key in LABEL_KEYS if key in arrays and key != columns.inputs), None)
    label_key = None if columns.without_labels else columns.labels or found
    arrays = _take_usable(arrays, columns.inputs, label_key, path)
    if columns.inputs is not None:
        arrays = {key: rows for key, rows in arrays.items() if key in (columns.inputs, label_key)}
    inputs = _choose_inputs(arrays, label_key, path)
    labels = None if label_key is None else arrays[label_key]
    if 0 in inputs.shape:
        raise UsageError(f"the array of inputs is empty: its shape is {list(inputs.shape)}", path=path)
    if labels is not None and labels.shape[:1] != inputs.shape[:1]:
        count = labels.shape[0] if labels.shape else "one number instead of"
        raise UsageError(f"there are {inputs.shape[0]} inputs but {count} labels", path=path)
    return inputs, labels


def _take_usable(
    arrays: Mapping[str, Rows], inputs: str | None, label_key: str | None, path: object
) -> Mapping[str, Rows]:
    """Return the arrays that hold plain numbers.

    Raises:
        UsageError: one that is named does not, or the labels, or the only one that can be the inputs by its name.
    """
    unusable = {key: rows for key, rows in arrays.items() if isinstance(rows, UnusableRows)}
    usable = {key: rows for key, rows in arrays.items() if key not in unusable}
    if label_key in unusable:
        raise UsageError(f"{unusable[label_key].explain(label_key)}; --labels none leaves it out", path=path)
    wanted = inputs
    if wanted is None and not any(key in usable for key in INPUT_KEYS):  # another array is something else
        wanted = next((key for key in INPUT_KEYS if key in unusable), None)
    if wanted in unusable:
        raise UsageError(f"{unusable[wanted].explain(wanted)}; name the inputs with --inputs", path=path)
    return usable


def _choose_inputs(arrays: Mapping[str, Rows], label_key: str | None, path: object) -> Rows:
    """Return the array of a usual name, or the only one that can be the inputs.

    Raises:
        UsageError: there is none, or which is not told.
    """
    candidates = {key: rows for key, rows in arrays.items() if key != label_key and len(rows.shape) > 1}
    key = next((key for key in INPUT_KEYS if key in candidates), None)
    if key is None and len(candidates) == 1:
        key = next(iter(candidates))
    if key is not None:
        return candidates[key]
    held = ", ".join(f"{key} {list(rows.shape)}" for key, rows in list(arrays.items())[:_SHOWN])
    if not candidates:
        raise UsageError(
            f"no array here can be the inputs, of shape (samples, ...): it holds {held or 'no array'}", path=path
        )
    more = f" and {len(arrays) - _SHOWN} more" if len(arrays) > _SHOWN else ""
    raise UsageError(
        f"which array holds the inputs? The data has {held}{more}; name it with --inputs (and the labels with "
        "--labels)",
        path=path,
    )
