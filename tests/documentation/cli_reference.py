"""``python -m tests.documentation.cli_reference`` writes docs/cli.md from the command line's own help."""

from __future__ import annotations

import contextlib
import io
import os
from unittest import mock

from bntool.cli.main import COMMANDS, ExitCode, main
from tests.places import ROOT

PAGE = ROOT / "docs" / "cli.md"

_MEANINGS = {
    ExitCode.DONE: "done; skips are reported; kept because not better is done too",
    ExitCode.FINDINGS: "findings at or above `--fail-on`, or `diff --expect` not met",
    ExitCode.USAGE: "usage, or a package is missing (the message names it)",
    ExitCode.FILE: "a file is unreadable, unknown, damaged, unsafe or unwritable",
    ExitCode.REFUSED: "refused: nothing could be done safely, or a skip or assumption under `--strict`",
    ExitCode.VERIFICATION: "verification failed; nothing was written",
    ExitCode.USER_CODE: "your model or data code raised",
    ExitCode.INTERRUPTED: "interrupted; nothing was written",
}


def help_of(*command: str) -> str:
    """What ``bntool COMMAND --help`` prints on a terminal of 100 columns."""
    stream = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": "100"}), contextlib.redirect_stdout(stream):
        main([*command, "--help"])
    return stream.getvalue().strip()


def write_reference() -> str:
    """The text of the page."""
    parts = ["# Command line\n\nMade from `--help` by `make docs`; a test holds it.\n"]
    for command in ((), *((name,) for name in COMMANDS)):
        title = " ".join(("bntool", *command))
        parts.append(f"## {title}\n\n```text\n{help_of(*command)}\n```\n")
    rows = "\n".join(f"| {code.value} | {_MEANINGS[code]} |" for code in ExitCode)
    parts.append(
        f"## Exit codes\n\n| code | meaning |\n|---|---|\n{rows}\n\nOf several files, the worst code counts.\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(write_reference())
