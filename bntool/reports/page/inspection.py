"""The page of what `inspect` found in one file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bntool.checkpoints.origin import describe_origin
from bntool.inspection.findings import Finding, Severity
from bntool.inspection.results import Inspection, LayerInspection, StateDictInspection, Summary
from bntool.inspection.verdict import Health
from bntool.reports.blocks import Style
from bntool.reports.layers import list_scales
from bntool.reports.page.cells import describe_channels, draw_item, range_item
from bntool.reports.page.document import Column, Entry, Item, Page, Place, Row, Snippet, Table
from bntool.reports.page.strips import Mark, Scale, scale_sizes
from bntool.reports.severities import SEVERITY_STYLES
from bntool.reports.text import format_size, plural
from bntool.shells import join_words

HEALTH_STYLES = {
    Health.HEALTHY: Style.GOOD,
    Health.SUSPICIOUS: Style.WARNING,
    Health.SICK: Style.ERROR,
    Health.NO_BATCH_NORM: Style.PLAIN,
    Health.NOT_JUDGED: Style.NOTICE,
}


def make_inspection_page(path: str, inspection: Inspection) -> Page:
    """Make the page of one file."""
    anchors = name_rows(inspection.state_dicts)
    return Page(
        command="inspect",
        subject=path,
        style=HEALTH_STYLES[inspection.verdict.health],
        verdict=inspection.verdict.sentence,
        details=tuple(_list_details(inspection)),
        facts=_list_facts(inspection),
        entries=tuple(_group_findings(inspection.state_dicts, inspection.findings, anchors)),
        tables=tuple(make_layer_table(one, anchors) for one in inspection.list_worst_first() if one.layers),
        snippets=(
            Snippet("The same in a terminal", (join_words(["bntool", "inspect", path]),)),
            Snippet("In Python", ("import bntool", f"inspection = bntool.inspect({path!r})")),
        ),
    )


def _list_details(inspection: Inspection) -> Iterator[Item]:
    """Yield what was not judged, and what a configuration had a part in."""
    for what in inspection.verdict.not_judged:
        yield Item(f"not judged: {what}", Style.MUTED)
    for note in inspection.checkpoint.notes:
        yield Item(note, Style.MUTED)
    for one in inspection.ignored:
        where = f" in {one.layer}" if one.layer else ""
        yield Item(f"ignored by {inspection.configuration}: {one.finding.code.value}{where}: {one.reason}", Style.MUTED)
    for rule in inspection.thresholds:
        where = f" for {', '.join(rule.layers)}" if rule.layers else ""
        said = f"{rule.name} {rule.value:g}{where} (usually {rule.default:g}): {rule.reason}"
        yield Item(f"threshold of {inspection.configuration}: {said}", Style.MUTED)


def make_state_dict_page(one: StateDictInspection) -> Page:
    """Make the page of one state dict alone."""
    anchors = name_rows([one])
    found = list(_group_findings([one], (), anchors))
    worst = max((entry.style for entry in found), key=_STYLE_RANKS.index, default=Style.GOOD)
    sick = sum(severity is not None and severity.rank > 0 for severity in one.find_worst().values())
    return Page(
        command="state dict",
        subject=one.state_dict.key,
        style=worst,
        verdict=f"findings in {sick} of {plural(len(one.layers), 'layer')}" if sick else "nothing above a notice",
        entries=tuple(found),
        tables=(make_layer_table(one, anchors),) if one.layers else (),
    )


_STYLE_RANKS = (Style.GOOD, *SEVERITY_STYLES.values())
Anchors = dict[tuple[str, str], str]  # of the row of a layer: by key of the state dict and name


def name_rows(state_dicts: Sequence[StateDictInspection]) -> Anchors:
    """Make anchors for the rows of all layers."""
    keys = [(one.state_dict.key, layer.name) for one in state_dicts for layer in one.layers]
    return {key: f"l{number}" for number, key in enumerate(keys)}


def _list_facts(inspection: Inspection) -> dict[str, str]:
    checkpoint = inspection.checkpoint
    facts = {
        "Format": checkpoint.format.title,
        "Size": format_size(checkpoint.format.size(checkpoint)),
        "Origin": describe_origin(checkpoint),
        "Loading it": inspection.safety.verdict.value,
    }
    for one in inspection.state_dicts:
        name = f"State dict {one.state_dict.key!r}" if one.state_dict.key else "State dict"
        known = [architecture.title + ", in part" * (not architecture.whole) for architecture in one.architectures]
        counts = [plural(len(one.layers), "BatchNorm layer"), f"{one.parameters:,} parameters"]
        facts[name] = "; ".join([*counts, *known])
    if inspection.checksums is not None:
        facts["Checksums"] = f"{plural(inspection.checksums, 'record')} verified"
    return {name: text for name, text in facts.items() if text}


def _group_findings(
    state_dicts: Sequence[StateDictInspection], of_file: Sequence[Finding], anchors: Anchors
) -> Iterator[Entry]:
    """Group findings of the layers, the state dicts and the file; one entry for each code, severity and advice, worst
    first.
    """
    groups: dict[tuple[str, Severity, str], tuple[Finding, list[Place]]] = {}
    several = len(state_dicts) > 1
    for one in state_dicts:
        key = one.state_dict.key
        label = f"{key}: " if several and key else ""
        for finding in one.findings:
            places = [Place(label + name, anchors.get((key, name), "")) for name in finding.layers]
            groups[finding.code.value, finding.severity, f"{key} {len(groups)}"] = (finding, places)
        for layer in one.layers:
            for finding in layer.findings:
                group = groups.setdefault((finding.code.value, finding.severity, finding.advice), (finding, []))
                more = describe_channels(finding.channels)
                group[1].append(Place(label + layer.name, anchors[key, layer.name], more))
    for finding in of_file:
        groups[finding.code.value, finding.severity, f"file {len(groups)}"] = (finding, [])
    ordered = sorted(groups.values(), key=lambda group: -group[0].severity.rank)
    for number, (finding, places) in enumerate(ordered):
        example = f"{places[0].name}: " if len(places) > 1 and not finding.layers else ""
        yield Entry(
            SEVERITY_STYLES[finding.severity],
            finding.code.value,
            example + finding.message,
            advice=finding.advice,
            places=tuple(places),
            anchor=f"f{number}",
        )


def make_layer_table(one: StateDictInspection, anchors: Anchors) -> Table:
    """Make the table of the layers of one state dict, with a strip of running_var and one of the scale each."""
    scales = [list_scales(layer) for layer in one.layers]
    of_variances = scale_sizes(v for layer in one.layers for v in _values(layer.tensors.get("running_var")))
    of_scales = scale_sizes(value for values in scales for value in values)
    counters = len({layer.num_batches_tracked for layer in one.layers}) > 1
    columns = [
        Column("layer"),
        Column("channels", "How many channels the layer has", is_number=True, is_minor=True),
        Column(
            "running_var by channel", "Variance of each channel; a colour is the same in all layers", scale=of_variances
        ),
        Column("min to max", "Smallest and largest running_var", is_number=True),
        Column(
            "|scale| by channel",
            "|weight| / sqrt(running_var + eps): what a channel is multiplied by",
            scale=of_scales,
        ),
        Column("min to max", "Smallest and largest |scale|", is_number=True),
        Column("running_mean", "Smallest and largest running_mean", is_number=True, is_minor=True),
        *((Column("batches", "num_batches_tracked", is_number=True, is_minor=True),) if counters else ()),
        Column("findings", "What was found, worst first"),
    ]
    rows = tuple(
        _make_row(
            layer,
            [*layer.findings, *(finding for finding in one.findings if layer.name in finding.layers)],
            values,
            (of_variances, of_scales),
            anchors[one.state_dict.key, layer.name],
            counters=counters,
        )
        for layer, values in zip(one.layers, scales, strict=True)
    )
    title = f"Layers of {one.state_dict.key}" if one.state_dict.key else "Layers"
    shared = max((layer.layer.num_features or 0 for layer in one.layers), default=0) > 64
    note = "A notch above a strip marks the channels that a finding names."
    if shared:
        note += " Where channels share a place, it shows the largest above the median above the smallest."
    return Table(title, "layers", tuple(columns), rows, note)


def _make_row(
    layer: LayerInspection,
    findings: Sequence[Finding],
    scales: Sequence[float],
    axes: tuple[Scale, Scale],
    anchor: str,
    *,
    counters: bool,
) -> Row:
    found = sorted(findings, key=lambda finding: -finding.severity.rank)
    worst = found[0].severity if found else None
    style = Style.PLAIN if worst is None else SEVERITY_STYLES[worst]
    marks = [Mark(SEVERITY_STYLES[finding.severity], finding.channels) for finding in found if finding.channels]
    variances = _values(layer.tensors.get("running_var"))
    channels = layer.layer.num_features
    count = layer.num_batches_tracked
    items = [
        Item(layer.name),
        Item("" if channels is None else str(channels), sort=channels),
        draw_item(variances, axes[0], marks, what="running_var"),
        range_item(variances),
        draw_item(scales, axes[1], marks, what="|scale|"),
        range_item(scales),
        range_item(_values(layer.tensors.get("running_mean"))),
        *((Item("" if count is None else str(count), sort=-1 if count is None else count),) if counters else ()),
        Item(", ".join(finding.short for finding in found), style, sort=-1 if worst is None else worst.rank),
    ]
    return Row(tuple(items), anchor, style)


def _values(summary: Summary | None) -> Sequence[float]:
    return () if summary is None else summary.values
