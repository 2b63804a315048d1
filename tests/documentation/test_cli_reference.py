"""docs/cli.md says what --help says."""

from __future__ import annotations

from tests.documentation.cli_reference import PAGE, write_reference


def test_the_reference_is_what_help_prints() -> None:
    assert PAGE.read_text() == write_reference(), "run `make docs`"
