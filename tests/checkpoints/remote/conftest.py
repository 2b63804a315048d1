"""Each test has a cache of its own, and waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs.file_server import FileServer, serve_files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BNTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bntool.checkpoints.remote.http._PAUSE", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve_files() as serving:
        yield serving
