"""A thousand mutants of every format; ``python -m tests.fuzz`` runs more. What it found stays here as a case."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import run


def test_mutants_are_read_or_refused(tmp_path: Path) -> None:
    outcome = run(1000, tmp_path, seed=20240501)
    assert outcome.accepted > 100  # mutants in data; else the checksums hide everything
    assert outcome.refused > 400
