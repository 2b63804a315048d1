"""Findings, things worth knowing about a layer or a file: a code, a severity and advice; docs/findings.md explains
each.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

from bntool.representation import short_repr


class Severity(Enum):
    """The severity of a finding: an ERROR makes outputs wrong, a WARNING may, a NOTICE is worth knowing."""

    NOTICE = "notice"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


class FindingCode(Enum):
    """Stable identifiers, for JSON and the documentation."""

    NON_FINITE = "non-finite"
    NEGATIVE_VARIANCE = "negative-variance"
    ZERO_VARIANCE = "zero-variance"
    NEVER_UPDATED = "never-updated"
    PARTLY_INITIAL = "partly-initial"
    COUNTER_MISSING = "counter-missing"
    COUNTER_ZERO = "counter-zero"
    COUNTER_LOW = "counter-low"
    COUNTER_DTYPE = "counter-dtype"
    COUNTER_DISAGREES = "counter-disagrees"
    DEAD_CHANNELS = "dead-channels"
    EXPLODING_SCALE = "exploding-scale"
    OUTLYING_VARIANCE = "outlying-variance"
    OUTLYING_MEAN = "outlying-mean"
    OUTLYING_BIAS = "outlying-bias"
    STATISTICS_MISSING = "statistics-missing"
    AFFINE_MISSING = "affine-missing"
    AFFINE_COMPUTED = "affine-computed"
    AFFINE_INITIAL = "affine-initial"
    BATCH_STATISTICS = "batch-statistics"
    LEFT_IN_TRAIN_MODE = "left-in-train-mode"
    LEFT_IN_EVAL_MODE = "left-in-eval-mode"
    NO_GRADIENT = "no-gradient"
    MOMENTUM = "momentum"
    EPS = "eps"
    HALF_STATISTICS = "half-statistics"
    UNDERFLOW = "underflow"
    OVERFLOW = "overflow"
    COUNTER_AGAINST_STEPS = "counter-against-steps"
    COUNTER_RESET = "counter-reset"
    STATISTICS_JUMPED = "statistics-jumped"
    EMA_STATISTICS_INITIAL = "ema-statistics-initial"
    EMA_STATISTICS_LAG = "ema-statistics-lag"
    AVERAGE_NOT_RECOMPUTED = "average-not-recomputed"
    INSTANCE_NORM_LOOKALIKE = "instance-norm-lookalike"
    NOT_BATCH_NORM = "not-batch-norm"
    SHAPE_MISMATCH = "shape-mismatch"
    NOT_INITIALISED = "not-initialised"
    SUSPICIOUS_GLOBAL = "suspicious-global"
    UNKNOWN_GLOBAL = "unknown-global"
    HOLDS_CODE = "holds-code"
    NOT_UNDERSTOOD = "not-understood"
    HOLES = "holes"
    NO_BATCH_NORM = "no-batch-norm"
    PARTIAL = "partial"


# what may be a BatchNorm, or a part of one, and could not be judged: a gate fails by it whatever its severity
UNJUDGED = (FindingCode.STATISTICS_MISSING, FindingCode.AFFINE_COMPUTED, FindingCode.NOT_UNDERSTOOD)


class Finding(NamedTuple):
    """Something worth knowing about a layer or a file.

    Attributes:
        short: a word or two for a table.
        message: a sentence with the numbers: what was found, and against what.
        facts: the numbers.
        advice: a sentence on what to do; "" where the message says it, or nothing is to be done.
        channels: numbers of the channels that it concerns; empty where it concerns all of them or none.
        layers: names of the layers that it concerns, of a finding that belongs to a state dict or a file.
        leaves_open: what can therefore not be judged, in a few words; "" where the verdict stands.
    """

    code: FindingCode
    severity: Severity
    short: str
    message: str
    facts: dict[str, Any] | None = None
    advice: str = ""
    channels: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()
    leaves_open: str = ""

    def __repr__(self) -> str:
        return short_repr(self)


class IgnoredFinding(NamedTuple):
    """A finding that a configuration takes for meant.

    Attributes:
        layer: that it is of; "" for a state dict or the file.
        finding: what was found.
        reason: that the configuration gives.
    """

    layer: str
    finding: Finding
    reason: str
