"""One verdict on a file."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Health(Enum):
    """The possible verdicts on a file."""

    HEALTHY = "healthy"  # nothing above a notice, and everything was looked at
    SUSPICIOUS = "suspicious"  # warnings
    SICK = "sick"  # errors
    NO_BATCH_NORM = "no BatchNorm"
    NOT_JUDGED = "not judged"  # nothing above a notice where it was looked, but that was not everywhere


class Verdict(NamedTuple):
    """The verdict on a file, from all that was found in it and from what was not looked at.

    Attributes:
        health: what it is.
        sentence: the same in words: ``healthy``, ``3 layers suspicious``, ``2 layers sick``, ``no BatchNorm`` or
            ``not judged: what``.
        layers: how many BatchNorm layers were looked at, in all state dicts.
        suspicious, sick: how many of them have a warning or an error as their worst finding.
        not_judged: what was not looked at, or could not be, in a few words each.
    """

    health: Health
    sentence: str
    layers: int
    suspicious: int
    sick: int
    not_judged: tuple[str, ...] = ()
