"""Findings on one BatchNorm layer, from the numbers of its tensors.

The thresholds are those of :mod:`bntool.inspection.thresholds`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

from bntool.batchnorm import COUNTER, DEFAULT_EPS, STATISTICS, VECTORS
from bntool.checkpoints.dtypes import FLOAT16
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.results import Summary
from bntool.inspection.thresholds import DEFAULTS, Thresholds
from bntool.representation import format_number

HALF_LARGEST = 65504.0
USUAL_MOMENTUM = 0.1


def find_in_layer(
    tensors: dict[str, Summary],
    *,
    eps: float | None,
    momentum: float | None = None,
    averages_all: bool = False,
    recalibrated: bool = False,
    is_weight_unknown: bool = False,
    thresholds: Thresholds = DEFAULTS,
) -> list[Finding]:
    """Return the findings of one BatchNorm, from its tensors alone.

    Args:
        tensors: by role.
        eps: where it is known; else PyTorch's default is used for the scale, which thresholds are coarse enough for.
        momentum: where it is known, what the counter says is held against what the statistics can be after so few
            updates.
        averages_all: momentum is known to be None, PyTorch's plain average over all batches.
        recalibrated: the file records that its statistics were recomputed, so that the counter tells nothing.
        is_weight_unknown: it has a weight that is not in the file or cannot be read, so that no scale is known.
    """
    findings = _shapes(tensors)
    if findings:
        return findings
    findings += _nonfinite(tensors)
    mean, variance = tensors.get("running_mean"), tensors.get("running_var")
    if mean is not None and variance is not None:
        eps = DEFAULT_EPS if eps is None else eps
        weights = _list_weights(tensors, variance, known=not is_weight_unknown)
        findings += _variance(variance, weights, eps=eps, thresholds=thresholds)
        outlying = _outlying(mean, variance, thresholds)
        findings += outlying
        initial = _initial(mean, variance, tensors.get(COUNTER), thresholds)
        findings += initial
        hidden = {i for f in outlying if f.code is FindingCode.OUTLYING_VARIANCE for i in f.channels}
        if not is_weight_unknown:
            findings += _scale(tensors, variance, eps, hidden=hidden, thresholds=thresholds)
        findings += _half(mean, variance)
        findings += _bias(tensors, thresholds)
        tells_nothing = bool(initial) or recalibrated
        findings += _counter(
            tensors,
            tells_nothing=tells_nothing,
            momentum=momentum,
            averages_all=averages_all,
            few=thresholds.few_updates,
        )
    return findings


def _shapes(tensors: dict[str, Summary]) -> list[Finding]:
    vectors = {role: tensors[role] for role in VECTORS if role in tensors}
    lengths: dict[str, Any] = {role: len(summary.values) for role, summary in vectors.items()}
    if len(set(lengths.values())) <= 1:
        return []
    listed = ", ".join(f"{role} {length}" for role, length in lengths.items())
    message = f"its tensors have different lengths ({listed}): they do not belong together"
    advice = "take each layer's tensors from one model"
    return [Finding(FindingCode.SHAPE_MISMATCH, Severity.ERROR, "shapes differ", message, dict(lengths), advice)]


def compare_shapes(shapes: Mapping[str, tuple[int, ...]]) -> list[Finding]:
    """Return a finding where vectors of one length lie in different axes: a module loads all of them in one shape.

    Args:
        shapes: of the tensors of a layer, by role.
    """
    vectors = {role: shapes[role] for role in VECTORS if role in shapes}
    if len(set(vectors.values())) <= 1 or len(set(map(math.prod, vectors.values()))) > 1:
        return []
    facts = {role: list(shape) for role, shape in vectors.items()}
    listed = ", ".join(f"{role} {shape}" for role, shape in facts.items())
    message = f"its tensors have different shapes ({listed}): torch.nn.BatchNorm loads vectors, and no module both"
    advice = "reshape them to one shape, [C] for torch.nn.BatchNorm"
    return [Finding(FindingCode.SHAPE_MISMATCH, Severity.WARNING, "shapes differ", message, facts, advice)]


def _nonfinite(tensors: dict[str, Summary]) -> list[Finding]:
    bad = {role: summary.nonfinite for role, summary in tensors.items() if summary.nonfinite}
    if not bad:
        return []
    role, count = max(bad.items(), key=lambda item: item[1])
    listed = ", ".join(f"{count} of {len(tensors[role].values)} in {role}" for role, count in bad.items())
    channels = {
        i
        for role in bad.keys() & set(VECTORS)
        for i, value in enumerate(tensors[role].values)
        if not math.isfinite(value)
    }
    message = f"NaN or infinite: {listed}. {_describe_outputs(tensors, channels)}"
    only_statistics = bad.keys() <= set(STATISTICS)
    advice = (
        "recalibrate, or take an earlier file" if only_statistics else "take an earlier file: no data restore these"
    )
    short = f"{count} non-finite in {role}"
    return [Finding(FindingCode.NON_FINITE, Severity.ERROR, short, message, bad, advice, tuple(sorted(channels)))]


def _describe_outputs(tensors: dict[str, Summary], channels: Collection[int]) -> str:
    """Describe what these channels put out for usual inputs."""
    found = set()
    for channel in channels:
        weight, bias, mean, variance = (
            tensors[role].values[channel] if role in tensors else usual for role, usual in _USUAL.items()
        )
        root = math.sqrt(variance + DEFAULT_EPS) if variance >= 0 else math.nan
        scale = weight / root
        for usual in (-math.pi, math.pi):
            output = usual * scale + (bias - mean * scale)  # as PyTorch computes it
            found.add("NaN" if math.isnan(output) else "infinite" if math.isinf(output) else "constant")
    if found == {"constant"}:
        return "These channels are constant, their bias: whatever comes in is divided by infinity"
    return f"The outputs of these channels are {' or '.join(sorted(found))}"


_USUAL = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


def _list_weights(tensors: Mapping[str, Summary], variance: Summary, *, known: bool) -> Sequence[float]:
    """Return the weight of each channel, NaN where it is not known."""
    return tensors["weight"].values if "weight" in tensors else [1.0 if known else math.nan] * len(variance.values)


def _variance(variance: Summary, weights: Sequence[float], *, eps: float, thresholds: Thresholds) -> list[Finding]:
    """Find channels whose variance is none, or is that of a constant.

    Where the weight is 0 the variance decides nothing: pruned channels are told of by their scale.

    Args:
        weights: of each channel; NaN where it is not known.
    """
    vanishing = thresholds.vanishing_variance
    if variance.minimum is None or variance.minimum > max(vanishing, 0.0):  # nearly always: no need to count
        return []
    count = len(variance.values)
    negative = tuple(i for i, value in enumerate(variance.values) if value < 0)
    zero = tuple(i for i, value in enumerate(variance.values) if value == 0 and weights[i] != 0)
    small = tuple(
        i
        for i, value in enumerate(variance.values)
        if 0 < value <= vanishing and abs(weights[i]) > thresholds.vanishing_scale * math.sqrt(value + eps)
    )
    findings = []
    if negative:
        message = f"running_var is negative in {len(negative)} of {count} channels: no average of squares can be"
        findings.append(
            Finding(
                FindingCode.NEGATIVE_VARIANCE,
                Severity.ERROR,
                f"{len(negative)} negative var",
                message,
                {"channels": len(negative)},
                "recalibrate; the file was edited, or averaged with weights of both signs",
                negative,
            )
        )
    if zero:
        lost = "was rounded to an integer" if variance.dtype.startswith(_INTEGERS) else "underflowed in half precision"
        message = (
            f"running_var is 0 in {len(zero)} of {count} channels: their input was constant (dead channels before this "
            f"layer), or it {lost}; the scale is weight / sqrt(eps)"
        )
        findings.append(
            Finding(
                FindingCode.ZERO_VARIANCE,
                Severity.WARNING,
                f"{len(zero)} zero var",
                message,
                {"channels": len(zero)},
                "look at the layer before: whatever new data put into these channels is amplified by 1 / sqrt(eps)",
                zero,
            )
        )
    if small:
        smallest = min(variance.values[i] for i in small)
        largest = max(abs(weights[i]) / math.sqrt(variance.values[i] + eps) for i in small)
        what = f"of channel {small[0]}" if len(small) == 1 else f"in {len(small)} of {count} channels"
        message = (
            f"running_var {what} is nearly 0 ({format_number(smallest, 2)}), as if the input had been constant for "
            "long. Behind dead channels it is, and comes out right; whatever else new data put there is amplified "
            f"{format_number(largest)} times"
        )
        advice = "nothing is to be done where the channels before are dead; else look at what feeds them"
        facts = {"channels": len(small), "smallest": smallest, "largest_scale": largest}
        short = f"var {format_number(smallest, 1)}"
        severity = Severity.WARNING if len(small) == count > 1 else Severity.NOTICE  # nothing comes through the layer
        findings.append(Finding(FindingCode.ZERO_VARIANCE, severity, short, message, facts, advice, small))
    return findings


_INTEGERS = ("int", "uint", "bool")  # begin their names


def _outlying(mean: Summary, variance: Summary, thresholds: Thresholds) -> list[Finding]:
    """Return channels whose statistics lie far above those of all others, with nothing in between.

    What data and training give is a continuum, however wide: a gap of orders of magnitude inside of a layer is none.
    Of two channels only, the gap must be one that is an error.
    """
    if mean.minimum is None or mean.maximum is None or variance.minimum is None or variance.maximum is None:
        return []
    least = max(variance.minimum, thresholds.constant_variance)
    may_vary = variance.maximum > thresholds.outlying_variance * least
    may_lie_far = max(-mean.minimum, mean.maximum) > thresholds.outlying_mean * math.sqrt(least)
    if not may_vary and not may_lie_far:  # nearly always
        return []
    pairs = zip(mean.values, variance.values, strict=True)
    constant = thresholds.constant_variance
    live = [(abs(m), v, i) for i, (m, v) in enumerate(pairs) if constant < v < math.inf and m - m == 0]
    findings = []
    by_variance = sorted(live, key=lambda channel: channel[1])
    gap, first = _find_gap([v for _, v, _ in by_variance])
    if gap >= (thresholds.outlying_variance if len(live) > 2 else thresholds.outlying_variance_error):
        channels, far = [i for _, _, i in by_variance[first:]], gap >= thresholds.outlying_variance_error
        findings.append(_describe_outlying("running_var", gap, channels, variance, far=far))
    by_mean = sorted(live)
    sigmas = [math.sqrt(v) for v in accumulate((v for _, v, _ in by_mean), max)]
    gap, first = _find_gap([m for m, _, _ in by_mean], at_least=sigmas)
    if gap >= (thresholds.outlying_mean if len(live) > 2 else thresholds.outlying_mean_error):
        channels, far = [i for _, _, i in by_mean[first:]], gap >= thresholds.outlying_mean_error
        findings.append(_describe_outlying("running_mean", gap, channels, mean, far=far))
    return findings


def _bias(tensors: dict[str, Summary], thresholds: Thresholds) -> list[Finding]:
    """Find channels whose bias lies far above that of all others and above all weights: they put out that constant."""
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or bias is None or weight.nonfinite or bias.nonfinite or bias.minimum is None:
        return []
    largest = max(-bias.minimum, bias.maximum or 0.0)
    if weight.minimum is None or largest < thresholds.outlying_bias * max(-weight.minimum, weight.maximum or 0.0):
        return []  # nearly always
    usual = max(map(abs, weight.values)) or 1.0
    ordered = sorted((abs(value), channel) for channel, value in enumerate(bias.values))
    gap, first = _find_gap([value for value, _ in ordered], at_least=[usual] * len(ordered))
    if gap < thresholds.outlying_bias or len(ordered) <= 2:
        return []
    channels = tuple(sorted(channel for _, channel in ordered[first:]))
    value = max((bias.values[channel] for channel in channels), key=abs)
    what = f"channel {channels[0]}" if len(channels) == 1 else f"{len(channels)} of {len(ordered)} channels"
    message = (
        f"bias of {what} ({format_number(value, 3)}) is {format_number(gap, 1)} times that of all others and all "
        "weights, with nothing in between: what comes in is lost beside it"
    )
    advice = "take an earlier file, or look at the learning rate: no data restore a bias"
    short, facts = f"bias {format_number(value, 2)}", {"channels": len(channels), "ratio": gap, "largest": value}
    return [Finding(FindingCode.OUTLYING_BIAS, Severity.WARNING, short, message, facts, advice, channels)]


def _find_gap(ordered: Sequence[float], *, at_least: Sequence[float] = ()) -> tuple[float, int]:
    """Return the largest ratio of neighbours in the upper half of ordered numbers, and the place above the gap.

    Args:
        at_least: what the lower neighbour counts as, if it is less.
    """
    best = (0.0, 0)
    for place in range((len(ordered) + 1) // 2, len(ordered)):
        below = ordered[place - 1]
        best = max(best, (ordered[place] / max(below, at_least[place - 1] if at_least else below), place))
    return best


def _describe_outlying(role: str, gap: float, outlying: Sequence[int], summary: Summary, *, far: bool) -> Finding:
    channels = tuple(sorted(outlying))
    largest = max((summary.values[channel] for channel in channels), key=abs)
    is_variance = role == "running_var"
    count = len(channels)
    what = f"channel {channels[0]}" if count == 1 else f"{count} of {len(summary.values)} channels"
    constant = (
        "what usual data put into it comes out as a constant"
        if is_variance
        else "usual data, normalised by it, are shifted as far"
    )
    return Finding(
        FindingCode.OUTLYING_VARIANCE if is_variance else FindingCode.OUTLYING_MEAN,
        Severity.ERROR if far else Severity.WARNING,
        f"{'var' if is_variance else 'mean'} {format_number(largest, 2)}",
        f"{role} of {what} ({format_number(largest, 3)}) is {format_number(gap, 1)} times that of all others, with "
        f"nothing in between: {constant}",
        {"channels": count, "ratio": gap, "largest": largest},
        "recalibrate, or take an earlier file; if the layer reads raw numbers of several kinds, scale them first",
        channels,
    )


def _initial(mean: Summary, variance: Summary, counter: Summary | None, thresholds: Thresholds) -> list[Finding]:
    if 0.0 not in mean.values or 1.0 not in variance.values:
        return _one_of_two(mean, variance)
    pairs = enumerate(zip(mean.values, variance.values, strict=True))
    initial = tuple(i for i, (m, v) in pairs if m == 0 and v == 1)
    count = len(mean.values)
    if not initial:
        return _one_of_two(mean, variance)
    tracked = counter.values[0] if counter is not None and len(counter.values) == 1 else None
    if len(initial) < count:
        if len(initial) < thresholds.initial_share * count:
            return _one_of_two(mean, variance)
        message = f"running_mean is 0 and running_var 1 in {len(initial)} of {count} channels: these look never updated"
        facts = {"channels": len(initial)}
        return [
            Finding(
                FindingCode.PARTLY_INITIAL, Severity.WARNING, "partly initial", message, facts, _IF_TRAINED, initial
            )
        ]
    said = "" if tracked is None else f" (num_batches_tracked is {tracked:g})"
    message = f"running_mean is 0 and running_var 1 everywhere{said}: the statistics were never updated, or were reset"
    return [Finding(FindingCode.NEVER_UPDATED, Severity.WARNING, "never updated", message, advice=_IF_TRAINED)]


def _one_of_two(mean: Summary, variance: Summary) -> list[Finding]:
    """Find one of the two statistics as it was created, although the other has moved: updates move both.

    Variances that are all the same are no measured ones: FrozenBatchNorm of detectron2 has 0 and 1 - eps. What is
    nearly so, behind another BatchNorm, is exactly so in half precision.
    """
    if any(one.dtype not in ("float32", "float64") for one in (mean, variance)):
        return []
    same_mean, same_variance = mean.minimum == mean.maximum, variance.minimum == variance.maximum
    if same_mean == same_variance or mean.nonfinite or variance.nonfinite or mean.minimum is None:
        return []
    if same_mean and mean.minimum == 0:
        lost, moved = "running_mean", "running_var"
    elif same_variance and variance.minimum == 1:
        lost, moved = "running_var", "running_mean"
    else:
        return []
    value = 0 if same_mean else 1
    message = (
        f"{lost} is {value} in every channel, as it is created, while {moved} has moved: updates move both, so that "
        f"{lost} was lost, by a converter or by loading under another name"
    )
    advice = f"look at what {lost} is called where the file was converted or loaded, or recalibrate"
    return [Finding(FindingCode.PARTLY_INITIAL, Severity.WARNING, f"{lost} {value}", message, {"lost": lost}, advice)]


_IF_TRAINED = (
    "if the model was trained, recalibrate it before it is used in eval mode; folded or fixed layers look so on purpose"
)


def _scale(
    tensors: dict[str, Summary], variance: Summary, eps: float, *, hidden: Collection[int], thresholds: Thresholds
) -> list[Finding]:
    """Return channels that carry nothing, or far too much.

    Args:
        hidden: channels whose scale is small because of a variance that is wrong.
    """
    weight = tensors.get("weight")
    if _has_usual_scales(weight, variance, eps, thresholds):
        return []
    weights = weight.values if weight is not None else [1.0] * len(variance.values)
    pairs = zip(weights, variance.values, strict=True)
    sound = not variance.nonfinite and variance.minimum is not None and variance.minimum + eps > 0
    if sound and (weight is None or not weight.nonfinite):
        scales = [abs(w) / math.sqrt(v + eps) for w, v in pairs]
        known = scales
    else:
        scales = [
            abs(w) / math.sqrt(v + eps) if math.isfinite(w) and 0 < v + eps < math.inf else math.nan for w, v in pairs
        ]
        known = [scale for scale in scales if scale == scale]  # noqa: PLR0124 not NaN
    if not known:
        return []
    findings = []
    largest, count = max(known), len(variance.values)
    # beside a channel that explodes, sound ones are small, and no constants
    threshold = thresholds.dead_scale * min(largest, thresholds.exploding_scale)
    dead: tuple[int, ...] = ()
    if min(known) <= threshold:
        dead = tuple(i for i, scale in enumerate(scales) if scale <= threshold and i not in hidden)
    if dead:
        share = len(dead) / count
        message = (
            f"{len(dead)} of {count} channels ({share:.0%}) have a scale of nearly 0: pruned or dead, "
            "they give a constant whatever comes in"
        )
        findings.append(
            Finding(
                FindingCode.DEAD_CHANNELS,
                Severity.WARNING if share >= thresholds.dead_share else Severity.NOTICE,
                f"{len(dead)} dead",
                message,
                {"channels": len(dead), "share": share},
                "nothing is to be done where they were pruned; else look at weight decay and learning rate",
                dead,
            )
        )
    if largest > thresholds.exploding_scale:
        exploding = tuple(i for i, scale in enumerate(scales) if scale > thresholds.exploding_scale)
        large = {weights[i] ** 2 > scales[i] for i in exploding}  # it adds more to the scale than the variance does
        causes = ["tiny variance"] * (False in large) + [_LARGE_WEIGHT] * (True in large)
        message = (
            f"{len(exploding)} of {count} channels have |weight / sqrt(running_var + eps)| above "
            f"{thresholds.exploding_scale:g} (largest {format_number(largest)}): {' and '.join(causes)}; rounding "
            "errors and new data are amplified as much"
        )
        advice = "look at what feeds these channels: nearly constant in training, they need not be on new data"
        if causes == [_LARGE_WEIGHT]:
            advice = "take an earlier file, or look at the learning rate: no data restore a weight"
        findings.append(
            Finding(
                FindingCode.EXPLODING_SCALE,
                Severity.WARNING,
                f"scale {format_number(largest, 2)}",
                message,
                {"channels": len(exploding), "largest": largest},
                advice,
                exploding,
            )
        )
    return findings


_LARGE_WEIGHT = "large weight"


def _has_usual_scales(weight: Summary | None, variance: Summary, eps: float, thresholds: Thresholds) -> bool:
    """Return whether the extremes alone tell that no scale is nearly 0 and none too large: most layers need no closer
    look.
    """
    if variance.nonfinite or variance.minimum is None or variance.maximum is None or variance.minimum + eps <= 0:
        return False
    smallest, largest = 1.0, 1.0
    if weight is not None:
        if weight.nonfinite or weight.minimum is None or weight.maximum is None:
            return False
        smallest = weight.minimum if weight.minimum > 0 else min(map(abs, weight.values))
        largest = max(-weight.minimum, weight.maximum)
    low, high = smallest / math.sqrt(variance.maximum + eps), largest / math.sqrt(variance.minimum + eps)
    return high <= thresholds.exploding_scale and low > thresholds.dead_scale * high


def _half(mean: Summary, variance: Summary) -> list[Finding]:
    integers = [one.dtype for one in (variance, mean) if one.dtype.startswith(_INTEGERS)]
    if integers:
        message = f"statistics are stored in {integers[0]}: what stood behind the point is lost"
        return [Finding(FindingCode.HALF_STATISTICS, Severity.WARNING, integers[0], message, advice=_NOT_IN_EIGHT_BITS)]
    eights = [one.dtype for one in (variance, mean) if one.dtype.startswith("float8")]
    if eights:
        message = (
            f"statistics are stored in {eights[0]}, which keeps 2 to 4 digits in base 2: they are off by some percent"
        )
        return [Finding(FindingCode.HALF_STATISTICS, Severity.WARNING, eights[0], message, advice=_NOT_IN_EIGHT_BITS)]
    if variance.dtype not in ("float16", "bfloat16") and mean.dtype not in ("float16", "bfloat16"):
        return []
    message = f"statistics are stored in {variance.dtype}: running averages cannot be updated precisely in it"
    advice = "keep statistics in float32 where training goes on"
    findings = [Finding(FindingCode.HALF_STATISTICS, Severity.NOTICE, variance.dtype, message, advice=advice)]
    if variance.dtype == "float16":
        small = tuple(i for i, value in enumerate(variance.values) if 0 <= value < FLOAT16.smallest_normal)
        if small:
            message = (
                f"running_var is below float16's normal range in {len(small)} channels: it lost digits or became 0"
            )
            facts = {"channels": len(small)}
            findings.append(
                Finding(FindingCode.UNDERFLOW, Severity.WARNING, "var underflow", message, facts, _NOT_IN_HALF, small)
            )
        pairs = enumerate(zip(mean.values, variance.values, strict=True))
        large = tuple(i for i, (m, v) in pairs if abs(m) >= HALF_LARGEST or abs(v) >= HALF_LARGEST)
        if large:
            message = f"statistics of {len(large)} channels stand at float16's largest value or beyond: they overflowed"
            facts = {"channels": len(large)}
            findings.append(
                Finding(FindingCode.OVERFLOW, Severity.ERROR, "overflow", message, facts, _NOT_IN_HALF, large)
            )
    return findings


_NOT_IN_EIGHT_BITS = "take a file from before the cast, or recalibrate: a quantisation must leave statistics out"
_NOT_IN_HALF = "store statistics in float32, then recalibrate"


def _counter(
    tensors: dict[str, Summary], *, tells_nothing: bool, momentum: float | None, averages_all: bool, few: float
) -> list[Finding]:
    counter = tensors.get(COUNTER)
    if counter is None:
        return []
    if counter.dtype != "int64" or len(counter.values) != 1:
        message = f"num_batches_tracked is {counter.dtype} {list(counter.shape)}; PyTorch has an int64 scalar"
        done = "an average or other arithmetic on"
        if counter.dtype in ("float16", "bfloat16"):
            done = "a cast to half of"
        advice = f"set it to an int64 scalar before training resumes; {done} the whole state dict has done it"
        short = f"counter {counter.dtype}"
        return [Finding(FindingCode.COUNTER_DTYPE, Severity.WARNING, short, message, advice=advice)]
    count = int(counter.values[0])
    if count < 0:
        message = f"num_batches_tracked is {count}: no count of batches can be"
        advice = "set it to 0, or take it from another file: with momentum=None it decides how much a batch counts"
        return [Finding(FindingCode.COUNTER_DTYPE, Severity.WARNING, f"counter {count}", message, advice=advice)]
    if tells_nothing:
        return []
    return _few_updates(tensors["running_var"], count, momentum, few, averages_all=averages_all)


def _few_updates(
    variance: Summary, count: int, momentum: float | None, few: float, *, averages_all: bool
) -> list[Finding]:
    if count == 0:
        message = (
            "num_batches_tracked is 0 although the statistics have moved: they were set by other means (a converted "
            "model, an averaged copy)"
        )
        advice = "nothing is to be done, unless momentum becomes None: the first batch would take their place"
        if averages_all:
            message += ". momentum is None here: the first batch of a training that goes on takes their place"
            advice = "before training goes on, set num_batches_tracked to the number of batches that they rest on"
        return [Finding(FindingCode.COUNTER_ZERO, Severity.NOTICE, "counter 0", message, advice=advice)]
    least = _find_least_updates(few, momentum)
    if count >= least:
        return []
    updates = f"{count} update{'s' if count > 1 else ''}"
    facts: dict[str, float] = {"updates": count}
    if momentum is not None and _contradicts(variance, count, momentum):
        message = (
            f"num_batches_tracked is {count}, but running_var of some channels is less than {updates} with momentum "
            f"{momentum:g} can leave of the initial 1: the counter was reset, and the values are older"
        )
        advice = "nothing is to be done, unless momentum becomes None: the next batches would count for too much"
        return [Finding(FindingCode.COUNTER_RESET, Severity.NOTICE, "counter reset", message, facts, advice)]
    message = (
        f"the statistics rest on {count} batch{'es' if count > 1 else ''} only (num_batches_tracked): recomputed "
        "on other data than the training's, reset, or hardly trained"
    )
    advice = "recalibrate --dry-run measures how far they are off"
    if momentum is not None and count >= few:
        left = (1 - momentum) ** count
        message = (
            f"the statistics rest on {count} batches (num_batches_tracked), of which momentum {momentum:g} leaves "
            f"{left:.0%} of the initial mean 0 and variance 1"
        )
        advice += "; with so small a momentum they need a longer training, or a larger one for the first batches"
        facts = {"updates": count, "initial_share": left}
    return [Finding(FindingCode.COUNTER_LOW, Severity.WARNING, f"{updates} only", message, facts, advice)]


def _find_least_updates(few: float, momentum: float | None) -> float:
    """Return the updates after which as little of the initial values is left as few updates leave with momentum 0.1."""
    if momentum is None or not 0 < momentum < USUAL_MOMENTUM:
        return few
    return few * math.log1p(-USUAL_MOMENTUM) / math.log1p(-momentum)


def _contradicts(variance: Summary, count: int, momentum: float) -> bool:
    """Return whether running_var is less than what so few updates leave of its initial 1: no batch has a negative
    variance.

    After n updates with momentum m at least (1 - m)^n is left (PyTorch: new = (1 - m) * old + m * batch). The counter
    was then set by other means than these updates, as copies of a model that count anew have it.
    """
    if not 0 < momentum < 1 or variance.minimum is None:
        return False
    unit = _ROUNDING.get(variance.dtype, 2.0**-20)  # of each update
    return variance.minimum < ((1 - momentum) * (1 - unit)) ** count


_ROUNDING = {"bfloat16": 2.0**-7, "float16": 2.0**-9}
