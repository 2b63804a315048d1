"""Fixtures that tests of several rooms use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.places import FIXTURES, SHARED


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of small files made by other software."""
    return FIXTURES


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with larger real files, which not every machine has."""
    if not SHARED.is_dir():
        pytest.skip("BNTOOL_SHARED names no folder with real checkpoints, and ../shared does not exist")
    return SHARED
