"""Strided views and scaled tensors, held against torch."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bntool.checkpoints import arrays, tensors
from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.dtypes import BY_NAME
from bntool.checkpoints.files import MemorySource
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.scaled_tensors import ScaledTensor
from bntool.checkpoints.tensors import LiteralTensor, Storage, StoredTensor, describe_shape, read_bytes, read_numbers
from bntool.errors import RefusedError, UnsafeFileError, UsageError
from bntool.plan import Operation, Plan, Scaled, SetTensor
from tests.checkpoints.foreign import bits
from tests.checkpoints.samples import to_torch


def _stored(tensor: torch.Tensor, *, big_endian: bool = False) -> StoredTensor:
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    array = whole.numpy() if tensor.dtype is not torch.bfloat16 else whole.view(torch.uint8).numpy()
    data = (array.byteswap() if big_endian else array).tobytes()
    return StoredTensor(
        BY_NAME[str(tensor.dtype).removeprefix("torch.")],
        tuple(tensor.shape),
        tensor.stride(),
        int(tensor.storage_offset()),
        Storage(MemorySource(b"head" + data), 4, len(data), "0", big_endian=big_endian),
    )


@st.composite
def _views(draw: Any) -> torch.Tensor:
    """Any strided view of a storage, overlapping or not."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    strides = draw(st.lists(st.integers(0, 7), min_size=len(shape), max_size=len(shape)))
    dtype = draw(st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.int64, torch.complex128]))
    return torch.as_strided(torch.arange(100).to(dtype), shape, strides, draw(st.integers(0, 8)))


@given(_views(), st.booleans())
def test_gathers_any_strided_view(view: torch.Tensor, big_endian: bool) -> None:
    stored = _stored(view, big_endian=big_endian)
    assert read_bytes(stored) == bits(view)
    assert stored.is_contiguous == view.is_contiguous()
    touched = torch.zeros(100, dtype=torch.int64)
    for offset in torch.as_strided(torch.arange(100), view.shape, view.stride(), view.storage_offset()).flatten():
        touched[offset] += 1
    if (touched > 1).any():
        assert stored.overlaps_itself
    elif view.numel():
        places = touched.nonzero().flatten()
        assert stored.byte_range == (int(places[0]) * view.element_size(), (int(places[-1]) + 1) * view.element_size())


def test_contiguous_strided_and_dense_views_do_not_overlap_themselves() -> None:
    base = torch.zeros(4, 3, 5, 5)
    for view in (
        base,
        base.to(memory_format=torch.channels_last),
        base.transpose(0, 2),
        base[1:, :, ::2],
        base[0, 0, 0, 0],
    ):
        assert not _stored(view).overlaps_itself


def test_pieces_of_large_strided_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK", 64)
    big = torch.arange(3000.0).reshape(30, 100).t()
    assert read_bytes(_stored(big)) == bits(big)
    assert max(map(len, _stored(big).chunks())) <= 64
    assert read_bytes(_stored(big.contiguous())) == bits(big)
    assert max(map(len, _stored(big.contiguous()).chunks())) <= 64


def test_an_absurd_expansion_is_refused() -> None:
    with pytest.raises(UnsafeFileError, match="expands"):
        read_bytes(_stored(torch.zeros(1).expand(10**5, 10**5)))


def test_numbers_are_exact() -> None:
    assert list(read_numbers(_stored(torch.tensor([0.1])))) == [float(np.float32(0.1))]
    assert LiteralTensor.from_numbers([1, 2], dtype=BY_NAME["float16"], shape=(2,)).data == b"\x00\x3c\x00\x40"
    assert describe_shape((1, 2)) == "[1, 2]"
    assert describe_shape((1,) * 9) == "[1, 1, 1, 1, 1, 1, 1, 1, ...]"


# scaling


def _factors(shape: tuple[int, ...]) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.float64) * 3


def _layers() -> dict[str, tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]]:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(6, 8, 3), nn.Linear(7, 5)
    grouped = nn.ConvTranspose2d(6, 10, 3, groups=2)  # weight is [in, out / groups, k, k]
    return {
        "conv": (conv.weight, (8, 54), (8, 1)),
        "linear": (linear.weight, (5, 7), (5, 1)),
        "input channels": (linear.weight, (5, 7), (1, 7)),
        "transposed": (nn.ConvTranspose2d(6, 10, 3).weight, (6, 10, 9), (1, 10, 1)),
        "transposed, groups": (grouped.weight, (2, 3, 5, 9), (2, 1, 5, 1)),
        "channels last": (conv.weight.to(memory_format=torch.channels_last), (8, 54), (8, 1)),
        "rows of several runs": (torch.randn(3, 2500), (3, 2500), (3, 1)),
        "one element": (torch.randn(1), (1,), (1,)),
        "scalar": (torch.tensor(3.0), (1,), (1,)),
        "empty": (torch.randn(0, 4), (0, 4), (1, 4)),
    }


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", _layers())
def test_scaling_is_float64_rounded_once(
    name: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "CHUNK", chunk)
    monkeypatch.setattr(tensors, "CHUNK", max(chunk, 16))
    weight, view, factor_shape = _layers()[name]
    weight = weight.detach().to(dtype)
    factors = _factors(factor_shape)
    scaled = ScaledTensor(_stored(weight), view, tuple(factors.flatten().tolist()), factor_shape)
    expected = (weight.double().reshape(view) * factors).reshape(weight.shape).to(dtype)
    assert torch.equal(to_torch(scaled), expected)


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
@pytest.mark.parametrize(
    ("view", "shapes"),
    [
        ((6, 5, 3, 3), ((6, 1, 1, 1), (1, 5, 1, 1))),
        ((1, 6, 5, 9), ((1, 1, 5, 1), (1, 6, 1, 1))),
        ((6, 45), ((6, 1), (1, 45))),
    ],
)
def test_scaling_by_factors_of_two_dimensions_rounds_their_product_first(
    view: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "CHUNK", chunk)
    weight = torch.randn(6, 5, 3, 3)
    one, other = map(_factors, shapes)
    vectors = [array("d", factors.flatten().tolist()) for factors in (one, other)]
    scaled = ScaledTensor(_stored(weight), view, vectors[0], shapes[0], vectors[1], shapes[1])
    expected = (weight.double().reshape(view) * (one * other)).reshape(weight.shape).float()
    assert torch.equal(to_torch(scaled), expected)


def test_scaling_leaves_numpys_settings_as_they_were() -> None:
    before = np.getbufsize(), np.geterr()
    read_bytes(ScaledTensor(_stored(torch.randn(4, 50)), (4, 50), (1.0, 2.0, 3.0, 4.0), (4, 1)))
    assert (np.getbufsize(), np.geterr()) == before
    with pytest.raises(OverflowError):
        read_bytes(ScaledTensor(_stored(torch.full((1,), 3e38)), (1,), (1e5,), (1,)))
    assert (np.getbufsize(), np.geterr()) == before


def test_scaling_bfloat16_rounds_once() -> None:
    from tests.checkpoints.test_dtypes import _nearest_bfloat16

    weight = torch.randn(4, 50).bfloat16()
    factors = _factors((4, 1))
    scaled = ScaledTensor(_stored(weight), (4, 50), tuple(factors.flatten().tolist()), (4, 1))
    products = (weight.double() * factors).flatten().tolist()
    assert to_torch(scaled).flatten().tolist() == [_nearest_bfloat16(product) for product in products]


def test_infinities_and_nan_pass_but_overflow_does_not() -> None:
    weight = torch.tensor([float("inf"), float("nan"), 1.0])
    scaled = ScaledTensor(_stored(weight), (3,), (2.0,), (1,))
    assert bits(to_torch(scaled)) == bits(weight * 2)
    for dtype, value in ((torch.float32, 3e38), (torch.float16, 6e4), (torch.float64, 1e308), (torch.bfloat16, 3e38)):
        with pytest.raises(OverflowError):
            read_bytes(ScaledTensor(_stored(torch.tensor([value], dtype=dtype)), (1,), (1e5,), (1,)))


def test_overflow_while_writing_is_refused(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.full((2,), 3e38)}, tmp_path / "in.pt")
    plan = Plan(Operation.FOLD, steps=(SetTensor("a.weight", Scaled("a.weight", (2,), (10.0, 1.0), (2,))),))
    with pytest.raises(RefusedError, match="too large"):
        save_checkpoint(apply_plan(open_checkpoint(tmp_path / "in.pt"), plan), tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


@pytest.mark.parametrize(
    ("dtype", "scaled", "error"),
    [
        (torch.int64, Scaled("a.weight", (2,), (1.0,), (1,)), RefusedError),
        (torch.float8_e5m2, Scaled("a.weight", (2,), (1.0,), (1,)), RefusedError),
        (torch.float32, Scaled("a.weight", (3,), (1.0,), (1,)), UsageError),
        (torch.float32, Scaled("b.weight", (2,), (1.0,), (1,)), UsageError),
        (torch.float32, Scaled("nothing", (2,), (1.0,), (1,)), UsageError),
    ],
)
def test_what_cannot_be_scaled(dtype: torch.dtype, scaled: Scaled, error: type[Exception], tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2).to(dtype), "b.weight": torch.ones(2, dtype=torch.float64)}
    torch.save(tensors, tmp_path / "in.pt")
    with pytest.raises(error):
        apply_plan(open_checkpoint(tmp_path / "in.pt"), Plan(Operation.FOLD, steps=(SetTensor("a.weight", scaled),)))


def test_a_channels_last_weight_is_scaled_in_place(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    torch.save({"a.weight": weight}, tmp_path / "in.pt")
    plan = Plan(
        Operation.FOLD, steps=(SetTensor("a.weight", Scaled("a.weight", (4, 12), (1.0, 2.0, 3.0, 4.0), (4, 1))),)
    )
    save_checkpoint(apply_plan(open_checkpoint(tmp_path / "in.pt"), plan), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)["a.weight"]
    assert found.stride() == weight.stride()
    assert torch.equal(found, weight * torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1))
