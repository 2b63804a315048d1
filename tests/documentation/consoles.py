"""Console blocks of a page: commands with what they print."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Console:
    """One command of a ```console block.

    Attributes:
        command: what stands after ``$``.
        output: what the page says it prints, stdout and stderr together; ``...`` stands for anything.
    """

    command: str
    output: str


def read_consoles(page: Path) -> list[Console]:
    """All commands of the page, in order."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            while command.endswith("\\"):
                rest, _, output = output.partition("\n")
                command = command[:-1] + rest.removeprefix(">").strip()
            found.append(Console(command, output))
    return found


# what long work tells every ten seconds, on a machine that is slow
_PROGRESS = re.compile(r"^bntool: [a-z ]+: (\d|[^\n]*left$)[^\n]*\n", flags=re.MULTILINE)


def run_console(console: Console, *, folder: Path, environment: dict[str, str]) -> str:
    """What the command prints, run by a shell in ``folder``."""
    done = subprocess.run(
        ["bash", "-c", console.command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return _PROGRESS.sub("", done.stdout)


def matches(expected: str, printed: str) -> bool:
    """Whether the output is as the page says, trailing spaces aside."""
    pattern = ".*?".join(map(re.escape, _tidy(expected).split("...")))
    return re.fullmatch(pattern, _tidy(printed), flags=re.DOTALL) is not None


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
