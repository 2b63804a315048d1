"""docs/safety.md says of each advisory what bntool says of a file that does what it describes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.documentation.safety_table import PAGE, TABLES
from tests.documentation.tables import fill
from tests.inspection.advisories import ADVISORIES, Advisory, script
from tests.inspection.attacks import ATTACKS
from tests.inspection.test_loaders import judge


@pytest.mark.parametrize("advisory", ADVISORIES, ids=lambda advisory: f"{advisory.number} {advisory.build.__name__}")
def test_files_of_advisories_are_judged_as_the_page_says(advisory: Advisory, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        path = advisory.build(tmp_path, tmp_path / "canary")
    assert judge(path) == advisory.says
    assert not (tmp_path / "canary").exists()


def test_the_page_has_them_all() -> None:
    assert fill(PAGE, TABLES) == PAGE.read_text(), "python -m tests.documentation.safety_table writes it anew"


@pytest.mark.parametrize("build", [script, ATTACKS["tar of type 7"][0]])
def test_weights_only_refuses_them_today(build: object, tmp_path: Path) -> None:
    assert callable(build)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = build(tmp_path, tmp_path / "canary")
        with pytest.raises(RuntimeError, match="Cannot use ``weights_only=True`` with"):
            torch.load(path, weights_only=True)
    assert not (tmp_path / "canary").exists()
