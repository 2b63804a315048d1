"""Fixtures that tests of several rooms use."""

from __future__ import annotations

import contextlib
import gc
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from bntool.cli import progress
from tests.places import FIXTURES, SHARED
from tests.programs.forking import ONNXRUNTIME, ForkedProcess

with contextlib.suppress(ImportError):  # the environments of ``make oracles`` run tests without it
    from hypothesis import HealthCheck, settings

    # other processes may have the machine: no test asserts a time; what one run tries every other one tries, too
    unhurried = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("unhurried", unhurried)
    settings.load_profile("unhurried")

progress._LOG_INTERVAL = 1e6  # seconds: else there would be lines more where another process has the machine

gc.disable()  # what is imported and collected stays: to look through it again and again takes seconds


def pytest_collection_finish() -> None:
    """From here on only what tests make is looked through for what to free."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)  # with little that stays, all of it would be looked through often
    gc.enable()


def pytest_runtest_setup() -> None:
    """Before fixtures that several tests share."""
    begin_random_numbers()


@pytest.fixture(autouse=True)
def begin_random_numbers_of_a_test() -> None:
    """After them."""
    begin_random_numbers()


def begin_random_numbers() -> None:
    """Let random numbers not depend on which tests came before."""
    random.seed(0)
    if sys.modules.get("numpy") is not None:
        sys.modules["numpy"].random.seed(0)
    if sys.modules.get("torch") is not None:
        sys.modules["torch"].manual_seed(0)


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
