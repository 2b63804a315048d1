"""What is done to images before a model sees them: resize, crop, scale to 0..1, subtract mean, divide by std."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bntool.errors import UsageError


@dataclass(frozen=True)
class Preprocessing:
    """Steps from pixels 0..255 to the input of a model, in this order.

    Attributes:
        resize: length of the shorter side in pixels; None leaves the size.
        crop: side of the square cut from the middle, in pixels; None leaves it whole.
        mean: subtracted for each channel, after scaling pixels to 0..1.
        std: divided by, for each channel.
    """

    resize: int | None = None
    crop: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """(pixels / 255 - mean) / std.

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
        mean = torch.tensor(self.mean).reshape(1, -1, 1, 1)
        std = torch.tensor(self.std).reshape(1, -1, 1, 1)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRESETS = {
    "imagenet": Preprocessing(resize=256, crop=224, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "inception": Preprocessing(resize=342, crop=299, mean=(0.5,), std=(0.5,)),
    "normalize": Preprocessing(mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "scale": Preprocessing(),
}


def parse_preprocessing(text: str) -> Preprocessing:
    """Read ``imagenet``, ``imagenet,resize=232`` or ``resize=40,crop=32,mean=0.5,std=0.25/0.25/0.25``.

    A preset may come first: ``imagenet`` (resize 256, crop 224, ImageNet's mean and std), ``inception`` (342, 299, mean
    and std 0.5), ``normalize`` (ImageNet's mean and std only), ``scale`` (pixels to 0..1 only).

    Raises:
        UsageError: it cannot be understood.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    result = Preprocessing()
    if "=" in first:
        rest = [first, *rest]
    elif first in PRESETS:
        result = PRESETS[first]
    else:
        raise UsageError(
            f"--preprocess knows no {first!r}; presets are {', '.join(PRESETS)}, or e.g. resize=40,crop=32"
        )
    for part in rest:
        name, _, value = part.partition("=")
        try:
            result = _set(result, name, value)
        except ValueError:
            raise UsageError(f"--preprocess {part!r}: {value!r} is not a number") from None
    if any(number <= 0 for number in result.std) or min(result.resize or 1, result.crop or 1) < 1:
        raise UsageError("--preprocess: std, resize and crop must be positive")
    return result


def _set(preprocessing: Preprocessing, name: str, value: str) -> Preprocessing:
    if name == "resize":
        return replace(preprocessing, resize=int(value) or None)
    if name == "crop":
        return replace(preprocessing, crop=int(value) or None)
    numbers = tuple(float(number) for number in value.split("/")) if name in ("mean", "std") else ()
    if name == "mean":
        return replace(preprocessing, mean=numbers)
    if name == "std":
        return replace(preprocessing, std=numbers)
    raise UsageError(f"--preprocess knows no {name!r}; it can set resize, crop, mean and std")
