"""The table of the BatchNorm layers of a state dict, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bntool.batchnorm import AFFINE, EpsSource
from bntool.inspection.findings import Finding, Severity
from bntool.inspection.module_findings import describe_behaviour
from bntool.inspection.results import LayerInspection, StateDictInspection, Summary
from bntool.reports.blocks import Block, Cell, Column, Histogram, Line, Style, Table, line
from bntool.reports.layers import (
    LayerRow,
    Pictures,
    Range,
    arrange_rows,
    find_scale_ranges,
    picture_scales,
    picture_variances,
)
from bntool.reports.severities import MARKS, SEVERITY_STYLES
from bntool.reports.text import plural
from bntool.representation import format_number, list_first

MIDDLE = 100  # columns from which on channels and running_mean are shown
WIDE = 132  # and means
WIDEST = 172  # and weight, bias and findings
_LISTED = 6  # layers named in a finding that concerns many
_LISTED_CHANNELS = 8


def show_layers(state_dict: StateDictInspection, *, every: bool, pictures: bool) -> Iterator[Block]:
    """Show the layers that need attention first, each with what was found and what to do; then the rest.

    Args:
        every: a row for each layer, however many there are.
        pictures: count channels for histograms.
    """
    grouped = group_findings(state_dict)
    urgent = [entry for entry in grouped if entry[0].severity is not Severity.NOTICE]
    notices = [entry for entry in grouped if entry[0].severity is Severity.NOTICE]
    if not state_dict.layers:
        yield from show_findings(grouped)
        return
    rows = arrange_rows(state_dict, every=every)
    yield _make_table(rows, list(show_findings(urgent)), pictures=pictures)
    if notices:
        yield line()
        yield from show_findings(notices)


def _make_table(rows: Sequence[LayerRow], findings: Sequence[Line], *, pictures: bool) -> Table:
    layers = [layer for row in rows for layer in row.layers]
    columns = (
        Column("", pictures=True),
        Column("layer", shrinks=True),
        Column("layers", right=True),
        Column("kind"),
        Column("C", right=True, wide=MIDDLE),
        Column("", pictures=True),
        Column("running_var", right=True, narrow=WIDE),
        Column("running_var", right=True, wide=WIDE),
        Column("", pictures=True),
        Column("|scale|", right=True),
        Column("running_mean", right=True, wide=MIDDLE, narrow=WIDE),
        Column("running_mean", right=True, wide=WIDE),
        *(Column(role, right=True, wide=WIDEST) for role in AFFINE),
        Column("batches", right=True),
        Column("eps", right=True),
        Column("momentum", right=True, wide=WIDE),
        Column("scale factor", right=True),
        Column("findings", wide=WIDEST),
    )
    said = _list_common(layers)
    if pictures:
        counted = picture_variances(rows), picture_scales(rows)
        ranges = [(one.minimum, one.maximum) for one in counted[1].distributions]
        variances, scales, caption = _draw_channels(rows, *counted)
    else:
        ranges = find_scale_ranges(rows)
        variances = scales = [Cell("")] * len(rows)
        caption = ""
    drawn: list[tuple[Cell, ...] | Line] = []
    sick = sum(row.worst in (Severity.ERROR, Severity.WARNING) for row in rows)
    for at, row in enumerate(rows):
        if at == sick and (at or findings):  # findings may be about layers that have no row
            drawn += [*findings, line()]
        drawn.append(_make_row(row, said, variances[at], scales[at], ranges[at]))
    if sick == len(rows):
        drawn += findings
    return Table(columns, drawn, caption)


def _draw_channels(
    rows: Sequence[LayerRow], variances: Pictures, scales: Pictures
) -> tuple[list[Cell], list[Cell], str]:
    """Return pictures of running_var and of the scale of each row, and a caption for both."""
    from bntool.reports.pictures.channels import describe_axis  # a pipe takes no pictures

    said = [
        f"{name} {describe_axis(pictures.axis)}"
        for name, pictures in (("running_var", variances), ("|scale|", scales))
        if pictures.axis is not None
    ]
    styles = [_find_style(row) for row in rows]
    drawn = [
        [_picture_cell(counts, style) for counts, style in zip(pictures.counts, styles, strict=True)]
        for pictures in (variances, scales)
    ]
    return drawn[0], drawn[1], f"{', '.join(said)}, logarithmic" if said else ""


def _find_style(row: LayerRow) -> Style:
    return SEVERITY_STYLES[row.worst] if row.worst in (Severity.ERROR, Severity.WARNING) else Style.PLAIN


def _make_row(row: LayerRow, said: set[str], variances: Cell, scales: Cell, scale: Range) -> tuple[Cell, ...]:
    style = SEVERITY_STYLES[row.worst] if row.worst else Style.PLAIN
    strong = _find_style(row)
    return (
        Cell(MARKS[row.worst] if row.worst else "", style),
        Cell(row.name or "(in no module)", strong),
        Cell(f"{len(row.layers):,}" if row.is_stage else ""),
        Cell("" if "kind" in said else _merge({find_kind(layer) for layer in row.layers})),
        Cell(_describe_channel_counts(row.layers)),
        variances,
        _range_cell(row, "running_var", digits=2),
        _range_cell(row, "running_var", digits=3, mean=True),
        scales,
        _scale_cell(*scale),
        _range_cell(row, "running_mean", digits=2),
        _range_cell(row, "running_mean", digits=3, mean=True),
        *(_range_cell(row, role, digits=3, mean=True) for role in AFFINE),
        *(
            Cell("" if name in said else _merge({_describe_fact(name, layer) for layer in row.layers}))
            for name in ("batches", "eps", "momentum", "scale factor")
        ),
        Cell(_merge_findings(row.layers), style),
    )


def _describe_channel_counts(layers: Iterable[LayerInspection]) -> str:
    known = {layer.layer.num_features for layer in layers} - {None}
    counts = [count for count in known if count is not None]
    return "" if not counts else str(counts[0]) if len(counts) == 1 else f"{min(counts)}..{max(counts)}"


def _merge(texts: set[str]) -> str:
    """Return the text that all share; "" where they differ, which a row of several layers has no place for."""
    return next(iter(texts)) if len(texts) == 1 else "" if texts == {""} else "..."


def _merge_findings(layers: Iterable[LayerInspection]) -> str:
    return ", ".join(dict.fromkeys(finding.short for layer in layers for finding in layer.findings))


def _picture_cell(counts: tuple[int, ...] | None, style: Style) -> Cell:
    return Cell("", style) if counts is None else Cell("", style, picture=Histogram(counts))


def _scale_cell(low: float | None, high: float | None) -> Cell:
    return Cell("-", Style.MUTED) if low is None or high is None else Cell(describe_range(low, high, digits=2))


def _range_cell(row: LayerRow, role: str, *, digits: int, mean: bool = False) -> Cell:
    summaries = [layer.tensors[role] for layer in row.layers if role in layer.tensors]
    if len(summaries) == 1:
        return make_range_cell(summaries[0], digits=digits, mean=mean)
    known = [s for s in summaries if s.minimum is not None and s.maximum is not None and s.mean is not None]
    if not known:
        return make_range_cell(summaries[0] if summaries else None, digits=digits)
    low, high = min(s.minimum or 0.0 for s in known), max(s.maximum or 0.0 for s in known)
    count = sum(len(s.values) for s in known)
    average = sum((s.mean or 0.0) * (len(s.values) / count) for s in known) if count else 0.0
    text = describe_range(low, high, digits=digits) + (f" ({format_number(average, 2)})" * mean * (low != high))
    return Cell(text, Style.ERROR if any(s.nonfinite for s in summaries) else Style.PLAIN)


def make_range_cell(summary: Summary | None, *, digits: int, mean: bool = False) -> Cell:
    """Make a cell of ``min..max``, with the mean in between where there is room for it."""
    if summary is None:
        return Cell("-", Style.MUTED)
    if summary.minimum is None or summary.maximum is None or summary.mean is None:
        return Cell("nan", Style.ERROR)
    text = describe_range(summary.minimum, summary.maximum, digits=digits)
    if mean and summary.minimum != summary.maximum:
        text += f" ({format_number(summary.mean, 2)})"
    return Cell(text, Style.ERROR if summary.nonfinite else Style.PLAIN)


def describe_range(low: float, high: float, *, digits: int) -> str:
    """Describe a range as ``low..high``, or as one number where both look the same."""
    texts = [format_number(number, digits) for number in (low, high)]
    return texts[0] if texts[0] == texts[1] else "..".join(texts)


def find_kind(layer: LayerInspection) -> str:
    """Return the class of a layer where the file holds it (only that tells BatchNorm1d from 2d), else its kind."""
    return layer.layer.class_path.rpartition(".")[2] or layer.layer.kind.value


def _describe_fact(name: str, layer: LayerInspection) -> str:
    """Describe one layer for a column; "" where nothing tells."""
    if name == "batches":
        return "" if layer.num_batches_tracked is None else str(layer.num_batches_tracked)
    attributes = layer.layer.attributes
    if name == "momentum" and attributes.get("momentum", 0) is None:
        return "None"  # a setting of PyTorch, and not unknown
    values = {"eps": layer.layer.eps, "momentum": layer.layer.momentum, "scale factor": attributes.get("scale_factor")}
    value = values[name]
    return format_number(value, 6 if name == "scale factor" else 3) if isinstance(value, float | int) else ""


def find_common(values: Sequence[Any]) -> Any:
    """Return the value that all share, or None."""
    return values[0] if values and all(value == values[0] for value in values) else None


def _list_common(layers: Sequence[LayerInspection]) -> set[str]:
    """Find the columns that say the same in all rows: that stands above the table."""
    facts = ("batches", "eps", "momentum", "scale factor")
    said = {name for name in facts if len({_describe_fact(name, layer) for layer in layers}) == 1}
    return said | ({"kind"} if len({find_kind(layer) for layer in layers}) == 1 else set())


def show_common(layers: Sequence[LayerInspection]) -> Iterator[Line]:
    """Show once what is the same in all layers, instead of in each row."""
    if not layers:
        return
    said = []
    tracked = [layer.num_batches_tracked for layer in layers]
    if find_common(tracked) is not None:
        said.append(f"num_batches_tracked {tracked[0]}")
    elif all(value is None for value in tracked) and not layers[0].layer.class_path:
        said.append("num_batches_tracked missing")
    eps = [layer.layer.eps for layer in layers]
    if find_common(eps) is not None:
        said.append(f"eps {format_number(eps[0] or 0.0)} ({layers[0].layer.eps_source.value})")
    elif all(layer.layer.eps_source is EpsSource.UNKNOWN for layer in layers):
        said.append("eps not in the file")
    momentum = [layer.layer.momentum for layer in layers]
    if find_common(momentum) is not None:
        said.append(f"momentum {format_number(momentum[0] or 0.0)}")
    factor = _describe_fact("scale factor", layers[0])
    if factor and "scale factor" in _list_common(layers):
        said.append(f"statistics divided by the scale factor {factor}")
    modes = [layer.layer.training for layer in layers]
    if find_common(modes) is not None:
        said.append("train mode" if modes[0] else "eval mode")
    if said:
        yield line("every layer: " + ", ".join(said))


def show_behaviour(layers: Sequence[LayerInspection]) -> Iterator[Line]:
    """Show what PyTorch does with layers whose flags are not those that most have."""
    behaving: dict[str, list[str]] = {}
    for layer in layers:
        for sentence in describe_behaviour(layer.layer):
            behaving.setdefault(sentence, []).append(layer.name)
    for sentence, names in behaving.items():
        where = "every layer" if len(names) == len(layers) > 1 else list_first(names, _LISTED)
        yield Line((Cell(f"{where}: "), Cell(sentence)))


GroupedFinding = tuple[
    Finding, tuple[str, ...]
]  # the first of those that share code, severity and advice, and whose they are


def group_findings(state_dict: StateDictInspection) -> list[GroupedFinding]:
    """Group findings: those of the state dict, then one entry for each code, severity and advice with its layers, worst
    first.
    """
    grouped: dict[tuple[str, str, str], tuple[Finding, list[str]]] = {}
    for layer in state_dict.layers:
        for finding in layer.findings:
            entry = grouped.setdefault((finding.code.value, finding.severity.value, finding.advice), (finding, []))
            entry[1].append(layer.name + describe_channels(finding.channels))
    own = [(finding, finding.layers) for finding in state_dict.findings]
    of_layers = [(finding, tuple(names)) for finding, names in grouped.values()]
    return sorted([*own, *of_layers], key=lambda entry: -entry[0].severity.rank)


def describe_channels(channels: Sequence[int]) -> str:
    """Describe channels by their numbers, to stand behind the name of their layer; "" for none."""
    if not channels:
        return ""
    return f" (channel{'s' * (len(channels) > 1)} {list_first(list(map(str, channels)), _LISTED_CHANNELS)})"


def show_findings(grouped: Iterable[GroupedFinding]) -> Iterator[Line]:
    """Show what was found, where, and what to do."""
    for finding, names in grouped:
        where = ""
        if names:
            listed = list_first(names, _LISTED)
            where = f" in {listed}" if len(names) == 1 else f" in {plural(len(names), 'layer')}: {listed}"
        severity = finding.severity
        yield Line(
            (
                Cell(f"{MARKS[severity]} {severity.value}", SEVERITY_STYLES[severity]),
                Cell(f" {finding.code.value}", Style.HEADING),
                Cell(where),
            )
        )
        example = f"{names[0].partition(' (')[0]}: " if len(names) > 1 and not finding.layers else ""
        yield Line((Cell(example), Cell(finding.message)), indent=2)
        if finding.advice:
            yield Line((Cell("to do: ", Style.MUTED), Cell(finding.advice)), indent=2)
