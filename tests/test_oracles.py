"""Every script says what it needs in a way that is read without running it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracles.__main__ import FOLDER, read_requirements

SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if not path.stem.startswith("__")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_requirements_can_be_read(script: Path) -> None:
    requirements = read_requirements(script)
    assert requirements
    assert all(isinstance(one, str) for one in requirements)
