"""The commands of the README and the guides are run, in order, on a copy of sample_ckpts."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.documentation.consoles import find_prompts, matches, read_consoles, run_console
from tests.places import ROOT
from tests.programs import write_commands

PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if read_consoles(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_console_blocks_print_what_the_page_says(page: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sample_ckpts", tmp_path / "sample_ckpts", ignore=shutil.ignore_patterns("__pycache__"))
    binaries = Path(sys.executable).parent
    (tmp_path / "bin").mkdir()
    server = write_commands(tmp_path / "bin", binaries)
    path = os.pathsep.join([str(tmp_path / "bin"), str(binaries), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore"}
    for console in read_consoles(page):
        printed = run_console(console, folder=tmp_path, environment=environment, inherited=(server,))
        assert matches(console.output, printed), (
            f"$ {console.command}\n{printed}\n--- but {page.name} says\n{console.output}"
        )


def test_the_readme_has_something_to_run() -> None:
    assert len(read_consoles(ROOT / "README.md")) >= 6


@pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "sample_ckpts" / "README.md"],
    ids=lambda page: page.name,
)
def test_commands_can_be_pasted(page: Path) -> None:
    assert not find_prompts(page)


def test_prompts_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ ls\n```\n```sh\n$ ls\nls \\\n> x\n```\n```text\n$ is no prompt here\n```\n")
    assert find_prompts(page) == ["a block of console", "$ ls", "> x"]
