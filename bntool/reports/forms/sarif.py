"""Problems as SARIF 2.1.0, which code scanning of GitHub and other services takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bntool.reports.forms.problems import Problem, list_problems
from bntool.reports.report import Report
from bntool.version import __version__

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {"error": "error", "warning": "warning", "notice": "note"}


def draw(report: Report) -> str:
    """Draw a log with one run: a rule for each code that occurs, a result for each problem.

    A checkpoint has no lines: the location of a result is the file, and the layer as its logical location.
    """
    problems = list_problems(report)
    codes = sorted({one.code for one in problems})
    rules = [
        {"id": code, "shortDescription": {"text": code.replace("-", " ")}, "help": {"text": f"bntool explain {code}"}}
        for code in codes
    ]
    run = {
        "tool": {"driver": {"name": "bntool", "version": __version__, "rules": rules}},
        "invocations": [
            {
                "executionSuccessful": not any(one.is_failure for one in problems),
                "toolExecutionNotifications": [
                    {"level": "error", "message": {"text": one.message}, "locations": [_locate(one)]}
                    for one in problems
                    if one.is_failure
                ],
            }
        ],
        "results": [
            {
                "ruleId": one.code,
                "ruleIndex": codes.index(one.code),
                "level": _LEVELS[one.severity],
                "message": {"text": f"{one.place}: {one.message}" if one.place else one.message},
                "locations": [_locate(one)],
            }
            for one in problems
        ],
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _locate(problem: Problem) -> dict[str, Any]:
    path = Path(problem.file)
    uri = path.as_uri() if path.is_absolute() else quote(path.as_posix())
    # code scanning of GitHub asks for a line, which a checkpoint does not have
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}}
    if problem.layer:
        location["logicalLocations"] = [{"fullyQualifiedName": problem.layer, "kind": "module"}]
    return location
