"""The result of `recalibrate`, for people and as JSON data."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bntool.recalibration.options import Precision
from bntool.reports.blocks import Block, Cell, Column, Line, Style, Table, line, verbatim
from bntool.reports.loading import show_loading_code
from bntool.reports.pictures.channels import draw_shifts
from bntool.reports.text import format_size, plural
from bntool.reports.worst_channels import (
    describe_unusable_channels,
    describe_worst_channel,
    find_lone_mean,
    find_lone_variance,
)
from bntool.representation import format_number, list_first
from bntool.verification.statistics_shift import NO_SHIFT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bntool.data.policies import LeftOut
    from bntool.recalibration.drift import LayerDrift
    from bntool.recalibration.output_changes import OutputChange, OutputChanges
    from bntool.recalibration.results import CheckpointRecalibration, PreprocessingSteps

_UNEVEN = 1.05  # the spread of variances over their mean change from which the latter says too little
_FAR = 2.0  # times as far off as the layer that is furthest off, a channel of another is named, too
_SHOWN = 4  # reasons for leaving samples out that are given
_RATE = ("top1", "top5")


def describe_recalibration(outcome: CheckpointRecalibration) -> dict[str, Any]:
    """Return the facts as JSON data."""
    from bntool.recalibration.drift import find_first_parted

    result = outcome.recalibration
    parted = find_first_parted(result.drifts)
    alone = outcome.output_changes.alone if outcome.output_changes is not None else {}
    return {
        "state_dict": result.plan.state_dict,
        "method": result.method.value,
        "prior": result.prior,
        "samples": result.samples,
        "batches": result.batches,
        "memory": result.memory,
        "precision": result.precision.value,
        "promoted": list(outcome.promoted),
        "preprocessing": _describe_preprocessing(outcome.preprocessing),
        "left_out": [left_out.reason for left_out in result.left_out],
        "left_out_samples": sum(left_out.samples for left_out in result.left_out),
        "layers": [
            drift.describe() | {"parted": drift.has_parted, "alone": _describe_change(alone.get(drift.layer))}
            for drift in result.drifts
        ],
        "first_parted": parted.layer if parted is not None else None,
        "skips": [{"layer": s.layer, "reason": s.reason.value, "detail": s.detail} for s in result.plan.skips],
        "effects": None
        if outcome.output_changes is None
        else {
            "samples": outcome.output_changes.samples,
            "finite_before": outcome.output_changes.finite,
            "together": _describe_change(outcome.output_changes.together),
        },
        "evaluation": _describe_evaluation(outcome),
        "kept": outcome.kept,
        "warnings": list(outcome.warnings),
        "output": outcome.output,
    }


def _describe_evaluation(outcome: CheckpointRecalibration) -> dict[str, Any] | None:
    before, after = outcome.before, outcome.after
    if before is None or after is None:
        return None
    return {
        "data": outcome.evaluated_on,
        "metric": before.metric if before.value is not None else None,
        "samples": before.samples,
        "before": before.value,
        "after": after.value,
        "flipped": outcome.flipped,
        "finite_before": before.finite,
        "finite_after": after.finite,
    }


def _describe_change(change: OutputChange | None) -> dict[str, Any] | None:
    return None if change is None else asdict(change)


def _describe_preprocessing(steps: PreprocessingSteps | None) -> dict[str, str] | None:
    return None if steps is None else {"steps": steps.steps, "origin": steps.origin}


def show_recalibration(outcome: CheckpointRecalibration) -> list[Block]:
    """Return lines and tables for people: the result, what needs attention, then the drift of each layer, worst
    first.
    """
    result = outcome.recalibration
    title = f"recalibrate {plural(len(result.drifts), 'BatchNorm layer')}: {result.method.value} statistics of "
    title += f"{plural(result.samples, 'sample')} in {plural(result.batches, 'batch', 'batches')}"
    if result.prior:
        title += f", the old ones counting for {result.prior:,.12g}"
    if result.precision is Precision.BFLOAT16:
        title += ", approximate (forwards in bfloat16)"
    if result.memory is not None:
        title += f", about {format_size(result.memory)} of memory"
    evaluation = _evaluation(outcome)
    attention = [
        *(
            Line((Cell("left alone ", Style.WARNING), Cell(f"{s.layer}: {s.reason.value} ({s.detail})")), indent=2)
            for s in result.plan.skips
        ),
        *_promoted(outcome.promoted),
        *show_left_out(result.left_out),
        *(line(f"! {warning}", Style.WARNING) for warning in outcome.warnings),
    ]
    blocks: list[Block] = [line(title, Style.HEADING), *evaluation[:1], _say_written(outcome), line()]
    blocks += evaluation[1:]
    blocks += _diagnosis([d for d in result.drifts if d.layer not in outcome.lacking])
    blocks += [*_output_changes(outcome.output_changes), *attention, line()]
    if outcome.preprocessing is not None:
        steps = outcome.preprocessing
        blocks.append(line(f"preprocessing: {steps.steps} ({steps.origin})", Style.MUTED))
    return [*blocks, _drift_table(result.drifts, outcome.output_changes), *_show_loading(outcome)]


def _drift_table(drifts: tuple[LayerDrift, ...], output_changes: OutputChanges | None) -> Table:
    columns = (
        Column("layer", shrinks=True),
        Column("order", right=True, wide=100),
        Column("", pictures=True),
        Column("mean shift", right=True, wide=100),
        Column("worst mean", right=True),
        Column("", pictures=True),
        Column("variance", right=True, wide=100),
        Column("spread", right=True, wide=120),
        Column("worst var", right=True),
        Column("error", right=True, wide=100),
        Column("outputs", right=True),
        Column("channels", right=True, wide=140),
        Column("positions", right=True, wide=140),
    )
    alone = output_changes.alone if output_changes is not None else {}
    order = {drift.layer: index for index, drift in enumerate(drifts, start=1)}
    worst_first = sorted(drifts, key=lambda drift: -drift.severity)
    means, ratios, caption = draw_shifts([drift.shift for drift in worst_first])
    rows = []
    for at, drift in enumerate(worst_first):
        style = Style.WARNING if drift.has_parted else Style.PLAIN
        error = drift.sampling_error
        rows.append(
            (
                Cell(drift.layer),
                Cell(str(order[drift.layer]), Style.MUTED),
                means[at],
                Cell(_in_sigmas(drift.mean_shift), style),
                Cell(_in_sigmas(drift.worst_mean_shift), style),
                ratios[at],
                Cell("x " + format_number(drift.variance_ratio), style),
                Cell("x " + format_number(drift.variance_spread), style),
                Cell(f"x {format_number(drift.shift.worst_variance_ratio)}", style),
                Cell("" if error is None else f"± {format_number(error, 2)} σ", Style.MUTED),
                Cell("" if drift.layer not in alone else _in_percent(alone[drift.layer])),
                Cell(f"{drift.channels:,}"),
                Cell(f"{drift.positions:,}"),
            )
        )
    return Table(columns, rows, caption)


def _in_sigmas(value: float) -> str:
    return _format(value) + " σ"


def _format(value: float) -> str:
    """Format in two digits, or as the whole part where that has more and can still be read."""
    return f"{value:,.0f}" if 99.5 <= value < 1e5 else format_number(value, 2)


def _diagnosis(drifts: Sequence[LayerDrift]) -> list[Block]:
    """Describe which layer parts from the data first, and which most."""
    from bntool.recalibration.drift import find_first_parted

    if not drifts:
        return []
    parted = find_first_parted(drifts)
    if parted is None:
        return [line(_describe_agreement(drifts), Style.GOOD)]
    first = f"First layer in execution order to part from the data: {parted.layer} {_describe_drift(parted)}."
    if parted.finite and parted.sampling_error is None:
        first += f" {_ONE_BATCH}"
    worst = max(drifts, key=lambda drift: drift.severity)
    said = [first]
    if worst.severity > parted.severity:
        said.append(f"Furthest from it: {worst.layer} {_describe_drift(worst)}.")
    known = [(drift.layer, drift.shift) for drift in drifts if drift.shift.finite]
    layer, shift = max(known, key=lambda one: one[1].worst, default=("", NO_SHIFT))
    if layer not in ("", parted.layer, worst.layer) and shift.worst > _FAR * worst.severity:
        said.append(f"The channel that is furthest off is one of {layer}: {describe_worst_channel(shift)}.")
    return [line(text, Style.NOTICE) for text in said]


_ONE_BATCH = "One batch does not tell how much of that is sampling error."


def _describe_agreement(drifts: Sequence[LayerDrift]) -> str:
    """Describe how well the stored statistics agree with those of the data, where no layer has parted from them."""
    from bntool.recalibration.drift import PARTED_RATIO, PARTED_SIGMAS

    if all(drift.is_sampling for drift in drifts):
        return "The stored statistics are those of this data, within sampling error."
    near = "The stored statistics are, over the channels of each layer, those of this data "
    near += f"to {PARTED_SIGMAS:g} σ and a factor of {PARTED_RATIO:g}"
    if any(drift.sampling_error is None for drift in drifts):
        return f"{near}{_describe_worst(drifts)}. {_ONE_BATCH}"
    beyond = max((drift for drift in drifts if not drift.is_sampling), key=lambda drift: drift.severity)
    return f"{near}, which is more than sampling error: {beyond.layer} {_describe_drift(beyond)}."


def _describe_worst(drifts: Sequence[LayerDrift]) -> str:
    """Describe the channel that is furthest off, and how far."""
    furthest = max(drifts, key=lambda drift: drift.shift.worst)
    worst = describe_worst_channel(furthest.shift)
    return f", furthest off in {furthest.layer}, {worst}" if worst else ""


def _describe_drift(drift: LayerDrift) -> str:
    if not drift.finite:
        where = describe_unusable_channels(drift.shift)
        return f"holds statistics that are not usable (NaN, infinite or negative variance){where}"
    ratio, spread = drift.variance_ratio, drift.variance_spread
    far = _in_sigmas(drift.mean_shift)
    factor = f"its variance by a factor of {format_number(ratio)}"
    lone = find_lone_mean(drift.shift)
    if lone is not None:
        far += f" ({_in_sigmas(drift.worst_mean_shift)} in channel {lone})"
    ratios = drift.shift.variance_ratios()
    if spread > _UNEVEN * max(ratio, 1 / ratio):  # one number says too little
        lone = find_lone_variance(drift.shift)
        ends = [
            format_number(end) + (f" (channel {lone})" if lone is not None and end == ratios[lone] else "")
            for end in (min(ratios), max(ratios))
        ]
        factor = f"its variances by factors of {' to '.join(ends)}"
    return f"is off by {far}, {factor}"


def _output_changes(output_changes: OutputChanges | None) -> list[Block]:
    if output_changes is None or not output_changes.alone:
        return []
    together = output_changes.together
    on = f"of {plural(output_changes.samples, 'sample')}"
    if not output_changes.finite or not together.finite:
        words = {True: "finite", False: "NaN or infinite"}
        before, after = words[output_changes.finite], words[together.finite]
        text = f"Outputs {on} are {before} with the stored statistics and {after} with the new ones."
        return [line(text, Style.WARNING)]
    if together.relative is None:
        return []
    flipped = "" if together.flipped is None else f" and {_percent(together.flipped)} of their predictions"
    text = f"All new statistics together change the outputs {on} by {_in_percent(together)} of their norm{flipped}; "
    return [line(text + "the column outputs shows what those of one layer alone do.")]


def _in_percent(change: OutputChange) -> str:
    """Describe how much outputs change relative to their norm, in percent."""
    if change.relative is None:
        return "-" if change.finite else "not finite"
    return f"{_format(100 * change.relative)} %"


def show_left_out(parts: tuple[LeftOut, ...]) -> list[Block]:
    """Show how many samples of the data were left out, and why; nothing where none were."""
    if not parts:
        return []
    count = plural(sum(part.samples for part in parts), "sample")
    reasons = list_first([part.reason for part in parts], _SHOWN, separator="; ")
    return [line(f"{count} left out: {reasons}", Style.WARNING)]


def _promoted(names: tuple[str, ...]) -> list[Block]:
    if not names:
        return []
    return [line(f"float32 in the output: {list_first(names, _SHOWN)}", Style.NOTICE)]


def _evaluation(outcome: CheckpointRecalibration) -> list[Block]:
    before, after = outcome.before, outcome.after
    if before is None or after is None:
        return []
    blocks: list[Block] = []
    if before.value is not None and after.value is not None:
        style = (
            Style.GOOD if after.value > before.value else Style.WARNING if after.value < before.value else Style.PLAIN
        )
        text = f"{before.metric} {format_rate(before.metric, before.value)} -> {format_rate(after.metric, after.value)}"
        on = f" on {plural(before.samples, 'sample')} of {outcome.evaluated_on}"
        blocks.append(Line((Cell(text, style), Cell(on))))
        if after.value < before.value and outcome.output is not None:
            blocks.append(line("the new statistics are worse here; --keep-if-better would not have written them"))
    if outcome.flipped is not None:
        text = f"{_percent(outcome.flipped)} of the predictions change"
        where = "" if before.value is not None else f" on {outcome.evaluated_on}"
        has_labels = before.value is not None or before.labels is not None or before.note is not None
        blocks.append(line(text + where + "; there are no labels" * (not has_labels)))
    if not after.finite:
        blocks.append(line("outputs hold NaN or infinity, with the new statistics too", Style.WARNING))
    elif not before.finite:
        blocks.append(line("outputs held NaN or infinity before, and no longer do", Style.GOOD))
    return blocks


def format_rate(metric: str, value: float) -> str:
    return _percent(value) if metric in _RATE else format_number(value, 5)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _say_written(outcome: CheckpointRecalibration) -> Line:
    if outcome.kept:
        return line("kept the old statistics, because the new ones are not better; nothing was written", Style.NOTICE)
    if outcome.output is None:
        return line("nothing was written", Style.MUTED)
    (written,) = verbatim([f"wrote {outcome.output}"], Style.GOOD)
    return written


def _show_loading(outcome: CheckpointRecalibration) -> list[Block]:
    if outcome.kept or outcome.output is None:
        return []
    loading = show_loading_code(outcome.checkpoint, outcome.state_dict, outcome.output)
    return [line(), line("Load it without bntool:"), *verbatim(loading, indent=2)]
