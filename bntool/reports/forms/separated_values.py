"""A report as CSV: a row for each layer, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from bntool.reports.report import FileReport, Report, describe_error
from bntool.reports.text import sanitize

# command -> the lists of its facts that are rows; what a row is of is told by the column "list" where there are several
_LISTS = {
    "inspect": ("layers",),
    "diff": ("layers",),
    "recalibrate": ("layers", "skips"),
    "freeze": ("layers", "steps", "skips"),
    "fold": ("folds", "skips"),
    "convert": ("layers", "steps", "skips", "kept", "losses"),
    "explain": ("explanations",),
    "average": ("sources", "steps"),
}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


def draw(report: Report) -> str:
    """Draw a header and rows as RFC 4180 has them; all rows have the columns that any of them has."""
    rows = [row for file in report.files for row in _list_rows(report.command, file)]
    columns = dict.fromkeys(["file", *(name for row in rows for name in row)])
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(columns), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({name: _guard(value) for name, value in row.items()} for row in rows)
    return stream.getvalue()


def _list_rows(command: str, file: FileReport) -> Iterator[dict[str, Any]]:
    if file.error is not None:
        yield {"file": file.path, "error": describe_error(file.error)["message"]}
    lists = _LISTS.get(command, ("layers",))
    for place, facts in _find_places(file.facts):
        for name in lists:
            found = facts.get(name) or ()
            for item in found:
                row = item if isinstance(item, Mapping) else {"name": item}
                kind = {"list": name} if len(lists) > 1 else {}
                yield {"file": file.path, **place, **kind, **_flatten(row)}


def _find_places(facts: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Yield the facts themselves, or those of each state dict, with what tells them apart."""
    state_dicts = [one for one in facts.get("state_dicts", ()) if isinstance(one, Mapping)]
    if not state_dicts:
        yield {}, facts
    for one in state_dicts:
        yield {"state_dict": one["key"]}, one


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten data to names with dots for what lies deeper; of findings to their codes, of other lists to their
    items.
    """
    row: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            row.update(_flatten(value, f"{prefix}{name}."))
        elif isinstance(value, list | tuple):
            row[prefix + name] = " ".join(
                str(one.get("code", one)) if isinstance(one, Mapping) else str(one) for one in value
            )
        else:
            row[prefix + name] = value
    return row


def _guard(value: Any) -> Any:
    """Give text that a spreadsheet would take for a formula an apostrophe, which shows it as text."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    shown = sanitize(value, limit=None)
    return f"'{shown}" if value.startswith(_FORMULA) else shown
