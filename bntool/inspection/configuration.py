"""What a project says of its files: the severity that fails a gate, and findings that are meant to be so."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from bntool.checkpoints.addresses import Location
from bntool.errors import UsageError
from bntool.inspection.findings import Finding, FindingCode, IgnoredFinding, Severity
from bntool.inspection.results import StateDictInspection

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
        wanted = not self.layers or (bool(names) and all(_matches(self.layers, name) for name in names))
        return finding.code in self.findings and wanted


@dataclass(frozen=True)
class Configuration:
    """What a file says.

    Attributes:
        path: of the file.
        fail_on: the severity that fails, where the command line says none.
        rules: in the order of the file; the first that takes a finding gives the reason.
    """

    path: Path
    fail_on: Severity | None = None
    rules: tuple[IgnoreRule, ...] = ()

    def ignore(
        self, path: Location, inspections: Sequence[StateDictInspection], findings: Sequence[Finding]
    ) -> tuple[list[StateDictInspection], tuple[Finding, ...], tuple[IgnoredFinding, ...]]:
        """Take out the findings of a file that are meant to be so.

        What may be a BatchNorm and was not understood cannot be ignored: nothing is known of it.

        Returns:
            The state dicts and the findings of the file without them, and what was taken out.
        """
        written = path.as_posix() if isinstance(path, Path) else str(path)
        rules = [rule for rule in self.rules if not rule.files or _matches(rule.files, written, path.name)]
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


def _matches(globs: Sequence[str], *names: str) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def read_configuration(path: Path) -> Configuration:
    """What a ``bntool.toml`` says, or the table ``tool.bntool`` of a ``pyproject.toml``.

    Raises:
        UsageError: it cannot be read, or says what cannot be understood.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"this configuration cannot be read: {error}", path=path) from error
    table = document.get("tool", {}).get("bntool", {}) if path.name == _SHARED_FILE else document
    try:
        _check_keys(table, ("fail-on", "ignore"), "")
        rules = tuple(map(_read_rule, table.get("ignore", [])))
        return Configuration(path, _read_severity(table.get("fail-on")), rules)
    except UsageError as error:
        raise error.about(path) from None
    except (AttributeError, TypeError) as error:
        what = "fail-on, and [[ignore]] with findings, layers, files and reason"
        raise UsageError(f"this configuration is not built as it should be: {what}", path=path) from error


def _read_severity(value: Any) -> Severity | None:
    known = {severity.value: severity for severity in Severity}
    if value is not None and value not in known:
        raise UsageError(f"fail-on = {value!r} is none of {', '.join(known)}")
    return known.get(value)


def _read_rule(table: Mapping[str, Any]) -> IgnoreRule:
    _check_keys(table, ("findings", "layers", "files", "reason"), " of [[ignore]]")
    reason, codes = table.get("reason"), _read_texts(table, "findings")
    if not isinstance(reason, str) or not reason.strip():
        raise UsageError('each [[ignore]] says why: reason = "..."')
    if not codes:
        raise UsageError('each [[ignore]] says which findings: findings = ["..."]')
    known = {code.value: code for code in FindingCode if code is not FindingCode.NOT_UNDERSTOOD}
    for code in codes:
        if code not in known:
            raise UsageError(_suggest(code, list(known), "no finding that can be ignored"))
    found = tuple(known[code] for code in codes)
    return IgnoreRule(found, _read_texts(table, "layers"), _read_texts(table, "files"), reason.strip())


def _read_texts(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = table.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UsageError(f"{key} is a list of texts")
    return tuple(values)


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise UsageError(_suggest(key, known, f"no key{where}"))


def _suggest(word: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"{word!r} is {what}{f'; did you mean {near[0]!r}?' if near else ''}"
