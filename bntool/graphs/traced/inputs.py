"""Inputs to run a model with where none are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from bntool.errors import UsageError, UserCodeError
from bntool.modules.borrowing import borrow
from bntool.modules.calling import call
from bntool.modules.finding import walk_modules

_BATCH = 2  # one sample would hide mistakes about the batch axis
# small ones first: they prove the same, faster
_LENGTHS = (224, 1024, 64, 16000, 16)
_SIZES = (64, 224, 32, 28, 8, 16, 128, 256, 299, 384, 512)
_SIZES_3D = (32, 64, 112, 224)
_FRAMES = (16, 8, 32)
_TRIES = 40


def parse_shape(text: str) -> tuple[int, ...]:
    """Read ``1,3,224,224`` as a shape.

    Raises:
        UsageError: it is none.
    """
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape {text!r} is no shape; write it like 1,3,224,224")
    return shape


def make_input(model: nn.Module, shape: Sequence[int]) -> torch.Tensor:
    """Return a normally distributed input of that shape, in the model's dtype and on its device.

    Torch's own random state is not touched.
    """
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), numbers)
    return numbers.to(device=parameter.device, dtype=parameter.dtype)


def find_input(model: nn.Module) -> torch.Tensor:
    """Guess an input that the model runs on, from its first layers; the model is given back as it was.

    Raises:
        UsageError: none of the usual shapes runs.
    """
    tried: list[tuple[int, ...]] = []
    problem = ""
    with borrow(model), torch.no_grad():
        model.eval()
        for shape in guess_shapes(model):
            if shape in tried or len(tried) >= _TRIES:
                continue
            tried.append(shape)
            inputs = make_input(model, shape)
            try:
                call(model, inputs)
            except UserCodeError as error:
                problem = problem or error.message
            else:
                return inputs
    shapes = ", ".join(str(list(shape)) for shape in tried[:6])
    raise UsageError(
        f"the model runs on none of {len(tried)} usual inputs ({shapes}, ...): give --input-shape or --data. "
        f"The first one: {problem}"
    )


def guess_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """List shapes that the model may take, the likely ones first."""
    configuration = getattr(model, "default_cfg", None)
    if isinstance(configuration, dict) and configuration.get("input_size"):  # timm's models know theirs
        yield (_BATCH, *configuration["input_size"])
    layers = [module for _, module in walk_modules(model)]
    convolutions = [m for m in layers if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    linears = [m for m in layers if isinstance(m, nn.Linear)]
    first = next((m for m in layers if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)), None)
    if isinstance(first, nn.Linear):
        yield from ((_BATCH, first.in_features), (_BATCH, 16, first.in_features))
    for convolution in convolutions[:3]:
        yield from _shapes_of_images(convolution)
    for linear in linears[:1]:
        yield from ((_BATCH, linear.in_features), (_BATCH, 16, linear.in_features))
    for channels in (3, 1):
        yield from ((_BATCH, channels, size, size) for size in (64, 224, 32, 28))


def _shapes_of_images(convolution: nn.Module) -> Iterator[tuple[int, ...]]:
    channels: int = convolution.in_channels  # type: ignore[assignment]
    if isinstance(convolution, nn.Conv1d):
        yield from ((_BATCH, channels, length) for length in _LENGTHS)
    elif isinstance(convolution, nn.Conv2d):
        yield from ((_BATCH, channels, size, size) for size in _SIZES)
    else:
        yield from ((_BATCH, channels, n, size, size) for n in _FRAMES for size in _SIZES_3D)
