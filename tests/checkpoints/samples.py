"""State dicts to read and write, and how to write each format: the one table that a new format adds a line to."""

from __future__ import annotations

import io
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.tensors import Tensor, read_bytes
from tests.checkpoints.foreign import (
    Tensors,
    bits,
    write_distributed,
    write_flax,
    write_legacy,
    write_mindspore,
    write_mxnet,
    write_nemo,
    write_npz,
    write_numpy_pickle,
    write_safetensors,
    write_sharded,
    write_tar,
    write_tensorflow,
    write_torchserve,
    write_zip,
)


def tiny_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    with torch.no_grad():
        net(torch.randn(4, 3, 6, 6))
    return net


# every kind of state dict that all formats can hold


def _dtype(dtype: torch.dtype) -> Callable[[], Tensors]:
    def build() -> Tensors:
        if dtype.is_floating_point or dtype.is_complex:
            return {"layer.weight": torch.linspace(-3, 3, 24).reshape(4, 6).to(dtype)}
        return {"layer.weight": torch.arange(24).remainder(2 if dtype is torch.bool else 120).reshape(4, 6).to(dtype)}

    return build


PLAIN_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip


def can_save(dtype: torch.dtype) -> bool:
    """Whether the installed torch writes tensors of a dtype: 2.5 has uint16, but does not."""
    try:
        torch.save(torch.zeros(1).to(dtype), io.BytesIO())
    except KeyError:
        return False
    return True


LATE_DTYPES = tuple(
    dtype
    for dtype in (
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.uint16,
        torch.uint32, torch.uint64,
    )
    if can_save(dtype)
)  # fmt: skip


def _transposed() -> Tensors:
    return {"fc.weight": torch.arange(35.0).reshape(5, 7).t(), "fc.bias": torch.arange(7.0)}


def _sliced() -> Tensors:
    base = torch.arange(120.0).reshape(4, 5, 6)
    return {"a.weight": base[1:3, ::2, 1:4], "b.weight": base[:, 2], "c.weight": base[3, 4, 5]}


def _expanded() -> Tensors:
    return {"a.weight": torch.arange(3.0).reshape(3, 1).expand(3, 4), "b.weight": torch.tensor(2.5).expand(2, 3)}


def _channels_last() -> Tensors:
    return {"conv.weight": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)}


def _tied() -> Tensors:
    weight = torch.arange(6.0).reshape(2, 3)
    return {"embed.weight": weight, "other.bias": torch.zeros(2), "head.weight": weight.detach()}


def _views() -> Tensors:
    flat = torch.arange(20.0)
    return {"a.weight": flat[:4], "b.weight": flat[4:10].reshape(2, 3), "c.weight": flat[8:12]}


def _empty() -> Tensors:
    return {"a.weight": torch.empty(0), "b.weight": torch.empty(3, 0, 2), "c.weight": torch.ones(2)}


def _scalars() -> Tensors:
    return {"bn.num_batches_tracked": torch.tensor(7), "bn.scale": torch.tensor(0.5), "bn.on": torch.tensor(True)}


def _parameters() -> Tensors:
    return {
        "a.weight": nn.Parameter(torch.arange(4.0)),
        "a.bias": nn.Parameter(torch.arange(4.0), requires_grad=False),
    }


def _odd_names() -> Tensors:
    names = ["weight", "a.b.c.weight", "größe.weight", "[red]x[/].weight", "a b.weight", "\x1b[31m.weight", "x" * 300]
    return {name: torch.full((2,), float(i)) for i, name in enumerate(names)}


def _bits() -> Tensors:
    payloads = torch.tensor([0x7FC00001, -0x400000, 0x7F800000, 1, -0x80000000], dtype=torch.int32)
    return {"odd.weight": payloads.view(torch.float32)}  # NaN payloads, infinity, a subnormal number, minus zero


def _large() -> Tensors:
    return {"big.weight": torch.arange(700_000, dtype=torch.float32).reshape(700, 1000)}  # more than one chunk


STATE_DICTS: dict[str, Callable[[], Tensors]] = {
    **{str(dtype).removeprefix("torch."): _dtype(dtype) for dtype in PLAIN_DTYPES + LATE_DTYPES},
    "net": lambda: tiny_net().state_dict(),
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": _expanded,
    "channels_last": _channels_last,
    "tied": _tied,
    "views": _views,
    "empty": _empty,
    "scalars": _scalars,
    "parameters": _parameters,
    "odd_names": _odd_names,
    "nan_payloads": _bits,
    "large": _large,
}


# how each format is written: the one entry that a new format needs here


@dataclass(frozen=True)
class Builder:
    """How another program writes a format.

    Attributes:
        write: gives the file to open.
        cannot_hold: names of :data:`STATE_DICTS` that the format or the program does not take.
    """

    write: Callable[[Tensors, Path], Path]
    cannot_hold: frozenset[str] = frozenset()

    def __call__(self, tensors: Tensors, folder: Path) -> Path:
        return self.write(tensors, folder)


_LATE = frozenset(str(dtype).removeprefix("torch.") for dtype in LATE_DTYPES)
_FLOAT8 = frozenset(name for name in _LATE if "float8" in name)
_FNUZ = frozenset({"float8_e4m3fnuz", "float8_e5m2fnuz"})
WRITERS: dict[str, Builder] = {
    "torch-zip": Builder(write_zip),
    "torch-legacy": Builder(write_legacy, cannot_hold=_LATE),
    "safetensors": Builder(write_safetensors, cannot_hold=_FNUZ),
    "sharded": Builder(write_sharded, cannot_hold=_FNUZ),
    "torch-tar": Builder(write_tar, cannot_hold=_LATE),
    "numpy-pickle": Builder(write_numpy_pickle, cannot_hold=_FLOAT8 | {"bfloat16"}),
    "torchserve": Builder(write_torchserve),
    "nemo": Builder(write_nemo),
    "mxnet": Builder(write_mxnet, cannot_hold=_FLOAT8 | {"complex64"}),
    "mindspore": Builder(write_mindspore, cannot_hold=_FLOAT8 | {"complex64"}),
    "flax": Builder(write_flax),
    "npz": Builder(write_npz, cannot_hold=_FLOAT8 | {"bfloat16"}),
    "distributed": Builder(write_distributed),
    "tensorflow": Builder(write_tensorflow, cannot_hold=frozenset({"odd_names"})),  # where a slash parts names
}
TORCH_FORMATS = ("torch-zip", "torch-legacy")


# comparing with torch


def torch_dtype(tensor: Tensor) -> torch.dtype:
    found = getattr(torch, tensor.dtype.name)
    assert isinstance(found, torch.dtype)
    return found


def to_torch(tensor: Tensor) -> torch.Tensor:
    """What bntool reads, as a tensor."""
    data = bytearray(read_bytes(tensor))
    if not data:
        return torch.empty(tensor.shape, dtype=torch_dtype(tensor))
    return torch.frombuffer(data, dtype=torch_dtype(tensor)).reshape(tensor.shape)


def assert_holds(checkpoint: Checkpoint, expected: Tensors, key: str = "") -> None:
    """The state dict holds exactly these tensors, bit for bit, in this order where the writer keeps it."""
    state_dict = checkpoint.state_dict(key)
    if checkpoint.format.name in TORCH_FORMATS:
        assert list(state_dict.tensors) == list(expected)
    else:  # safetensors.torch has an order of its own
        assert set(state_dict.tensors) == set(expected)
    for name, wanted in expected.items():
        found = state_dict.tensors[name]
        assert torch_dtype(found) == wanted.dtype, name
        assert tuple(found.shape) == tuple(wanted.shape), name
        assert read_bytes(found) == bits(wanted), name


def assert_same(found: Any, expected: Any, where: str = "root") -> None:
    """Deep equality of what torch.load gives: types, order, attributes, tensors bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, found.requires_grad) == (
            expected.dtype,
            expected.shape,
            expected.requires_grad,
        )
        assert found.stride() == expected.stride(), where
        assert bits(found) == bits(expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
        if isinstance(expected, OrderedDict) and hasattr(expected, "_metadata"):
            assert_same(found._metadata, expected._metadata, f"{where}._metadata")
    elif isinstance(expected, list | tuple | deque):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif hasattr(expected, "__dict__") and not isinstance(expected, type):
        assert_same(vars(found), vars(expected), where)
    else:
        assert found == expected or found != found, where  # noqa: PLR0124 (NaN)
