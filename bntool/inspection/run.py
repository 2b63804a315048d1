"""The files of one run, one after another: a summary of each, and what changed from one to the next."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from bntool.batchnorm import DEFAULT_EPS
from bntool.checkpoints.addresses import Location, as_location, split_numbers
from bntool.checkpoints.origin import find_progress
from bntool.errors import BntoolError
from bntool.inspection.checkpoint import inspect
from bntool.inspection.findings import Finding, FindingCode, Severity
from bntool.inspection.judging import add_configured
from bntool.inspection.results import Inspection, LayerInspection
from bntool.inspection.thresholds import combine
from bntool.inspection.verdict import Health, Verdict
from bntool.representation import format_number, html_repr
from bntool.verification.statistics_shift import StatisticsShift, WorstShift, measure_shift, measure_worst_shift

if TYPE_CHECKING:
    from bntool.inspection.configuration import Configuration

_SHOWN = 6  # files, in a repr
_RANKS = {Health.SUSPICIOUS: 1, Health.SICK: 2}


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
    change: WorstShift | None = None

    @property
    def moved(self) -> float | None:
        """The distance that the channel moved which moved most: in sigmas, or the log of its ratio of variances."""
        return None if self.change is None else self.change.severity


@dataclass(frozen=True)
class FoundInLayers:
    """A finding above a notice, and all layers of a file that have one of its code, severity and advice.

    Attributes:
        finding: that of the first of them, or of the file.
        layers: their names; empty where it concerns the file as a whole.
    """

    finding: Finding
    layers: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class FileSummary:
    """The facts that are kept of one file.

    Attributes:
        path: as it was given.
        progress: what the file says of how far the training was: ``epoch``, ``step`` or ``iteration``.
        verdict: None where the file could not be inspected.
        error: why it could not be; None where it was.
        findings: above a notice, worst first.
        layers: those of the state dict that commands take unless told otherwise, by name.
        moved_most: the layer whose statistics changed most against the file before; None where none can be compared.
        change: how far they changed.
    """

    path: str
    progress: Mapping[str, int] = field(default_factory=dict)
    verdict: Verdict | None = None
    error: BntoolError | None = None
    findings: tuple[FoundInLayers, ...] = ()
    layers: Mapping[str, LayerState] = field(default_factory=dict)
    moved_most: str | None = None
    change: StatisticsShift | None = None

    def __repr__(self) -> str:
        said = self.verdict.sentence if self.verdict is not None else f"{self.error}"
        return f"<{self.path}: {said}>"


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
        """Count the files of each verdict, the worst first; ``failed`` counts those that could not be inspected."""
        counts = Counter("failed" if f.verdict is None else f.verdict.health.value for f in self.files)
        order = ("failed", *(h.value for h in (Health.SICK, Health.SUSPICIOUS, Health.NOT_JUDGED)), *counts)
        return {name: counts[name] for name in dict.fromkeys(order) if counts[name]}

    def find_broken(self) -> int | None:
        """Find where in ``files`` something broke: at the first that is sick; else the first suspicious one after a
        better.

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
        """Return the layers whose statistics changed most from one file to the next, the one that moved most first."""
        largest: dict[str, float] = {}
        for file in self.files:
            for name, state in file.layers.items():
                if state.moved is not None and state.moved > largest.get(name, 0.0):
                    largest[name] = state.moved
        return sorted(largest, key=lambda name: -largest[name])[:count]


OnFile = Callable[[str, Inspection], None]


class _Statistics(NamedTuple):
    """The statistics of one layer in one file.

    Attributes:
        sums: of variance and eps.
        usable: all are finite, and the sums positive.
    """

    mean: Sequence[float]
    variance: Sequence[float]
    eps: float
    sums: Sequence[float]
    usable: bool

    def measure_worst_shift(self, before: _Statistics) -> WorstShift:
        old, new = (before.mean, before.sums), (self.mean, self.sums)
        return measure_worst_shift(old, new, usable=before.usable and self.usable)

    def measure_shift(self, before: _Statistics) -> StatisticsShift:
        old, new = (before.mean, before.variance), (self.mean, self.variance)
        shift = measure_shift(old, new, old_eps=before.eps, new_eps=self.eps)
        return dataclasses.replace(shift, old=None, new=None)  # the numbers of channels are not kept


_ByLayer = dict[str, _Statistics]


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
    named = sorted(map(as_location, paths), key=lambda location: split_numbers(str(location)))
    files = _follow(named, on_file, options)
    ordered, ordered_by = _order(files)
    if ordered != files:  # names do not say the order: what changed is measured again
        places = {id(file): location for file, location in zip(files, named, strict=True)}
        ordered = _follow([places[id(file)] for file in ordered], None, options)
    return Run(tuple(ordered), ordered_by)


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
    follower = Follower(options.get("configuration"))
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
    """Summarizes inspections of one model one after another: each beside the one before.

    Args:
        configuration: the thresholds and what is meant to be so between files, too.
    """

    def __init__(self, configuration: Configuration | None = None) -> None:
        self._configuration = configuration
        self._before, self._states = _ByLayer(), dict[str, LayerState]()

    def summarize(self, name: str, inspection: Inspection) -> FileSummary:
        """Keep what is needed of an inspection, with what changed since the last one.

        Args:
            name: of the file, or of the moment.
        """
        layers = next((s.layers for s in inspection.state_dicts if s.chosen), ())
        statistics = {layer.name: found for layer in layers if (found := _read_statistics(layer)) is not None}
        summary = _summarize(name, inspection, layers, self._before, statistics)
        summary = _add_jumps(summary, inspection, (self._before, statistics), self._states, self._configuration)
        self._before, self._states = statistics or self._before, dict(summary.layers) or self._states
        return summary


def _read_statistics(layer: LayerInspection) -> _Statistics | None:
    mean, variance = layer.tensors.get("running_mean"), layer.tensors.get("running_var")
    if mean is None or variance is None or len(mean.values) != len(variance.values):
        return None
    eps = DEFAULT_EPS if layer.layer.eps is None else layer.layer.eps
    finite = not mean.nonfinite and not variance.nonfinite
    usable = finite and variance.minimum is not None and variance.minimum + eps > 0
    return _Statistics(mean.values, variance.values, eps, [value + eps for value in variance.values], usable)


def _summarize(
    path: str, inspection: Inspection, layers: Sequence[LayerInspection], before: _ByLayer, statistics: _ByLayer
) -> FileSummary:
    states = {
        layer.name: _summarize_layer(layer, before.get(layer.name), statistics.get(layer.name)) for layer in layers
    }
    moved = {name: state.moved for name, state in states.items() if state.moved is not None}
    most = max(moved, key=lambda name: moved[name], default=None)
    return FileSummary(
        path=path,
        progress=find_progress(inspection.checkpoint.entries),
        verdict=inspection.verdict,
        findings=tuple(_list_findings(inspection)),
        layers=states,
        moved_most=most,
        change=None if most is None else statistics[most].measure_shift(before[most]),
    )


def _add_jumps(
    summary: FileSummary,
    inspection: Inspection,
    statistics: tuple[_ByLayer, _ByLayer],
    before_states: Mapping[str, LayerState],
    configuration: Configuration | None,
) -> FileSummary:
    """Return the summary, with layers whose variances exploded against the file before.

    Args:
        statistics: of the file before, and of this one.
        before_states: of the file before.
    """
    before, now = statistics
    thresholds_of = combine(inspection.thresholds)
    jumped: dict[str, float] = {}
    for name, state in summary.layers.items():
        threshold = thresholds_of(name).variance_jump
        if _may_have_jumped(state, before_states.get(name), threshold):
            ratio = now[name].measure_shift(before[name]).variance_ratio
            if ratio >= threshold:
                jumped[name] = ratio
    if not jumped:
        return summary
    path, verdict, findings = inspection.checkpoint.path, inspection.verdict, list(summary.findings)
    meant = [name for name in jumped if configuration is not None and configuration.ignores_jump(path, name)]
    left = {name: ratio for name, ratio in jumped.items() if name not in meant}
    if left:
        findings.append(_describe_jump(left))
        findings.sort(key=lambda entry: -entry.finding.severity.rank)
        verdict = _judge_again(inspection, summary.layers, left)
    if meant:
        count = f"{len(meant)} jump{'s' * (len(meant) > 1)} ignored"
        verdict = verdict._replace(sentence=f"{verdict.sentence}, {count}")
    return dataclasses.replace(summary, verdict=verdict, findings=tuple(findings))


def _may_have_jumped(state: LayerState, before: LayerState | None, threshold: float) -> bool:
    """Return whether the variances of a whole layer can have exploded, as the worst channel says.

    The first statistics after the initial ones are no jump.
    """
    change = state.change
    was_initial = before is not None and before.largest_variance == before.smallest_variance == 1
    if change is None or not change.finite or was_initial:
        return False
    return max(change.worst_variance_ratio, 1 / change.worst_variance_ratio) >= threshold


def _describe_jump(ratios: Mapping[str, float]) -> FoundInLayers:
    worst = max(ratios, key=lambda name: ratios[name])
    finding = Finding(
        FindingCode.STATISTICS_JUMPED,
        Severity.WARNING,
        f"var x {format_number(ratios[worst], 2)}",
        f"running_var of {worst} is {format_number(ratios[worst], 2)} times what it was in the file before, over "
        "all its channels",
        {"layer": worst, "ratio": ratios[worst]},
        advice="take the file before, and look at the data and the learning rate between the two",
        layers=tuple(ratios),
    )
    return FoundInLayers(finding, tuple(ratios))


def _judge_again(inspection: Inspection, states: Mapping[str, LayerState], jumped: Mapping[str, object]) -> Verdict:
    """Return the verdict on a file with what is known from the file before."""
    verdict = inspection.verdict
    if verdict.health is Health.SICK:
        return verdict
    more = sum(1 for name in jumped if states[name].worst is not Severity.WARNING)
    count = verdict.suspicious + more
    sentence = f"{count} layer{'s' * (count > 1)} suspicious"
    verdict = verdict._replace(health=Health.SUSPICIOUS, sentence=sentence, suspicious=count)
    return add_configured(verdict, ignored=len(inspection.ignored), thresholds=len(inspection.thresholds))


def _summarize_layer(layer: LayerInspection, before: _Statistics | None, now: _Statistics | None) -> LayerState:
    mean, variance = layer.tensors.get("running_mean"), layer.tensors.get("running_var")
    ends = () if mean is None or mean.minimum is None or mean.maximum is None else (-mean.minimum, mean.maximum)
    largest = None if variance is None else variance.maximum
    change = None
    if before is not None and now is not None and len(before.mean) == len(now.mean):
        change = now.measure_worst_shift(before)
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
    grouped: dict[tuple[FindingCode, Severity, str], tuple[Finding, list[str]]] = {}
    own = [*inspection.findings, *(f for s in inspection.state_dicts for f in s.findings)]
    found = [(finding, finding.layers) for finding in own]
    found += [(f, (layer.name,)) for s in inspection.state_dicts for layer in s.layers for f in layer.findings]
    for finding, names in found:
        if finding.severity is not Severity.NOTICE:
            grouped.setdefault((finding.code, finding.severity, finding.advice), (finding, []))[1].extend(names)
    entries = [FoundInLayers(finding, tuple(dict.fromkeys(names))) for finding, names in grouped.values()]
    return sorted(entries, key=lambda entry: -entry.finding.severity.rank)
