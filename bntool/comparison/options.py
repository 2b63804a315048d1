"""The choices of comparing, apart from the code that compares."""

from __future__ import annotations

from enum import Enum


class Expectation(Enum):
    """The relation that two checkpoints may be expected to have."""

    FROZEN = "frozen"  # no tensor of a BatchNorm changed
    NORM_EVAL = "norm-eval"  # no statistics of a BatchNorm changed; weight and bias may
    STATS_ONLY = "stats-only"  # nothing but statistics of BatchNorm layers changed
    IDENTICAL = "identical"  # the same tensors, bit by bit
