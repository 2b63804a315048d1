"""The arithmetic on large tensors that rewriting a file needs, in numpy, a chunk at a time.

The one module of this package that imports numpy; it is imported only when such a tensor is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bntool.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from bntool.checkpoints.files import CHUNK
from bntool.checkpoints.tensors import read_bytes, swap_bytes

if TYPE_CHECKING:
    from bntool.checkpoints.tensors import ScaledTensor, StoredTensor, Tensor

SMALLEST_NORMAL = {FLOAT64: 2.0**-1022, FLOAT32: 2.0**-126, BFLOAT16: 2.0**-126, FLOAT16: 2.0**-14}

_NUMPY = {FLOAT64: "<f8", FLOAT32: "<f4", FLOAT16: "<f2"}

_BUFFER = 512  # elements that numpy converts at a time: all operands then stay in the first cache, a third faster

Array = NDArray[Any]


def to_float64(data: bytes | memoryview, dtype: DType) -> Array:
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
    _check_range(widened, dtype, values)
    return rounded.tobytes()


def _check_range(rounded: Array, dtype: DType, *sources: Array) -> None:
    """Raise OverflowError where a result is infinite and what it was computed from is not."""
    if np.isfinite(rounded).all():  # one cheap look at all elements; which are at fault matters only where one is
        return
    finite = np.logical_and.reduce(np.broadcast_arrays(*map(np.isfinite, sources)))
    if np.any(finite & ~np.isfinite(rounded)):
        raise OverflowError(f"a result is too large for {dtype}")


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


def whole_rows(chunks: Iterable[bytes], row: int) -> Iterator[bytes | memoryview]:
    """The same bytes, cut into pieces that hold whole rows of ``row`` bytes; nearly nothing is copied."""
    pending = b""
    for chunk in chunks:
        rest = memoryview(chunk)
        if pending:
            missing = row - len(pending)
            pending, rest = pending + rest[:missing], rest[missing:]
            if len(pending) < row:
                continue
            yield pending
        whole = len(rest) - len(rest) % row
        if whole:
            yield rest[:whole]
        pending = bytes(rest[whole:])


def scale_chunks(tensor: ScaledTensor) -> Iterator[bytes]:
    """The product of a tensor and its factors, in C order, in pieces of about a chunk whatever the shape."""
    view, dtype = tensor.view, tensor.dtype
    factors = np.asarray(tensor.factors, dtype="<f8").reshape(tensor.factor_shape)
    inner = len(view)  # the dimensions from here on are computed together
    while inner > 0 and math.prod(view[inner - 1 :]) * dtype.itemsize <= CHUNK:
        inner -= 1
    row = math.prod(view[inner:]) * dtype.itemsize
    if row == 0:
        return
    first = 0
    for data in whole_rows(tensor.source.chunks(), row):
        count = len(data) // row
        here = _factors_of(first, count, view[:inner], factors)
        yield _scale_rows(data, dtype, here, (count, *view[inner:]), flush=tensor.flush)
        first += count


def _factors_of(first: int, count: int, outer: tuple[int, ...], factors: Array) -> Array:
    """The factors of some rows, which are counted over the dimensions ``outer``."""
    if not outer:
        return factors[np.newaxis]
    if len(outer) == 1:
        return factors[first : first + count] if len(factors) > 1 else factors
    place = np.unravel_index(np.arange(first, first + count), outer)
    index = tuple(np.minimum(one, extent - 1) for one, extent in zip(place, factors.shape, strict=False))
    rows: Array = factors[index]
    return rows


def _scale_rows(
    data: bytes | memoryview, dtype: DType, factors: Array, shape: tuple[int, ...], *, flush: bool
) -> bytes:
    """The product in float64, rounded once; see :func:`round_to`."""
    if flush or dtype is BFLOAT16:
        values = to_float64(data, dtype).reshape(shape)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            product: Array = values * factors
        _check_range(product, dtype, values, factors)
        if flush:
            product[np.abs(product) < SMALLEST_NORMAL[dtype]] = 0
        return round_to(product, dtype)
    values = np.frombuffer(data, _NUMPY[dtype]).reshape(shape)
    rounded = np.empty_like(values)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        usual = np.setbufsize(_BUFFER)
        try:  # the product is taken in float64 a few hundred elements at a time and rounded on the way out
            np.multiply(values, factors, out=rounded, dtype="<f8", casting="same_kind")
        finally:
            np.setbufsize(usual)
    _check_range(rounded, dtype, values, factors)
    return rounded.tobytes()


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
    data = read_bytes(new)
    if storage.big_endian:
        data = swap_bytes(data, stored.dtype.swapsize)
    target[...] = np.frombuffer(data, item).reshape(stored.shape)
    return start, bytes(span)
