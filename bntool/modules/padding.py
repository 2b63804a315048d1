"""Convolutions that pad with a value of its own for each channel instead of with zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

VALUES = "padding_values"  # the buffer of such a module


class _PadsWithValues:
    """The base of convolutions that pad with values before they convolve.

    Attributes:
        padding_values: shape (in_channels,).
        amounts: elements before and after, of the last axis first, as ``torch.nn.functional.pad`` takes them.
    """

    padding_values: torch.Tensor
    amounts: tuple[int, ...]

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 as torch calls it
        padded = pad_channels(input, self.amounts, self.padding_values)
        return self._conv_forward(padded, self.weight, self.bias)  # type: ignore[attr-defined, no-any-return]

    def extra_repr(self) -> str:
        """Return what torch shows, and the padding."""
        return f"{super().extra_repr()}, padded by {self.amounts} with values of its own"  # type: ignore[misc]


class ValuePaddedConv1d(_PadsWithValues, nn.Conv1d):
    """A convolution of (N, C, L) that pads with a value for each channel."""


class ValuePaddedConv2d(_PadsWithValues, nn.Conv2d):
    """A convolution of (N, C, H, W) that pads with a value for each channel."""


class ValuePaddedConv3d(_PadsWithValues, nn.Conv3d):
    """A convolution of (N, C, D, H, W) that pads with a value for each channel."""


_CLASSES: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ValuePaddedConv1d,
    nn.Conv2d: ValuePaddedConv2d,
    nn.Conv3d: ValuePaddedConv3d,
}


def pad_channels(data: torch.Tensor, amounts: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Pad with a value for each channel; what is not padded stays bit for bit.

    Args:
        data: shape (N, C, ...) or (C, ...), with as many positions as ``amounts`` has pairs.
        amounts: as ``torch.nn.functional.pad`` takes them.
        values: shape (C,).
    """
    positions = len(amounts) // 2
    inside = torch.zeros_like(data.narrow(-positions - 1, 0, 1))
    border = functional.pad(inside, list(amounts), value=1.0)
    return functional.pad(data, list(amounts)) + border * values.to(data.dtype).reshape(
        -1, *(1 for _ in range(positions))
    )


def find_amounts(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """Count the elements that a convolution adds before and after, of the last axis first."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return (0,) * 2 * len(module.kernel_size)
        totals = [step * (size - 1) for step, size in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple(half for total in reversed(totals) for half in (total // 2, total - total // 2))
    return tuple(int(size) for size in reversed(tuple(module.padding)) for _ in range(2))


def change_padding(module: nn.Module) -> None:
    """Let a convolution pad with its buffer ``padding_values`` from now on, in place: parameters and hooks stay.

    Args:
        module: a plain convolution of torch that pads with zeros, or one that was changed before.
    """
    if isinstance(module, _PadsWithValues):
        return
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    amounts = find_amounts(module)
    module.__class__ = _CLASSES[type(module)]  # type: ignore[assignment]
    module.amounts = amounts  # type: ignore[assignment]
    module.padding = (0,) * len(module.kernel_size)
    module._reversed_padding_repeated_twice = [0] * len(amounts)
