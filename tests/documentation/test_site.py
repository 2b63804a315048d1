"""The site's contents; building it, with all links, is `make site`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable

import pytest

import bntool
from tests.documentation.site_roles import on_page_content
from tests.places import ROOT


def test_every_public_name_is_on_the_page_of_calls() -> None:
    shown = re.findall(r"^::: bntool\.[\w.]+\.(\w+)$", (ROOT / "docs" / "python.md").read_text(), flags=re.MULTILINE)
    assert sorted(shown) == sorted(set(bntool.__all__) - {"__version__"})


def test_every_page_can_be_found_from_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert sorted(re.findall(r": ([\w/-]+\.md)$", menu, flags=re.MULTILINE)) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")
    )


SHOWN = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "python.md").read_text(), flags=re.MULTILINE)


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
    assert on_page_content(html).partition("</h3>")[2] == (
        f" see {link}, <code>Averaged</code>, <code>bntool.errors</code> and {link}"
    )
