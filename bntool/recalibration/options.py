"""The choices of recalibration, apart from the code that needs torch."""

from __future__ import annotations

import re
from enum import Enum

from bntool.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(I?)B?", re.IGNORECASE)


class Method(Enum):
    """The method by which running statistics are computed from batches; docs/recalibration.md has the formulas and
    sources.
    """

    POOLED = "pooled"
    EXACT = "exact"
    PAPER = "paper"


class Precision(Enum):
    """The precision of the forwards over calibration data; moments are taken in float32 and float64 either way."""

    MODEL = "model"
    BFLOAT16 = "bfloat16"


def check_memory(memory: int | str | None, *, method: Method, fit_memory: bool) -> int | None:
    """Return how much memory activations may take, in bytes.

    Raises:
        UsageError: it is no amount, or the method keeps no activations.
    """
    if memory is None:
        return None
    if method is not Method.EXACT:
        raise UsageError(f"--memory is for --method exact; {method.value} needs the memory of one forward")
    if fit_memory:
        raise UsageError("--samples auto takes as many as fit, and --memory sets aside what does not: give one of them")
    size = memory if isinstance(memory, int) else parse_size(memory)
    if size < 1:
        raise UsageError("--memory must be more than nothing", value=memory)
    return size


def parse_size(text: str) -> int:
    """Parse ``2GB``, ``500 MB``, ``1.5GiB`` or a number of bytes, as bytes.

    Raises:
        UsageError: it is nothing of the kind.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"--memory {text!r}: give an amount, e.g. 2GB")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
