"""The choices of freezing, apart from the code that freezes."""

from __future__ import annotations

from enum import Enum


class FreezeForm(Enum):
    """The form that freezing gives the tensors."""

    POLICY = "policy"  # they stay as they are
    CONSTANT = "constant"  # statistics are folded into weight and bias


class EmitTarget(Enum):
    """The framework that code is written for."""

    PYTHON = "python"
    MMDET = "mmdet"
    MMENGINE = "mmengine"
    LIGHTNING = "lightning"
    TIMM = "timm"
    ACCELERATE = "accelerate"
