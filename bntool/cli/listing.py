"""What ``bntool inspect`` does with checkpoints, without the options that typer reads."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.exit_codes import ExitCode, exit_code_of
from bntool.cli.globs import expand_globs
from bntool.cli.output import is_drawn, print_blocks, print_report, print_written
from bntool.errors import BntoolError
from bntool.inspection.findings import Severity
from bntool.progress import OnProgress, ignore
from bntool.reports.forms.form import ReportForm
from bntool.reports.report import FileReport, Report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bntool.inspection.configuration import Configuration
    from bntool.inspection.results import Inspection
    from bntool.inspection.run import Run
    from bntool.reports.forms.problems import Problem


def list_checkpoints(
    checkpoints: Sequence[os.PathLike[str]],
    *,
    form: ReportForm | None = None,
    quiet: bool = False,
    fail_on: Severity | None = None,
    config: Path | None = None,
    no_config: bool = False,
    html: Path | None = None,
    force: bool = False,
    every_tensor: bool = False,
    statistics: bool = False,
    verify_checksums: bool = False,
    **settings: Any,
) -> ExitCode:
    """Inspect checkpoints, one by one or as a run, and print what was found.

    Args:
        form: of the report; None for text.
        fail_on: findings of this severity or worse end with an exit code of 1.
        config: the file with findings that are meant to be so; else the one that is found here or above.
        no_config: take no such file.
        html: the page to write.
        force: replace the page if it exists.
        every_tensor: list every layer, then every tensor; of several files each.
        statistics: list every tensor, with its minimum, mean and maximum.
        settings: more of what :func:`~bntool.inspection.checkpoint.inspect` takes.

    Raises:
        UsageError: a configuration is given and unwanted, or is not one.
    """
    checkpoints = expand_globs(checkpoints)
    configuration = _configure(config, no_config=no_config)
    if configuration is not None:
        fail_on = fail_on or configuration.fail_on
    shown = _Shown(
        every_layer=every_tensor or not is_drawn(sys.stdout),
        every_tensor=every_tensor or statistics,
        form=form,
        blocks=(form.takes_blocks if form else not quiet) and (len(checkpoints) == 1 or every_tensor),
        at_once=form is None and len(checkpoints) > 1,
        page=html if len(checkpoints) == 1 else None,
        force=force,
        fail_on=fail_on,
    )
    settings |= {
        "every_tensor": every_tensor,
        "statistics": statistics,
        "verify_checksums": verify_checksums,
        "configuration": configuration,
    }
    # only these read files whole; what is printed meanwhile is progress enough
    slow = checkpoints if (statistics or verify_checksums) and not (shown.at_once and shown.blocks) else []
    reading = _show_reading(slow, as_json=form is not None, quiet=quiet)
    if len(checkpoints) == 1:
        from bntool.inspection.checkpoint import inspect

        failed = {}
        try:
            with reading as progress:
                inspection = inspect(checkpoints[0], on_progress=progress, **settings)
        except BntoolError as error:
            failed[str(checkpoints[0])] = error.about(checkpoints[0])
        else:
            shown.take(str(checkpoints[0]), inspection)
        report = Report("inspect", shown.list_reports(checkpoints, failed))
    else:
        from bntool.inspection.run import inspect_run
        from bntool.reports.blocks import Style, line
        from bntool.reports.run import describe_run, show_run

        with reading as progress:
            run = inspect_run(checkpoints, on_file=shown.take, on_progress=progress, **settings)
        failed = {file.path: file.error for file in run.files if file.error is not None}
        files = shown.list_reports(checkpoints, failed)
        wanted = form.takes_blocks if form else not quiet
        used = [] if configuration is None else [line(f"configuration: {configuration.path}", Style.MUTED)]
        report = Report("inspect", files, describe_run(run), (*show_run(run), *used) if wanted else ())
        shown.take_run(report)
        if html is not None and len(failed) < len({*checkpoints}):
            _write_run_page(run, checkpoints, html, settings, force=force)
    code = max([ExitCode.FINDINGS if shown.fails else ExitCode.DONE, *map(exit_code_of, failed.values())])
    gate = fail_on or Severity.ERROR
    print_report(report._replace(fail_on=gate.value), form=form, quiet=quiet, failing=shown.failing)
    if len(failed) < len({*checkpoints}):
        print_written(html, form=form, quiet=quiet)
    return code


def _configure(given: Path | None, *, no_config: bool) -> Configuration | None:
    """Return the configuration that is given or found; its modules are imported only where a file may be one."""
    if given is not None and no_config:
        from bntool.errors import UsageError

        raise UsageError("--config and --no-config exclude each other")
    if no_config:
        return None
    if given is None:
        from bntool.cli.configuration import find_file

        given = find_file(Path.cwd())
    if given is None:
        return None
    from bntool.inspection.configuration import read_configuration

    return read_configuration(given)


def _show_reading(
    paths: Sequence[os.PathLike[str]], *, as_json: bool, quiet: bool
) -> contextlib.AbstractContextManager[OnProgress]:
    if not paths:
        return contextlib.nullcontext(ignore)
    from bntool.cli.progress import show_reading

    return show_reading(paths, as_json=as_json, quiet=quiet)


@dataclass(eq=False, repr=False)
class _Shown:
    """The reports on files, made as soon as each is inspected, before it is forgotten.

    Attributes:
        page: of the only one.
        blocks: each is shown whole.
        at_once: and not kept until all are.
        failing: what fails on ``fail_on``.
        reports: by path.
    """

    every_layer: bool
    every_tensor: bool
    form: ReportForm | None
    blocks: bool
    at_once: bool
    page: Path | None
    force: bool
    fail_on: Severity | None
    fails: bool = False
    failing: list[Problem] = field(default_factory=list)
    reports: dict[str, FileReport] = field(default_factory=dict)

    def list_reports(
        self, paths: Sequence[os.PathLike[str]], failed: Mapping[str, BntoolError]
    ) -> tuple[FileReport, ...]:
        """Return one report for each path, in order."""
        from bntool.reports.report import FileReport

        failures = {path: FileReport(path, error=error) for path, error in failed.items()}
        return tuple((self.reports | failures)[str(path)] for path in paths)

    def take_run(self, report: Report) -> None:
        """Let findings fail a gate that only the files together show."""
        from bntool.reports.forms.problems import list_jumps

        if self.fail_on is not None:
            found = [one for one in list_jumps(report) if one.reaches(self.fail_on.value)]
            self.failing += found
            self.fails = self.fails or bool(found)

    def take(self, path: str, inspection: Inspection) -> None:
        from bntool.reports.blocks import Block, line
        from bntool.reports.forms.problems import list_problems_of
        from bntool.reports.inspection import describe_inspection, show_inspection
        from bntool.reports.report import FileReport

        fails = self.fail_on is not None and inspection.fails_on(self.fail_on)
        takes_facts = fails or (self.form is not None and not self.form.takes_blocks)
        facts = describe_inspection(inspection, every_tensor=self.every_tensor) if takes_facts else {}
        blocks: list[Block] = []
        if self.blocks:
            blocks += show_inspection(
                path,
                inspection,
                every_layer=self.every_layer,
                every_tensor=self.every_tensor,
                pictures=is_drawn(sys.stdout),
            )
        if self.at_once and blocks:
            print_blocks([*blocks, line()])
            blocks = []
        report = FileReport(path, facts, blocks)
        if self.fail_on is not None and fails:
            self.failing += [one for one in list_problems_of(report) if one.reaches(self.fail_on.value)]
        self.reports[path] = report.encode() if self.form is ReportForm.JSON else report
        if self.page is not None:
            from bntool.reports.page.inspection import make_inspection_page
            from bntool.reports.page.writing import write_page

            write_page(make_inspection_page(path, inspection), self.page, force=self.force)
        self.fails = self.fails or fails


def _write_run_page(
    run: Run, checkpoints: Sequence[os.PathLike[str]], path: Path, settings: Mapping[str, Any], *, force: bool
) -> None:
    """Write the page of several files, with one of them whole: the one that broke, or the last."""
    from bntool.inspection.checkpoint import inspect
    from bntool.reports.page.run import make_run_page
    from bntool.reports.page.writing import write_page

    named = {str(location): location for location in checkpoints}
    sound = [file for file in run.files if file.error is None]
    broken = run.find_broken()
    chosen = run.files[broken] if broken is not None else sound[-1] if sound else None
    looked_at = None if chosen is None else (chosen, inspect(named[chosen.path], **settings))
    write_page(make_run_page(run, looked_at=looked_at), path, force=force)
