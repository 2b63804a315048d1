"""The result of `inspect` for several files: a row each, the first that broke, and the layers that moved most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bntool.inspection.findings import FindingCode, Severity
from bntool.inspection.run import FileSummary, FoundInLayers, LayerState, Run
from bntool.inspection.verdict import Health
from bntool.reports.blocks import Block, Cell, Column, Line, Series, Style, Table, line
from bntool.reports.layer_table import describe_channels, describe_range
from bntool.reports.severities import HEALTH_STYLES, MARKS, SEVERITY_STYLES
from bntool.reports.text import plural
from bntool.representation import format_number, list_first
from bntool.verification.statistics_shift import StatisticsShift, WorstShift

MOVED = 6  # layers that are shown as series
_LISTED = 4  # files named in a line
_MIDDLE, _WIDE = 100, 140
_COUNT_STYLES = {"failed": Style.ERROR, **{health.value: style for health, style in HEALTH_STYLES.items()}}
_HEALTH_MARKS = {Health.SICK: MARKS[Severity.ERROR], Health.SUSPICIOUS: MARKS[Severity.WARNING]}


def describe_run(run: Run) -> dict[str, Any]:
    """Describe what several files say together, as JSON data."""
    broken = run.find_broken()
    return {
        "ordered_by": run.ordered_by,
        "counts": run.count(),
        "broken": None if broken is None else run.files[broken].path,
        "rows": [_describe_row(file) for file in run.files],
        "jumps": [
            {"file": file.path, "layers": list(found.layers), "message": found.finding.message}
            for file in run.files
            for found in file.findings
            if found.finding.code is FindingCode.STATISTICS_JUMPED
        ],
        "moved": [
            {"layer": name, "changes": [_how_far(file.layers.get(name)) for file in run.files]}
            for name in run.list_moved(MOVED)
        ],
    }


def _describe_row(file: FileSummary) -> dict[str, Any]:
    moved = file.moved_most
    worst = file.findings[0] if file.findings else None
    return {
        "file": file.path,
        "progress": dict(file.progress),
        "health": None if file.verdict is None else file.verdict.health.value,
        "worst": None
        if worst is None
        else {
            "code": worst.finding.code.value,
            "severity": worst.finding.severity.value,
            "layers": list(worst.layers),
        },
        "running_var": list(_find_extremes(file)),
        "largest_mean": max((s.largest_mean for s in file.layers.values() if s.largest_mean is not None), default=None),
        "nonfinite": sum(state.nonfinite for state in file.layers.values()),
        "change": None if moved is None else _describe_change(moved, file.change),
    }


def _describe_change(name: str, change: StatisticsShift | None) -> dict[str, Any]:
    assert change is not None
    return {
        "layer": name,
        "mean_shift": change.mean_shift,
        "worst_mean_shift": change.worst_mean_shift,
        "variance_spread": change.variance_spread,
        "worst_variance_ratio": change.worst_variance_ratio,
    }


def show_run(run: Run) -> Iterator[Block]:
    """Yield the verdict on all, what needs attention, a row for each file, the layers that moved, and the verdict
    again.
    """
    yield count_files(run, named=False)
    yield from show_break(run)
    attention = list(_show_findings(run))
    if attention:
        yield line()
        yield from attention
    yield line()
    yield make_file_table(run)
    moved = run.list_moved(MOVED)
    if moved and len(run.files) > 2:
        yield line()
        yield _moved_table(run, moved)
    yield line()
    yield count_files(run, named=True)


def count_files(run: Run, *, named: bool) -> Line:
    """Count the files, and how many have each verdict.

    Args:
        named: say which are not healthy.
    """
    cells = [
        Cell(plural(len(run.files), "file"), Style.HEADING),
        Cell(": " if named else f" by {run.ordered_by}: "),
    ]
    for index, (word, count) in enumerate(run.count().items()):
        cells += [Cell(", " * bool(index)), Cell(f"{count} {word}", _COUNT_STYLES[word])]
        files = [f for f in run.files if ("failed" if f.verdict is None else f.verdict.health.value) == word]
        if named and word in ("failed", Health.SICK.value, Health.SUSPICIOUS.value):
            cells.append(Cell(f" ({list_files(run, files)})"))
    return Line(tuple(cells))


def list_files(run: Run, files: Sequence[FileSummary]) -> str:
    """List the names of files, without the folder where all files of the run lie in one."""
    folders = {Path(file.path).parent for file in run.files}
    return list_first([Path(file.path).name if len(folders) == 1 else file.path for file in files], _LISTED)


def show_break(run: Run) -> Iterator[Line]:
    """Show in which file something broke, and what; nothing where nothing did."""
    at = run.find_broken()
    if at is None:
        return
    broken = run.files[at]
    before = next((file for file in reversed(run.files[:at]) if file.verdict is not None), None)
    assert broken.verdict is not None
    style = HEALTH_STYLES[broken.verdict.health]
    cells = [
        Cell(say_since_when(run, at), style),
        Cell(_describe_progress(broken, " ({})")),
    ]
    worst = broken.findings[0] if broken.findings else None
    if worst is not None:
        where = _place(worst)
        cells.append(Cell(f": {worst.finding.short}" + (f" in {where}" if where else "")))
    if before is not None and before.verdict is not None:
        cells.append(Cell(f"; {list_files(run, [before])} was {before.verdict.health.value}"))
    yield Line(tuple(cells))


def say_since_when(run: Run, at: int) -> str:
    """Say that something is wrong, and from which file of a run on.

    Args:
        at: where the file stands in which something broke.
    """
    broken = run.files[at]
    assert broken.verdict is not None
    health, name = broken.verdict.health, list_files(run, [broken])
    if at == 0:
        return f"{health.value} already in the first file, {name}"
    earlier = any(file.verdict is not None and file.verdict.health is health for file in run.files[:at])
    return f"{health.value} {'again' if earlier else 'first'} in {name}"


def _place(found: FoundInLayers) -> str:
    """Return the layers, and the channels of the only one."""
    return list_first(found.layers, _LISTED) + describe_channels(found.finding.channels) * (len(found.layers) == 1)


def _describe_progress(file: FileSummary, form: str) -> str:
    said = ", ".join(f"{word} {value}" for word, value in file.progress.items())
    return form.format(said) if said else ""


def _show_findings(run: Run) -> Iterator[Line]:
    """Show each code, severity and advice once, with the files that have it and the first of them as the example."""
    grouped: dict[tuple[str, str, str], list[tuple[FileSummary, FoundInLayers]]] = {}
    for file in run.files:
        for found in file.findings:
            key = (found.finding.code.value, found.finding.severity.value, found.finding.advice)
            grouped.setdefault(key, []).append((file, found))
    for entries in sorted(grouped.values(), key=lambda entries: -entries[0][1].finding.severity.rank):
        file, found = entries[0]
        finding = found.finding
        files = [entry for entry, _ in entries]
        yield Line(
            (
                Cell(f"{MARKS[finding.severity]} {finding.severity.value}", SEVERITY_STYLES[finding.severity]),
                Cell(f" {finding.code.value}", Style.HEADING),
                Cell(f" in {plural(len(files), 'file')}: {list_files(run, files)}"),
            )
        )
        where = f"{list_files(run, [file])}, " if len(files) > 1 else ""
        where += _place(found) or "the file"
        yield Line((Cell(f"{where}: "), Cell(finding.message)), indent=2)
        if finding.advice:
            yield Line((Cell("to do: ", Style.MUTED), Cell(finding.advice)), indent=2)


def make_file_table(run: Run) -> Table:
    """Make a table with a row for each file."""
    words = list(dict.fromkeys(word for file in run.files for word in file.progress))
    columns = (
        Column("", pictures=True),
        Column("file", shrinks=True),
        *(Column(word, right=True, wide=0 if word == run.ordered_by else _WIDE) for word in words),
        Column("verdict"),
        Column("worst layer", shrinks=True),
        Column("found", wide=_MIDDLE),
        Column("running_var", right=True),
        Column("|running_mean|", right=True, wide=_WIDE),
        Column("change", right=True),
        Column("moved most", shrinks=True, wide=_MIDDLE),
    )
    return Table(columns, [_file_row(file, words) for file in run.files])


def _file_row(file: FileSummary, words: Sequence[str]) -> tuple[Cell, ...]:
    verdict, moved = file.verdict, file.moved_most
    style = Style.ERROR if verdict is None else HEALTH_STYLES[verdict.health]
    strong = style if verdict is None or verdict.health in _HEALTH_MARKS else Style.PLAIN
    worst = file.findings[0] if file.findings else None
    low, high = _find_extremes(file)
    means = [state.largest_mean for state in file.layers.values() if state.largest_mean is not None]
    mark = MARKS[Severity.ERROR] if verdict is None else _HEALTH_MARKS.get(verdict.health, "")
    nonfinite = any(state.nonfinite for state in file.layers.values())
    return (
        Cell(mark, style),
        Cell(file.path, strong),
        *(Cell(str(file.progress.get(word, ""))) for word in words),
        Cell(_describe_verdict(file), style),
        Cell("" if worst is None else worst.layers[0] if worst.layers else "(the file)"),
        Cell("" if worst is None else worst.finding.short),
        Cell(
            "" if low is None or high is None else describe_range(low, high, digits=2),
            Style.ERROR if nonfinite else Style.PLAIN,
        ),
        Cell(format_number(max(means), 2) if means else ""),
        Cell("" if moved is None else describe_change(file.layers[moved].change)),
        Cell("" if moved is None or not _how_far(file.layers[moved]) else moved),
    )


def _describe_verdict(file: FileSummary) -> str:
    """Return the verdict in so few words that it stands in a table."""
    verdict = file.verdict
    if verdict is None:
        return "failed" if file.error is None else file.error.code
    if verdict.sick or verdict.suspicious:
        return ", ".join(f"{n} {w}" for n, w in ((verdict.sick, "sick"), (verdict.suspicious, "suspicious")) if n)
    return verdict.health.value


def _find_extremes(file: FileSummary) -> tuple[float | None, float | None]:
    states = file.layers.values()
    return (
        min((s.smallest_variance for s in states if s.smallest_variance is not None), default=None),
        max((s.largest_variance for s in states if s.largest_variance is not None), default=None),
    )


def describe_change(change: WorstShift | None) -> str:
    """Describe how far the channel moved that moved most, by the measure that says more."""
    if change is None:
        return ""
    if not change.finite:
        return "not finite"
    if change.worst_mean_shift >= abs(math.log(change.worst_variance_ratio)):
        return "none" if not change.worst_mean_shift else f"{format_number(change.worst_mean_shift, 2)} σ"
    return f"x {format_number(change.worst_variance_ratio)}"


def _how_far(state: LayerState | None) -> float | None:
    return None if state is None else state.moved


def _moved_table(run: Run, names: Sequence[str]) -> Table:
    columns = (
        Column("moved most", shrinks=True),
        Column("", pictures=True),
        Column("largest var", right=True),
        Column("channel", right=True),
        Column("", pictures=True),
        Column("change", right=True),
        Column("in", shrinks=True),
    )
    rows = []
    for name in names:
        states = [file.layers.get(name) for file in run.files]
        variances = [None if state is None or state.nonfinite else state.largest_variance for state in states]
        changes = [_how_far(state) for state in states]
        first = _find_first_large(changes)
        state = states[first]
        known = [value for value in variances if value is not None]
        peak = max((s for s in states if s is not None), key=lambda s: s.largest_variance or 0.0, default=None)
        rows.append(
            (
                Cell(name),
                Cell("", picture=Series(tuple(_place_all(variances)))),
                Cell(describe_range(min(known), max(known), digits=2) if known else "-"),
                Cell("" if peak is None or peak.largest_channel is None else str(peak.largest_channel)),
                Cell("", picture=Series(tuple(_relate_all(changes)))),
                Cell(describe_change(state.change) if state is not None else ""),
                Cell(name_file(run, run.files[first])),
            )
        )
    return Table(columns, rows, caption="file by file: largest running_var, logarithmic; change of the worst channel")


def _find_first_large(changes: Sequence[float | None]) -> int:
    """Find the first change that is at least half as large as the largest: the break, not the return from it."""
    sizes = [change or 0.0 for change in changes]
    return next(at for at, size in enumerate(sizes) if size >= max(sizes) / 2)


def name_file(run: Run, file: FileSummary) -> str:
    """Name a file by its place in the run, as ``epoch 12``, or else by its file name."""
    known = file.progress.get(run.ordered_by)
    return Path(file.path).name if known is None else f"{run.ordered_by} {known}"


def _place_all(values: Sequence[float | None]) -> list[float | None]:
    """Place each value between the smallest and the largest, on a logarithmic axis."""
    positive = [value for value in values if value is not None and value > 0]
    low, high = (math.log(min(positive)), math.log(max(positive))) if positive else (0.0, 0.0)
    width = max(high - low, math.log(1.1))  # noise is no mountain
    return [
        None if value is None else max(math.log(value) - low, 0.0) / width if value > 0 else 0.0 for value in values
    ]


def _relate_all(values: Sequence[float | None]) -> list[float | None]:
    """Relate each value to the largest finite one; infinite ones are as high as that."""
    largest = max((value for value in values if value is not None and math.isfinite(value)), default=0.0)
    return [
        None if value is None else 1.0 if math.isinf(value) else value / largest if largest else 0.0 for value in values
    ]
