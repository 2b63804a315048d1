"""The results of an inspection: a file, its state dicts, their layers and tensors, with numbers and findings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bntool.batchnorm import COUNTER, BatchNorm, LayerArrays, NormKind
from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.tensors import Tensor
from bntool.graphs.architectures.recognition import Architecture
from bntool.inspection.findings import UNJUDGED, Finding, IgnoredFinding, Severity
from bntool.inspection.safety import Safety
from bntool.inspection.thresholds import ThresholdRule
from bntool.inspection.verdict import Verdict
from bntool.representation import html_repr, list_first


class Summary:
    """Numbers of one tensor.

    Args:
        dtype: its name.
        shape: of the tensor.
        values: all elements, exactly.

    Attributes:
        nonfinite: how many elements are NaN or infinite.
        minimum, maximum: of the finite elements; None where there are none.
    """

    __slots__ = ("_finite", "dtype", "maximum", "minimum", "nonfinite", "shape", "values")

    def __init__(self, values: Sequence[float], *, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.values = values
        self.nonfinite = 0
        self._finite = values
        if not math.isfinite(sum(values)):  # or it is the sum that overflows
            self._finite = [value for value in values if math.isfinite(value)]
            self.nonfinite = len(values) - len(self._finite)
        self.minimum: float | None = min(self._finite, default=None)
        self.maximum: float | None = max(self._finite, default=None)

    def __repr__(self) -> str:
        return f"Summary({self.dtype} {list(self.shape)}: {self.minimum} .. {self.maximum}, mean {self.mean})"

    @property
    def mean(self) -> float | None:
        """The mean of the finite elements, in float64; None where there are none."""
        count = len(self._finite)
        try:
            return math.fsum(self._finite) / count if count else None
        except OverflowError:  # the sum of float64 values near the limit
            return math.fsum(value / count for value in self._finite)


@dataclass(frozen=True, repr=False, eq=False)
class LayerInspection(LayerArrays):
    """One BatchNorm with the numbers of its tensors and what is wrong with it."""

    layer: BatchNorm
    tensors: dict[str, Summary]
    findings: tuple[Finding, ...]

    _repr_html_ = html_repr

    def __repr__(self) -> str:
        found = f"; {list_first([finding.short for finding in self.findings], _SHOWN)}" if self.findings else ""
        return f"{self.layer!r}"[:-1] + f"{found}>"

    @property
    def name(self) -> str:
        """Dotted module path."""
        return self.layer.name

    @property
    def worst(self) -> Severity | None:
        """The severity of its worst finding; None without one."""
        return max((finding.severity for finding in self.findings), key=lambda severity: severity.rank, default=None)

    @property
    def num_batches_tracked(self) -> int | None:
        """None where there is none."""
        counter = self.tensors.get(COUNTER)
        return int(counter.values[0]) if counter is not None and len(counter.values) == 1 else None

    def read(self, role: str) -> Any:
        """Return a tensor as a numpy array of float64, exactly what the file held when it was inspected; None without
        one.
        """
        import numpy as np  # inspecting needs none

        summary = self.tensors.get(role)
        return None if summary is None else np.array(summary.values, "f8").reshape(summary.shape)


class TensorInspection(NamedTuple):
    """One tensor of a state dict: its role, and its numbers where they were asked for.

    Attributes:
        role: ``parameter`` or ``buffer``, by the pickled module where there is one, else by name and dtype.
    """

    name: str
    role: str
    tensor: Tensor
    summary: Summary | None


@dataclass(frozen=True, repr=False, eq=False)
class StateDictInspection:
    """One state dict: counts, layers and findings.

    Attributes:
        parameters, buffers: elements.
        other_norms: how many layers of each other kind of normalisation.
        chosen: the commands that write work on this one unless told otherwise.
        names: of all its BatchNorm layers, also those that were not asked for.
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
    names: tuple[str, ...] = ()
    architectures: tuple[Architecture, ...] = ()

    _repr_html_ = html_repr

    def __repr__(self) -> str:
        sick = [layer.name for layer in self.layers if layer.findings]
        found = f", findings in {len(sick)}: {list_first(sick, _SHOWN)}" if sick else ""
        return f"<{self.state_dict.key or 'state dict'!r}: {len(self.layers)} BatchNorm layers{found}>"

    def find_worst(self) -> dict[str, Severity | None]:
        """Return the severity of the worst finding that concerns each layer, its own or the state dict's; None without
        one.

        Layers whose statistics are missing are in no list of layers, but in findings.
        """
        worst: dict[str, Severity | None] = {layer.name: layer.worst for layer in self.layers}
        for finding in self.findings:
            for name in finding.layers:
                other = worst.get(name)
                if other is None or finding.severity.rank > other.rank:
                    worst[name] = finding.severity
        return worst

    @property
    def worst(self) -> Severity | None:
        """The severity of its worst finding, of a layer or of itself; None without one."""
        found = [*(one for one in self.find_worst().values() if one), *(finding.severity for finding in self.findings)]
        return max(found, key=lambda severity: severity.rank, default=None)

    def __getitem__(self, name: str) -> LayerInspection:
        """Return the layer of that name.

        Raises:
            KeyError: there is none, or it was not asked for.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


@dataclass(frozen=True, repr=False, eq=False)
class Inspection:
    """The inspection of a file.

    Attributes:
        findings: those that concern the whole file.
        safety: what loading it may do.
        verdict: on its BatchNorm layers.
        checksums: how many records were held against their checksum; None where this was not asked for.
        configuration: the file that says what is meant to be so; None without one.
        ignored: findings that it takes for meant; the verdict does not count them.
        thresholds: that it sets for this file.
        idle_globs: of layers, in its rules for findings that the file has, that select none of them.
    """

    checkpoint: Checkpoint
    state_dicts: tuple[StateDictInspection, ...]
    findings: tuple[Finding, ...]
    safety: Safety
    verdict: Verdict
    checksums: int | None = None
    configuration: Path | None = None
    ignored: tuple[IgnoredFinding, ...] = ()
    thresholds: tuple[ThresholdRule, ...] = ()
    idle_globs: tuple[str, ...] = ()

    _repr_html_ = html_repr

    def __repr__(self) -> str:
        inner = "".join(f"\n  {state_dict!r}" for state_dict in self.state_dicts[:_SHOWN])
        more = f"\n  and {len(self.state_dicts) - _SHOWN} more" if len(self.state_dicts) > _SHOWN else ""
        safety = self.safety.verdict.value
        return f"<Inspection of {self.checkpoint.path}: {self.verdict.sentence}; {safety} to load{inner}{more}>"

    def list_worst_first(self) -> list[StateDictInspection]:
        """List the state dicts, those with errors first, then those with warnings, each in the order of the file."""
        urgency = {Severity.ERROR: 0, Severity.WARNING: 1}
        return sorted(self.state_dicts, key=lambda one: urgency.get(one.worst or Severity.NOTICE, len(urgency)))

    def fails_on(self, severity: Severity) -> bool:
        """Return whether there is a finding of this severity or worse, or what may be a BatchNorm and could not be
        judged.
        """
        worst = self.worst()
        unjudged = any(one.code in UNJUDGED for state_dict in self.state_dicts for one in state_dict.findings)
        unjudged = unjudged or bool(self.checkpoint.not_understood)
        return unjudged or (worst is not None and worst.rank >= severity.rank)

    def worst(self) -> Severity | None:
        """Return the highest severity of all findings."""
        found = [*self.findings]
        for state_dict in self.state_dicts:
            found += state_dict.findings
            for layer in state_dict.layers:
                found += layer.findings
        return max((finding.severity for finding in found), key=lambda severity: severity.rank, default=None)


_SHOWN = 6  # of many things, in a repr
