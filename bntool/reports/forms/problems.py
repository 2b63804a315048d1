"""The problems that inspect and diff find with a file, one by one, read from the data of the JSON document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bntool.comparison.options import Expectation
from bntool.inspection.findings import UNJUDGED, FindingCode
from bntool.reports.report import FileReport, Report, describe_error
from bntool.reports.text import sanitize
from bntool.representation import list_first

_SEVERITIES = ("notice", "warning", "error")
_LISTED = 3  # layers of one problem that are named
_LISTED_CHANNELS = 8
_UNJUDGED = {code.value for code in UNJUDGED}
EXPECTATION = "expectation"  # the code of what diff --expect finds changed


class Problem(NamedTuple):
    """A finding, a part of an expectation that is not met, or a file that could not be read.

    Attributes:
        file: as it was given.
        code: of the finding or error.
        severity: ``notice``, ``warning`` or ``error``.
        message: a sentence, and what to do where that is known.
        layer: its name, with the key of its state dict where the file has several; "" for the file as a whole.
        channels: that it concerns; empty for all or none.
        is_failure: the file could not be looked at at all.
    """

    file: str
    code: str
    severity: str
    message: str
    layer: str = ""
    channels: tuple[int, ...] = ()
    is_failure: bool = False

    @property
    def place(self) -> str:
        """Layer and channels in a few words; "" for the file."""
        if not self.channels:
            return self.layer
        shown = list_first(list(map(str, self.channels)), _LISTED_CHANNELS)
        return f"{self.layer}, channel{'s' * (len(self.channels) > 1)} {shown}".lstrip(", ")

    def reaches(self, severity: str) -> bool:
        """Return whether a gate that fails on this severity fails by it: what could not be judged does at any."""
        return self.code in _UNJUDGED or _SEVERITIES.index(self.severity) >= _SEVERITIES.index(severity)

    @property
    def sentence(self) -> str:
        """All of it but the file."""
        return f"{f'{self.place}: ' if self.place else ''}{self.code}: {self.message}"


def list_problems(report: Report) -> list[Problem]:
    """List all problems of all files, in the order of the files, then those that only the files together show."""
    return [*(problem for file in report.files for problem in list_problems_of(file)), *list_jumps(report)]


def list_problems_of(file: FileReport) -> Iterator[Problem]:
    """Yield the problems of one file: those of the file first, then those of its state dicts and layers."""
    if file.error is not None:
        error = describe_error(file.error)
        message = _add_advice(error["message"], error.get("remedy", ""))
        yield Problem(
            file.path, error["code"], "error", _safe(message), _safe(error.get("tensor", "")), is_failure=True
        )
    for finding in file.facts.get("findings", ()):
        yield _read(file.path, finding, "")
    state_dicts = file.facts.get("state_dicts", ())
    for state_dict in state_dicts:
        if not isinstance(state_dict, Mapping):  # diff names the keys alone
            continue
        where = f"{state_dict['key']}: " if len(state_dicts) > 1 and state_dict["key"] else ""
        for finding in state_dict["findings"]:
            yield _read(file.path, finding, _list_layers(where, finding.get("layers", ())))
        for layer in state_dict["layers"]:
            for finding in layer["findings"]:
                yield _read(file.path, finding, where + layer["name"])
    expected = file.facts.get("expectation") or {}
    for violation in expected.get("violations", ()):
        layer, _, what = violation.partition(": ")
        if not file.facts["layers"] and expected["name"] != Expectation.IDENTICAL.value:  # nothing to compare
            layer, what = "", violation
        message = f"{what}, against --expect {expected['name']}"
        yield Problem(file.facts["other_file"], EXPECTATION, "error", _safe(message), _safe(layer))


def _list_layers(where: str, names: Sequence[str]) -> str:
    return list_first([f"{where}{name}" for name in names], _LISTED)


def list_jumps(report: Report) -> list[Problem]:
    """List what is wrong with files beside those before them, as the data of a run say it."""
    jumps = (report.run or {}).get("jumps", ())
    return [
        Problem(one["file"], FindingCode.STATISTICS_JUMPED.value, "warning", _safe(one["message"]), _safe(layer))
        for one in jumps
        for layer in one["layers"]
    ]


def _read(path: str, finding: Mapping[str, Any], layer: str) -> Problem:
    message = _add_advice(finding["message"], finding.get("advice", ""))
    channels = tuple(finding.get("channels", ()))
    return Problem(path, finding["code"], finding["severity"], _safe(message), _safe(layer), channels)


def _add_advice(message: str, advice: str) -> str:
    return f"{message.rstrip('.')}. To do: {advice}" if advice else message


def _safe(text: str) -> str:
    return sanitize(text, limit=2000)
