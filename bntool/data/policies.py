"""The choices of reading data, apart from the code that needs torch."""

from __future__ import annotations

from enum import Enum


class OnBadData(Enum):
    """What to do about an input that cannot be read, or a batch that holds NaN or infinity."""

    STOP = "stop"
    SKIP = "skip"
