"""The choices of recalibration, apart from the code that needs torch."""

from __future__ import annotations

from enum import Enum


class Method(Enum):
    """How running statistics are computed from batches; docs/recalibration.md has the formulas and sources."""

    POOLED = "pooled"
    EXACT = "exact"
    PAPER = "paper"


class Precision(Enum):
    """What the forwards over calibration data compute in; moments are taken in float32 and float64 either way."""

    MODEL = "model"
    BFLOAT16 = "bfloat16"
