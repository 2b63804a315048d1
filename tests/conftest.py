"""Fixtures that tests of several rooms use."""

from __future__ import annotations

import gc
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.places import FIXTURES, SHARED
from tests.programs.forking import ONNXRUNTIME, ForkedProcess

gc.disable()  # what is imported and collected stays: to look through it again and again takes seconds


def pytest_collection_finish() -> None:
    """From here on only what tests make is looked through for what to free."""
    gc.freeze()
    gc.enable()


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


@pytest.fixture
def forked_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of ONNX Runtime are forked from one that has imported it: for tests that start many of them."""
    start = partial(ForkedProcess, imported=ONNXRUNTIME)
    forking = SimpleNamespace(Popen=start, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("bntool.folding.onnxruntime_process.subprocess", forking)
