"""Fixtures that tests of several rooms use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of small files made by other software."""
    return _ROOT / "tests" / "fixtures"


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with larger real files, which not every machine has."""
    folder = Path(os.environ.get("BNTOOL_SHARED", _ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("BNTOOL_SHARED names no folder with real checkpoints, and ../shared does not exist")
    return folder
