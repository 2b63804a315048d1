"""The choices of recalibration, apart from the code that needs torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bntool.data.policies import OnBadData
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


@dataclass(frozen=True)
class MethodOptions:
    """How new statistics are computed.

    Attributes:
        method: the method by which batches give statistics.
        precision: of the forwards.
        memory: for activations with the method exact, in bytes or as ``2GB``; None for what there is.
        fit_memory: the method exact uses fewer samples where not all fit into memory.
        prior: for how many samples the old statistics count beside the new ones.
        promote: statistics that half precision cannot hold are stored as float32.
    """

    method: Method = Method.POOLED
    precision: Precision = Precision.MODEL
    memory: int | str | None = None
    fit_memory: bool = False
    prior: float = 0.0
    promote: bool = False


@dataclass(frozen=True)
class DataOptions:
    """How calibration data are read.

    Attributes:
        samples: at most so many; None for all.
        batch_size: samples of a batch, where bntool makes the batches.
        seed: of the order of the samples.
        workers: processes that read; None for as many as the data take.
        on_bad_data: what to do about data that cannot be used.
    """

    samples: int | None = None
    batch_size: int = 64
    seed: int = 0
    workers: int | None = None
    on_bad_data: OnBadData = OnBadData.STOP


@dataclass(frozen=True)
class JudgingOptions:
    """What the model is judged by, before and after.

    Attributes:
        eval_data: labelled data, as batches or a spec; None for the calibration data.
        metric: ``top1``, ``top5`` or ``FILE.py:function``; None for top1 where there are class labels.
        keep_if_better: new statistics are written only if the metric is better than before.
    """

    eval_data: str | Iterable[Any] | None = None
    metric: str | None = None
    keep_if_better: bool = False


@dataclass(frozen=True)
class ShareOptions:
    """Which share of the batches is measured, and where what is measured is kept.

    Attributes:
        shard: ``3/64``, for the third of 64 shares; None for all batches.
        partial: the file that takes what was measured instead of new statistics.
        resume: the file in which it is kept while it is measured.
        resume_every: seconds from one writing of that to the next.
    """

    shard: str | None = None
    partial: str | os.PathLike[str] | None = None
    resume: str | os.PathLike[str] | None = None
    resume_every: float = 30.0

    @property
    def is_share(self) -> bool:
        """Whether a partial is measured, and no model judged."""
        return self.shard is not None or self.partial is not None


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
