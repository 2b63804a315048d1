"""Padding with a value for each channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bntool.modules.padding import change_padding, find_amounts, pad_channels


@pytest.mark.parametrize(
    ("shape", "amounts"), [((2, 3, 5), (1, 2)), ((2, 3, 4, 5), (1, 0, 2, 3)), ((3, 4, 5), (1, 1, 0, 2))]
)
def test_each_channel_as_torch_pads_it_alone(shape, amounts) -> None:
    x, values = torch.randn(shape), torch.tensor([0.5, -3.0, 0.0])
    axis = len(shape) - len(amounts) // 2 - 1
    parts = [F.pad(x.narrow(axis, i, 1), amounts, value=float(values[i])) for i in range(3)]
    assert torch.equal(pad_channels(x, amounts, values), torch.cat(parts, axis))


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": (2, 0)}, {"padding": "same", "dilation": (1, 2)}, {"padding": "valid"}]
)
def test_amounts_are_those_of_torch(options) -> None:
    module, x = nn.Conv2d(3, 4, (3, 4), **options), torch.randn(1, 3, 8, 9)
    padded = F.pad(x, find_amounts(module))
    by_hand = F.conv2d(padded, module.weight, module.bias, dilation=module.dilation)
    with torch.no_grad():
        expected = module(x)
        assert torch.allclose(by_hand, expected, atol=1e-6)
        module.register_buffer("padding_values", torch.zeros(3))
        change_padding(module)
        change_padding(module)  # under a second name: nothing more
        assert torch.allclose(module(x), expected, atol=1e-6)
