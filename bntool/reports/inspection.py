"""What `inspect` found: as JSON data, and as blocks for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bntool.batchnorm import STATISTICS, EpsSource
from bntool.checkpoints.checkpoint import GlobalTrust
from bntool.checkpoints.origin import describe_origin
from bntool.inspection.findings import Finding, Severity
from bntool.inspection.results import Inspection, LayerInspection, StateDictInspection, Summary, TensorInspection
from bntool.inspection.safety import Safety, SafetyVerdict
from bntool.inspection.verdict import Health, Verdict
from bntool.reports.blocks import Block, Cell, Column, Line, Style, Table, line
from bntool.reports.text import format_number, format_size, plural

NARROW = 76  # columns below which only the statistics are shown
WIDE = 132  # columns from which on means and findings stand in the table
_STYLES = {Severity.NOTICE: Style.NOTICE, Severity.WARNING: Style.WARNING, Severity.ERROR: Style.ERROR}
_MARKS = {Severity.NOTICE: "i", Severity.WARNING: "!", Severity.ERROR: "X"}
_HEALTH = {
    Health.HEALTHY: Style.GOOD,
    Health.SUSPICIOUS: Style.WARNING,
    Health.SICK: Style.ERROR,
    Health.NO_BATCH_NORM: Style.NOTICE,
    Health.NOT_JUDGED: Style.WARNING,
}
_VERDICTS = {
    SafetyVerdict.HARMLESS: Style.GOOD,
    SafetyVerdict.UNKNOWN: Style.WARNING,
    SafetyVerdict.SUSPICIOUS: Style.ERROR,
}
_VECTORS = ("weight", "bias", *STATISTICS)
_LISTED = 6  # layers named in a finding that concerns many


def describe_inspection(inspection: Inspection, *, every_tensor: bool) -> dict[str, Any]:
    """The facts as JSON data; the schema is docs/schema/inspect.json."""
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
    }


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


def show_inspection(path: str, inspection: Inspection, *, every_tensor: bool) -> Iterable[Block]:
    """The blocks for one file."""
    checkpoint = inspection.checkpoint
    facts = (checkpoint.format.title, format_size(checkpoint.format.size(checkpoint)), describe_origin(checkpoint))
    verdict = inspection.verdict
    yield Line((Cell(path, Style.HEADING), Cell(": "), Cell(verdict.sentence, _HEALTH[verdict.health], True)))
    yield line(", ".join(fact for fact in facts if fact))
    yield from _safety(inspection)
    if inspection.checksums is not None:
        yield line(f"checksums: {plural(inspection.checksums, 'record')} verified", Style.GOOD)
    for state_dict in inspection.state_dicts:
        yield line()
        yield from _state_dict_blocks(state_dict, inspection, every_tensor=every_tensor)
    if inspection.findings:
        yield line()
        yield from _finding_lines([(finding, []) for finding in inspection.findings])


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
    state_dict: StateDictInspection, inspection: Inspection, *, every_tensor: bool
) -> Iterable[Block]:
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
    kind = _common([_kind(layer) for layer in state_dict.layers]) or "BatchNorm"
    summary = f"{kind}: {plural(len(state_dict.layers), 'layer')}, {plural(channels, 'channel')}"
    yield line(summary + (f"; other norms: {others}" if others else ""))
    for architecture in state_dict.architectures:
        part = "" if architecture.whole else ", in part"
        yield line(f"names and shapes of {architecture.title}{part}", Style.NOTICE)
    yield from _common_facts(state_dict.layers)
    yield from _records(inspection.checkpoint.records.get(source.key, ()))
    if every_tensor:
        yield line()
        yield _tensor_table(state_dict.tensors)
    elif state_dict.layers:
        yield line()
        yield _layer_table(state_dict.layers)
    whole: list[tuple[Finding, list[str]]] = [(finding, []) for finding in state_dict.findings]
    grouped = whole + _group(state_dict.layers)
    if grouped:
        yield line()
        yield from _finding_lines(grouped)


def _kind(layer: LayerInspection) -> str:
    """The class where the file holds it: it tells the dimension, which tensors do not."""
    return layer.layer.class_path.rpartition(".")[2] or layer.layer.kind.value


def _common(values: Sequence[Any]) -> Any:
    """The value that all share, or None."""
    return values[0] if values and all(value == values[0] for value in values) else None


def _common_facts(layers: Sequence[LayerInspection]) -> Iterable[Block]:
    """What is the same in all layers is said once, not in each row."""
    if not layers:
        return
    said = []
    tracked = [layer.num_batches_tracked for layer in layers]
    if _common(tracked) is not None:
        said.append(f"num_batches_tracked {tracked[0]}")
    elif all(value is None for value in tracked) and not layers[0].layer.class_path:
        said.append("num_batches_tracked missing")
    eps = [layer.layer.eps for layer in layers]
    if _common(eps) is not None:
        said.append(f"eps {format_number(eps[0] or 0.0)} ({layers[0].layer.eps_source.value})")
    elif all(layer.layer.eps_source is EpsSource.UNKNOWN for layer in layers):
        said.append("eps not in the file")
    momentum = [layer.layer.momentum for layer in layers]
    if _common(momentum) is not None:
        said.append(f"momentum {format_number(momentum[0] or 0.0)}")
    factors = [_scale_factor(layer) for layer in layers]
    if _common(factors) is not None:
        said.append(f"statistics divided by the scale factor {format_number(factors[0] or 0.0, 6)}")
    if said:
        yield line("every layer: " + ", ".join(said))


def _scale_factor(layer: LayerInspection) -> float | None:
    """By which Caffe divides the statistics it stores; those shown are divided already."""
    factor = layer.layer.attributes.get("scale_factor")
    return factor if isinstance(factor, float) else None


def _records(history: Sequence[Any]) -> Iterable[Block]:
    for entry in history:
        operation, version = str(entry.get("operation", "?")), str(entry.get("bntool", "?"))
        layers = entry.get("layers")
        count = f", {plural(len(layers), 'layer')}" if isinstance(layers, list) else ""
        yield line(f"recorded: {operation} by bntool {version}{count}", Style.NOTICE)


def _worst(findings: Sequence[Finding]) -> Severity | None:
    return max((finding.severity for finding in findings), key=lambda severity: severity.rank, default=None)


def _layer_table(layers: Sequence[LayerInspection]) -> Table:
    columns = [
        Column("", narrow=WIDE),
        Column("layer", shrinks=True),
        Column("kind"),
        Column("C", right=True),
        *(Column(title, right=True, wide=NARROW, narrow=WIDE) for title in ("weight", "bias")),
        *(Column(title, right=True, narrow=WIDE) for title in ("mean", "var")),
        *(Column(title, right=True, wide=WIDE) for title in _VECTORS),
        Column("batches", right=True),
        Column("eps", right=True),
        Column("momentum", right=True, wide=WIDE),
        Column("scale factor", right=True),
        Column("findings", wide=WIDE),
    ]
    same_kind = _common([_kind(layer) for layer in layers]) is not None
    same_count = _common([layer.num_batches_tracked for layer in layers]) is not None
    same_eps = _common([layer.layer.eps for layer in layers]) is not None
    same_factor = _common([_scale_factor(layer) for layer in layers]) is not None
    same_momentum = _common([layer.layer.momentum for layer in layers]) is not None
    rows = []
    for layer in layers:
        norm, worst = layer.layer, _worst(layer.findings)
        style = _STYLES[worst] if worst else Style.PLAIN
        momentum = "" if same_momentum or norm.momentum is None else format_number(norm.momentum)
        eps = "" if same_eps or norm.eps is None else format_number(norm.eps)
        factor = _scale_factor(layer)
        count = "" if same_count or layer.num_batches_tracked is None else str(layer.num_batches_tracked)
        rows.append(
            (
                Cell(_MARKS[worst] if worst else "", style),
                Cell(norm.name, style),
                Cell("" if same_kind else _kind(layer)),
                Cell("" if norm.num_features is None else str(norm.num_features)),
                *(_range_cell(layer.tensors.get(role), digits=2) for role in _VECTORS),
                *(_range_cell(layer.tensors.get(role), digits=3, mean=True) for role in _VECTORS),
                Cell(count),
                Cell(eps),
                Cell(momentum),
                Cell("" if same_factor or factor is None else format_number(factor, 6)),
                Cell(", ".join(finding.short for finding in layer.findings), style),
            )
        )
    return Table(tuple(columns), rows)


def _range_cell(summary: Summary | None, *, digits: int, mean: bool = False) -> Cell:
    """``min..max``, with the mean in between where there is room for it."""
    if summary is None:
        return Cell("-", Style.MUTED)
    if summary.minimum is None or summary.maximum is None or summary.mean is None:
        return Cell("nan", Style.ERROR)
    numbers = [summary.minimum, summary.maximum]
    low, high = (format_number(number, digits) for number in numbers)
    text = low if low == high else f"{low}..{high}"
    if mean and low != high:
        text += f" ({format_number(summary.mean, 2)})"
    return Cell(text, Style.ERROR if summary.nonfinite else Style.PLAIN)


def _tensor_table(tensors: Sequence[TensorInspection]) -> Table:
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
                _range_cell(summary, digits=3, mean=True) if summary is not None else Cell(""),
                Cell(nonfinite, Style.ERROR),
            )
        )
    return Table(columns, rows)


def _group(layers: Sequence[LayerInspection]) -> list[tuple[Finding, list[str]]]:
    """One entry for each code and severity, with the layers that have it, worst first."""
    grouped: dict[tuple[str, str], tuple[Finding, list[str]]] = {}
    for layer in layers:
        for finding in layer.findings:
            entry = grouped.setdefault((finding.code.value, finding.severity.value), (finding, []))
            entry[1].append(layer.layer.name)
    return sorted(grouped.values(), key=lambda entry: -entry[0].severity.rank)


def _finding_lines(grouped: Sequence[tuple[Finding, list[str]]]) -> Iterable[Block]:
    for finding, names in grouped:
        where = ""
        if names:
            listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
            where = f" in {listed}" if len(names) == 1 else f" in {len(names)} layers: {listed}"
        severity = finding.severity
        yield Line(
            (
                Cell(f"{_MARKS[severity]} {severity.value}", _STYLES[severity]),
                Cell(f" {finding.code.value}", Style.HEADING),
                Cell(where),
            )
        )
        example = f"{names[0]}: " if len(names) > 1 else ""
        yield Line((Cell(example), Cell(finding.message, is_sentence=True)), indent=2)
        if finding.advice:
            yield Line((Cell(finding.advice, is_sentence=True),), indent=2)
