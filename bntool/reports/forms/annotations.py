"""Problems as workflow commands of GitHub Actions, which shows them as annotations of the job."""

from __future__ import annotations

from bntool.reports.forms.problems import list_problems
from bntool.reports.report import Report


def draw(report: Report) -> str:
    """Draw one line for each problem: ``::error file=...,title=...::message``.

    As https://docs.github.com/actions/reference/workflow-commands-for-github-actions has it: ``%``, line breaks, and in
    properties ``:`` and ``,`` are escaped.
    """
    lines = [
        f"::{one.severity} file={_escape_property(one.file)},title={_escape_property(f'bntool {one.code}')}::"
        f"{_escape(f'{one.place}: {one.message}' if one.place else one.message)}\n"
        for one in list_problems(report)
    ]
    return "".join(lines)


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape(text).replace(":", "%3A").replace(",", "%2C")
