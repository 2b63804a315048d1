"""A fold as a value: where scale and shift of a BatchNorm went."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Level(Enum):
    """The places that the scale and shift of a BatchNorm can go to."""

    DIRECT = "direct"  # into the producer right before it
    THROUGH = "through"  # back through additions, concatenations, splits or pools
    BATCHNORM = "norm"  # into the BatchNorm before it
    FORWARD = "forward"  # into what reads it
    BRANCH = "branch"  # into the convolution beside it that reads the same
    MERGED = "merged"  # into the one convolution that takes the place of parallel branches
    TRANSFORM = "transform"  # tensors around it are stored as a (x + b), by what lies before and after them


@dataclass(frozen=True)
class Fold:
    """One BatchNorm, called ``layer``, that is folded.

    Attributes:
        layer: which.
        into: the layers that take its scale and shift.
        level: how they are reached.
        stays: it stays as a module and only adds its shift.
        pooled: a max-pool lies between, which is exact since every scale is positive.
        scale_into, shift_into: those of ``into`` that take its scale, and those that take its shift.
    """

    layer: str
    into: tuple[str, ...]
    level: Level
    stays: bool
    scale_into: tuple[str, ...] = ()
    shift_into: tuple[str, ...] = ()
    pooled: bool = False

    @property
    def how(self) -> str:
        """How it is reached, for people, and what takes the scale or the shift alone."""
        pooled = ", past a max-pool (every scale is positive)"
        parts = (("scale", self.scale_into), ("shift", self.shift_into))
        apart = (f", {name} into {' and '.join(layers)}" for name, layers in parts if 0 < len(layers) < len(self.into))
        return f"{self.level.value}{pooled * self.pooled}{', keeps its shift' * self.stays}{''.join(apart)}"

    def describe(self) -> dict[str, Any]:
        """Return the fold as JSON data."""
        return {
            "layer": self.layer,
            "into": list(self.into),
            "level": self.level.value,
            "stays": self.stays,
            "pooled": self.pooled,
            "scale_into": list(self.scale_into),
            "shift_into": list(self.shift_into),
        }
