"""The examples of docs/api.md and of the library section of the README are run."""

from __future__ import annotations

import doctest
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bntool
from tests.places import ROOT, copy_samples

PAGE = ROOT / "docs" / "api.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    copy_samples(tmp_path / "sample_ckpts")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("digits_net", None)


def test_examples_print_what_the_page_says(folder: Path) -> None:
    text = re.sub(r"^```.*$", "", PAGE.read_text(), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, "api.md", str(PAGE), 0)
    assert len(test.examples) > 40
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)
    assert {"recalibrated.pt", "frozen.pt", "folded.pt", "ema.safetensors", "renamed.pt"} <= set(os.listdir(folder))


def test_the_page_names_every_public_call() -> None:
    text = PAGE.read_text()
    values = {"BatchNorm", "Checkpoint", "StateDict", "scale_and_shift", "__version__"}  # not called by users
    assert [name for name in bntool.__all__ if name not in values and name not in text] == []


def test_the_library_section_of_the_readme_runs(folder: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Library\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert {"recalibrated.pt", "frozen.pt", "folded.pt", "digits.safetensors"} <= set(os.listdir(folder))
