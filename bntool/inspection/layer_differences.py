"""Findings from comparing the layers of one state dict with each other."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from bntool.batchnorm import AFFINE, STATISTICS, NormKind
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.state_dicts import FLAT_AVERAGE, find_averaged_parts
from bntool.checkpoints.tensors import Tensor
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.module_findings import SAID_BY_FILE
from bntool.inspection.results import LayerInspection
from bntool.inspection.thresholds import Thresholds, ThresholdsOf
from bntool.representation import format_number

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
        _compare_eps(layers) if state_dict.is_module else {},
        _compare_sizes(layers, state_dict, thresholds_of),
    ]
    layers = _believe_resets([_soften_at_input(layer, state_dict) for layer in layers])
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
    if _is_fed(layer, state_dict):
        return layer
    findings = tuple(
        finding._replace(severity=Severity.WARNING) if finding.code in _OUTLYING else finding
        for finding in layer.findings
    )
    return dataclasses.replace(layer, findings=findings)


def _believe_resets(layers: Sequence[LayerInspection]) -> list[LayerInspection]:
    """Return the layers; a low counter that the values of another layer contradict was reset in this one, too."""
    low, reset = FindingCode.COUNTER_LOW, FindingCode.COUNTER_RESET
    proven = {
        (layer.num_batches_tracked, layer.layer.momentum): (layer.name, finding)
        for layer in layers
        for finding in layer.findings
        if finding.code is reset
    }
    if not proven:
        return list(layers)

    def correct(layer: LayerInspection, finding: Finding) -> Finding:
        known = proven.get((layer.num_batches_tracked, layer.layer.momentum))
        if finding.code is not low or known is None:
            return finding
        name, found = known
        message = (
            f"num_batches_tracked is {layer.num_batches_tracked}, as in {name}, where the values are older than that"
        )
        return found._replace(message=message)

    return [
        dataclasses.replace(one, findings=tuple(correct(one, finding) for finding in one.findings)) for one in layers
    ]


def _is_fed(layer: LayerInspection, state_dict: StateDict) -> bool:
    """Return whether the weight of a layer that gives as many channels stands anywhere before it."""
    own = {id(tensor) for tensor in layer.layer.tensors.values()}
    for tensor in state_dict.tensors.values():
        if id(tensor) in own:
            return False
        if len(tensor.shape) > 1 and layer.layer.num_features in tensor.shape[:2]:
            return True
    return False


def _compare_sizes(layers: Sequence[LayerInspection], state_dict: StateDict, thresholds_of: ThresholdsOf) -> _Found:
    """Find layers all of whose statistics lie far from where those of any other layer do.

    Only those are looked at whose own layer takes as many channels as a BatchNorm before gives: what a model is given,
    at a second place, too, may be of any size.
    """
    inner = [layer for layer in layers[1:] if layer.layer.kind is NormKind.BATCH_NORM and _has_numbers(layer)]
    found = {}
    ordered = sorted(inner, key=lambda layer: layer.tensors["running_var"].minimum or 0.0)
    largest = list(accumulate((layer.tensors["running_var"].maximum or 0.0 for layer in ordered), max))
    gap, first = 0.0, len(ordered)
    for place in range((len(ordered) + 1) // 2, len(ordered)):
        ratio = (ordered[place].tensors["running_var"].minimum or 0.0) / (largest[place - 1] or math.inf)
        gap, first = max((gap, first), (ratio, place))
    for layer in ordered[first:] if len(ordered) > _FEW_LAYERS else ():
        if gap >= thresholds_of(layer.name).outlying_layer_variance and _is_inner(layer, layers, state_dict):
            found[layer.name] = _describe_far_variance(layer, gap)
    for layer in inner:
        sigmas = _measure_offset(layer, thresholds_of(layer.name))
        if sigmas >= thresholds_of(layer.name).outlying_layer_mean and _is_inner(layer, layers, state_dict):
            found[layer.name] = _describe_far_mean(sigmas)
    return found


_FEW_LAYERS = 2  # too few to say what is usual


def _is_inner(layer: LayerInspection, layers: Sequence[LayerInspection], state_dict: StateDict) -> bool:
    """Return whether the weight before a layer takes as many channels as a BatchNorm before it gives.

    One for each channel of its own (depthwise) may be one that takes a single channel.
    """
    own = {id(tensor) for tensor in layer.layer.tensors.values()}
    taken = 0
    for tensor in state_dict.tensors.values():
        if id(tensor) in own:
            break
        if len(tensor.shape) > 1:
            taken = tensor.shape[1] if tensor.shape[0] == layer.layer.num_features else 0
    before = layers[: next(place for place, one in enumerate(layers) if one is layer)]
    return taken > 1 and any(one.layer.num_features == taken for one in before)


def _has_numbers(layer: LayerInspection) -> bool:
    statistics = [layer.tensors[role] for role in STATISTICS if role in layer.tensors]
    return len(statistics) == len(STATISTICS) and all(len(one.values) and not one.nonfinite for one in statistics)


def _measure_offset(layer: LayerInspection, thresholds: Thresholds) -> float:
    """Measure how far the mean lies from 0 in the channel in the middle, in sigmas, without constant channels."""
    mean, variance = (layer.tensors[role] for role in STATISTICS)
    least = max(variance.minimum or 0.0, thresholds.constant_variance)
    largest = max(-(mean.minimum or 0.0), mean.maximum or 0.0)
    if largest < thresholds.outlying_layer_mean * math.sqrt(least):  # nearly always
        return 0.0
    live = [
        abs(m) / math.sqrt(v)
        for m, v in zip(mean.values, variance.values, strict=True)
        if v > thresholds.constant_variance
    ]
    return sorted(live)[len(live) // 2] if len(live) > _FEW_CHANNELS else 0.0


_FEW_CHANNELS = 2


def _describe_far_variance(layer: LayerInspection, gap: float) -> Finding:
    least = layer.tensors["running_var"].minimum or 0.0
    return Finding(
        FindingCode.OUTLYING_VARIANCE,
        Severity.WARNING,
        f"all var {format_number(least, 2)}",
        f"running_var is {format_number(least, 3)} or more in every channel, {format_number(gap, 1)} times what "
        "any channel of the others has, with nothing in between: what usual data put into it comes out as a constant",
        {"ratio": gap, "smallest": least},
        "recalibrate, or take an earlier file; nothing is to be done if what comes in is as large",
    )


def _describe_far_mean(sigmas: float) -> Finding:
    return Finding(
        FindingCode.OUTLYING_MEAN,
        Severity.WARNING,
        f"mean {format_number(sigmas, 2)} sigma",
        f"running_mean lies {format_number(sigmas, 2)} standard deviations from 0 in the channel in the middle: no "
        "layer gives data that are so far from 0 and so near to each other, and usual data, normalised by it, are "
        "shifted as far",
        {"sigmas": sigmas},
        "recalibrate, or take an earlier file",
    )


def _part_copies(layers: Sequence[LayerInspection], state_dict: StateDict) -> list[list[LayerInspection]]:
    """Return the layers of each averaged copy that lies beside the model (``ema.``), and those of the model."""
    averages = find_averaged_parts(state_dict)
    copies: dict[str, list[LayerInspection]] = {}
    for layer in layers:
        part = layer.name.partition(".")[0]
        part = FLAT_AVERAGE if part == layer.name and part.startswith(FLAT_AVERAGE) else part
        copies.setdefault(part if part in (*averages, FLAT_AVERAGE) else "", []).append(layer)
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


def _compare_eps(layers: Sequence[LayerInspection]) -> _Found:
    """Find layers of a pickled module with another eps than all the others.

    Where several have another one, parts of the model are made differently, as detectors are.
    """
    said = {layer.name: layer.layer.eps for layer in layers if layer.layer.eps_source in SAID_BY_FILE}
    counts = Counter(said.values())
    usual, votes = counts.most_common(1)[0] if counts else (None, 0)
    odd = {name: eps for name, eps in said.items() if eps != usual}
    if usual is None or len(odd) != 1 or votes < _MANY:
        return {}
    ((name, eps),) = odd.items()
    if eps is None or any(f.code is FindingCode.EPS for layer in layers if layer.name == name for f in layer.findings):
        return {}
    message = f"eps is {eps:g} here and {usual:g} in all {votes} other layers"
    advice = "nothing is to be done where that was meant; a layer that was replaced or converted alone may have it so"
    facts = {"eps": eps, "expected": [usual]}
    return {name: Finding(FindingCode.EPS, Severity.NOTICE, f"eps {eps:g}", message, facts, advice)}


_MANY = 3  # layers that have the same, from which on one other is odd


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
    affine = {
        layer.name: [layer.layer.tensors[role] for role in AFFINE if role in layer.layer.tensors] for layer in layers
    }
    frozen = {name for name, tensors in affine.items() if tensors and all(_trains(t) is False for t in tensors)}
    return {layer.name: _describe_no_gradient(layer) for layer in layers if layer.name in frozen}


def _describe_no_gradient(layer: LayerInspection) -> Finding:
    message = "its weight and bias have requires_grad=False while other parameters of the model train"
    advice = "nothing is to be done where it was frozen on purpose"
    moves = layer.layer.training is True and layer.layer.track_running_stats is not False and layer.layer.momentum != 0
    if moves and layer.layer.kind is NormKind.BATCH_NORM:
        message += "; it is in train mode, so that its running statistics move all the same"
        advice = "where it was to be frozen: eval() of this layer after each model.train(), as bntool freeze does it"
    return Finding(FindingCode.NO_GRADIENT, Severity.NOTICE, "no gradient", message, advice=advice)


def _trains(tensor: Tensor) -> bool | None:
    """Return requires_grad of a parameter; None for what is none."""
    return getattr(tensor, "requires_grad", None) if getattr(tensor, "is_parameter", False) else None
