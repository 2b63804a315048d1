"""Writing a page: like any other output it appears whole or not at all, and replaces nothing unasked."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from bntool.checkpoints.outputs import OutputFiles, is_same_file
from bntool.errors import MissingExtraError, UsageError
from bntool.reports.page.document import Page


def check_page(
    path: Path | None, *, force: bool, inputs: Iterable[os.PathLike[str]], outputs: Iterable[Path | None] = ()
) -> None:
    """Find out before any work whether a page can be written.

    Args:
        path: of the page; None for none.
        force: replace a file that exists.
        inputs: files that are read.
        outputs: what else is written.

    Raises:
        UsageError: the page would be one of these files.
        MissingExtraError: Jinja2 is missing.
        UnwritableFileError: it exists and ``force`` is not given, or its folder is missing.
    """
    if path is None:
        return
    if importlib.util.find_spec("jinja2") is None:
        raise MissingExtraError("--html needs Jinja2, which torch brings: pip install Jinja2")
    for other in inputs:
        if is_same_file(path, other):
            raise UsageError("the page would replace the input; name another file with --html", path=path)
    for output in outputs:
        if output is not None and is_same_file(path, output):
            raise UsageError("the page and another output have the same name; name another file with --html", path=path)
    OutputFiles(force=force).check(path)


def write_page(page: Page, path: Path, *, force: bool) -> None:
    """Write a page as one file of HTML.

    Raises:
        UnwritableFileError: it exists and ``force`` is not given, or the system refuses.
    """
    from bntool.reports.page.rendering import render_page

    with OutputFiles(force=force) as output:
        output.open(path).write(render_page(page).encode("utf-8", "backslashreplace"))
