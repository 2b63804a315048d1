"""The arithmetic on large tensors that rewriting a file needs, in numpy, a chunk at a time.

The one module of this package that imports numpy; it is imported only when such a tensor is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bntool.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from bntool.checkpoints.files import CHUNK
from bntool.checkpoints.tensors import read_bytes

if TYPE_CHECKING:
    from bntool.checkpoints.tensors import ScaledTensor, StoredTensor, Tensor

_NUMPY = {FLOAT64: "<f8", FLOAT32: "<f4", FLOAT16: "<f2"}

Array = NDArray[Any]


def to_float64(data: bytes, dtype: DType) -> Array:
    """Elements as float64, exactly."""
    if dtype is BFLOAT16:
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype("<f8")
    return np.frombuffer(data, _NUMPY[dtype]).astype("<f8")


def round_to(values: Array, dtype: DType) -> bytes:
    """Float64 values rounded once, to nearest with ties to even.

    Raises:
        OverflowError: a finite value is too large for ``dtype``.
    """
    with np.errstate(over="ignore", under="ignore"):
        if dtype is BFLOAT16:
            rounded, widened = _round_to_bfloat16(values)
        else:
            rounded = values.astype(_NUMPY[dtype])
            widened = rounded
    if not np.array_equal(np.isfinite(widened), np.isfinite(values)):
        raise OverflowError(f"a result is too large for {dtype}")
    return rounded.tobytes()


def _round_to_bfloat16(values: Array) -> tuple[Array, Array]:
    """Bits of the nearest bfloat16, and their values.

    Going through float32 would round twice; the float32 is therefore rounded to odd first (Boldo and Melquiond 2008),
    after which rounding again to fewer bits gives the same as rounding once.
    """
    single = values.astype("<f4")
    bits = single.view("<u4").copy()
    inexact = np.isfinite(single) & (single.astype("<f8") != values)
    too_large = inexact & (np.abs(single.astype("<f8")) > np.abs(values))
    bits[too_large] -= 1  # the neighbour toward zero; sign and magnitude make this right for both signs
    bits[inexact] |= 1
    upper = bits + 0x7FFF + ((bits >> 16) & 1)
    upper = np.where(np.isnan(single), bits | 0x400000, upper) & 0xFFFF0000
    return (upper >> 16).astype("<u2"), upper.astype("<u4").view("<f4")


def scale_chunks(tensor: ScaledTensor) -> Iterator[bytes]:
    """The product of a tensor and its factors, in C order, streamed over the first dimension of its view."""
    view, dtype = tensor.view, tensor.dtype
    factors = np.asarray(tensor.factors, dtype="<f8").reshape(tensor.factor_shape)
    row = math.prod(view[1:])
    rows_at_once = max(1, CHUNK // max(1, row * dtype.itemsize))
    pending, first = b"", 0
    for chunk in tensor.source.chunks():
        pending += chunk
        whole = len(pending) // max(1, row * dtype.itemsize) // rows_at_once * rows_at_once
        if whole:
            size = whole * row * dtype.itemsize
            yield from _scale_rows(pending[:size], dtype, (first, whole, rows_at_once), view, factors)
            pending, first = pending[size:], first + whole
    rest = view[0] - first
    if rest and row:
        yield from _scale_rows(pending, dtype, (first, rest, rows_at_once), view, factors)


def _scale_rows(
    data: bytes, dtype: DType, span: tuple[int, int, int], view: tuple[int, ...], factors: Array
) -> Iterator[bytes]:
    first, count, step = span
    row_bytes = math.prod(view[1:]) * dtype.itemsize
    for start in range(0, count, step):
        rows = min(step, count - start)
        values = to_float64(data[start * row_bytes : (start + rows) * row_bytes], dtype).reshape(rows, *view[1:])
        here = factors if factors.shape[0] == 1 else factors[first + start : first + start + rows]
        yield round_to(values * here, dtype)


def place_in_span(stored: StoredTensor, new: Tensor) -> tuple[int, bytes]:
    """Lay the elements of ``new`` out as the strided view ``stored`` lies in its storage.

    Returns:
        The first byte within the storage, and the bytes from there; bytes between the elements stay as they were.
    """
    storage = stored.storage
    assert storage is not None
    start, end = stored.byte_range
    span = bytearray(storage.source.read(storage.offset + start, end - start))
    item = f"V{stored.dtype.itemsize}"
    strides = tuple(stride * stored.dtype.itemsize for stride in stored.strides)
    target: Array = np.ndarray(stored.shape, dtype=item, buffer=span, strides=strides)
    values = np.frombuffer(read_bytes(new), item).reshape(stored.shape)
    if storage.big_endian:
        raw = values.view("u1").reshape(*stored.shape, stored.dtype.itemsize)[..., ::-1]
        values = np.ascontiguousarray(raw).view(item).reshape(stored.shape)
    target[...] = values
    return start, bytes(span)
