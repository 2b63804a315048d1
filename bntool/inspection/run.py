"""The files of one run, one after another: a summary of each, and what changed from one to the next."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bntool.batchnorm import DEFAULT_EPS
from bntool.checkpoints.addresses import Location, as_location
from bntool.checkpoints.origin import find_progress
from bntool.errors import BntoolError
from bntool.inspection.checkpoint import inspect
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.results import Inspection, LayerInspection
from bntool.inspection.verdict import Health, Verdict
from bntool.representation import html_repr
from bntool.verification.statistics_shift import StatisticsShift, measure_shift

JUMP = 1e4  # times that running_var grows from one file to the next, over all channels; raw pixels give some 1e3
_SHOWN = 6  # files, in a repr
_RANKS = {Health.SUSPICIOUS: 1, Health.SICK: 2}
_NUMBER = re.compile(r"(\d+)", re.ASCII)


@dataclass(frozen=True)
class LayerState:
    """One layer in one file.

    Attributes:
        worst: the severity of its worst finding; None without one.
        smallest_variance, largest_variance: of the finite values of running_var; None where there are none.
        largest_channel: the channel of the largest running_var.
        largest_mean: the largest magnitude of a finite running_mean; None where there is none.
        nonfinite: how many statistics are NaN or infinite.
        change: against the file before; None where that has no such layer, or there is no file before.
    """

    worst: Severity | None
    smallest_variance: float | None
    largest_variance: float | None
    largest_channel: int | None
    largest_mean: float | None
    nonfinite: int
    change: StatisticsShift | None = None

    @property
    def moved(self) -> float | None:
        """How far the channel moved that moved most: in sigmas, or the log of its ratio of variances."""
        return None if self.change is None else self.change.worst


@dataclass(frozen=True)
class FoundInLayers:
    """A finding above a notice, and all layers of a file that have one of its code and severity.

    Attributes:
        finding: that of the first of them, or of the file.
        layers: their names; empty where it concerns the file as a whole.
    """

    finding: Finding
    layers: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class FileSummary:
    """What is kept of one file.

    Attributes:
        path: as it was given.
        progress: what the file says of how far the training was: ``epoch``, ``step`` or ``iteration``.
        verdict: None where the file could not be inspected.
        error: why it could not be; None where it was.
        findings: above a notice, worst first.
        layers: those of the state dict that commands take unless told otherwise, by name.
    """

    path: str
    progress: Mapping[str, int] = field(default_factory=dict)
    verdict: Verdict | None = None
    error: BntoolError | None = None
    findings: tuple[FoundInLayers, ...] = ()
    layers: Mapping[str, LayerState] = field(default_factory=dict)

    def __repr__(self) -> str:
        said = self.verdict.sentence if self.verdict is not None else f"{self.error}"
        return f"<{self.path}: {said}>"

    @property
    def moved_most(self) -> str | None:
        """The layer whose statistics changed most against the file before; None where none can be compared."""
        changes = {name: state.moved for name, state in self.layers.items() if state.moved is not None}
        return max(changes, key=lambda name: changes[name], default=None)


@dataclass(frozen=True, repr=False)
class Run:
    """The files of a run.

    Attributes:
        files: in the order of the run.
        ordered_by: what that order is known from: ``epoch``, ``step`` or ``iteration``, which all files say, or
            ``name``, with numbers in names as numbers.
    """

    files: tuple[FileSummary, ...]
    ordered_by: str

    _repr_html_ = html_repr

    def __repr__(self) -> str:
        inner = "".join(f"\n  {file!r}" for file in self.files[:_SHOWN])
        more = f"\n  and {len(self.files) - _SHOWN} more" if len(self.files) > _SHOWN else ""
        return f"<Run of {len(self.files)} files by {self.ordered_by}{inner}{more}>"

    def count(self) -> dict[str, int]:
        """How many files have each verdict, the worst first; ``failed`` counts those that could not be inspected."""
        counts = Counter("failed" if f.verdict is None else f.verdict.health.value for f in self.files)
        order = ("failed", *(h.value for h in (Health.SICK, Health.SUSPICIOUS, Health.NOT_JUDGED)), *counts)
        return {name: counts[name] for name in dict.fromkeys(order) if counts[name]}

    def find_broken(self) -> int | None:
        """Where in ``files`` something broke: at the first that is sick; else the first suspicious one after a better.

        None where nothing did: a run may be suspicious from its first file on, which has seen few batches.
        """
        ranks = [None if f.verdict is None else _RANKS.get(f.verdict.health, 0) for f in self.files]
        worst = max((rank for rank in ranks if rank is not None), default=0)
        for at, rank in enumerate(ranks):
            before = next((other for other in reversed(ranks[:at]) if other is not None), None)
            if worst and rank == worst and (worst == _RANKS[Health.SICK] or (before is not None and before < worst)):
                return at
        return None

    def list_moved(self, count: int) -> list[str]:
        """The layers whose statistics changed most from one file to the next, the one that moved most first."""
        largest: dict[str, float] = {}
        for file in self.files:
            for name, state in file.layers.items():
                if state.moved is not None and state.moved > largest.get(name, 0.0):
                    largest[name] = state.moved
        return sorted(largest, key=lambda name: -largest[name])[:count]


OnFile = Callable[[str, Inspection], None]
Statistics = dict[str, tuple[Sequence[float], Sequence[float], float]]  # running_mean, running_var, eps by layer


def inspect_run(paths: Sequence[str | os.PathLike[str]], *, on_file: OnFile | None = None, **options: Any) -> Run:
    """Look at files of one model as a run; what ``bntool inspect`` does with several files.

    A file is forgotten when the next one was compared with it: what is kept of each is its summary.

    Example:
        >>> run = bntool.inspect_run(Path("run").glob("epoch_*.pt"))
        >>> run.files[run.find_broken()].path
        'run/epoch_17.pt'

    Args:
        paths: checkpoint files.
        on_file: is called with each path and what was found there, in the order of names.
        options: of :func:`bntool.inspect`. A file that cannot be inspected has the error in its summary.
    """
    named = sorted(map(as_location, paths), key=lambda location: _split_numbers(str(location)))
    files = _follow(named, on_file, options)
    ordered, ordered_by = _order(files)
    if ordered != files:  # names do not say the order: what changed is measured again
        places = {id(file): location for file, location in zip(files, named, strict=True)}
        ordered = _follow([places[id(file)] for file in ordered], None, options)
    return Run(tuple(ordered), ordered_by)


def _split_numbers(path: str) -> list[tuple[int, str]]:
    parts = _NUMBER.split(path)
    return [(int(part), "") if at % 2 else (-1, part) for at, part in enumerate(parts)]


def _order(files: Sequence[FileSummary]) -> tuple[list[FileSummary], str]:
    known = [file for file in files if file.error is None]
    for word, then in (("epoch", "step"), ("step", "epoch"), ("iteration", "epoch")):
        if known and all(word in file.progress for file in known):
            place = {id(f): (f.progress[word], f.progress.get(then, -1)) for f in known}
            before = (-1, -1)
            for file in files:  # one that says nothing stays behind the one that its name follows
                before = place.setdefault(id(file), before)
            return sorted(files, key=lambda file: place[id(file)]), word
    return list(files), "name"


def _follow(locations: Sequence[Location], on_file: OnFile | None, options: Mapping[str, Any]) -> list[FileSummary]:
    summaries: list[FileSummary] = []
    follower = Follower()
    for location in locations:
        path = str(location)
        try:
            inspection = inspect(location, **options)
        except BntoolError as error:
            summaries.append(FileSummary(path, error=error.about(path).with_traceback(None)))
            continue
        summaries.append(follower.summarize(path, inspection))
        if on_file is not None:
            on_file(path, inspection)
    return summaries


class Follower:
    """Summarizes inspections of one model one after another: each beside the one before."""

    def __init__(self) -> None:
        self._before, self._states = Statistics(), dict[str, LayerState]()

    def summarize(self, name: str, inspection: Inspection) -> FileSummary:
        """What is kept of an inspection, with what changed since the last one.

        Args:
            name: of the file, or of the moment.
        """
        layers = next((s.layers for s in inspection.state_dicts if s.chosen), ())
        statistics = {layer.name: found for layer in layers if (found := _read_statistics(layer)) is not None}
        summary = _summarize(name, inspection, layers, self._before, statistics, self._states)
        self._before, self._states = statistics or self._before, dict(summary.layers) or self._states
        return summary


def _read_statistics(layer: LayerInspection) -> tuple[Sequence[float], Sequence[float], float] | None:
    mean, variance = layer.tensors.get("running_mean"), layer.tensors.get("running_var")
    if mean is None or variance is None or len(mean.values) != len(variance.values):
        return None
    return mean.values, variance.values, DEFAULT_EPS if layer.layer.eps is None else layer.layer.eps


def _summarize(
    path: str,
    inspection: Inspection,
    layers: Sequence[LayerInspection],
    before: Statistics,
    statistics: Statistics,
    before_states: Mapping[str, LayerState],
) -> FileSummary:
    states = {
        layer.name: _summarize_layer(layer, before.get(layer.name), statistics.get(layer.name)) for layer in layers
    }
    jumped = {name: state.change for name, state in states.items() if _has_jumped(state, before_states.get(name))}
    findings, verdict = _list_findings(inspection), inspection.verdict
    if jumped:
        findings.append(_describe_jump(jumped))
        findings.sort(key=lambda entry: -entry.finding.severity.rank)
        verdict = _judge_again(verdict, states, jumped)
    return FileSummary(
        path=path,
        progress=find_progress(inspection.checkpoint.entries),
        verdict=verdict,
        findings=tuple(findings),
        layers=states,
    )


def _has_jumped(state: LayerState, before: LayerState | None) -> bool:
    """Whether the variances of a whole layer exploded; the first statistics after the initial ones are no jump."""
    change = state.change
    was_initial = before is not None and before.largest_variance == before.smallest_variance == 1
    return change is not None and change.finite and change.variance_ratio >= JUMP and not was_initial


def _describe_jump(jumped: Mapping[str, StatisticsShift | None]) -> FoundInLayers:
    ratios = {name: change.variance_ratio for name, change in jumped.items() if change is not None}
    worst = max(ratios, key=lambda name: ratios[name])
    finding = Finding(
        FindingCode.STATISTICS_JUMPED,
        Severity.WARNING,
        f"var x {ratios[worst]:.1e}",
        f"running_var of {worst} is {ratios[worst]:.1e} times what it was in the file before, over all its channels",
        {"layer": worst, "ratio": ratios[worst]},
        advice="take the file before, and look at the data and the learning rate between the two",
        layers=tuple(ratios),
    )
    return FoundInLayers(finding, tuple(ratios))


def _judge_again(verdict: Verdict, states: Mapping[str, LayerState], jumped: Mapping[str, object]) -> Verdict:
    """The verdict on a file with what is known from the file before."""
    if verdict.health is Health.SICK:
        return verdict
    more = sum(1 for name in jumped if states[name].worst is not Severity.WARNING)
    count = verdict.suspicious + more
    sentence = f"{count} layer{'s' * (count > 1)} suspicious"
    return verdict._replace(health=Health.SUSPICIOUS, sentence=sentence, suspicious=count)


def _summarize_layer(layer: LayerInspection, before: Any, now: Any) -> LayerState:
    mean, variance = layer.tensors.get("running_mean"), layer.tensors.get("running_var")
    ends = () if mean is None or mean.minimum is None or mean.maximum is None else (-mean.minimum, mean.maximum)
    largest = None if variance is None else variance.maximum
    change = None
    if before is not None and now is not None and len(before[0]) == len(now[0]):
        shift = measure_shift(before[:2], now[:2], old_eps=before[2], new_eps=now[2])
        change = dataclasses.replace(shift, old=None, new=None)  # the numbers of channels are not kept
    return LayerState(
        worst=layer.worst,
        smallest_variance=None if variance is None else variance.minimum,
        largest_variance=largest,
        largest_channel=None if variance is None or largest is None else variance.values.index(largest),
        largest_mean=max(ends, default=None),
        nonfinite=sum(summary.nonfinite for summary in (mean, variance) if summary is not None),
        change=change,
    )


def _list_findings(inspection: Inspection) -> list[FoundInLayers]:
    grouped: dict[tuple[FindingCode, Severity], tuple[Finding, list[str]]] = {}
    own = [*inspection.findings, *(f for s in inspection.state_dicts for f in s.findings)]
    found = [(finding, finding.layers) for finding in own]
    found += [(f, (layer.name,)) for s in inspection.state_dicts for layer in s.layers for f in layer.findings]
    for finding, names in found:
        if finding.severity is not Severity.NOTICE:
            grouped.setdefault((finding.code, finding.severity), (finding, []))[1].extend(names)
    entries = [FoundInLayers(finding, tuple(dict.fromkeys(names))) for finding, names in grouped.values()]
    return sorted(entries, key=lambda entry: -entry.finding.severity.rank)
