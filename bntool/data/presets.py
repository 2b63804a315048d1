"""The preprocessing that torchvision and timm record for their own architectures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from bntool.data.preprocessing import Interpolation, Preprocessing

_TORCHVISION = "torchvision:"
_CLASSIFICATION = ("ImageClassification", "SemanticSegmentation")  # of which a folder of images can be the input
_INTERPOLATIONS = {"random": Interpolation.BILINEAR} | {kind.value: kind for kind in Interpolation}


def find_model_preset(spec: str, model: torch.nn.Module) -> Preprocessing | None:
    """Find the preprocessing that the package of a model names for it.

    For ``torchvision:NAME`` that of its default weights (``get_model_weights(NAME).DEFAULT.transforms()``); for any
    model that timm made, the ``pretrained_cfg`` it carries. None where nothing is said, or something that a
    :class:`Preprocessing` cannot do (videos, borders, boxes).

    Args:
        spec: of the model, as ``--model`` has it.
        model: what it became.
    """
    if spec.startswith(_TORCHVISION):
        return _ask_torchvision(spec.removeprefix(_TORCHVISION))
    config = getattr(model, "pretrained_cfg", None)
    return _read_timm(config) if isinstance(config, Mapping) else None


def _ask_torchvision(name: str) -> Preprocessing | None:
    from torchvision import models

    try:
        weights = models.get_model_weights(name).DEFAULT
        transform = weights.transforms()
    except (ValueError, AttributeError):  # an architecture without weights
        return None
    if type(transform).__name__ not in _CLASSIFICATION:
        return None
    crop = getattr(transform, "crop_size", None)
    return Preprocessing(
        resize=int(transform.resize_size[0]),
        crop=None if crop is None else int(crop[0]),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=_INTERPOLATIONS[transform.interpolation.value],
        origin=f"torchvision's {weights}",
    )


def _read_timm(config: Mapping[str, Any]) -> Preprocessing | None:
    """Read a configuration as ``timm.data.transforms_imagenet_eval`` does."""
    from timm.data import resolve_data_config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = resolve_data_config({}, pretrained_cfg=config)
    _, height, width = found["input_size"]
    mode, interpolation = found["crop_mode"], _INTERPOLATIONS.get(found["interpolation"])
    squashes = mode == "squash"
    if interpolation is None or not (squashes or (mode == "center" and height == width)):
        return None
    # the names of pretrained weights: resnet50.a1_in1k
    name = ".".join(str(part) for part in (config.get("architecture"), config.get("tag")) if part)
    scaled = (math.floor(height / found["crop_pct"]), math.floor(width / found["crop_pct"]))
    return Preprocessing(
        resize=scaled if squashes else scaled[0],
        crop=(height, width) if height != width else height,
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=interpolation,
        origin=f"timm's {name}" if name else "timm",
    )
