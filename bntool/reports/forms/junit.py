"""Problems as a JUnit report, which CI servers show as tests: a suite for each file, a case for each layer."""

from __future__ import annotations

from collections.abc import Iterable
from xml.etree import ElementTree as ET

from bntool.reports.forms.problems import Problem, list_jumps, list_problems_of
from bntool.reports.report import FileReport, Report
from bntool.reports.text import sanitize

_THE_FILE = "(file)"


def draw(report: Report) -> str:
    """Draw XML: what fails the gate is a failure, an unreadable file an error; the rest is printed with passing
    cases.
    """
    root = ET.Element("testsuites", name=f"bntool {report.command}")
    jumps = list_jumps(report)
    for file in report.files:
        problems = [*list_problems_of(file), *(one for one in jumps if one.file == file.path)]
        _add_suite(root, file, problems, fail_on=report.fail_on)
    for attribute in ("tests", "failures", "errors"):
        root.set(attribute, str(sum(int(suite.get(attribute, "0")) for suite in root)))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _add_suite(root: ET.Element, file: FileReport, found: Iterable[Problem], *, fail_on: str) -> None:
    path = sanitize(file.path, limit=None)
    suite = ET.SubElement(root, "testsuite", name=path)
    cases: dict[str, list[Problem]] = {_THE_FILE: [], **{name: [] for name in _list_layers(file)}}
    for problem in found:
        cases.setdefault(problem.layer or _THE_FILE, []).append(problem)
    failures = errors = 0
    for name, problems in cases.items():
        case = ET.SubElement(suite, "testcase", classname=path, name=sanitize(name, limit=None))
        worst = [one for one in problems if one.reaches(fail_on)]
        if worst:
            kind = "error" if worst[0].is_failure else "failure"
            failures, errors = failures + (kind == "failure"), errors + (kind == "error")
            ET.SubElement(case, kind, message=worst[0].sentence, type=worst[0].code).text = _lines(worst)
        rest = [one for one in problems if not one.reaches(fail_on)]
        if rest:
            ET.SubElement(case, "system-out").text = _lines(rest)
    suite.attrib.update(tests=str(len(cases)), failures=str(failures), errors=str(errors))


def _list_layers(file: FileReport) -> list[str]:
    state_dicts = [one for one in file.facts.get("state_dicts", ()) if not isinstance(one, str)]
    several = len(state_dicts) > 1
    return [
        f"{one['key']}: {layer['name']}" if several and one["key"] else layer["name"]
        for one in state_dicts
        for layer in one["layers"]
    ]


def _lines(problems: Iterable[Problem]) -> str:
    return "\n".join(one.sentence for one in problems)
