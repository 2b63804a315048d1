"""The result of `inspect`: as JSON data, and as blocks for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bntool.checkpoints.checkpoint import GlobalTrust
from bntool.checkpoints.origin import describe_origin
from bntool.inspection.findings import Finding
from bntool.inspection.module_findings import describe_behaviour
from bntool.inspection.results import Inspection, LayerInspection, StateDictInspection, Summary, TensorInspection
from bntool.inspection.safety import Safety, SafetyVerdict
from bntool.inspection.verdict import Verdict
from bntool.reports.blocks import Block, Cell, Column, Line, Style, Table, line
from bntool.reports.severities import HEALTH_STYLES
from bntool.reports.text import format_size, plural
from bntool.representation import list_first

_VERDICTS = {
    SafetyVerdict.HARMLESS: Style.GOOD,
    SafetyVerdict.UNKNOWN: Style.WARNING,
    SafetyVerdict.SUSPICIOUS: Style.ERROR,
}
_LISTED = 6  # names in a line


def describe_inspection(inspection: Inspection, *, every_tensor: bool) -> dict[str, Any]:
    """Return the facts as JSON data; the schema is docs/schema/inspect.json."""
    checkpoint = inspection.checkpoint
    return {
        "format": checkpoint.format.name,
        "size": checkpoint.format.size(checkpoint),
        "origin": describe_origin(checkpoint),
        "verdict": _describe_verdict(inspection.verdict),
        "safety": _describe_safety(inspection.safety),
        "globals": [{"name": g.path, "called": g.called, "trust": g.trust.value} for g in checkpoint.globals],
        "checksums_verified": inspection.checksums,
        "state_dicts": [_describe_state_dict(s, inspection, every_tensor=every_tensor) for s in inspection.state_dicts],
        "findings": _describe_findings(inspection.findings),
        **_describe_configuration(inspection),
        **({"notes": list(checkpoint.notes)} if checkpoint.notes else {}),
    }


def _describe_configuration(inspection: Inspection) -> dict[str, Any]:
    """Return the configuration that was used and the findings that it ignores; nothing without a configuration."""
    if inspection.configuration is None:
        return {}
    ignored = [
        {"layer": one.layer, "code": one.finding.code.value, "message": one.finding.message, "reason": one.reason}
        for one in inspection.ignored
    ]
    thresholds = [
        {
            "name": rule.name,
            "value": rule.value,
            "default": rule.default,
            "layers": list(rule.layers),
            "reason": rule.reason,
        }
        for rule in inspection.thresholds
    ]
    described = {"configuration": str(inspection.configuration), "ignored": ignored, "thresholds": thresholds}
    return described | ({"idle_globs": list(inspection.idle_globs)} if inspection.idle_globs else {})


def _describe_verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "health": verdict.health.value,
        "sentence": verdict.sentence,
        "layers": verdict.layers,
        "suspicious": verdict.suspicious,
        "sick": verdict.sick,
        "not_judged": list(verdict.not_judged),
    }


def _describe_safety(safety: Safety) -> dict[str, Any]:
    return {
        "verdict": safety.verdict.value,
        "holds_code": safety.holds_code,
        "known": len(safety.known),
        "unknown": list(safety.unknown),
        "suspicious": list(safety.suspicious),
    }


def _describe_state_dict(
    state_dict: StateDictInspection, inspection: Inspection, *, every_tensor: bool
) -> dict[str, Any]:
    source = state_dict.state_dict
    facts: dict[str, Any] = {
        "key": source.key,
        "prefix": source.prefix,
        "chosen": state_dict.chosen,
        "tensors": len(source.tensors),
        "parameters": state_dict.parameters,
        "buffers": state_dict.buffers,
        "architectures": [architecture.describe() for architecture in state_dict.architectures],
        "layers": [_describe_layer(layer) for layer in state_dict.layers],
        "other_norms": {kind.value: count for kind, count in state_dict.other_norms.items()},
        "recorded": list(inspection.checkpoint.records.get(source.key, ())),
        "findings": _describe_findings(state_dict.findings),
    }
    if every_tensor:
        facts["all_tensors"] = [_describe_tensor(tensor) for tensor in state_dict.tensors]
    return facts


def _describe_layer(layer: LayerInspection) -> dict[str, Any]:
    norm = layer.layer
    factor = norm.attributes.get("scale_factor")
    return {
        "name": norm.name,
        "kind": norm.kind.value,
        "channels": norm.num_features,
        "eps": norm.eps,
        "eps_source": norm.eps_source.value,
        "momentum": norm.momentum,
        "training": norm.training,
        "affine": norm.affine,
        "track_running_stats": norm.track_running_stats,
        "behaviour": list(describe_behaviour(norm)),
        **({"scale_factor": factor} if isinstance(factor, float) and math.isfinite(factor) else {}),
        "num_batches_tracked": layer.num_batches_tracked,
        "tensors": {role: _describe_summary(summary) for role, summary in layer.tensors.items()},
        "findings": _describe_findings(layer.findings),
    }


def _describe_summary(summary: Summary) -> dict[str, Any]:
    return {
        "dtype": summary.dtype,
        "shape": list(summary.shape),
        "min": summary.minimum,
        "mean": summary.mean,
        "max": summary.maximum,
        "nonfinite": summary.nonfinite,
    }


def _describe_tensor(tensor: TensorInspection) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": tensor.name,
        "role": tensor.role,
        "dtype": tensor.tensor.dtype.name,
        "shape": list(tensor.tensor.shape),
        "bytes": getattr(tensor.tensor, "nbytes", 0),
    }
    wrapper = getattr(tensor.tensor, "wrapper", None)
    if wrapper:
        facts["wrapper"] = wrapper
    if tensor.summary is not None:
        facts.update({key: value for key, value in _describe_summary(tensor.summary).items() if key not in facts})
    return facts


def _describe_findings(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    return [
        {
            "code": f.code.value,
            "severity": f.severity.value,
            "message": f.message,
            **({"advice": f.advice} if f.advice else {}),
            **({"channels": list(f.channels)} if f.channels else {}),
            **({"layers": list(f.layers)} if f.layers else {}),
            **({"facts": f.facts} if f.facts else {}),
        }
        for f in findings
    ]


def show_inspection(
    path: str, inspection: Inspection, *, every_layer: bool, every_tensor: bool, pictures: bool
) -> Iterable[Block]:
    """Return the blocks for one file: the verdict, what needs attention, then the rest.

    Args:
        every_layer: a row for each BatchNorm layer; else those of a stage share one where there are many.
        every_tensor: list the tensors, too.
    """
    from bntool.reports.layer_table import show_findings  # JSON needs none of it

    checkpoint = inspection.checkpoint
    facts = (checkpoint.format.title, format_size(checkpoint.format.size(checkpoint)), describe_origin(checkpoint))
    verdict = inspection.verdict
    yield Line((Cell(path, Style.HEADING), Cell(": "), Cell(verdict.sentence, HEALTH_STYLES[verdict.health])))
    yield line(", ".join(fact for fact in facts if fact))
    for note in checkpoint.notes:
        yield Line((Cell(note, Style.MUTED),))
    yield from _safety(inspection)
    if inspection.checksums is not None:
        yield line(f"checksums: {plural(inspection.checksums, 'record')} verified", Style.GOOD)
    yield from _show_configuration(inspection)
    if inspection.findings:
        yield line()
        worst_first = sorted(inspection.findings, key=lambda finding: -finding.severity.rank)
        yield from show_findings((finding, ()) for finding in worst_first)
    for state_dict in inspection.list_worst_first():
        yield line()
        yield from _state_dict_blocks(
            state_dict, inspection, every_layer=every_layer, every_tensor=every_tensor, pictures=pictures
        )


def _show_configuration(inspection: Inspection) -> Iterable[Block]:
    """Show what a configuration ignores, by code and reason, and the thresholds that it sets."""
    if inspection.configuration is None:
        return

    yield line(f"configuration: {inspection.configuration}", Style.MUTED)
    grouped: dict[tuple[str, str], list[str]] = {}
    for one in inspection.ignored:
        places = [one.layer] if one.layer else list(one.finding.layers)
        grouped.setdefault((one.finding.code.value, one.reason), []).extend(places)
    for (code, reason), places in grouped.items():
        where = f" in {list_first(places, _LISTED)}" if places else ""
        yield Line((Cell("ignored ", Style.MUTED), Cell(f"{code}{where}: {reason}")), indent=2)
    for rule in inspection.thresholds:
        where = f" for {list_first(rule.layers, _LISTED)}" if rule.layers else ""
        said = f"{rule.name} {rule.value:g}{where} (usually {rule.default:g}): {rule.reason}"
        yield Line((Cell("threshold ", Style.MUTED), Cell(said)), indent=2)
    if inspection.idle_globs:
        names = list_first(inspection.idle_globs, _LISTED)
        yield Line((Cell("selects no layer ", Style.MUTED), Cell(f"of this file: {names} of [[ignore]]")), indent=2)


def _safety(inspection: Inspection) -> Iterable[Block]:
    names = inspection.checkpoint.globals
    safety = inspection.safety
    if not names and not safety.holds_code:
        return
    unsure = [name for name in names if name.trust is not GlobalTrust.KNOWN]
    reasons = [plural(len(names), "global")] if names else []
    if names:
        which = "none" if len(unsure) == len(names) else f"{len(unsure)} not"
        reasons.append(f"{which} known to be harmless" if unsure else "all known to build data only")
    if safety.holds_code:
        reasons.append("the archive holds code")
    cells = [Cell("safety: "), Cell(safety.verdict.value, _VERDICTS[safety.verdict]), Cell(f" ({', '.join(reasons)})")]
    for index, name in enumerate(unsure[:_LISTED]):
        style = Style.ERROR if name.trust is GlobalTrust.SUSPICIOUS else Style.WARNING
        cells += [Cell(", " if index else ": "), Cell(name.path + ("()" if name.called else ""), style)]
    cells.append(Cell(f" and {len(unsure) - _LISTED} more" if len(unsure) > _LISTED else ""))
    yield Line(tuple(cells))


def _state_dict_blocks(
    state_dict: StateDictInspection, inspection: Inspection, *, every_layer: bool, every_tensor: bool, pictures: bool
) -> Iterable[Block]:
    from bntool.reports.layer_table import find_common, find_kind, show_behaviour, show_common, show_layers

    source = state_dict.state_dict
    counts = (
        f"{plural(len(source.tensors), 'tensor')}: {state_dict.parameters:,} in parameters, "
        f"{state_dict.buffers:,} in buffers"
    )
    prefix = f", prefix {source.prefix!r}" if source.prefix else ""
    several = len(inspection.checkpoint.state_dicts) > 1
    chosen = " (the one that other commands take)" if state_dict.chosen and several else ""
    yield Line(
        (
            Cell(f"state dict {source.key!r}" if source.key else "state dict", Style.HEADING),
            Cell(f"{chosen}{prefix}, {counts}"),
        )
    )
    channels = sum(layer.layer.num_features or 0 for layer in state_dict.layers)
    others = ", ".join(f"{count} {kind.value}" for kind, count in state_dict.other_norms.items())
    kind = find_common([find_kind(layer) for layer in state_dict.layers]) or "BatchNorm"
    summary = f"{kind}: {plural(len(state_dict.layers), 'layer')}, {plural(channels, 'channel')}"
    yield line(summary + (f"; other norms: {others}" if others else ""))
    for architecture in state_dict.architectures:
        part = "" if architecture.whole else ", in part"
        yield line(f"names and shapes of {architecture.title}{part}", Style.NOTICE)
    yield from show_common(state_dict.layers)
    yield from show_behaviour(state_dict.layers)
    yield from _records(inspection.checkpoint.records.get(source.key, ()))
    if state_dict.layers or state_dict.findings:
        yield line()
        yield from show_layers(state_dict, every=every_layer, pictures=pictures)
    if every_tensor:
        yield line()
        yield _tensor_table(state_dict.tensors)


def _records(history: Sequence[Any]) -> Iterable[Block]:
    for entry in history:
        operation, version = str(entry.get("operation", "?")), str(entry.get("bntool", "?"))
        layers = entry.get("layers")
        count = f", {plural(len(layers), 'layer')}" if isinstance(layers, list) else ""
        yield line(f"recorded: {operation} by bntool {version}{count}", Style.NOTICE)


def _tensor_table(tensors: Sequence[TensorInspection]) -> Table:
    from bntool.reports.layer_table import make_range_cell

    columns = (
        Column("tensor", shrinks=True),
        Column("role"),
        Column("dtype"),
        Column("shape"),
        Column("bytes", right=True),
        Column("min..max (mean)", right=True),
        Column("non-finite", right=True),
    )
    rows = []
    for tensor in tensors:
        summary = tensor.summary
        wrapper = getattr(tensor.tensor, "wrapper", None)
        nonfinite = str(summary.nonfinite) if summary is not None and summary.nonfinite else ""
        rows.append(
            (
                Cell(tensor.name),
                Cell(tensor.role),
                Cell(tensor.tensor.dtype.name + (f" ({wrapper})" if wrapper else "")),
                Cell("x".join(map(str, tensor.tensor.shape)) or "scalar"),
                Cell(format_size(getattr(tensor.tensor, "nbytes", 0))),
                make_range_cell(summary, digits=3, mean=True) if summary is not None else Cell(""),
                Cell(nonfinite, Style.ERROR),
            )
        )
    return Table(columns, rows)
