"""Findings that need more than one layer: of a state dict, of the copies of a model, of a whole file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bntool.batchnorm import BatchNorm, NormKind
from bntool.checkpoints.checkpoint import Checkpoint, NotUnderstood
from bntool.checkpoints.files import quote
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.results import StateDictInspection
from bntool.representation import list_first

_LISTED = 3  # names in a sentence


def find_in_state_dict(norms: Sequence[BatchNorm]) -> list[Finding]:
    """Find norms that are not BatchNorm but could be taken for it."""
    findings = []
    lookalikes = [n for n in norms if n.kind is NormKind.INSTANCE_NORM]
    if lookalikes:
        message = (
            f"{len(lookalikes)} InstanceNorm layers have the same tensors as BatchNorm; they are told apart by class"
        )
        findings.append(Finding(FindingCode.INSTANCE_NORM_LOOKALIKE, Severity.NOTICE, "InstanceNorm", message))
    relatives = Counter(
        n.kind.value
        for n in norms
        if not n.kind.is_batch_norm
        and n.kind not in (NormKind.INSTANCE_NORM, NormKind.LAYER_OR_GROUP_NORM, NormKind.NORM_WITHOUT_STATISTICS)
    )
    for kind, count in relatives.items():
        message = f"{count} {kind} layers keep statistics but are no BatchNorm: bntool leaves them alone"
        findings.append(Finding(FindingCode.NOT_BATCH_NORM, Severity.NOTICE, kind, message))
    return findings


def _has_layers(inspection: StateDictInspection) -> bool:
    """Return whether it has BatchNorm layers, or may have: whose statistics are missing."""
    missing = any(finding.code is FindingCode.STATISTICS_MISSING for finding in inspection.findings)
    return bool(inspection.layers) or missing


def _is_folded(checkpoint: Checkpoint) -> bool:
    """Return whether the file records that its layers were folded away."""
    return any(entry.get("operation") == "fold" for history in checkpoint.records.values() for entry in history)


def _describe_not_understood(found: Sequence[NotUnderstood]) -> Finding:
    listed = list_first([f"{quote(one.name)}: {one.reason}" for one in found], _LISTED, separator="; ")
    message = f"not judged, though it may be a BatchNorm: {listed}"
    facts = {"names": [one.name for one in found]}
    return Finding(FindingCode.NOT_UNDERSTOOD, Severity.WARNING, "not understood", message, facts)


def find_in_file(checkpoint: Checkpoint, inspections: Sequence[StateDictInspection]) -> list[Finding]:
    """Find what concerns the whole file, beside what loading it may do."""
    findings = [
        Finding(FindingCode.HOLES, Severity.NOTICE, "holes", f"it holds {loss}; a file that bntool writes has none")
        for loss in checkpoint.format.describe_losses(checkpoint)
    ]
    other = checkpoint.format.describe_other(checkpoint)
    if other:
        findings.append(Finding(FindingCode.PARTIAL, Severity.NOTICE, "a partial", other))
    elif checkpoint.not_understood:
        findings.append(_describe_not_understood(checkpoint.not_understood))
    elif not any(map(_has_layers, inspections)) and not _is_folded(checkpoint):
        message = "no BatchNorm layer was found" if checkpoint.state_dicts else "no state dict was found"
        if checkpoint.format.why_empty and not checkpoint.state_dicts:
            message += f": {checkpoint.format.why_empty}"
        findings.append(Finding(FindingCode.NO_BATCH_NORM, Severity.NOTICE, "no BatchNorm", message))
    return findings
