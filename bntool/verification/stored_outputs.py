"""The way in which a changed model stores the output of a layer; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredOutput:
    """The output x of a layer is stored as a (x + b).

    Attributes:
        scale, shift: a and b of each channel, as arrays of float64.
        axis: where the channels lie.
    """

    scale: Any
    shift: Any
    axis: int
