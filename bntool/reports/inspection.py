"""What `inspect` found, as JSON data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bntool.checkpoints.origin import describe_origin
from bntool.inspection.findings import Finding
from bntool.inspection.results import Inspection, LayerInspection, StateDictInspection, Summary, TensorInspection
from bntool.inspection.safety import Safety, judge_safety


def describe_inspection(inspection: Inspection, *, every_tensor: bool) -> dict[str, Any]:
    """The facts as JSON data; the schema is docs/schema/inspect.json."""
    checkpoint = inspection.checkpoint
    return {
        "format": checkpoint.format.name,
        "size": checkpoint.format.size(checkpoint),
        "origin": describe_origin(checkpoint),
        "safety": _describe_safety(judge_safety(checkpoint)),
        "globals": [{"name": g.path, "called": g.called, "trust": g.trust.value} for g in checkpoint.globals],
        "checksums_verified": inspection.checksums,
        "state_dicts": [_describe_state_dict(s, inspection, every_tensor=every_tensor) for s in inspection.state_dicts],
        "findings": _describe_findings(inspection.findings),
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
            **({"facts": f.facts} if f.facts else {}),
        }
        for f in findings
    ]
