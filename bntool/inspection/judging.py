"""The verdict on a file, from what was found in it and from what was not looked at."""

from __future__ import annotations

from collections.abc import Sequence

from bntool.batchnorm import NormKind
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.files import quote
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.results import StateDictInspection
from bntool.inspection.verdict import Health, Verdict
from bntool.representation import list_first

_LISTED = 3  # names in a sentence
# these may normalise by stored statistics like a BatchNorm, and are not read
_RELATIVES = (
    NormKind.QUANTIZED_BATCH_NORM,
    NormKind.FUSED_CONV_BATCH_NORM,
    NormKind.SWITCH_NORM,
    NormKind.BATCH_RENORM,
    NormKind.EVO_NORM,
    NormKind.HETERO_BATCH_NORM,
    NormKind.GHOST_BATCH_NORM,
)


def judge(checkpoint: Checkpoint, inspections: Sequence[StateDictInspection], findings: Sequence[Finding]) -> Verdict:
    """Return the verdict on a file.

    Args:
        inspections: of the state dicts that were looked at.
        findings: those that concern the whole file.
    """
    worst = [severity for inspection in inspections for severity in inspection.find_worst().values()]
    sick, suspicious = worst.count(Severity.ERROR), worst.count(Severity.WARNING)
    of_no_layer = [finding for finding in _list_without_layers(inspections, findings) if finding.severity.rank > 0]
    not_judged = tuple(_list_not_judged(checkpoint, inspections))
    if sick or any(finding.severity is Severity.ERROR for finding in of_no_layer):
        health = Health.SICK
    elif suspicious or of_no_layer:
        health = Health.SUSPICIOUS
    elif not_judged:
        health = Health.NOT_JUDGED
    else:
        health = Health.HEALTHY if worst else Health.NO_BATCH_NORM
    parts = [_count(sick=sick, suspicious=suspicious)] if sick or suspicious else []
    if of_no_layer and not parts:
        named = ", ".join(dict.fromkeys(finding.short for finding in of_no_layer))
        layers = "" if not_judged else "layers healthy, " if worst else "no BatchNorm, "
        parts.append(f"{layers}the file {health.value}: {named}")
    if not_judged:
        parts.append(f"not judged: {list_first(not_judged, _LISTED)}")
    return Verdict(health, "; ".join(parts) or health.value, len(worst), suspicious, sick, not_judged)


def add_configured(verdict: Verdict, *, ignored: int, thresholds: int) -> Verdict:
    """Add to a verdict that a configuration had a part in it.

    Args:
        ignored: findings that it takes for meant.
        thresholds: that it sets for this file.
    """
    parts = [verdict.sentence]
    parts += [f"{ignored} finding{'s' * (ignored > 1)} ignored"] if ignored else []
    parts += [f"{thresholds} threshold{'s' * (thresholds > 1)} set"] if thresholds else []
    return verdict._replace(sentence=", ".join(parts))


def _list_without_layers(inspections: Sequence[StateDictInspection], findings: Sequence[Finding]) -> list[Finding]:
    of_file = [finding for finding in findings if finding.code is not FindingCode.NOT_UNDERSTOOD]  # told as not judged
    of_state_dicts = [finding for inspection in inspections for finding in inspection.findings if not finding.layers]
    return [*of_file, *of_state_dicts]


def _count(*, sick: int, suspicious: int) -> str:
    if not sick:
        return f"{suspicious} layer{'s' * (suspicious != 1)} suspicious"
    return f"{sick} layer{'s' * (sick != 1)} sick" + (f", {suspicious} suspicious" if suspicious else "")


def _list_not_judged(checkpoint: Checkpoint, inspections: Sequence[StateDictInspection]) -> list[str]:
    found = [quote(one.name) for one in checkpoint.not_understood]
    looked_at = {inspection.state_dict.key for inspection in inspections}
    found += [f"state dict {quote(s.key)}" for s in checkpoint.state_dicts if s.key not in looked_at]
    for inspection in inspections:
        left_out = len(inspection.names) - len(inspection.layers)
        if left_out:
            found.append(f"{left_out} of {len(inspection.names)} layers, which were not selected")
        found += [
            f"{count} {kind.value} layer{'s' * (count != 1)}"
            for kind, count in inspection.other_norms.items()
            if kind in _RELATIVES
        ]
        found += [finding.leaves_open for finding in inspection.findings if finding.leaves_open]
    if not checkpoint.state_dicts:
        is_other = bool(checkpoint.format.describe_other(checkpoint))
        found.append("a partial, which is no model" if is_other else "no state dict was found")
    return found
