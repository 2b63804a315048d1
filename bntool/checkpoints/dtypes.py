"""Element types of tensors: PyTorch's names, sizes, and how to turn bytes into numbers without torch or numpy."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from bntool.errors import NoNumbersError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class NumberKind(Enum):
    FLOAT = "float"
    INTEGER = "integer"
    BOOL = "bool"
    COMPLEX = "complex"
    OPAQUE = "opaque"  # quantised and packed types: shown and passed through, never interpreted


@dataclass(frozen=True, eq=False)  # there is one object of each, so that tables of them need no hash of six fields
class DType:
    """One element type.

    Attributes:
        name: PyTorch's spelling without ``torch.``, e.g. ``float32``.
        bits: size of one element in bits (safetensors has types smaller than a byte).
        kind: what the bits mean.
        safetensors: the name in a safetensors header, or None where that format has none.
        storage: the name of the typed storage class that torch.save writes, or None.
        struct_code: format character of :mod:`struct`, or None where the bits need decoding of our own.
    """

    name: str
    bits: int
    kind: NumberKind
    safetensors: str | None = None
    storage: str | None = None
    struct_code: str | None = None

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one element; 1 for types smaller than a byte."""
        return max(1, self.bits // 8)

    @property
    def swapsize(self) -> int:
        """Bytes that the byte order concerns: each part of a complex number by itself."""
        return self.itemsize // 2 if self.kind is NumberKind.COMPLEX else self.itemsize

    @cached_property
    def is_floating(self) -> bool:
        return self.kind is NumberKind.FLOAT

    @property
    def spacing(self) -> float:
        """Relative spacing of its numbers, ``torch.finfo(dtype).eps``; 0 for types that are not floating."""
        return _SPACINGS.get(self.name, 0.0)

    @property
    def smallest_normal(self) -> float:
        """The smallest number that has all digits, as ``torch.finfo(dtype).smallest_normal``; 0 below 16 bits."""
        return _SMALLEST_NORMALS.get(self.name, 0.0)

    def byte_count(self, elements: int) -> int:
        return (elements * self.bits + 7) // 8

    def __str__(self) -> str:
        return self.name


_SPACINGS = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float8_e4m3fn": 2.0**-3,
    "float8_e4m3fnuz": 2.0**-3,
    "float8_e5m2": 2.0**-2,
    "float8_e5m2fnuz": 2.0**-2,
    "float8_e8m0fnu": 1.0,
}
_SMALLEST_NORMALS = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}
_FLOAT, _INTEGER, _OPAQUE = NumberKind.FLOAT, NumberKind.INTEGER, NumberKind.OPAQUE

FLOAT64 = DType("float64", 64, _FLOAT, "F64", "DoubleStorage", "d")
FLOAT32 = DType("float32", 32, _FLOAT, "F32", "FloatStorage", "f")
FLOAT16 = DType("float16", 16, _FLOAT, "F16", "HalfStorage", "e")
BFLOAT16 = DType("bfloat16", 16, _FLOAT, "BF16", "BFloat16Storage")
INT64 = DType("int64", 64, _INTEGER, "I64", "LongStorage", "q")
UINT8 = DType("uint8", 8, _INTEGER, "U8", "ByteStorage", "B")

DTYPES: tuple[DType, ...] = (
    FLOAT64,
    FLOAT32,
    FLOAT16,
    BFLOAT16,
    DType("float8_e4m3fn", 8, _FLOAT, "F8_E4M3"),
    DType("float8_e5m2", 8, _FLOAT, "F8_E5M2"),
    DType("float8_e4m3fnuz", 8, _FLOAT, "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 8, _FLOAT, "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 8, _FLOAT, "F8_E8M0"),
    DType("float6_e2m3", 6, _OPAQUE, "F6_E2M3"),
    DType("float6_e3m2", 6, _OPAQUE, "F6_E3M2"),
    DType("float4", 4, _OPAQUE, "F4"),
    DType("float4_e2m1fn_x2", 8, _OPAQUE),
    INT64,
    DType("int32", 32, _INTEGER, "I32", "IntStorage", "i"),
    DType("int16", 16, _INTEGER, "I16", "ShortStorage", "h"),
    DType("int8", 8, _INTEGER, "I8", "CharStorage", "b"),
    DType("uint64", 64, _INTEGER, "U64", None, "Q"),
    DType("uint32", 32, _INTEGER, "U32", None, "I"),
    DType("uint16", 16, _INTEGER, "U16", None, "H"),
    UINT8,
    DType("bool", 8, NumberKind.BOOL, "BOOL", "BoolStorage", "?"),
    DType("complex32", 32, NumberKind.COMPLEX, None, None),
    DType("complex64", 64, NumberKind.COMPLEX, "C64", "ComplexFloatStorage"),
    DType("complex128", 128, NumberKind.COMPLEX, None, "ComplexDoubleStorage"),
    DType("qint8", 8, _OPAQUE, None, "QInt8Storage"),
    DType("quint8", 8, _OPAQUE, None, "QUInt8Storage"),
    DType("qint32", 32, _OPAQUE, None, "QInt32Storage"),
    DType("quint4x2", 8, _OPAQUE, None, "QUInt4x2Storage"),
    DType("quint2x4", 8, _OPAQUE, None, "QUInt2x4Storage"),
    DType("bits8", 8, _OPAQUE),
    DType("bits16", 16, _OPAQUE),
    DType("bits1x8", 8, _OPAQUE),
    DType("bits2x4", 8, _OPAQUE),
    DType("bits4x2", 8, _OPAQUE),
)

BY_NAME: dict[str, DType] = {dtype.name: dtype for dtype in DTYPES}
NUMPY_CODES = {
    "f8": "float64", "f4": "float32", "f2": "float16", "i8": "int64", "i4": "int32", "i2": "int16", "i1": "int8",
    "u8": "uint64", "u4": "uint32", "u2": "uint16", "u1": "uint8", "b1": "bool", "c8": "complex64", "c16": "complex128",
}  # fmt: skip
BY_SAFETENSORS: dict[str, DType] = {d.safetensors: d for d in DTYPES if d.safetensors}
BY_STORAGE: dict[str, DType] = {d.storage: d for d in DTYPES if d.storage}

# exponent bits, mantissa bits, bias, has infinities, NaN patterns beyond those of IEEE
_FLOAT8 = {
    "float8_e4m3fn": (4, 3, 7),
    "float8_e5m2": (5, 2, 15),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2fnuz": (5, 2, 16),
}


@lru_cache
def _float8_table(name: str) -> tuple[float, ...]:
    """Return the value of each of the 256 bit patterns."""
    if name == "float8_e8m0fnu":  # a bare power of two, 255 is NaN
        return (*(math.ldexp(1.0, code - 127) for code in range(255)), math.nan)
    exponent_bits, mantissa_bits, bias = _FLOAT8[name]
    top = (1 << exponent_bits) - 1
    values = []
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent = (code >> mantissa_bits) & top
        mantissa = code & ((1 << mantissa_bits) - 1)
        if name.endswith("fnuz") and code == 0x80:
            value = math.nan  # no negative zero: that pattern is the only NaN
        elif name == "float8_e5m2" and exponent == top:
            value = sign * math.inf if mantissa == 0 else math.nan
        elif name == "float8_e4m3fn" and (code & 0x7F) == 0x7F:
            value = math.nan
        elif exponent == 0:
            value = sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
        else:
            value = sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
        values.append(value)
    return tuple(values)


def decode_numbers(data: bytes, dtype: DType) -> Sequence[float]:
    """Turn raw bytes into Python numbers, exactly.

    Args:
        data: contiguous elements, little-endian.
        dtype: a float, integer or bool type.

    Raises:
        NoNumbersError: ``dtype`` is complex or opaque: its elements are not single numbers.
    """
    count = len(data) // dtype.itemsize
    if dtype.struct_code is not None:
        return struct.unpack(f"<{count}{dtype.struct_code}", data)
    if dtype is BFLOAT16:  # the upper half of a float32
        widened = bytearray(4 * count)
        widened[2::4] = data[::2]
        widened[3::4] = data[1::2]
        return struct.unpack(f"<{count}f", widened)
    if dtype.is_floating:
        table = _float8_table(dtype.name)
        return tuple(table[code] for code in data)
    raise NoNumbersError(f"{dtype} elements are not single numbers")


def _round_to_bfloat16(value: float) -> int:
    """Return the bits of the bfloat16 nearest to a float64, ties to even, in one rounding."""
    sign = 0x8000 if math.copysign(1.0, value) < 0 else 0
    if math.isnan(value):
        return sign | 0x7FC0
    magnitude = abs(value)
    if math.isinf(magnitude):
        return sign | 0x7F80
    if magnitude == 0.0:
        return sign
    _, exponent = math.frexp(magnitude)  # magnitude = m * 2**exponent, 0.5 <= m < 1
    unit = max(exponent - 8, -133)  # 8 significant bits; below 2**-126 the spacing stays 2**-133
    steps = round(math.ldexp(magnitude, -unit))  # exact scaling, then ties to even
    pattern = steps if unit == -133 else ((unit + 133) << 7) + steps
    return sign | min(pattern, 0x7F80)


def round_array_to_bfloat16(values: Array) -> tuple[Array, Array]:
    """Round float64 to bfloat16, ties to even, in one rounding; return the bits, and the values, of what is nearest.

    Going through float32 would round twice; the float32 is therefore rounded to odd first (Boldo and Melquiond 2008),
    after which rounding again to fewer bits gives the same as rounding once.
    """
    import numpy as np  # listing a file never comes here

    single = values.astype("<f4")
    bits = single.view("<u4").copy()
    inexact = np.isfinite(single) & (single.astype("<f8") != values)
    too_large = inexact & (np.abs(single.astype("<f8")) > np.abs(values))
    bits[too_large] -= 1  # the neighbour toward zero; sign and magnitude make this right for both signs
    bits[inexact] |= 1
    upper = bits + 0x7FFF + ((bits >> 16) & 1)
    upper = np.where(np.isnan(single), bits | 0x400000, upper) & 0xFFFF0000
    return (upper >> 16).astype("<u2"), upper.astype("<u4").view("<f4")


def _as_integer(value: float, dtype: DType) -> int:
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{value!r} is no {dtype}")
    return int(value)


def encode_numbers(values: Sequence[float], dtype: DType) -> bytes:
    """Round Python numbers once, to nearest with ties to even, into the little-endian bytes of ``dtype``.

    Raises:
        OverflowError: a finite value is too large for ``dtype``.
        ValueError: ``dtype`` is not a type that bntool writes (float64/32/16, bfloat16, integers, bool), or a number
            that is not whole should become an integer.
    """
    if dtype.struct_code is not None:
        code = dtype.struct_code
        numbers = [_as_integer(value, dtype) for value in values] if dtype.kind is _INTEGER else values
        try:
            return struct.pack(f"<{len(numbers)}{code}", *numbers)
        except struct.error as error:
            raise OverflowError(str(error)) from error
    if dtype is BFLOAT16:
        patterns = [_round_to_bfloat16(value) for value in values]
        for value, pattern in zip(values, patterns, strict=True):
            if pattern & 0x7FFF == 0x7F80 and not math.isinf(value):
                raise OverflowError(f"{value!r} is too large for bfloat16")
        return struct.pack(f"<{len(patterns)}H", *patterns)
    raise ValueError(f"bntool does not write {dtype}")
