"""The choices of converting, apart from the code that converts."""

from __future__ import annotations

from enum import Enum


class ConversionTarget(Enum):
    """The targets that a checkpoint can be converted to."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    FROZEN_BATCHNORM = "frozen-batchnorm"
    BATCHNORM = "batchnorm"


class FrozenKind(Enum):
    """The project whose FrozenBatchNorm2d is meant; they have the same four buffers and the same default eps."""

    TORCHVISION = "torchvision"
    TIMM = "timm"
    DETECTRON2 = "detectron2"

    @property
    def version(self) -> int:
        """Version of the module in ``_metadata``: detectron2 before 2021-06-18 changed the variance of lower ones."""
        return 3 if self is FrozenKind.DETECTRON2 else 1

    @property
    def default_eps(self) -> float:
        """Eps where its layers are built without saying so (torchvision before 0.8 had 0)."""
        return 1e-5
