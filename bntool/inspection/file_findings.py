"""Findings that need more than one layer: of a state dict, of the copies of a model, of a whole file."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from bntool.batchnorm import BatchNorm, NormKind
from bntool.checkpoints.checkpoint import Checkpoint, NotUnderstood
from bntool.checkpoints.files import quote
from bntool.checkpoints.state_dicts import is_averaged_copy
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.results import LayerInspection, StateDictInspection

_LISTED = 3  # names in a sentence


def find_in_state_dict(norms: Sequence[BatchNorm]) -> list[Finding]:
    """Norms that are not BatchNorm but could be taken for it."""
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


def compare_averaged(inspections: list[StateDictInspection]) -> list[StateDictInspection]:
    """Flag averaged copies whose statistics are still initial while the model's have moved."""
    models = [i for i in inspections if not is_averaged_copy(i.state_dict.key)]
    moved = {
        layer.layer.name
        for inspection in models
        for layer in inspection.layers
        if layer.layer.has_statistics and not _is_initial(layer)
    }
    compared = []
    for inspection in inspections:
        stale = [i for i in inspection.layers if _is_initial(i) and i.layer.name in moved]
        if is_averaged_copy(inspection.state_dict.key) and stale:
            message = (
                f"the statistics of {len(stale)} of {len(inspection.layers)} layers of this averaged copy are initial "
                "while the model's have moved: its buffers were not copied"
            )
            finding = Finding(
                FindingCode.EMA_STATISTICS_INITIAL,
                Severity.ERROR,
                "EMA statistics initial",
                message,
                advice=f"recalibrate it before use, with --state-dict {inspection.state_dict.key}",
                layers=tuple(layer.name for layer in stale),
            )
            findings = (*inspection.findings, finding)
            inspection = dataclasses.replace(inspection, findings=findings)  # noqa: PLW2901
        compared.append(inspection)
    return compared


def _is_initial(layer: LayerInspection) -> bool:
    return any(finding.code is FindingCode.NEVER_UPDATED for finding in layer.findings)


def _is_folded(checkpoint: Checkpoint) -> bool:
    """Whether the file records that its layers were folded away."""
    return any(entry.get("operation") == "fold" for history in checkpoint.records.values() for entry in history)


def _describe_not_understood(found: Sequence[NotUnderstood]) -> Finding:
    shown = "; ".join(f"{quote(one.name)}: {one.reason}" for one in found[:_LISTED])
    more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    message = f"not judged, though it may be a BatchNorm: {shown}{more}"
    facts = {"names": [one.name for one in found]}
    return Finding(FindingCode.NOT_UNDERSTOOD, Severity.WARNING, "not understood", message, facts)


def find_in_file(checkpoint: Checkpoint, inspections: Sequence[StateDictInspection]) -> list[Finding]:
    """What concerns the whole file, beside what loading it may do."""
    findings = [
        Finding(FindingCode.HOLES, Severity.NOTICE, "holes", f"it holds {loss}; a file that bntool writes has none")
        for loss in checkpoint.format.describe_losses(checkpoint)
    ]
    if checkpoint.not_understood:
        findings.append(_describe_not_understood(checkpoint.not_understood))
    elif not any(inspection.layers for inspection in inspections) and not _is_folded(checkpoint):
        message = "no BatchNorm layer was found" if checkpoint.state_dicts else "no state dict was found"
        if checkpoint.format.why_empty and not checkpoint.state_dicts:
            message += f": {checkpoint.format.why_empty}"
        findings.append(Finding(FindingCode.NO_BATCH_NORM, Severity.NOTICE, "no BatchNorm", message))
    return findings
