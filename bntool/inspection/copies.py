"""Copies of one model in one file, held against each other: averaged ones (EMA, SWA) and the model they are made of.

They lie in state dicts of their own, or beside each other in one, as ``net.`` and ``ema.``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from bntool.batchnorm import AFFINE, DEFAULT_EPS, STATISTICS, VECTORS
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.files import quote
from bntool.checkpoints.state_dicts import (
    COUNT_OF_AVERAGES,
    FLAT_AVERAGE,
    find_averaged_parts,
    find_prefix,
    flatten_average,
    is_averaged_copy,
)
from bntool.checkpoints.tensors import read_numbers
from bntool.errors import BntoolError
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.results import LayerInspection, StateDictInspection
from bntool.inspection.statistics_findings import describe_missing
from bntool.inspection.thresholds import Thresholds
from bntool.representation import format_number
from bntool.verification.statistics_shift import StatisticsShift, measure_shift

_EXPLAINED = 0.6  # what is left of the difference, where it is the initial values that make it


class _Copy(NamedTuple):
    """One copy of a model.

    Attributes:
        place: of its state dict among those of the file.
        title: for people.
        path: what its names begin with in its state dict, after the prefix of wrappers; "" for nothing.
        is_average: its name says so.
        layers: by name without path.
        parameters: names of all its tensors, without path.
        averagings: how often it was averaged, as the file counts; None where it does not.
    """

    place: int
    title: str
    path: str
    is_average: bool
    layers: Mapping[str, LayerInspection]
    parameters: frozenset[str]
    averagings: int | None = None

    @property
    def words(self) -> str:
        """The words for a finding of its state dict."""
        if self.is_average:
            return repr(self.path) if self.path else "this averaged copy"
        return "the model under its own names"


def compare_copies(
    inspections: Sequence[StateDictInspection], *, recalibrated: Sequence[Collection[str]], thresholds: Thresholds
) -> list[StateDictInspection]:
    """Return the state dicts of a file, with what is found where copies of one model are held against each other.

    Args:
        recalibrated: of each state dict, the layers whose statistics bntool recomputed, as the file records.
    """
    copies = [copy for place, inspection in enumerate(inspections) for copy in _find_copies(place, inspection)]
    found: list[list[Finding]] = [[] for _ in inspections]
    for copy in copies:
        model = _find_model(copy, copies)
        if all(layer.name in recalibrated[copy.place] for layer in copy.layers.values()) and copy.layers:
            continue
        if model is not None and copy.path == FLAT_AVERAGE:
            found[copy.place] += _compare_flat(copy, model, inspections[copy.place].state_dict, thresholds)
        elif model is not None:
            found[copy.place] += _compare(copy, model, thresholds)
        elif copy.averagings is not None:
            found[copy.place] += _judge_average(copy)
    return [
        dataclasses.replace(inspection, findings=(*_without_known(inspection.findings, more), *more))
        if more
        else inspection
        for inspection, more in zip(inspections, found, strict=True)
    ]


def _without_known(findings: Sequence[Finding], known: Sequence[Finding]) -> list[Finding]:
    """Leave findings out that guess what another copy of the model tells for certain."""
    missing = {name for finding in known if finding.code is FindingCode.STATISTICS_MISSING for name in finding.layers}
    return [f for f in findings if f.code is not FindingCode.STATISTICS_MISSING or not missing.issuperset(f.layers)]


def _find_flat_copies(place: int, inspection: StateDictInspection) -> list[_Copy]:
    """Find a model, and the average of it that mmcv's EMAHook keeps in buffers; nothing where there is none."""
    names = frozenset(inspection.state_dict.tensors)
    averaged = frozenset(name for name in names if flatten_average(name) in names)
    layers = {layer.name: layer for layer in inspection.layers}
    averages = {name: layers[flatten_average(name)] for name in layers if flatten_average(name) in layers}
    flat = {layer.name for layer in averages.values()}
    own = {name: layer for name, layer in layers.items() if name not in flat}
    if not any(f"{name}.{role}" in averaged for name in own for role in VECTORS):
        return []
    model = _Copy(place, "the model beside it", "", False, own, names - set(map(flatten_average, averaged)))
    return [model, _Copy(place, repr(FLAT_AVERAGE), FLAT_AVERAGE, True, averages, averaged)]


def _find_copies(place: int, inspection: StateDictInspection) -> Iterator[_Copy]:
    state_dict = inspection.state_dict
    names = [state_dict.strip(name) for name in state_dict.tensors]
    flat = _find_flat_copies(place, inspection)
    if flat:
        yield from flat
        return
    counted = COUNT_OF_AVERAGES in state_dict.tensors or COUNT_OF_AVERAGES in names
    parts = dict.fromkeys(name.partition(".")[0] for name in names)
    averages = find_averaged_parts(state_dict)
    if len(averages) == len(parts) or not averages:
        title = f"state dict {quote(state_dict.key)}" if state_dict.key else "the state dict"
        yield _Copy(
            place,
            title,
            "",
            counted or is_averaged_copy(state_dict.key),
            {layer.name: layer for layer in inspection.layers},
            frozenset(names),
            _read_count(inspection) if counted else None,
        )
        return
    rest = [name for name in names if name.partition(".")[0] not in averages]
    paths = ["", *(f"{part}." for part in parts if part not in averages)]
    for path in [*paths, *(f"{part}." for part in averages)]:
        own = [name for name in (rest if path in paths else names) if name.startswith(path)]
        inner = [name.removeprefix(path) for name in own]
        below = path + (find_prefix(inner) if path else "")
        yield _Copy(
            place,
            f"{below!r}" if below else "the model beside it",
            below,
            path not in paths,
            {
                layer.name.removeprefix(below): layer
                for layer in inspection.layers
                if layer.name.startswith(below) and f"{layer.name}.running_var" in own
            },
            frozenset(name.removeprefix(below) for name in own if name.startswith(below)),
            _read_count(inspection, path),
        )


def _read_count(inspection: StateDictInspection, path: str = "") -> int | None:
    """Read how often a copy was averaged whose names begin with this path; None where nothing counts that."""
    tensors, name = inspection.state_dict.tensors, path + COUNT_OF_AVERAGES
    tensor = tensors.get(name) or tensors.get(inspection.state_dict.prefix + name)
    try:
        if tensor is None:
            return None
        values = read_numbers(tensor)
    except (BntoolError, ValueError):  # it tells nothing then
        return None
    return int(values[0]) if len(values) == 1 and math.isfinite(values[0]) else None


def _find_model(copy: _Copy, copies: Sequence[_Copy]) -> _Copy | None:
    """Return the copy that an average is of: the one that is no average and has most of its parameters.

    One that is no average is held against another only where it has no statistics at all, and against an average where
    only that has some.
    """
    if not copy.is_average and any(map(_has_statistics, copy.layers.values())):
        return None
    whole = [other for other in copies if any(map(_has_statistics, other.layers.values()))]
    others = [other for other in whole if not other.is_average] or ([] if copy.is_average else whole)
    best = max(others, key=lambda other: len(other.parameters & copy.parameters), default=None)
    enough = best is not None and 2 * len(best.parameters & copy.parameters) >= len(copy.parameters)
    return best if enough else None


def _has_statistics(layer: LayerInspection) -> bool:
    return all(role in layer.tensors for role in STATISTICS)


def _compare(copy: _Copy, model: _Copy, thresholds: Thresholds) -> Iterator[Finding]:
    """Yield what is wrong with an average beside its model."""
    missing = [
        copy.path + name
        for name, layer in model.layers.items()
        if _has_statistics(layer) and name not in copy.layers and f"{name}.weight" in copy.parameters
    ]
    if missing:
        yield describe_missing(missing, model.title)
    shared = [
        (layer, model.layers[name])
        for name, layer in copy.layers.items()
        if name in model.layers and _has_statistics(layer) and _has_statistics(model.layers[name])
    ]
    stale = [layer for layer, other in shared if _is_initial(layer) and not _is_initial(other)]
    if stale:
        yield _describe_initial(copy, model, stale, len(shared))
        return
    pairs = [pair for pair in shared if _agree_in_shape(*pair) and not any(map(_is_initial, pair))]
    if not pairs:
        return
    if all(_are_equal(layer, other, STATISTICS) for layer, other in pairs):
        yield from _judge_equal(copy, model, pairs, thresholds)
        return
    measured = [(pair, _measure_shift(*pair)) for pair in pairs]
    pairs, shifts = [pair for pair, s in measured if s.finite], [s for _, s in measured if s.finite]
    if not pairs:
        return
    share = _measure_initial_share(pairs)
    usual = _median(shift.severity for shift in shifts)
    apart = usual > thresholds.average_lag and _measure_distance(pairs) < thresholds.average_weight_distance
    is_initial = share > thresholds.average_initial_share
    worst = max(range(len(pairs)), key=lambda place: shifts[place].severity)
    if is_initial or apart:
        why = _IS_INITIAL.format(share) if is_initial else _IS_APART.format(100 * thresholds.average_weight_distance)
        yield _describe_lag(copy, model, pairs, share, (pairs[worst][0].name, shifts[worst]), why)
        return
    if copy.averagings is not None:
        return  # torch's AveragedModel, whose statistics update_bn recomputes and counts anew
    own, others = (_find_counter(layers) for layers in zip(*pairs, strict=True))
    if own is not None and others is not None and own < thresholds.average_counter_share * others:
        yield _describe_counters(copy, model, pairs, (own, others), (pairs[worst][0].name, shifts[worst]))


def _compare_flat(copy: _Copy, model: _Copy, state_dict: StateDict, thresholds: Thresholds) -> list[Finding]:
    """Say what is wrong with the average of mmcv's EMAHook or its model.

    The hook exchanges the two before a file is written: which of them is the average, only their numbers tell.
    """
    if copy.layers:
        return list(_compare(copy, model, thresholds)) or list(_compare(model, copy, thresholds))
    vectors = []
    for name, layer in model.layers.items():
        for role in AFFINE:
            flat, own = flatten_average(f"{name}.{role}"), layer.tensors.get(role)
            tensor = state_dict.tensors.get(flat)
            if tensor is not None and own is not None and tuple(tensor.shape) == own.shape:
                vectors.append((read_numbers(tensor, name=flat), own.values))
    distance = _relate_distance(vectors)
    if not distance > thresholds.average_weight_distance:
        return []
    message = (
        f"there are two sets of weights, under the model's names and under {FLAT_AVERAGE!r} (mmcv's EMAHook), whose "
        f"BatchNorms are {distance:.1%} apart, and one set of statistics, those of the set that was trained. Which one "
        "that is, nothing in the file tells: the hook exchanges them before a file is written"
    )
    return [
        Finding(
            FindingCode.AVERAGE_NOT_RECOMPUTED,
            Severity.NOTICE,
            "average",
            message,
            {"distance": distance},
            "bntool recalibrate --dry-run measures whether the statistics are those of the weights that will be used",
            layers=tuple(model.layers),
            leaves_open="whether the statistics are those of these weights or of the ones they are averaged with",
        )
    ]


def _judge_equal(
    copy: _Copy, model: _Copy, pairs: Sequence[tuple[LayerInspection, LayerInspection]], thresholds: Thresholds
) -> Iterator[Finding]:
    """Yield what it means that an average has the statistics of its model, bit by bit."""
    distance, averagings = _measure_distance(pairs), copy.averagings or 0
    if distance > thresholds.average_weight_distance or (distance and averagings > 1):
        yield _describe_copied(copy, model, pairs, distance)
    elif averagings > 1:
        yield _describe_equal(copy, model, averagings)


def _find_counter(layers: Sequence[LayerInspection]) -> int | None:
    """Return the num_batches_tracked that all layers have; None where they differ."""
    counters = {layer.num_batches_tracked for layer in layers}
    return counters.pop() if len(counters) == 1 else None


def _is_initial(layer: LayerInspection) -> bool:
    return any(finding.code is FindingCode.NEVER_UPDATED for finding in layer.findings)


def _agree_in_shape(layer: LayerInspection, other: LayerInspection) -> bool:
    lengths = {len(one.tensors[role].values) for one in (layer, other) for role in STATISTICS}
    return len(lengths) == 1 and 0 not in lengths


def _are_equal(layer: LayerInspection, other: LayerInspection, roles: Sequence[str]) -> bool:
    return all(list(layer.tensors[role].values) == list(other.tensors[role].values) for role in roles)


def _measure_distance(pairs: Sequence[tuple[LayerInspection, LayerInspection]]) -> float:
    """Return the relative distance of the weights and biases of the BatchNorms."""
    vectors = []
    for layer, other in pairs:
        for role in AFFINE:
            one, two = layer.tensors.get(role), other.tensors.get(role)
            if one is not None and two is not None and len(one.values) == len(two.values):
                vectors.append((one.values, two.values))
    return _relate_distance(vectors)


def _relate_distance(vectors: Iterable[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Return the distance of all first vectors from the second ones, relative to the length of these; 0 of nothing."""
    distances, lengths = [], []
    for one, two in vectors:
        distances.append(math.dist(one, two))
        lengths.append(math.hypot(*two))
    length = math.hypot(*lengths)
    return math.hypot(*distances) / length if length else 0.0


def _measure_initial_share(pairs: Sequence[tuple[LayerInspection, LayerInspection]]) -> float:
    """Measure how much of the initial mean 0 and variance 1 is left in an average; 0 where it differs by something
    else.

    With a share f, mean is (1 - f) times the model's and variance is (1 - f) times the model's plus f: f is the median
    of what each channel gives, of means and of variances, whichever is less. It must explain most of the difference.
    """
    by_mean, by_variance = [], []
    for layer, other in pairs:
        tensors = (one.tensors[role].values for one in (layer, other) for role in STATISTICS)
        for mean, variance, model_mean, model_variance in zip(*tensors, strict=True):
            if not all(map(math.isfinite, (mean, variance, model_mean, model_variance))) or model_variance < 0:
                continue
            if abs(model_mean) > 0.1 * math.sqrt(model_variance + DEFAULT_EPS):
                by_mean.append(1 - mean / model_mean)
            if abs(1 - model_variance) > 0.3 * max(1.0, model_variance):
                by_variance.append((variance - model_variance) / (1 - model_variance))
    if not by_mean or not by_variance:
        return 0.0
    share = min(_median(by_mean), _median(by_variance))
    if not 0 < share < 1:
        return 0.0
    return share if _measure_rest(pairs, share) < _EXPLAINED * _measure_rest(pairs, 0.0) else 0.0


def _measure_rest(pairs: Sequence[tuple[LayerInspection, LayerInspection]], share: float) -> float:
    """Measure how far an average is from its model with a share of initial values: the median over layers, in
    sigmas.
    """
    rests = []
    for layer, other in pairs:
        eps = DEFAULT_EPS if other.layer.eps is None else other.layer.eps
        own = (layer.tensors["running_mean"].values, layer.tensors["running_var"].values)
        mean = [(1 - share) * value for value in other.tensors["running_mean"].values]
        variance = [(1 - share) * value + share for value in other.tensors["running_var"].values]
        rests.append(measure_shift(own, (mean, variance), old_eps=eps, new_eps=eps).severity)
    return _median(rests)


def _median(values: Iterable[float]) -> float:
    """Return the one in the middle, the upper of two (the module statistics costs its import)."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _measure_shift(layer: LayerInspection, other: LayerInspection) -> StatisticsShift:
    old, new = ((one.tensors["running_mean"].values, one.tensors["running_var"].values) for one in (layer, other))
    old_eps, new_eps = (DEFAULT_EPS if one.layer.eps is None else one.layer.eps for one in (layer, other))
    return measure_shift(old, new, old_eps=old_eps, new_eps=new_eps)


def _describe_initial(copy: _Copy, model: _Copy, stale: Sequence[LayerInspection], count: int) -> Finding:
    message = (
        f"the statistics of {len(stale)} of {count} layers of {copy.words} are initial while those of "
        f"{model.title} have moved: its buffers were not copied"
    )
    return Finding(
        FindingCode.EMA_STATISTICS_INITIAL,
        Severity.ERROR,
        "EMA statistics initial",
        message,
        advice="recalibrate it before use, or give it the model's buffers",
        layers=tuple(layer.name for layer in stale),
    )


def _describe_copied(
    copy: _Copy, model: _Copy, pairs: Sequence[tuple[LayerInspection, LayerInspection]], distance: float
) -> Finding:
    times = f" {copy.averagings} times" if copy.averagings else ""
    message = (
        f"{copy.words} was averaged{times}, but its statistics are those of {model.title}, bit by bit, while weights "
        f"and biases of the BatchNorms are {distance:.1%} apart: averaged weights need statistics of their own"
    )
    advice = "torch.optim.swa_utils.update_bn(loader, averaged), or bntool recalibrate"
    return Finding(
        FindingCode.AVERAGE_NOT_RECOMPUTED,
        Severity.WARNING,
        "average not recomputed",
        message,
        {"distance": distance},
        advice,
        layers=tuple(layer.name for layer, _ in pairs),
    )


_IS_INITIAL = "about {:.0%} of them is still the initial 0 and 1: the decay is too slow for so few updates"
_IS_APART = "weights and biases of the BatchNorms are the same within {:g} %"


def _describe_equal(copy: _Copy, model: _Copy, averagings: int) -> Finding:
    """Describe an average whose BatchNorms equal the model's bit by bit: only other weights tell more."""
    message = (
        f"{copy.words} was averaged {averagings} times, but its BatchNorms are those of {model.title}, bit by bit: if "
        "other weights differ, its statistics are not those of these weights"
    )
    return Finding(
        FindingCode.AVERAGE_NOT_RECOMPUTED,
        Severity.NOTICE,
        "average",
        message,
        {"averagings": averagings},
        "torch.optim.swa_utils.update_bn(loader, averaged), or bntool recalibrate; bntool diff shows whether weights "
        "differ",
        leaves_open="whether the statistics of this average were recomputed",
    )


def _describe_lag(
    copy: _Copy,
    model: _Copy,
    pairs: Sequence[tuple[LayerInspection, LayerInspection]],
    share: float,
    worst: tuple[str, StatisticsShift],
    why: str,
) -> Finding:
    name, shift = worst
    message = (
        f"the statistics of {copy.words} lag behind those of {model.title}, most in {name}: by "
        f"{format_number(shift.mean_shift, 2)} sigma and a factor of {format_number(shift.variance_spread, 2)} in "
        f"variance; {why}"
    )
    return Finding(
        FindingCode.EMA_STATISTICS_LAG,
        Severity.WARNING,
        "EMA statistics lag",
        message,
        {"initial_share": share, "mean_shift": shift.mean_shift, "variance_spread": shift.variance_spread},
        "recalibrate it before use, or use the model's buffers",
        layers=tuple(layer.name for layer, _ in pairs),
    )


def _describe_counters(
    copy: _Copy,
    model: _Copy,
    pairs: Sequence[tuple[LayerInspection, LayerInspection]],
    counters: tuple[int, int],
    worst: tuple[str, StatisticsShift],
) -> Finding:
    own, usual = counters
    name, shift = worst
    message = (
        f"num_batches_tracked of {copy.words} is {own}, that of {model.title} {usual}: its buffers were copied when "
        "the model was there, or averaged together with this counter, or its statistics were recomputed. They are "
        f"nowhere farther from the model's than in {name}: {format_number(shift.mean_shift, 2)} sigma and a factor of "
        f"{format_number(shift.variance_spread, 2)} in variance"
    )
    return Finding(
        FindingCode.COUNTER_DISAGREES,
        Severity.NOTICE,
        f"counter {own}",
        message,
        {"counter": own, "usual": usual, "mean_shift": shift.mean_shift, "variance_spread": shift.variance_spread},
        "bntool recalibrate --dry-run measures how far they are off; bntool diff shows the two side by side",
        layers=tuple(layer.name for layer, _ in pairs),
    )


def _judge_average(copy: _Copy) -> Iterator[Finding]:
    """Yield what the counter tells of an average alone: whether its statistics can have been recomputed after it was
    made.

    torch.optim.swa_utils.update_bn counts anew, from 0; an average whose buffers are averaged as well has a counter
    below the number of averagings, too.
    """
    counters = [layer.num_batches_tracked for layer in copy.layers.values() if _has_statistics(layer)]
    known = [counter for counter in counters if counter is not None]
    averagings = copy.averagings or 0
    if averagings < 1 or not counters or (known and max(known) < averagings):
        return
    count = f"num_batches_tracked is {max(known)}" if known else "num_batches_tracked is missing"
    message = (
        f"averaged {averagings} times: averaged weights need statistics of their own. These may be those of the last "
        f"model instead, and nothing in the file tells: {count}, which is the number of batches of one epoch if they "
        "were recomputed, and of the whole training if not"
    )
    yield Finding(
        FindingCode.AVERAGE_NOT_RECOMPUTED,
        Severity.NOTICE,
        "average",
        message,
        {"averagings": averagings},
        "torch.optim.swa_utils.update_bn(loader, averaged), or bntool recalibrate --dry-run, which measures it",
        leaves_open="whether the statistics of this average were recomputed",
    )
