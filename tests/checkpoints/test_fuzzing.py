"""Some hundred mutants of all formats; ``python -m tests.fuzz`` runs more. What it found stays here as a case."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import run, run_command
from tests.places import SAMPLES


def test_mutants_are_read_or_refused(tmp_path: Path) -> None:
    outcome = run(500, tmp_path, seed=20240501)
    assert outcome.accepted > 50  # mutants in data; else the checksums hide everything
    assert outcome.refused > 200


def test_commands_of_the_fuzzer_run(tmp_path: Path) -> None:
    written = tmp_path / "out.safetensors"
    run_command(["convert", str(SAMPLES / "digits.pt"), "-o", str(written)])
    assert written.is_file()
