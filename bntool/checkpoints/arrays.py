"""The arithmetic on large tensors that rewriting a file needs, in numpy, a chunk at a time.

It imports numpy, and is imported only when such a tensor is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bntool.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType, round_array_to_bfloat16
from bntool.checkpoints.files import CHUNK, Chunk
from bntool.checkpoints.tensors import StoredTensor, Tensor, read_bytes, swap_bytes

FAR_FROM_OVERFLOW = {FLOAT64: 2.0**1000, FLOAT32: 2.0**127, BFLOAT16: 2.0**127, FLOAT16: 2.0**15}

_HALVES = {FLOAT16: 13, BFLOAT16: 16}  # how many bits fewer a significand has than that of float32
_UNSURE = 2  # units of float32 that a product of float32 numbers may be off
_ORDINARY = (2.0**-100, 2.0**100)  # factors that float32 has as precisely as any
_AT_A_TIME = 1024  # elements that numpy casts, multiplies and casts back together
_NUMPY = {FLOAT64: "<f8", FLOAT32: "<f4", FLOAT16: "<f2"}

Array = NDArray[Any]


def as_numbers(data: Chunk, dtype: DType) -> Array:
    """Convert elements to numbers: as they are where numpy knows their dtype, else as float64, exactly."""
    return to_float64(data, dtype) if dtype is BFLOAT16 else np.frombuffer(data, _NUMPY[dtype])


def as_bits(data: Chunk, dtype: DType) -> Array:
    """Return the bits of elements as signed integers: without their sign they are ordered as floats are, NaN last."""
    return np.frombuffer(data, f"<i{dtype.itemsize}")


def to_float64(data: Chunk, dtype: DType) -> Array:
    """Convert elements to float64, exactly."""
    numbers = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4") if dtype is BFLOAT16 else None
    with np.errstate(invalid="ignore"):  # numpy warns of NaNs that are called signalling; they are NaNs like others
        return (np.frombuffer(data, _NUMPY[dtype]) if numbers is None else numbers).astype("<f8")


def _check_range(rounded: Array, dtype: DType, *sources: Array) -> None:
    """Raise OverflowError where a result is infinite and what it was computed from is not."""
    if np.isfinite(rounded).all():  # one cheap look at all elements; which are at fault matters only where one is
        return
    finite = np.logical_and.reduce(np.broadcast_arrays(*map(np.isfinite, sources)))
    if np.any(finite & ~np.isfinite(rounded)):
        raise OverflowError(f"a result is too large for {dtype}")


def whole_rows(chunks: Iterable[Chunk], row: int) -> Iterator[Chunk]:
    """Cut bytes into pieces that hold whole rows of ``row`` bytes; nearly nothing is copied."""
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


def scale_chunks(  # noqa: PLR0913 what a ScaledTensor is made of
    tensor: Tensor,
    factors: Sequence[float],
    *,
    view: tuple[int, ...],
    factor_shape: tuple[int, ...],
    others: Sequence[float] = (),
    other_shape: tuple[int, ...] = (),
    flush: bool,
    places: Sequence[int] = (),
    addends: Sequence[float] = (),
) -> Iterator[Chunk]:
    """Yield the product of a tensor and its factors, in C order, in pieces of about a chunk whatever the shape.

    The arguments are those of :class:`bntool.checkpoints.scaled_tensors.ScaledTensor`.

    Raises:
        OverflowError: a product is too large for the dtype.
    """
    dtype = tensor.dtype
    rows = np.asarray(factors, dtype="<f8").reshape(factor_shape)
    across = np.asarray(others, dtype="<f8").reshape(other_shape) if other_shape else None
    inner = len(view)  # the dimensions from here on are computed together
    while inner > 0 and math.prod(view[inner - 1 :]) * dtype.itemsize <= CHUNK:
        inner -= 1
    row = math.prod(view[inner:]) * dtype.itemsize
    if row == 0:
        return
    product = Product(dtype, flush=flush)
    first = 0
    where, added = np.asarray(places, dtype=int), np.asarray(addends, dtype="<f8")
    for data in whole_rows(tensor.chunks(), row):
        count = len(data) // row
        here = _factors_of(first, count, view[:inner], rows)
        if across is not None:
            here = here * _factors_of(first, count, view[:inner], across)
        extra = None
        if where.size:
            start = first * (row // dtype.itemsize)
            some = slice(*np.searchsorted(where, (start, start + len(data) // dtype.itemsize)))
            extra = where[some] - start, added[some]
        yield product.round(data, (count, *view[inner:]), here, extra=extra)
        first += count


def average_chunks(tensors: Sequence[Tensor], weights: Sequence[float]) -> Iterator[Chunk]:
    """Yield the weighted mean of tensors, in C order, a piece at a time.

    The arguments are those of :class:`bntool.checkpoints.combined_tensors.AveragedTensor`.

    Raises:
        OverflowError: a mean is too large for the dtype of the first.
    """
    dtype = tensors[0].dtype
    streams = [_Stream(tensor) for tensor in tensors]
    left = math.prod(tensors[0].shape)
    while left:
        count = min(left, CHUNK // 8)
        pieces = [stream.take(count) for stream in streams]
        with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, as it should be
            first, total, same = pieces[0], pieces[0] * weights[0], np.ones(count, dtype=bool)
            for piece, weight in zip(pieces[1:], weights[1:], strict=True):
                total += piece * weight
                same &= piece == first
        wide = np.where(same, first, total)
        rounded, widened = _round(wide, dtype)
        _check_range(widened, dtype, wide)
        yield rounded.view("u1").data
        left -= count


def merge_chunks(
    tensors: Sequence[Tensor],
    factors: Sequence[Sequence[float]],
    inputs: Sequence[Sequence[float]],
    *,
    places: Sequence[int],
    addends: Sequence[float],
) -> Iterator[Chunk]:
    """Sum up kernels times factors, in C order, some output channels at a time.

    The arguments are those of :class:`bntool.checkpoints.combined_tensors.MergedTensor`.

    Raises:
        OverflowError: a sum is too large for the dtype of the first.
    """
    shape, dtype = tensors[0].shape, tensors[0].dtype
    row = math.prod(shape[1:])
    if not row:
        return
    streams = [_Stream(tensor) for tensor in tensors]
    where, added = np.asarray(places, dtype=int), np.asarray(addends, dtype="<f8")
    together = max(1, CHUNK // (8 * row))
    for first in range(0, shape[0], together):
        count = min(together, shape[0] - first)
        total = np.zeros((count, *shape[1:]))
        for stream, tensor, several, across in zip(streams, tensors, factors, inputs, strict=True):
            piece = stream.take(count * math.prod(tensor.shape[1:])).reshape(count, *tensor.shape[1:])
            middle = [slice(None), slice(None)]
            for most, size in zip(shape[2:], tensor.shape[2:], strict=True):
                middle.append(slice((most - size) // 2, (most - size) // 2 + size))
            here = np.asarray(several[first : first + count], dtype="<f8").reshape(count, *(1 for _ in shape[1:]))
            product = piece * here
            if len(across):
                product *= np.asarray(across, dtype="<f8").reshape(1, -1, *(1 for _ in shape[2:]))
            total[tuple(middle)] += product
        some = slice(*np.searchsorted(where, (first * row, (first + count) * row)))
        total.reshape(-1)[where[some] - first * row] += added[some]
        rounded, widened = _round(total, dtype)
        _check_range(widened, dtype, total)
        yield rounded.reshape(-1).view("u1").data


class _Stream:
    """The elements of a tensor, in C order, as many at a time as are asked for."""

    def __init__(self, tensor: Tensor) -> None:
        self._dtype, self._chunks, self._rest = tensor.dtype, iter(tensor.chunks()), memoryview(b"")

    def take(self, count: int) -> Array:
        """Return the next elements as float64."""
        missing, parts = count * self._dtype.itemsize, []
        while missing:
            if not len(self._rest):
                self._rest = memoryview(next(self._chunks))
            parts.append(self._rest[:missing])
            self._rest = self._rest[len(parts[-1]) :]
            missing -= len(parts[-1])
        return to_float64(parts[0] if len(parts) == 1 else b"".join(parts), self._dtype)


def _round(wide: Array, dtype: DType) -> tuple[Array, Array]:
    """Round float64 numbers to the nearest elements of a dtype; return the elements and their values."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return _cast(wide, dtype)


def _cast(wide: Array, dtype: DType) -> tuple[Array, Array]:
    """Round as :func:`_round` does, where numpy is told already not to warn."""
    if dtype is BFLOAT16:
        return round_array_to_bfloat16(wide)
    rounded = wide.astype(_NUMPY[dtype])
    return rounded, rounded


def _factors_of(first: int, count: int, outer: tuple[int, ...], factors: Array) -> Array:
    """Return the factors of some rows, which are counted over the dimensions ``outer``."""
    if not outer:
        return factors[np.newaxis]
    if len(outer) == 1:
        return factors[first : first + count] if len(factors) > 1 else factors
    place = np.unravel_index(np.arange(first, first + count), outer)
    index = tuple(np.minimum(one, extent - 1) for one, extent in zip(place, factors.shape, strict=False))
    rows: Array = factors[index]
    return rows


class Product:
    """Products of elements and factors, rounded once.

    Args:
        dtype: of the products.
        flush: those that are subnormal numbers of the dtype become zero.
    """

    def __init__(self, dtype: DType, *, flush: bool = False) -> None:
        self._dtype, self._flush = dtype, flush
        self._used: dict[str, Array] = {}  # again for each piece: memory that is new costs as much as the product

    def round(
        self,
        data: Chunk,
        shape: tuple[int, ...],
        factors: Array,
        *,
        is_bounded: bool = False,
        extra: tuple[Array, Array] | None = None,
    ) -> Chunk:
        """Return the products of one piece, little endian in C order.

        Args:
            data: its elements.
            shape: of the piece.
            factors: float64, of a shape that goes with ``shape``.
            is_bounded: it is known that no product is too large or comes from NaN or infinity.
            extra: places in the piece, in C order, and what is added to the products there.

        Raises:
            OverflowError: a product is too large for the dtype, and what it is the product of is finite.
        """
        is_plain = extra is None and not self._flush
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if is_plain and self._dtype in _HALVES and _are_ordinary(factors):
                is_bounded = is_bounded or are_bounded(data, self._dtype, float(np.abs(factors).max(initial=0)))
                if is_bounded:
                    return _freeze(self._multiply_halves(np.frombuffer(data, "<u2").reshape(shape), factors))
            values = as_numbers(data, self._dtype).reshape(shape)
            if is_plain and self._dtype is not BFLOAT16:
                rounded = widened = self._multiply(values, factors)
            else:
                rounded, widened = _cast(self._multiply_wide(values, factors, extra), self._dtype)
        if not is_bounded:
            _check_range(widened, self._dtype, values, factors)
        return _freeze(rounded)

    def _multiply(self, values: Array, factors: Array) -> Array:
        """Return the products in their dtype, made in float64 a few at a time that stay in the first cache."""
        rounded = np.empty(values.shape, _NUMPY[self._dtype])
        before = np.setbufsize(_AT_A_TIME)
        try:
            np.multiply(values, factors, out=rounded, dtype="<f8", casting="same_kind")
        finally:
            np.setbufsize(before)
        return rounded

    def _multiply_halves(self, halves: Array, factors: Array) -> Array:
        """Return the bits of products of 16 bits, made in float32; those few are made in float64 that may be rounded
        either way from there.

        The bits of a float16, moved up, are those of a float32 that is 2^112 times smaller, subnormal numbers included.
        The nearest float32 to a factor is off by half a unit, their product by another half: by two units at most, as a
        unit is not of the same size for both.

        Args:
            halves: the bits of the elements; no product is too large, infinite or NaN.
        """
        shift = _HALVES[self._dtype]
        is_apart = self._dtype is FLOAT16  # the sign: exponents have fewer bits than those of float32
        magnitudes = (
            np.bitwise_and(halves, 0x7FFF, out=self._reuse("magnitudes", halves, "<u2")) if is_apart else halves
        )
        wide = np.left_shift(magnitudes, np.uint32(shift), out=self._reuse("wide", halves, "<u4"), dtype="<u4")
        single = wide.view("<f4")
        np.multiply(single, (np.abs(factors) if is_apart else factors).astype("<f4"), out=single)
        half = 1 << (shift - 1)
        np.add(wide, np.uint32(half + _UNSURE), out=wide)
        low = np.bitwise_and(wide, np.uint32(2 * half - 1), out=self._reuse("low", halves, "<u4"))
        unsure = np.flatnonzero(low <= 2 * _UNSURE)
        rounded: Array = np.empty(halves.shape, "<u2")
        np.right_shift(wide, np.uint32(shift), out=rounded, casting="unsafe")
        if is_apart:
            rounded |= np.bitwise_xor(halves, magnitudes, out=magnitudes)
            if np.signbit(factors).any():
                rounded ^= np.signbit(factors) * np.uint16(0x8000)
        if unsure.size:
            values = as_numbers(halves.reshape(-1)[unsure].tobytes(), self._dtype)
            others = np.broadcast_to(factors, halves.shape)[np.unravel_index(unsure, halves.shape)]
            rounded.reshape(-1)[unsure] = _cast(values.astype("<f8") * others, self._dtype)[0].view("<u2")
        return rounded

    def _multiply_wide(self, values: Array, factors: Array, extra: tuple[Array, Array] | None) -> Array:
        """Return the products in float64, some with an addend, and subnormal ones flushed where that is asked for."""
        wide = np.multiply(values, factors, out=self._reuse("products", values, "<f8"))
        if extra is not None:
            wide.reshape(-1)[extra[0]] += extra[1]
        if self._flush:
            wide[np.abs(wide) < self._dtype.smallest_normal] = 0
        return wide

    def _reuse(self, name: str, like: Array, kind: str) -> Array:
        """Return memory of that name for as many elements as another array has."""
        if name not in self._used or self._used[name].size < like.size:
            self._used[name] = np.empty(like.size, kind)
        return self._used[name][: like.size].reshape(like.shape)


def _freeze(elements: Array) -> Chunk:
    """Return the bytes of elements that nobody changes any more, so that they can be written without a copy."""
    return elements.reshape(-1).view("u1").data.toreadonly()


def are_bounded(data: Chunk, dtype: DType, factor: float) -> bool:
    """Return whether no product of these elements and a factor, or one that is smaller, is too large, or comes from NaN
    or infinity.
    """
    bits = as_bits(data, dtype)
    (largest,) = as_numbers(np.bitwise_and(bits, np.iinfo(bits.dtype).max).max(initial=0).tobytes(), dtype)
    return bool(largest < FAR_FROM_OVERFLOW[dtype] / max(factor, 1.0))


def _are_ordinary(factors: Array) -> bool:
    """Return whether factors can be taken in float32, and subnormal numbers are not flushed to zero there."""
    smallest, largest = _ORDINARY
    magnitudes = np.abs(factors)
    is_flushed = not (np.ones(1, "<u4").view("<f4") * np.float32(1)).view("<u4")[0]
    return not is_flushed and bool(((magnitudes == 0) | ((magnitudes > smallest) & (magnitudes < largest))).all())


def place_in_span(stored: StoredTensor, new: Tensor) -> tuple[int, bytes]:
    """Arrange the elements of ``new`` as the strided view ``stored`` lies in its storage; return where that begins, and
    the bytes.

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
