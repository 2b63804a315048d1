"""``python -m tests.documentation.cli_reference`` writes docs/cli.md from the command line's own help."""

from __future__ import annotations

import contextlib
import io
import os
from unittest import mock

from bntool.cli.application import COMMANDS
from bntool.cli.main import main
from tests.places import ROOT

PAGE = ROOT / "docs" / "cli.md"

_EXIT_CODES = (
    "They stand above; [exit codes](exit-codes.md) says when each comes and what to do. Of several files, the worst\n"
    "code counts."
)

_STREAMS = """\
## What is printed where

The result goes to stdout, everything else to stderr. On a terminal it is drawn by rich, in its width; in a pipe or a
file it is plain aligned text, every line as long as it is. Python and commands that are meant to be pasted are never
wrapped.

| variable | |
|---|---|
| `COLUMNS` | the width, where it is not that of the terminal |
| `NO_COLOR` | no colours; bold and dim stay |
| `FORCE_COLOR` | drawn as on a terminal elsewhere too, e.g. in a CI log; 80 columns unless `COLUMNS` says more |
| `TERM=dumb` | no colours, no styles, nothing that moves |

Long work shows on stderr how far it is and how long it will take: on a terminal as one line that is erased at the
end, elsewhere as a line every ten seconds. `--quiet` turns it off. What the code of `--model` and `--data` prints
goes to stderr. A reader that closes the pipe early changes no exit code.

## Files that are written

A file appears whole or not at all: it is written beside its place as `.NAME.*.writing`, read back, brought to the
disk and renamed. Only a regular file is ever replaced, and only with `--force`; a link, a named pipe or a device is
not.

Ctrl-C, SIGTERM and SIGHUP remove what was begun; after the latter two the process ends by the signal. What `kill -9`
or a power cut leaves beside a place (`.NAME.*.writing`, `.NAME.*.replaced`) is removed by the next run that writes
there: such files are locked as long as a process works on them. Of several files that belong together, such as
shards, some may then be the old ones and some the new ones.
"""


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
    parts.append(f"## Exit codes\n\n{_EXIT_CODES}\n")
    return "\n".join([*parts, _STREAMS])


if __name__ == "__main__":
    PAGE.write_text(write_reference())
