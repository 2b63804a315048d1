"""The forms of a report for programs; each is drawn by a module of its own, imported when it is asked for."""

from __future__ import annotations

import importlib
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bntool.reports.report import Report


class ReportForm(Enum):
    """The forms of ``--report``. Those of problems are of commands that judge: inspect and diff."""

    JSON = "json"
    MARKDOWN = "markdown"
    CSV = "csv"
    GITHUB = "github"
    SARIF = "sarif"
    JUNIT = "junit"

    @property
    def lists_problems(self) -> bool:
        """Whether it shows findings and expectations that are not met, and nothing else."""
        return self in (ReportForm.GITHUB, ReportForm.SARIF, ReportForm.JUNIT)

    @property
    def takes_blocks(self) -> bool:
        """Whether it shows what people are shown, else the data of ``--json``."""
        return self is ReportForm.MARKDOWN


_DRAWN_BY = {
    ReportForm.MARKDOWN: "markdown",
    ReportForm.CSV: "separated_values",
    ReportForm.GITHUB: "annotations",
    ReportForm.SARIF: "sarif",
    ReportForm.JUNIT: "junit",
}


def draw(report: Report, form: ReportForm) -> Iterator[str]:
    """Draw a report in a form, piece by piece, with a newline at its end; "" where the form has nothing to show."""
    if form is ReportForm.JSON:
        yield from report.iterate_json()
        yield "\n"
        return
    drawn_by: Callable[[Report], str] = importlib.import_module(f"{__package__}.{_DRAWN_BY[form]}").draw
    yield drawn_by(report)
