"""Every script says what it needs in a way that is read without running it."""

from __future__ import annotations

from tests.oracles.__main__ import FOLDER, read_requirements


def test_requirements_can_be_read() -> None:
    for script in sorted(FOLDER.glob("*.py")):
        if not script.stem.startswith("__"):
            requirements = read_requirements(script)
            assert requirements, script
            assert all(isinstance(one, str) for one in requirements), script
