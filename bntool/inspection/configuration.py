"""The configuration of a project: what fails a gate, which findings are meant to be so, and thresholds of its own."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bntool.checkpoints.addresses import Location
from bntool.errors import UsageError
from bntool.inspection.findings import Finding, FindingCode, IgnoredFinding, Severity
from bntool.inspection.results import StateDictInspection
from bntool.inspection.thresholds import OF_FILES, ThresholdRule, Thresholds, matches

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SHARED_FILE = "pyproject.toml"  # which has a table for bntool


class IgnoreRule(NamedTuple):
    """Findings that are meant to be so.

    Attributes:
        findings: their codes.
        layers, files: globs of layer names and of paths; empty for all.
        reason: why; it is shown beside each of them.
    """

    findings: tuple[FindingCode, ...]
    layers: tuple[str, ...]
    files: tuple[str, ...]
    reason: str

    def takes(self, finding: Finding, layer: str) -> bool:
        names = [layer] if layer else list(finding.layers)
        wanted = not self.layers or (bool(names) and all(matches(self.layers, name) for name in names))
        return finding.code in self.findings and wanted


@dataclass(frozen=True)
class Configuration:
    """The configuration that a file holds.

    Attributes:
        path: of the file.
        fail_on: the severity that fails, where the command line says none.
        rules: in the order of the file; the first that takes a finding gives the reason.
        thresholds: in the order of the file; the last that fits counts.
    """

    path: Path
    fail_on: Severity | None = None
    rules: tuple[IgnoreRule, ...] = ()
    thresholds: tuple[ThresholdRule, ...] = ()

    def find_thresholds(self, path: Location) -> tuple[ThresholdRule, ...]:
        """Find the thresholds that it sets for a file."""
        return tuple(rule for rule in self.thresholds if _fits(rule, path))

    def ignores_jump(self, path: Location, layer: str) -> bool:
        """Return whether it is meant to be so that the variances of a layer exploded against the file before."""
        code = FindingCode.STATISTICS_JUMPED
        found = [rule for rule in self.rules if code in rule.findings and _fits(rule, path)]
        return any(not rule.layers or matches(rule.layers, layer) for rule in found)

    def find_idle_globs(self, path: Location, inspections: Sequence[StateDictInspection]) -> tuple[str, ...]:
        """Find globs that select no layer of a file, of rules for findings that it still has: names may have changed.

        Args:
            inspections: its state dicts, without what is ignored.
        """
        names = [name for one in inspections for name in one.names]
        left = {finding.code for one in inspections for layer in one.layers for finding in layer.findings}
        left |= {finding.code for one in inspections for finding in one.findings}
        rules = [rule for rule in self.rules if _fits(rule, path) and left.intersection(rule.findings)]
        globs = dict.fromkeys(glob for rule in rules for glob in rule.layers)
        return tuple(glob for glob in globs if not any(matches((glob,), name) for name in names))

    def ignore(
        self, path: Location, inspections: Sequence[StateDictInspection], findings: Sequence[Finding]
    ) -> tuple[list[StateDictInspection], tuple[Finding, ...], tuple[IgnoredFinding, ...]]:
        """Take out the findings of a file that are meant to be so.

        What may be a BatchNorm and was not understood cannot be ignored: nothing is known of it.

        Returns:
            The state dicts and the findings of the file without them, and what was taken out.
        """
        rules = [rule for rule in self.rules if _fits(rule, path)]
        ignored: list[IgnoredFinding] = []

        def keep(found: Sequence[Finding], layer: str = "") -> tuple[Finding, ...]:
            kept = []
            for finding in found:
                rule = next((rule for rule in rules if rule.takes(finding, layer)), None)
                if rule is None:
                    kept.append(finding)
                else:
                    ignored.append(IgnoredFinding(layer, finding, rule.reason))
            return tuple(kept)

        if not rules:
            return list(inspections), tuple(findings), ()
        left = [
            replace(
                one,
                findings=keep(one.findings),
                layers=tuple(replace(layer, findings=keep(layer.findings, layer.name)) for layer in one.layers),
            )
            for one in inspections
        ]
        return left, keep(findings), tuple(ignored)


def _fits(rule: IgnoreRule | ThresholdRule, path: Location) -> bool:
    written = path.as_posix() if isinstance(path, Path) else str(path)
    return not rule.files or matches(rule.files, written, path.name)


def read_configuration(path: Path) -> Configuration:
    """Read a ``bntool.toml``, or the table ``tool.bntool`` of a ``pyproject.toml``.

    Raises:
        UsageError: it cannot be read, or says what cannot be understood.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"this configuration cannot be read: {error.strerror}", path=path) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"this configuration cannot be read: {error}", path=path) from error
    table = document.get("tool", {}).get("bntool", {}) if path.name == _SHARED_FILE else document
    try:
        if "tool" in table and path.name != _SHARED_FILE:
            raise UsageError(
                f"the table tool.bntool is for {_SHARED_FILE}; here its keys stand alone, as in [[ignore]]"
            )
        _check_keys(table, ("fail-on", "ignore", "threshold"), "")
        rules = tuple(map(_read_rule, _list_tables(table, "ignore")))
        thresholds = tuple(map(_read_threshold, _list_tables(table, "threshold")))
        return Configuration(path, _read_severity(table.get("fail-on")), rules, thresholds)
    except UsageError as error:
        raise error.about(path) from None
    except (AttributeError, TypeError) as error:
        what = "fail-on, [[ignore]] with findings, and [[threshold]] with name and value; layers, files, reason"
        raise UsageError(f"this configuration is not built as it should be: {what}", path=path) from error


def _list_tables(table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UsageError(f"{key} is a list of tables: write [[{key}]], with two brackets, above each")
    return found


def _read_severity(value: Any) -> Severity | None:
    known = {severity.value: severity for severity in Severity}
    if value is not None and value not in known:
        raise UsageError(f"fail-on = {value!r} is none of {', '.join(known)}")
    return known.get(value)


def _read_rule(table: Mapping[str, Any]) -> IgnoreRule:
    _check_keys(table, ("findings", "layers", "files", "reason"), " of [[ignore]]")
    reason, codes = _read_reason(table, "[[ignore]]"), _read_texts(table, "findings")
    if not codes:
        raise UsageError('each [[ignore]] says which findings: findings = ["..."]')
    known = {code.value: code for code in FindingCode if code is not FindingCode.NOT_UNDERSTOOD}
    for code in codes:
        if code not in known:
            raise UsageError(_suggest(code, list(known), "no finding that can be ignored"))
    found = tuple(known[code] for code in codes)
    return IgnoreRule(found, _read_texts(table, "layers"), _read_texts(table, "files"), reason)


def _read_threshold(table: Mapping[str, Any]) -> ThresholdRule:
    _check_keys(table, ("name", "value", "layers", "files", "reason"), " of [[threshold]]")
    reason, name, value = _read_reason(table, "[[threshold]]"), table.get("name"), table.get("value")
    known = {field.replace("_", "-"): field for field in Thresholds._fields}
    if not isinstance(name, str):
        raise UsageError(f'each [[threshold]] says which: name = "..." of {", ".join(known)}')
    if name not in known:
        raise UsageError(_suggest(name, list(known), "no threshold"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"value = {value!r} of {name} is no positive number")
    layers = _read_texts(table, "layers")
    if layers and known[name] in OF_FILES:
        raise UsageError(f"{name} is of a file, not of its layers: leave layers out")
    return ThresholdRule(known[name], value, layers, _read_texts(table, "files"), reason)


def _read_reason(table: Mapping[str, Any], kind: str) -> str:
    reason = table.get("reason")
    if not isinstance(reason, str) or not reason.strip():
        raise UsageError(f'each {kind} says why: reason = "..."')
    return reason.strip()


def _read_texts(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = table.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UsageError(f'{key} is a list of texts: {key} = ["..."]')
    return tuple(values)


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise UsageError(_suggest(key, known, f"no key{where}"))


def _suggest(word: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{word!r} is {what}{hint} There are: {', '.join(known)}"
