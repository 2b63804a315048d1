"""Policies for data that cannot be used, apart from the code that needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class OnBadData(Enum):
    """The policy for an input that cannot be read, or a batch that holds NaN or infinity."""

    STOP = "stop"
    SKIP = "skip"


@dataclass(frozen=True)
class LeftOut:
    """Samples that were not used.

    Attributes:
        reason: which, and why, in words.
        samples: how many.
        layer: where that was seen, if not in the data itself.
    """

    reason: str
    samples: int
    layer: str | None = None
