"""Findings that show where the layers of one state dict are held against each other."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.state_dicts import find_averaged_parts
from bntool.checkpoints.tensors import Tensor
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.results import LayerInspection
from bntool.inspection.thresholds import ThresholdsOf

_Found = dict[str, Finding]  # by the name of the layer


def compare_layers(
    layers: Sequence[LayerInspection], state_dict: StateDict, thresholds_of: ThresholdsOf
) -> tuple[LayerInspection, ...]:
    """Return the layers, with what only the others tell of each."""
    found = [
        *(_compare_counters(copy) for copy in _part_copies(layers, state_dict)),
        _compare_affine(layers, thresholds_of),
        _compare_modes(layers, state_dict),
        _compare_gradients(layers, state_dict),
    ]
    layers = [_soften_at_input(layer, state_dict) for layer in layers]
    return tuple(
        dataclasses.replace(layer, findings=(*layer.findings, *more))
        if (more := [findings[layer.name] for findings in found if layer.name in findings])
        else layer
        for layer in layers
    )


_OUTLYING = (FindingCode.OUTLYING_VARIANCE, FindingCode.OUTLYING_MEAN)


def _soften_at_input(layer: LayerInspection, state_dict: StateDict) -> LayerInspection:
    """Return the layer, with no more than a warning of outlying statistics where they may be those of raw numbers.

    A BatchNorm that no layer feeds normalises what the model is given: columns of a table have scales of their own.
    """
    if not any(finding.code in _OUTLYING and finding.severity is Severity.ERROR for finding in layer.findings):
        return layer
    own = {id(tensor) for tensor in layer.layer.tensors.values()}
    for tensor in state_dict.tensors.values():
        if id(tensor) in own:
            break
        if len(tensor.shape) > 1 and layer.layer.num_features in tensor.shape[:2]:
            return layer
    findings = tuple(
        dataclasses.replace(finding, severity=Severity.WARNING) if finding.code in _OUTLYING else finding
        for finding in layer.findings
    )
    return dataclasses.replace(layer, findings=findings)


def _part_copies(layers: Sequence[LayerInspection], state_dict: StateDict) -> list[list[LayerInspection]]:
    """Return the layers of each averaged copy that lies beside the model (``ema.``), and those of the model."""
    averages = find_averaged_parts(state_dict)
    copies: dict[str, list[LayerInspection]] = {}
    for layer in layers:
        part = layer.name.partition(".")[0]
        copies.setdefault(part if part in averages else "", []).append(layer)
    return list(copies.values())


def _compare_counters(layers: Sequence[LayerInspection]) -> _Found:
    """Return layers whose num_batches_tracked differs from what most layers have."""
    counts = Counter(n for layer in layers if (n := layer.num_batches_tracked) is not None)
    if len(counts) <= 1:
        return {}
    usual, votes = max(counts.items(), key=lambda item: (item[1], item[0]))
    if votes * 2 < counts.total():
        return {}  # no common value to disagree with
    share = "most" if votes * 2 > counts.total() else "half of the"
    found = {}
    for layer in layers:
        own = layer.num_batches_tracked
        if own is not None and own != usual:
            message = (
                f"num_batches_tracked is {own} here and {usual} in {share} layers: it was trained apart, frozen for a "
                "time, reset, or used more often"
            )
            advice = "nothing is to be done where that was meant: a new head, frozen layers, layers that are shared"
            facts = {"counter": own, "usual": usual}
            found[layer.name] = Finding(
                FindingCode.COUNTER_DISAGREES, Severity.NOTICE, f"counter {own}", message, facts, advice
            )
    return found


def _compare_affine(layers: Sequence[LayerInspection], thresholds_of: ThresholdsOf) -> _Found:
    """Return layers whose weight and bias are exactly as they were created, after many updates of their statistics."""
    trained = [layer for layer in layers if "weight" in layer.tensors and "bias" in layer.tensors]
    initial = [layer for layer in trained if _is_as_created(layer)]
    if not initial:
        return {}
    are_all = len(initial) == len(trained)
    found = {}
    for layer in initial:
        count, many = layer.num_batches_tracked or 0, thresholds_of(layer.name).many_updates
        if count < many or any(f.code is FindingCode.NEVER_UPDATED for f in layer.findings):
            continue
        others = "in every layer" if are_all else f"while those of {len(trained) - len(initial)} other layers moved"
        message = (
            f"weight is exactly 1 and bias exactly 0 in every channel after {count} updates of the statistics, "
            f"{others}: they got no gradient, because they were frozen, not given to the optimizer, or what the layer "
            "puts out is not used"
        )
        advice = "look at requires_grad, at the parameters that the optimizer got, and at where the output goes"
        severity = Severity.NOTICE if are_all else Severity.WARNING
        facts = {"updates": count}
        found[layer.name] = Finding(FindingCode.AFFINE_INITIAL, severity, "never trained", message, facts, advice)
    return found


def _is_as_created(layer: LayerInspection) -> bool:
    weight, bias = layer.tensors["weight"], layer.tensors["bias"]
    return weight.minimum == weight.maximum == 1 and not weight.nonfinite and bias.minimum == bias.maximum == 0


def _in_training_mode() -> Finding:
    """Make the finding of a node of a graph in training mode: a program has one mode."""
    message = "its node is in training mode: it normalises by the batch whenever the program runs"
    advice = "export the model again after model.eval(), unless the program is to be trained"
    return Finding(FindingCode.BATCH_STATISTICS, Severity.WARNING, "training mode", message, advice=advice)


def _compare_modes(layers: Sequence[LayerInspection], state_dict: StateDict) -> _Found:
    """Return layers of a module whose mode is not the one of the whole model."""
    root = state_dict.modules.get(state_dict.prefix.rstrip(".")) or state_dict.modules.get("")
    training = None if root is None else root.attributes.get("training")
    if not isinstance(training, bool):
        return {layer.name: _in_training_mode() for layer in layers if layer.layer.training is True}
    odd = [layer for layer in layers if layer.layer.training is (not training)]
    if training and len(odd) == len(layers):
        return {}  # norm_eval: statistics are kept while the rest trains
    if training:
        message = "it is in eval mode in a model in train mode: its statistics do not move while those of others do"
        advice = "nothing is to be done where it was frozen on purpose; model.train() undoes it"
        finding = Finding(FindingCode.LEFT_IN_EVAL_MODE, Severity.NOTICE, "eval mode", message, advice=advice)
    else:
        message = (
            "it is in train mode in a model in eval mode: it normalises by the batch, and every forward moves its "
            "running statistics"
        )
        advice = "call model.eval() once more, after every module is in its place"
        finding = Finding(FindingCode.LEFT_IN_TRAIN_MODE, Severity.WARNING, "train mode", message, advice=advice)
    return {layer.name: finding for layer in odd}


def _compare_gradients(layers: Sequence[LayerInspection], state_dict: StateDict) -> _Found:
    """Return layers whose weight and bias do not train while other parameters of the model do."""
    own = {id(tensor) for layer in layers for tensor in layer.layer.tensors.values()}
    if not any(_trains(tensor) for tensor in state_dict.tensors.values() if id(tensor) not in own):
        return {}
    message = "its weight and bias have requires_grad=False while other parameters of the model train"
    advice = "nothing is to be done where it was frozen on purpose"
    finding = Finding(FindingCode.NO_GRADIENT, Severity.NOTICE, "no gradient", message, advice=advice)
    affine = {
        layer.name: [layer.layer.tensors[role] for role in ("weight", "bias") if role in layer.layer.tensors]
        for layer in layers
    }
    return {name: finding for name, tensors in affine.items() if tensors and all(_trains(t) is False for t in tensors)}


def _trains(tensor: Tensor) -> bool | None:
    """Return requires_grad of a parameter; None for what is none."""
    return getattr(tensor, "requires_grad", None) if getattr(tensor, "is_parameter", False) else None
