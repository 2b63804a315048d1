"""What is wrong with one BatchNorm layer, from the numbers of its tensors.

The thresholds are documented in docs/findings.md and tested on the samples.
"""

from __future__ import annotations

import math
from typing import Any

from bntool.batchnorm import DEFAULT_EPS
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.results import Summary

DEAD_SCALE = 1e-6  # of the largest |scale| of the layer; below it a channel carries nothing that float32 can keep
EXPLODING_SCALE = 1e3  # |scale| above this amplifies rounding errors of float32 into visible ones
FEW_UPDATES = 22  # 0.9 ** 22 = 0.1: with momentum 0.1, a tenth of the initial values is left
HALF_SMALLEST_NORMAL = 2.0**-14
HALF_LARGEST = 65504.0


def find_in_layer(
    tensors: dict[str, Summary], *, eps: float | None, momentum: float | None = None, recalibrated: bool = False
) -> list[Finding]:
    """The findings of one BatchNorm, from its tensors alone.

    Args:
        tensors: by role.
        eps: where it is known; else PyTorch's default is used for the scale, which thresholds are coarse enough for.
        momentum: where it is known, what the counter says is held against what the statistics can be after so few
            updates.
        recalibrated: the file records that its statistics were recomputed, so that the counter tells nothing.
    """
    findings = _shapes(tensors)
    if findings:
        return findings
    findings += _nonfinite(tensors)
    mean, variance = tensors.get("running_mean"), tensors.get("running_var")
    if mean is not None and variance is not None:
        findings += _variance(variance)
        initial = _initial(mean, variance, tensors.get("num_batches_tracked"))
        findings += initial
        findings += _scale(tensors, variance, DEFAULT_EPS if eps is None else eps)
        findings += _half(mean, variance)
        findings += _counter(tensors, is_initial=bool(initial), momentum=momentum, recalibrated=recalibrated)
    return findings


def _shapes(tensors: dict[str, Summary]) -> list[Finding]:
    vectors = {role: tensors[role] for role in ("weight", "bias", "running_mean", "running_var") if role in tensors}
    lengths: dict[str, Any] = {role: len(summary.values) for role, summary in vectors.items()}
    if len(set(lengths.values())) <= 1:
        return []
    listed = ", ".join(f"{role} {length}" for role, length in lengths.items())
    message = f"its tensors have different lengths ({listed}): they do not belong together"
    return [Finding(FindingCode.SHAPE_MISMATCH, Severity.ERROR, "shapes differ", message, dict(lengths))]


def _nonfinite(tensors: dict[str, Summary]) -> list[Finding]:
    bad = {role: summary.nonfinite for role, summary in tensors.items() if summary.nonfinite}
    if not bad:
        return []
    role, count = max(bad.items(), key=lambda item: item[1])
    listed = ", ".join(f"{count} of {len(tensors[role].values)} in {role}" for role, count in bad.items())
    outputs = "The outputs of these channels are NaN"
    if bad.keys() == {"running_var"} and not any(map(math.isnan, tensors["running_var"].values)):
        outputs = "These channels are constant, their bias: whatever comes in is divided by infinity"
        if -math.inf in tensors["running_var"].values:
            outputs = "The outputs of these channels are NaN or constant"
    message = f"NaN or infinite: {listed}. {outputs}; recalibrate, or take an earlier file"
    return [Finding(FindingCode.NON_FINITE, Severity.ERROR, f"{count} non-finite in {role}", message, bad)]


def _variance(variance: Summary) -> list[Finding]:
    if variance.minimum is None or variance.minimum > 0:  # nearly always: no need to count
        return []
    count = len(variance.values)
    negative = sum(value < 0 for value in variance.values)
    zero = sum(value == 0 for value in variance.values)
    findings = []
    if negative:
        message = (
            f"running_var is negative in {negative} of {count} channels: no average of squares can be; recalibrate"
        )
        facts = {"channels": negative}
        findings.append(
            Finding(FindingCode.NEGATIVE_VARIANCE, Severity.ERROR, f"{negative} negative var", message, facts)
        )
    if zero:
        message = (
            f"running_var is 0 in {zero} of {count} channels: their input was constant (dead channels before this "
            "layer), or it underflowed in half precision; the scale is weight / sqrt(eps)"
        )
        facts = {"channels": zero}
        findings.append(Finding(FindingCode.ZERO_VARIANCE, Severity.WARNING, f"{zero} zero var", message, facts))
    return findings


def _initial(mean: Summary, variance: Summary, counter: Summary | None) -> list[Finding]:
    if 0 not in mean.values or 1 not in variance.values:
        return []
    initial = sum(m == 0 and v == 1 for m, v in zip(mean.values, variance.values, strict=True))
    count = len(mean.values)
    if not initial or not count:
        return []
    tracked = counter.values[0] if counter is not None and len(counter.values) == 1 else None
    if initial < count:
        if initial * 2 < count:
            return []
        message = f"running_mean is 0 and running_var 1 in {initial} of {count} channels: these look never updated"
        return [Finding(FindingCode.PARTLY_INITIAL, Severity.WARNING, "partly initial", message, {"channels": initial})]
    said = "" if tracked is None else f" (num_batches_tracked is {tracked:g})"
    message = (
        f"running_mean is 0 and running_var 1 everywhere{said}: the statistics were never updated, or were reset. If "
        "the model was trained, it needs recalibration before eval mode is right; folded or fixed layers look so on "
        "purpose"
    )
    return [Finding(FindingCode.NEVER_UPDATED, Severity.WARNING, "never updated", message)]


def _scale(tensors: dict[str, Summary], variance: Summary, eps: float) -> list[Finding]:
    weight = tensors.get("weight")
    weights = weight.values if weight is not None else [1.0] * len(variance.values)
    pairs = zip(weights, variance.values, strict=True)
    sound = not variance.nonfinite and variance.minimum is not None and variance.minimum + eps > 0
    if sound and (weight is None or not weight.nonfinite):
        scales = [abs(w) / math.sqrt(v + eps) for w, v in pairs]
    else:
        scales = [abs(w) / math.sqrt(v + eps) for w, v in pairs if math.isfinite(w) and 0 < v + eps < math.inf]
    if not scales:
        return []
    findings = []
    largest, count = max(scales), len(variance.values)
    threshold = DEAD_SCALE * largest
    dead = sum(scale <= threshold for scale in scales) if min(scales) <= threshold else 0
    if dead:
        message = (
            f"{dead} of {count} channels ({dead / count:.0%}) have a scale of nearly 0: pruned or dead, "
            "they give a constant whatever comes in"
        )
        severity = Severity.WARNING if dead * 10 >= count else Severity.NOTICE
        facts = {"channels": dead, "share": dead / count}
        findings.append(Finding(FindingCode.DEAD_CHANNELS, severity, f"{dead} dead", message, facts))
    if largest > EXPLODING_SCALE:
        exploding = sum(scale > EXPLODING_SCALE for scale in scales)
        message = (
            f"{exploding} of {count} channels have |weight / sqrt(running_var + eps)| above {EXPLODING_SCALE:g} "
            f"(largest {largest:.3g}): tiny variance; rounding errors and new data are amplified as much"
        )
        facts = {"channels": exploding, "largest": largest}
        findings.append(Finding(FindingCode.EXPLODING_SCALE, Severity.WARNING, f"scale {largest:.1e}", message, facts))
    return findings


def _half(mean: Summary, variance: Summary) -> list[Finding]:
    if variance.dtype not in ("float16", "bfloat16") and mean.dtype not in ("float16", "bfloat16"):
        return []
    message = f"statistics are stored in {variance.dtype}: running averages cannot be updated precisely in it"
    findings = [Finding(FindingCode.HALF_STATISTICS, Severity.NOTICE, variance.dtype, message)]
    if variance.dtype == "float16":
        small = sum(0 <= value < HALF_SMALLEST_NORMAL for value in variance.values)
        if small:
            message = f"running_var is below float16's normal range in {small} channels: it lost digits or became 0"
            findings.append(
                Finding(FindingCode.UNDERFLOW, Severity.WARNING, "var underflow", message, {"channels": small})
            )
        large = sum(abs(value) >= HALF_LARGEST for value in (*variance.values, *mean.values))
        if large:
            message = f"{large} statistics stand at float16's largest value or beyond: they overflowed"
            findings.append(Finding(FindingCode.OVERFLOW, Severity.ERROR, "overflow", message, {"channels": large}))
    return findings


def _counter(
    tensors: dict[str, Summary], *, is_initial: bool, momentum: float | None, recalibrated: bool
) -> list[Finding]:
    counter = tensors.get("num_batches_tracked")
    if counter is None:
        return []
    if counter.dtype != "int64" or len(counter.values) != 1:
        message = f"num_batches_tracked is {counter.dtype} {list(counter.shape)}; PyTorch has an int64 scalar"
        return [Finding(FindingCode.COUNTER_DTYPE, Severity.WARNING, f"counter {counter.dtype}", message)]
    count = int(counter.values[0])
    if is_initial or recalibrated:
        return []
    if count == 0:
        message = (
            "num_batches_tracked is 0 although the statistics have moved: they were set by other means (a converted "
            "model, an averaged copy); momentum=None would forget them at the first batch"
        )
        return [Finding(FindingCode.COUNTER_ZERO, Severity.NOTICE, "counter 0", message)]
    if 0 < count < FEW_UPDATES and not _contradicts(tensors["running_var"], count, momentum):
        message = (
            f"the statistics rest on {count} batch{'es' if count > 1 else ''} only (num_batches_tracked): recomputed "
            "on other data than the training's, reset, or hardly trained; check them with recalibrate --dry-run"
        )
        return [
            Finding(
                FindingCode.COUNTER_LOW,
                Severity.WARNING,
                f"{count} update{'s' if count > 1 else ''} only",
                message,
                {"updates": count},
            )
        ]
    return []


def _contradicts(variance: Summary, count: int, momentum: float | None) -> bool:
    """Whether running_var is less than what so few updates leave of its initial 1: no batch has a negative variance.

    After n updates with momentum m at least (1 - m)^n is left (PyTorch: new = (1 - m) * old + m * batch). The counter
    was then set by other means than these updates, as copies of a model that count anew have it.
    """
    if momentum is None or not 0 < momentum < 1 or variance.minimum is None:
        return False
    rounding = 1 - 2.0**-7 * count  # of each update, in the narrowest dtype
    return variance.minimum < (1 - momentum) ** count * rounding
