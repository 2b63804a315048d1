"""The site's contents; building it, with all links, is `make site`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import bntool
from tests.documentation.python_calls import PAGE, write_page
from tests.documentation.site_hook import find_raw_markdown, link_references
from tests.places import ROOT


def test_every_public_name_is_on_the_page_of_calls() -> None:
    assert PAGE.read_text() == write_page(), "run `make docs`"


def test_every_page_can_be_found_from_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert sorted(re.findall(r": ([\w/-]+\.md)$", menu, flags=re.MULTILINE)) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")
    )


SHOWN = [f"{module}.{name}" for name, module in bntool._PUBLIC.items()]


def functions_of(path: str) -> dict[str, Callable[..., object]]:
    """The function there, or the public methods of the class there."""
    module, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    if not isinstance(value, type):
        return {path: value}
    members = {key: inspect.unwrap(member) for key, member in vars(value).items() if inspect.isroutine(member)}
    return {f"{path}.{key}": member for key, member in members.items() if not key.startswith("_")}


@pytest.mark.parametrize("path", SHOWN)
def test_parameters_are_described_one_by_one(path: str) -> None:
    """Else a strict build fails: a line for two of them is a parameter that there is not."""
    for name, function in functions_of(path).items():
        docstring = inspect.getdoc(function) or ""
        section = re.search(r"^Args:\n((?:    .*\n|\n)+)", docstring + "\n", flags=re.MULTILINE)
        described = re.findall(r"^    (\S[^:]*):", section[1], flags=re.MULTILINE) if section else []
        assert set(described) <= set(inspect.signature(function).parameters), name


def test_pages_link_to_files_and_to_no_folder() -> None:
    """A site shows no list of a folder."""
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).is_file(), f"{page.name} links to {target}"


def test_references_of_docstrings_become_links() -> None:
    html = (
        '<h3 id="bntool.folding.live.fold">fold</h3> see :func:<code>~bntool.folding.live.fold</code>, '
        ":class:<code>bntool.plan.Averaged</code>, :mod:<code>bntool.errors</code> and :func:<code>fold</code>"
    )
    link = '<a href="#bntool.folding.live.fold"><code>fold</code></a>'
    assert link_references(html).partition("</h3>")[2] == (
        f" see {link}, <code>Averaged</code>, <code>bntool.errors</code> and {link}"
    )


@pytest.mark.parametrize(
    ("html", "is_raw"),
    [
        ("<p>A list:\n- one\n- two</p>", True),
        ("<p>```python keras\nimport keras</p>", True),
        ("<p>| a | b |\n|---|---|\n| 1 | 2 |</p>", True),
        ("<p>see [there](there.md)</p>", True),
        ("<p>a - b, <code>**keywords</code>, <code>a[0](b)</code> and | or</p>\n<ul><li>one</li></ul>", False),
    ],
)
def test_markdown_that_the_site_shows_as_it_is_written_is_found(html: str, is_raw: bool) -> None:
    assert bool(find_raw_markdown(html)) == is_raw


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_blocks_are_what_the_site_takes_for_blocks(page: Path) -> None:
    """A word behind the language makes a paragraph of a block; `title="..."` does not."""
    for information in re.findall(r"^ *```(\S.*)$", page.read_text(), flags=re.MULTILINE):
        assert re.fullmatch(r'[a-z]+( title="[\w.]+")?', information), (page.name, information)


def test_the_site_is_built_strictly() -> None:
    """With --quiet mkdocs counts no warnings, and a strict build passes whatever it warns of."""
    (line,) = re.findall(r"mkdocs build.*$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert line.split() == ["mkdocs", "build", "--strict"]
