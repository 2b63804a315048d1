"""Decoding and rounding, held against torch."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bntool.checkpoints import arrays
from bntool.checkpoints.dtypes import (
    BFLOAT16,
    BY_NAME,
    DTYPES,
    FLOAT16,
    FLOAT32,
    NumberKind,
    decode_numbers,
    encode_numbers,
)

NUMBERS = [d for d in DTYPES if d.kind in (NumberKind.FLOAT, NumberKind.INTEGER, NumberKind.BOOL)]


def _patterns(size: int) -> bytes:
    """All patterns of one or two bytes, and a good selection of wider ones."""
    if size == 1:
        return bytes(range(256))
    if size == 2:
        return b"".join(struct.pack("<H", pattern) for pattern in range(1 << 16))
    return (
        np.random.default_rng(0).integers(0, 256, 4096 * size, dtype=np.uint8).tobytes() + bytes(size) + b"\xff" * size
    )


def round_with_numpy(values, dtype):
    """As means of weights are rounded."""
    wide = np.array(values, "<f8")
    rounded, widened = arrays._round(wide, dtype)
    arrays._check_range(widened, dtype, wide)
    return rounded.tobytes()


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_decodes_every_pattern_as_torch_does(dtype: object) -> None:
    assert isinstance(dtype, type(FLOAT32))
    data = _patterns(dtype.itemsize)
    if dtype.name == "bool":
        data = data[:2]
    if not hasattr(torch, dtype.name):
        pytest.skip(f"this torch has no {dtype.name}")
    wide = torch.uint64 if dtype.name == "uint64" else torch.float64 if dtype.is_floating else torch.int64
    expected = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype.name)).to(wide).tolist()
    found = decode_numbers(data, dtype)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == other or (math.isnan(one) and math.isnan(other))
        assert math.copysign(1, one) == math.copysign(1, other) or math.isnan(other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_kinds_are_those_of_torch(dtype: object) -> None:
    assert isinstance(dtype, type(FLOAT32))
    known = getattr(torch, dtype.name, None)
    if known is None:
        # float6 and float4 are known to safetensors only, and the latest to the latest torch
        assert dtype.safetensors is not None or dtype.name in ("float4_e2m1fn_x2", "float8_e8m0fnu")
        return
    assert known.itemsize == dtype.itemsize
    assert known.is_floating_point == dtype.is_floating or dtype.name == "float4_e2m1fn_x2"
    assert known.is_complex == (dtype.kind is NumberKind.COMPLEX)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_spacing_and_smallest_normal_number_are_those_of_torch(dtype: torch.dtype) -> None:
    known, torchs = BY_NAME[str(dtype).removeprefix("torch.")], torch.finfo(dtype)
    assert (known.spacing, known.smallest_normal) == (torchs.eps, torchs.smallest_normal)


def test_every_dtype_of_safetensors_and_torch_is_known() -> None:
    from safetensors.torch import _TYPES

    for name, dtype in _TYPES.items():
        found = [d for d in DTYPES if d.safetensors == name]
        assert found or name in ("F4", "F8_E8M0"), name
        assert not found or str(dtype) == f"torch.{found[0].name}" or name == "F4"
    for name in dir(torch):
        if isinstance(getattr(torch, name), torch.dtype) and not name.startswith(
            ("int", "uint", "bit", "quint", "qint")
        ):
            assert str(getattr(torch, name)).removeprefix("torch.") in BY_NAME, name


def test_opaque_and_complex_elements_are_not_numbers() -> None:
    for name in ("complex64", "quint8", "float4"):
        with pytest.raises(ValueError, match="not single numbers"):
            decode_numbers(bytes(8), BY_NAME[name])
        with pytest.raises(ValueError, match="does not write"):
            encode_numbers([1.0], BY_NAME[name])


HARD = [
    0.0, -0.0, 1.0, 1e-300, 5e-324, 65504.0, 65519.99, 6e-8, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0000001, 3.4e38, 1e-45,
    1.00390625, 1.00390625 + 2**-30, 1.00390625 - 2**-30, 1.01171875, 2.0**-133, 2.0**-134, 2.0**-134 * 1.5, 3.3895e38,
    math.inf, -math.inf, math.nan,
]  # fmt: skip
DOUBLES = st.one_of(st.sampled_from(HARD), st.floats(), st.floats(-1e5, 1e5), st.floats(-1e-37, 1e-37))


@given(st.lists(DOUBLES, min_size=1, max_size=20))
def test_rounds_to_float32_and_float16_as_torch_does(values: list[float]) -> None:
    for dtype in (FLOAT32, FLOAT16):
        expected = torch.tensor(values, dtype=torch.float64).to(getattr(torch, dtype.name))
        overflows = bool((expected.isinf() & torch.tensor(values).isfinite()).any())
        for round_all in (lambda v, d=dtype: encode_numbers(v, d), lambda v, d=dtype: round_with_numpy(v, d)):
            overflows = any(math.isinf(e) and math.isfinite(v) for e, v in zip(expected.tolist(), values, strict=True))
            if overflows:
                with pytest.raises(OverflowError):
                    round_all(values)
            else:
                found = torch.frombuffer(bytearray(round_all(values)), dtype=expected.dtype)
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
                assert torch.equal(found.signbit(), expected.signbit()) or bool(expected.isnan().any())


def _nearest_bfloat16(value: float) -> float:
    """By trying the neighbours that torch knows; torch itself rounds float64 twice on the way."""
    start = torch.tensor(value, dtype=torch.float64).to(torch.bfloat16)
    if not math.isfinite(value) or value == 0:
        return float(start)
    largest = torch.finfo(torch.bfloat16).max
    around = [
        start,
        torch.nextafter(start, torch.tensor(math.inf).bfloat16()),
        torch.nextafter(start, -torch.tensor(math.inf).bfloat16()),
    ]
    candidates = [c for c in around if c.isfinite()]
    even = {float(c): int(c.view(torch.int16)) & 1 for c in candidates}
    best = min(even, key=lambda c: (abs(Fraction(c) - Fraction(value)), even[c]))
    if abs(Fraction(value)) >= Fraction(largest) + Fraction(2) ** 119:  # half a step beyond the largest
        return math.copysign(math.inf, value)
    return best


@given(DOUBLES)
def test_rounds_to_bfloat16_once(value: float) -> None:
    expected = _nearest_bfloat16(value)
    for round_all in (lambda v: encode_numbers(v, BFLOAT16), lambda v: round_with_numpy(v, BFLOAT16)):
        if math.isinf(expected) and not math.isinf(value):
            with pytest.raises(OverflowError):
                round_all([value])
            continue
        (found,) = decode_numbers(round_all([value]), BFLOAT16)
        assert found == expected or math.isnan(expected)
        assert math.isnan(found) == math.isnan(expected)
        assert math.copysign(1, found) == math.copysign(1, value) or math.isnan(value)


def test_torch_rounds_bfloat16_twice_and_bntool_does_not() -> None:
    value = 1 + 2**-8 + 2**-40  # just above the middle between two bfloat16 numbers
    assert torch.tensor(value, dtype=torch.float64).to(torch.bfloat16).item() == 1.0
    assert decode_numbers(encode_numbers([value], BFLOAT16), BFLOAT16) == (1 + 2**-7,)
    assert round_with_numpy([value], BFLOAT16) == encode_numbers([value], BFLOAT16)


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "int32", "int64", "uint64"])
def test_integers(name: str) -> None:
    dtype, limits = BY_NAME[name], torch.iinfo(getattr(torch, name))
    for value in (limits.min, limits.max, 0, 7, 7.0):
        assert decode_numbers(encode_numbers([value], dtype), dtype) == (int(value),)
    for value in (limits.min - 1, limits.max + 1):
        with pytest.raises(OverflowError):
            encode_numbers([value], dtype)
    for value in (0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="is no"):
            encode_numbers([value], dtype)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_products_of_halves_are_rounded_once(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a float32 of the product lies in the middle of two of them, and where they are subnormal."""
    taken = []
    monkeypatch.setattr(
        arrays.Product,
        "_multiply_halves",
        lambda *given, do=arrays.Product._multiply_halves: taken.append(1) or do(*given),
    )
    random = np.random.default_rng(0)
    subnormal = 1 << (10 if dtype is FLOAT16 else 7)
    factors = np.stack(
        [
            1 + random.integers(-2000, 2000, 64) * 2.0**-12,
            (1 + random.integers(0, 4096, 64) * 2.0**-12) * (1 + random.integers(-3, 4, 64) * 2.0**-40),
            np.ldexp(1.5, random.integers(-40, 4, 64)),
            np.exp(random.standard_normal(64)) * random.choice([-1, 1], 64),
            random.choice([0.0, -0.0, 1.0, -1.0], 64),
        ]
    )
    for several in factors:
        for largest in (subnormal * 2, 0x6000):
            bits = (random.integers(0, largest, (64, 40)) | random.choice([0, 0x8000], (64, 40))).astype("<u2")
            found = arrays.Product(dtype).round(bits.tobytes(), bits.shape, several.reshape(-1, 1))
            values = np.array(decode_numbers(bits.tobytes(), dtype)).reshape(bits.shape)
            exact = (values * several.reshape(-1, 1)).reshape(-1).tolist()  # 11 bits times 53, rounded to 53
            assert bytes(found) == encode_numbers(exact, dtype)
    assert len(taken) >= 8
