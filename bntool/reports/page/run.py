"""The page of what `inspect` found in several files: layers by files as a heat map, and the file that broke whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.results import Inspection
from bntool.inspection.run import FileSummary, LayerState, Run
from bntool.reports.blocks import Style
from bntool.reports.page.cells import describe_channels
from bntool.reports.page.document import Column, Entry, Item, Page, Picture, Place, Row, Snippet, Table
from bntool.reports.page.from_blocks import make_table, read_blocks
from bntool.reports.page.inspection import HEALTH_STYLES, make_layer_table, name_rows
from bntool.reports.page.strips import Mark, Scale, count_pixels, draw_series, scale_sizes
from bntool.reports.run import count_files, list_files, make_file_table, name_file, say_since_when, show_break
from bntool.reports.severities import SEVERITY_STYLES
from bntool.reports.text import plural
from bntool.representation import format_number
from bntool.shells import join_words

_NEGLIGIBLE = 1e-4  # of the measure of a change: so small, it is none for a picture
_LISTED = 40  # files that a command names
_LONGEST = 12  # characters of a label


def make_run_page(run: Run, *, looked_at: tuple[FileSummary, Inspection] | None = None) -> Page:
    """Make the page of a run.

    Args:
        looked_at: a file that is shown whole: the one that broke, or the last.
    """
    broken = run.find_broken()
    known = read_blocks([*show_break(run), count_files(run, named=True)]).lines
    details = [Item(line.text) for line in known]
    style, verdict = _judge(run, broken)
    rows = {name: f"r{number}" for number, name in enumerate(_list_layers(run))}
    paths = [file.path for file in run.files]
    command = join_words(["bntool", "inspect", *paths]) if len(paths) <= _LISTED else ""
    snippets = [Snippet("The same in a terminal", (command,))] if command else []
    if broken is not None:
        one = join_words(["bntool", "inspect", run.files[broken].path])
        snippets.insert(0, Snippet("The file that broke, alone", (one,)))
    tables = [_make_map(run, rows, broken)] if rows else []
    tables.append(make_table(make_file_table(run), title="Files", noun="files"))
    return Page(
        command="inspect",
        subject=_name_folder(paths),
        style=style,
        verdict=verdict,
        details=tuple(details),
        entries=tuple(_list_findings(run, rows)),
        tables=(*tables, *(() if looked_at is None else _show_whole(*looked_at))),
        snippets=tuple(snippets),
    )


def _judge(run: Run, broken: int | None) -> tuple[Style, str]:
    if broken is not None:
        file = run.files[broken]
        assert file.verdict is not None
        return HEALTH_STYLES[file.verdict.health], say_since_when(run, broken)
    counts = run.count()
    words = ", ".join(f"{count} {word}" for word, count in counts.items())
    failed = any(file.error is not None for file in run.files)
    styles = {HEALTH_STYLES[file.verdict.health] for file in run.files if file.verdict is not None}
    worst = next((style for style in (Style.WARNING, Style.NOTICE, Style.PLAIN) if style in styles), Style.GOOD)
    return Style.ERROR if failed else worst, f"{plural(len(run.files), 'file')}: {words}"


def _name_folder(paths: list[str]) -> str:
    """Return the first and the last file."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}, {len(paths)} files"


def _list_layers(run: Run) -> list[str]:
    return list(dict.fromkeys(name for file in run.files for name in file.layers))


@dataclass
class _Found:
    """One code and severity in all files of a run."""

    finding: Finding
    files: list[FileSummary] = field(default_factory=list)
    layers: dict[str, FileSummary] = field(default_factory=dict)  # with the first file that has it


def _list_findings(run: Run, rows: dict[str, str]) -> Iterator[Entry]:
    """List findings, each with the files that have it, and its layers with the first file of each."""
    grouped: dict[tuple[FindingCode, Severity], _Found] = {}
    for file in run.files:
        for one in file.findings:
            group = grouped.setdefault((one.finding.code, one.finding.severity), _Found(one.finding))
            group.files.append(file)
            for name in one.layers:
                group.layers.setdefault(name, file)
    for number, group in enumerate(sorted(grouped.values(), key=lambda group: -group.finding.severity.rank)):
        finding, first = group.finding, group.files[0]
        place = f"{plural(len(group.files), 'file')}, first {name_file(run, first)}"
        channels = describe_channels(finding.channels) if len(group.layers) == 1 else ""
        example = f"{next(iter(group.layers))}: " if group.layers else ""
        yield Entry(
            SEVERITY_STYLES[finding.severity],
            f"{finding.code.value} in {place}",
            example + finding.message,
            finding.advice,
            tuple(
                Place(name, rows.get(name, ""), ", ".join(filter(None, (f"since {name_file(run, file)}", channels))))
                for name, file in group.layers.items()
            ),
            f"f{number}",
        )
    for file in run.files:
        if file.error is not None:
            yield Entry(Style.ERROR, f"{file.error.code}: {list_files(run, [file])}", file.error.sentence)


def _make_map(run: Run, anchors: dict[str, str], broken: int | None) -> Table:
    """Make the map of layers by files."""
    states = {name: [file.layers.get(name) for file in run.files] for name in anchors}
    variances = {name: [_read_variance(state) for state in row] for name, row in states.items()}
    changes = {name: [_read_change(state) for state in row] for name, row in states.items()}
    sizes = scale_sizes(value for row in variances.values() for value in row if value is not None)
    moves = scale_sizes(v for row in changes.values() for v in row if v is not None and v > _NEGLIGIBLE)
    names = [name_file(run, file) for file in run.files]
    gap = broken or 0
    ticks = _choose_ticks([_shorten(name, run.ordered_by) for name in names], gap)
    columns = (
        Column("layer"),
        Column("largest running_var", "by file", scale=sizes, places=names, gap=gap, ticks=ticks),
        Column("min to max", "Smallest and largest of these", is_number=True),
        Column(
            "change",
            "Against the file before, of the channel that moved most: in standard deviations, or as log of the ratio",
            scale=moves,
            places=names,
            gap=gap,
            ticks=ticks,
        ),
        Column("first found", "The first file in which the layer has the worst that was found in it"),
    )
    rows = tuple(
        _make_row(name, states[name], (variances[name], sizes), (changes[name], moves), names, anchors[name], gap)
        for name in anchors
    )
    note = "A notch above a strip marks the files in which the layer has a warning or an error."
    if gap:
        note += f" The gap is before {names[gap]}, where it broke."
    return Table("Layers by files", "layers", columns, rows, note)


_Series = tuple[list[float | None], Scale]


def _make_row(  # noqa: PLR0917 what a row is made of
    name: str,
    states: list[LayerState | None],
    variances: _Series,
    changes: _Series,
    names: list[str],
    anchor: str,
    gap: int,
) -> Row:
    places: dict[Severity, list[int]] = {Severity.WARNING: [], Severity.ERROR: []}
    for at, state in enumerate(states):
        if state is not None and state.worst in places:
            places[state.worst].append(at)
    marks = [Mark(SEVERITY_STYLES[severity], found) for severity, found in places.items()]
    first = next((found[0] for found in (places[Severity.ERROR], places[Severity.WARNING]) if found), None)
    style = Style.ERROR if places[Severity.ERROR] else Style.WARNING if places[Severity.WARNING] else Style.PLAIN
    known = [value for value in variances[0] if value is not None and math.isfinite(value)]
    ends = f"{format_number(min(known), 2)} to {format_number(max(known), 2)}" if known else "-"
    marked = "" if first is None else f"; first marked: {names[first]}"
    return Row(
        (
            Item(name),
            _draw(variances, marks, gap, f"largest running_var in {plural(len(states), 'file')}, {ends}{marked}"),
            Item(ends, sort=max(known, default=-math.inf)),
            _draw(changes, marks, gap, f"change in {plural(len(states), 'file')}{marked}"),
            Item("" if first is None else names[first], style, sort=math.inf if first is None else first),
        ),
        anchor,
        style,
    )


def _draw(series: _Series, marks: list[Mark], gap: int, text: str) -> Item:
    values, scale = series
    largest = max((math.inf if math.isnan(value) else value for value in values if value is not None), default=-1.0)
    return Item(sort=largest, picture=Picture(draw_series(values, scale, marks, gap), text, len(values)))


def _read_variance(state: LayerState | None) -> float | None:
    if state is None or (state.largest_variance is None and not state.nonfinite):
        return None
    return math.nan if state.nonfinite else state.largest_variance


def _read_change(state: LayerState | None) -> float | None:
    return None if state is None or state.moved is None else state.moved


def _shorten(name: str, ordered_by: str) -> str:
    """Shorten a name for a label: a number alone where files are known by one, else a short name."""
    name = name.removeprefix(f"{ordered_by} ")
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"


def _choose_ticks(names: list[str], gap: int) -> tuple[tuple[float, str], ...]:
    """Return the first, the one after the gap, and the last, where they do not meet."""
    last = len(names) - 1
    chosen = {0: names[0], last: names[last]}
    if gap:
        chosen = {place: text for place, text in chosen.items() if abs(place - gap) > _APART * len(names)}
        chosen[gap] = f"▾{names[gap]}"
    wide = count_pixels(len(names))
    width = len(names) * wide + bool(gap)
    pixels = {place: place * wide + (gap > 0 and place >= gap) + wide / 2 for place in sorted(chosen)}
    return tuple((pixel / width, chosen[place]) for place, pixel in pixels.items())


_APART = 0.25  # of the width, between two labels


def _show_whole(file: FileSummary, inspection: Inspection) -> Iterator[Table]:
    anchors = name_rows(inspection.state_dicts)
    for one in inspection.state_dicts:
        if one.layers:
            table = make_layer_table(one, anchors)
            yield Table(f"{table.title} in {file.path}", table.noun, table.columns, table.rows, table.note)
