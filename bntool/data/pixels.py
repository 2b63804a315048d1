"""The pixels of an image file, resized and cropped as torchvision and timm do it, and of arrays."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from bntool.data.preprocessing import Orientation, Preprocessing, Size
from bntool.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")
_MAX_16_BITS = 0xFFFF
_PIXEL_CHANNELS = (1, 3, 4)


def read_image(file: Path | BinaryIO, preprocessing: Preprocessing) -> torch.Tensor:
    """Return pixels of an image in RGB or grey, resized and cropped.

    Palettes, CMYK and grey become RGB as Pillow has it, an alpha channel is dropped, 16 bits of grey become their upper
    8. Resizing (antialiased) and cropping round as torchvision's ``Resize`` and ``CenterCrop`` do for PIL images. Of
    several frames the first counts.

    Returns:
        uint8, shape (C, H, W).

    Raises:
        Exception: Pillow cannot read it; it raises OSError, ValueError, SyntaxError and others on bad files.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on large images and odd metadata
        with Image.open(file) as opened:
            opened.load()
            upright = preprocessing.orientation is Orientation.UPRIGHT
            image = convert(ImageOps.exif_transpose(opened) if upright else opened, preprocessing.channels)
    if preprocessing.resize is not None:
        size = _fit_shorter_side(image.size, preprocessing.resize)
        if size != image.size:
            image = image.resize(size, Image.Resampling[preprocessing.interpolation.name])
    if preprocessing.crop is not None:
        image = _cut_middle(image, preprocessing.crop)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, preprocessing.channels).permute(2, 0, 1)


def convert(image: Image, channels: int) -> Image:
    """Convert an image of any mode to RGB or grey of 8 bits a channel.

    Raises:
        ValueError: its pixels have no fixed range (floating point, 32 bits).
    """
    import PIL.Image

    if image.mode in (*_DEEP, "I"):  # Pillow before 11 has 16 bits as I
        values = np.asarray(image)
        if values.min() < 0 or values.max() > _MAX_16_BITS:
            raise ValueError("its pixels are integers of 32 bits, which have no fixed range")
        image = PIL.Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating point, which have no fixed range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB" if channels == 3 else "L")


def _fit_shorter_side(size: tuple[int, int], wanted: Size) -> tuple[int, int]:
    """Return the width and height after resizing the shorter side."""
    if isinstance(wanted, tuple):
        return wanted[1], wanted[0]
    width, height = size
    other = int(wanted * max(size) / min(size))
    return (wanted, other) if width <= height else (other, wanted)


def _cut_middle(image: Image, crop: Size) -> Image:
    height, width = crop if isinstance(crop, tuple) else (crop, crop)
    left, top = _find_edge(image.width, width), _find_edge(image.height, height)
    return image.crop((left, top, left + width, top + height))


def _find_edge(length: int, wanted: int) -> int:
    """Return where a centred crop begins; negative if the image is smaller than the crop."""
    return round((length - wanted) / 2) if length >= wanted else -((wanted - length) // 2)


def arrange_pixels(pixels: torch.Tensor, spec: str) -> torch.Tensor:
    """Arrange pixels as (N, C, H, W), from (N, H, W, C), (N, C, H, W) or, grey, (N, H, W).

    Raises:
        UsageError: they are none of these.
    """
    if pixels.ndim == 3:
        return pixels.unsqueeze(1)
    if pixels.ndim == 4 and pixels.shape[1] in _PIXEL_CHANNELS:
        return pixels
    if pixels.ndim == 4 and pixels.shape[3] in _PIXEL_CHANNELS:
        return pixels.permute(0, 3, 1, 2).contiguous()
    raise UsageError(
        f"uint8 pixels of shape {list(pixels.shape)}; (N, H, W, C), (N, C, H, W) or (N, H, W) is needed", path=spec
    )
