"""How near the numbers of sound files come to the thresholds of findings.

The rules themselves say it: with a threshold lowered as far as it goes, the finding of each layer carries the number
that is held against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import bntool
from bntool.inspection.configuration import Configuration
from bntool.inspection.findings import Finding, FindingCode
from bntool.inspection.thresholds import DEFAULTS, ThresholdRule

_LEAST, _MOST = 1e-300, 1e300
# with these every layer has a finding that says its number
_LOWERED = {
    "exploding_scale": _LEAST,
    "outlying_variance": _LEAST,
    "outlying_mean": _LEAST,
    "outlying_bias": _LEAST,
    "outlying_layer_variance": _LEAST,
    "outlying_layer_mean": _LEAST,
    "vanishing_variance": _MOST,
    "variance_jump": _LEAST,
    "average_initial_share": -1.0,
}
SMALLEST = {"vanishing_variance"}  # whose finding is of numbers below it
MEASURED = tuple(_LOWERED)


class Extreme(NamedTuple):
    """The number that comes nearest to a threshold, and the file that has it."""

    value: float
    file: str

    def margin(self, field: str) -> float:
        """How many times farther the threshold is."""
        threshold = float(getattr(DEFAULTS, field))
        if self.value <= 0:
            return math.inf
        return self.value / threshold if field in SMALLEST else threshold / self.value


def measure_extremes(paths: Iterable[Path]) -> dict[str, Extreme]:
    """Measure how near the numbers of files come to each threshold; nothing of those that no file has a number for."""
    configuration = _lower_thresholds()
    extremes: dict[str, Extreme] = {}
    for path in paths:
        try:
            inspection = bntool.inspect(path, configuration=configuration)
        except bntool.BntoolError:
            continue
        for one in inspection.state_dicts:
            found = [*one.findings, *(finding for layer in one.layers for finding in layer.findings)]
            for finding in found:
                _keep(extremes, finding, path.name)
    return extremes


def measure_jumps(paths: Iterable[Path]) -> dict[str, Extreme]:
    """Measure how far variances moved from one file of a training to the next, in the order of their names."""
    extremes: dict[str, Extreme] = {}
    run = bntool.inspect_run(list(paths), configuration=_lower_thresholds())
    for file in run.files:
        for entry in file.findings:
            _keep(extremes, entry.finding, Path(file.path).name)
    return extremes


def merge_extremes(*several: dict[str, Extreme]) -> dict[str, Extreme]:
    """Return the nearest of all."""
    merged: dict[str, Extreme] = {}
    for extremes in several:
        for field, extreme in extremes.items():
            _keep_nearest(merged, field, extreme)
    return merged


def _lower_thresholds() -> Configuration:
    rules = tuple(ThresholdRule(field, value, (), (), "a measurement") for field, value in _LOWERED.items())
    return Configuration(Path("none"), thresholds=rules)


def _keep(extremes: dict[str, Extreme], finding: Finding, file: str) -> None:
    for field, value in _read_numbers(finding):
        _keep_nearest(extremes, field, Extreme(value, file))


def _keep_nearest(extremes: dict[str, Extreme], field: str, extreme: Extreme) -> None:
    known = extremes.get(field)
    nearer = known is None or (extreme.value < known.value) is (field in SMALLEST)
    if nearer and extreme != known:
        extremes[field] = extreme


def _read_numbers(finding: Finding) -> Iterator[tuple[str, float]]:
    """Yield the threshold that a finding is held against, and its number."""
    facts = finding.facts or {}
    of_channels = bool(finding.channels)
    if finding.code is FindingCode.OUTLYING_VARIANCE:
        yield "outlying_variance" if of_channels else "outlying_layer_variance", facts["ratio"]
    elif finding.code is FindingCode.OUTLYING_MEAN:
        yield ("outlying_mean", facts["ratio"]) if of_channels else ("outlying_layer_mean", facts["sigmas"])
    elif finding.code is FindingCode.OUTLYING_BIAS:
        yield "outlying_bias", facts["ratio"]
    elif finding.code is FindingCode.EXPLODING_SCALE:
        yield "exploding_scale", facts["largest"]
    elif finding.code is FindingCode.ZERO_VARIANCE and "smallest" in facts:
        yield "vanishing_variance", facts["smallest"]
    elif finding.code is FindingCode.STATISTICS_JUMPED:
        yield "variance_jump", facts["ratio"]
    elif finding.code is FindingCode.EMA_STATISTICS_LAG:
        yield "average_initial_share", facts["initial_share"]
