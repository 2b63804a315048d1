"""What an inspection gives: a file, its state dicts, their layers and tensors, with numbers and findings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from bntool.batchnorm import BatchNorm, NormKind
from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.tensors import Tensor
from bntool.graphs.architectures.recognition import Architecture
from bntool.inspection.findings import Finding, Severity


@dataclass(frozen=True)
class Summary:
    """Numbers of one tensor.

    Attributes:
        minimum, mean, maximum: over the finite elements; None where there are none.
        nonfinite: how many elements are NaN or infinite.
        values: all elements, exactly.
    """

    dtype: str
    shape: tuple[int, ...]
    minimum: float | None
    mean: float | None
    maximum: float | None
    nonfinite: int
    values: Sequence[float] = field(repr=False)


def summarize(values: Sequence[float], *, dtype: str, shape: tuple[int, ...]) -> Summary:
    """Minimum, mean (float64) and maximum of the finite elements, and how many are not finite."""
    finite = values if _all_finite(values) else [value for value in values if math.isfinite(value)]
    nonfinite = len(values) - len(finite)
    if not finite:
        return Summary(dtype, shape, None, None, None, nonfinite, values)
    try:
        mean = math.fsum(finite) / len(finite)
    except OverflowError:  # the sum of float64 values near the limit
        mean = math.fsum(value / len(finite) for value in finite)
    return Summary(dtype, shape, min(finite), mean, max(finite), nonfinite, values)


def _all_finite(values: Sequence[float]) -> bool:
    return math.isfinite(sum(values)) or all(map(math.isfinite, values))


@dataclass(frozen=True)
class LayerInspection:
    """One BatchNorm with the numbers of its tensors and what is wrong with it."""

    layer: BatchNorm
    tensors: dict[str, Summary]
    findings: tuple[Finding, ...]

    @property
    def num_batches_tracked(self) -> int | None:
        counter = self.tensors.get("num_batches_tracked")
        return int(counter.values[0]) if counter is not None and len(counter.values) == 1 else None


@dataclass(frozen=True)
class TensorInspection:
    """One tensor of a state dict: its role, and its numbers where they were asked for.

    Attributes:
        role: ``parameter`` or ``buffer``, by the pickled module where there is one, else by name and dtype.
    """

    name: str
    role: str
    tensor: Tensor
    summary: Summary | None


@dataclass(frozen=True)
class StateDictInspection:
    """One state dict: counts, layers and findings.

    Attributes:
        parameters, buffers: elements.
        other_norms: how many layers of each other kind of normalisation.
        chosen: the commands that write work on this one unless told otherwise.
        unselected: BatchNorm layers that were left out by name.
        architectures: whose names and shapes the tensors have, in whole or in part.
    """

    state_dict: StateDict
    parameters: int
    buffers: int
    layers: tuple[LayerInspection, ...]
    other_norms: dict[NormKind, int]
    findings: tuple[Finding, ...]
    tensors: tuple[TensorInspection, ...]
    chosen: bool
    unselected: int = 0
    architectures: tuple[Architecture, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        findings: those that concern the whole file.
        checksums: how many records were held against their checksum; None where this was not asked for.
    """

    checkpoint: Checkpoint
    state_dicts: tuple[StateDictInspection, ...]
    findings: tuple[Finding, ...]
    checksums: int | None = None

    def fails_on(self, severity: Severity) -> bool:
        """Whether there is a finding of this severity or worse, or something that could not be judged."""
        worst = self.worst()
        return bool(self.checkpoint.not_understood) or (worst is not None and worst.rank >= severity.rank)

    def worst(self) -> Severity | None:
        """The highest severity of all findings."""
        found = [*self.findings]
        for state_dict in self.state_dicts:
            found += state_dict.findings
            for layer in state_dict.layers:
                found += layer.findings
        return max((finding.severity for finding in found), key=lambda severity: severity.rank, default=None)
