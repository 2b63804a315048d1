"""Findings about BatchNorm layers whose statistics a file does not hold."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from bntool.batchnorm import STATISTICS, BatchNorm
from bntool.checkpoints.checkpoint import StateDict
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.representation import list_first
from bntool.verification.missing_statistics import find_missing_statistics

_WAY_OUT = (
    "an [[ignore]] of statistics-missing in bntool.toml says so to a gate, and a file of the whole module "
    "(torch.save(model)) says it by itself"
)


def report_missing_statistics(
    state_dict: StateDict, norms: Sequence[BatchNorm], *, not_understood: Collection[str] = ()
) -> list[Finding]:
    """Return the findings on what :func:`~bntool.verification.missing_statistics.find_missing_statistics` finds."""
    missing = find_missing_statistics(state_dict, norms, not_understood=not_understood)
    findings = []
    if missing.halves:
        roles = " and ".join(STATISTICS)
        message = f"a part of the statistics of {list_first(missing.halves)} is missing: a BatchNorm has {roles}"
        findings.append(_make(Severity.WARNING, message, missing.halves))
    if missing.likely:
        layers = "1 layer has" if len(missing.likely) == 1 else f"{len(missing.likely)} layers have"
        message = (
            f"{layers} weight and bias without statistics ({list_first(missing.likely)}): BatchNorms by their names"
            + (" and shapes" if missing.is_recognised else "")
        )
        findings.append(_make(Severity.WARNING, message, missing.likely))
    elif missing.possible:
        count = len(missing.possible)
        message = (
            f"{list_first(missing.possible)}: weight and bias behind a convolution, without statistics: may be a "
            "BatchNorm without its statistics, or a GroupNorm or LayerNorm, which have none"
        )
        left_open = f"{count} layer{'s' * (count > 1)} that may be a BatchNorm without its statistics"
        finding = _make(Severity.NOTICE, message, missing.possible)
        advice = f"{finding.advice}. If they are GroupNorms or LayerNorms, {_WAY_OUT}"
        findings.append(finding._replace(leaves_open=left_open, advice=advice))
    return findings


def describe_missing(names: Sequence[str], other: str) -> Finding:
    """Return layers that have statistics in another copy of the model and none here.

    Args:
        other: the copy that has them.
    """
    message = f"{len(names)} layers ({list_first(names)}) have no statistics here, those of {other} have"
    return _make(Severity.WARNING, message, names)


def _make(severity: Severity, message: str, layers: Sequence[str]) -> Finding:
    return Finding(
        FindingCode.STATISTICS_MISSING,
        severity,
        "statistics missing",
        message,
        advice="save model.state_dict(), which has the buffers; named_parameters() has none. bntool recalibrate gives "
        "a file its statistics from data",
        layers=tuple(layers),
    )
