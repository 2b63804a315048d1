"""Preprocessing of images before a model sees them: resize, crop, scale to 0..1, subtract mean, divide by std."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from bntool.errors import UsageError

if TYPE_CHECKING:
    import torch

Size = int | tuple[int, int]


class Interpolation(Enum):
    """The way in which pixels between pixels are made when an image is resized; the names are Pillow's."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Orientation(Enum):
    """The treatment of photos that say in their EXIF data how the camera was held."""

    UPRIGHT = "upright"  # as it was seen
    STORED = "stored"  # as its pixels are stored; what the loaders of torchvision and timm do


@dataclass(frozen=True)
class Preprocessing:
    """Steps from an image file to the input of a model, in this order.

    Attributes:
        resize: length of the shorter side in pixels, or (height, width), which distorts; None leaves the size.
        crop: side of the square, or (height, width), cut from the middle in pixels; black where the image is smaller.
        mean: subtracted for each channel, after scaling pixels to 0..1.
        std: divided by, for each channel.
        interpolation: for resizing, antialiased.
        channels: 3 for RGB, 1 for grey.
        orientation: of photos.
        origin: where these steps are from, in words.
    """

    resize: Size | None = None
    crop: Size | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: Interpolation = Interpolation.BILINEAR
    channels: int = 3
    orientation: Orientation = Orientation.UPRIGHT
    origin: str = field(default="--preprocess", compare=False)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute (pixels / 255 - mean) / std.

        Args:
            pixels: uint8, shape (N, C, H, W).

        Returns:
            float32, the same shape.

        Raises:
            UsageError: mean or std have another number of channels.
        """
        channels = pixels.shape[1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UsageError(f"{name} has {len(values)} values but the images have {channels} channels")
        import torch  # a shell that completes --preprocess needs none

        mean = torch.tensor(self.mean, dtype=torch.float32, device="cpu").reshape(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device="cpu").reshape(1, -1, 1, 1)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def without_geometry(self) -> Preprocessing:
        """Return the preprocessing without resize and crop, for pixels that already have their size."""
        return replace(self, resize=None, crop=None)

    def describe(self) -> str:
        """Write the steps as ``--preprocess`` takes them, without those that have their default."""
        parts = [f"{name}={_show_size(size)}" for name, size in (("resize", self.resize), ("crop", self.crop)) if size]
        if self.resize and self.interpolation is not Interpolation.BILINEAR:
            parts.append(f"interpolation={self.interpolation.value}")
        parts += [f"{name}={'/'.join(f'{v:.10g}' for v in values)}" for name, values in self._scaling()]
        if self.channels != 3:
            parts.append(f"channels={self.channels}")
        if self.orientation is not Orientation.UPRIGHT:
            parts.append(f"orientation={self.orientation.value}")
        return ",".join(parts)

    def _scaling(self) -> tuple[tuple[str, tuple[float, ...]], ...]:
        return (("mean", self.mean), ("std", self.std))


def _show_size(size: Size) -> str:
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEPS = ("resize", "crop", "interpolation", "mean", "std", "channels", "orientation")
PRESETS = {
    "imagenet": Preprocessing(resize=256, crop=224, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "inception": Preprocessing(resize=342, crop=299, mean=(0.5,), std=(0.5,)),
    "clip": Preprocessing(  # openai/CLIP, clip/clip.py
        resize=224,
        crop=224,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        interpolation=Interpolation.BICUBIC,
    ),
    # of the 50,000 training images, over all pixels
    "cifar10": Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": Preprocessing(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    "mnist": Preprocessing(mean=(0.1307,), std=(0.3081,), channels=1),
    "normalize": Preprocessing(mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "scale": Preprocessing(),
}
MODEL_PRESET = "model"


def parse_preprocessing(text: str, *, presets: Mapping[str, Preprocessing] = PRESETS) -> Preprocessing:
    """Read ``imagenet``, ``imagenet,resize=232`` or ``resize=40,crop=32,mean=0.5,std=0.25/0.25/0.25``.

    Args:
        text: a preset, and changes to it; or steps only. ``resize=224x224`` distorts to height x width.
        presets: by name: ``imagenet`` (resize 256, crop 224, ImageNet's mean and std), ``inception`` (342, 299, mean
            and std 0.5), ``clip`` (224, bicubic), ``cifar10``, ``cifar100``, ``mnist`` (one channel) and ``normalize``
            (ImageNet's) without size, ``scale`` (pixels to 0..1 only).

    Raises:
        UsageError: it cannot be understood.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    result = Preprocessing()
    if "=" in first:
        rest = [first, *rest]
    elif first in presets:
        result = replace(presets[first], origin=presets[first].origin if first == MODEL_PRESET else first)
    elif first == MODEL_PRESET:
        raise UsageError(
            "--preprocess model: the model's package says nothing of its preprocessing; name the steps, e.g. imagenet"
        )
    else:
        raise UsageError(
            f"--preprocess knows no {first!r}; presets are {', '.join(presets)}, or e.g. resize=40,crop=32"
        )
    for part in rest:
        name, _, value = part.partition("=")
        try:
            result = _set(result, name.strip(), value.strip())
        except ValueError:
            raise UsageError(f"--preprocess {part!r}: {value!r} is no such value") from None
    _check(result)
    return replace(result, origin=f"{result.origin}, changed") if rest and "=" not in first else result


def _check(preprocessing: Preprocessing) -> None:
    sizes = [size for size in (preprocessing.resize, preprocessing.crop) if size is not None]
    lengths = [length for size in sizes for length in (size if isinstance(size, tuple) else (size,))]
    if any(number <= 0 for number in preprocessing.std) or min(lengths, default=1) < 1:
        raise UsageError("--preprocess: std, resize and crop must be positive")
    if not all(map(math.isfinite, (*preprocessing.mean, *preprocessing.std))):
        raise UsageError("--preprocess: mean and std must be finite")
    if preprocessing.channels not in (1, 3):
        raise UsageError("--preprocess: channels is 3 (RGB) or 1 (grey)")


def _set(preprocessing: Preprocessing, name: str, value: str) -> Preprocessing:  # noqa: PLR0911 (one for each step)
    if name == "resize":
        return replace(preprocessing, resize=_read_size(value))
    if name == "crop":
        return replace(preprocessing, crop=_read_size(value))
    if name == "mean":
        return replace(preprocessing, mean=_read_numbers(value))
    if name == "std":
        return replace(preprocessing, std=_read_numbers(value))
    if name == "interpolation":
        return replace(preprocessing, interpolation=Interpolation(value))
    if name == "channels":
        return replace(preprocessing, channels=int(value))
    if name == "orientation":
        return replace(preprocessing, orientation=Orientation(value))
    raise UsageError(f"--preprocess knows no {name!r}; it can set {', '.join(STEPS[:-1])} and {STEPS[-1]}")


def _read_size(text: str) -> Size | None:
    height, by, width = text.partition("x")
    return (int(height), int(width)) if by else int(height) or None


def _read_numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split("/"))
