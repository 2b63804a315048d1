"""Commands of a page with what they print: a block of ``sh``, which can be pasted, and after it one of ``text``."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Console:
    """Commands and their output.

    Attributes:
        command: as a shell takes it, perhaps several lines.
        output: what the page says it prints, stdout and stderr together; ``...`` stands for anything. None where the
            page shows nothing: it must then end without an error.
    """

    command: str
    output: str | None


_LINES = r"((?:(?!```).*\n)*)"
_CONSOLE = re.compile(rf"^```sh\n{_LINES}```\n(?:\n?```text\n{_LINES}```)?", re.MULTILINE)
_BLOCK = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"\bbntool ([a-z]+)\b((?:\\\n|[^\n`#&|;])*)")


def read_consoles(page: Path) -> list[Console]:
    """All commands of the page, in order."""
    return [Console(command, output or None) for command, output in _CONSOLE.findall(page.read_text())]


def read_options(page: Path) -> Iterator[tuple[str, str]]:
    """Each option that the page uses in a command line of bntool, with the command, wherever it stands."""
    for command, arguments in _COMMAND.findall(page.read_text()):
        yield from ((command, option) for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", arguments))


def find_prompts(page: Path) -> list[str]:
    """Lines of commands that cannot be pasted: they begin with a prompt, or stand in a block with their output."""
    found = []
    for language, block in _BLOCK.findall(page.read_text()):
        if language in ("console", "shell-session"):
            found.append(f"a block of {language}")
        if language in ("sh", "bash", "shell"):
            found += [line for line in block.splitlines() if re.match(r"\s*[$>%] ", line)]
    return found


# what long work tells every ten seconds, on a machine that is slow
_PROGRESS = re.compile(r"^bntool: [a-z ]+: (\d|[^\n]*left$)[^\n]*\n", flags=re.MULTILINE)


def run_console(
    console: Console, *, folder: Path, environment: dict[str, str], inherited: tuple[int, ...] = ()
) -> tuple[int, str]:
    """The exit code of the command and what it prints, run by a shell in ``folder``."""
    done = subprocess.run(
        ["bash", "-c", console.command],
        cwd=folder,
        env=environment,
        pass_fds=inherited,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return done.returncode, _PROGRESS.sub("", done.stdout)


def matches(expected: str, printed: str) -> bool:
    """Whether the output is as the page says, trailing spaces aside."""
    pattern = ".*?".join(map(re.escape, _tidy(expected).split("...")))
    return re.fullmatch(pattern, _tidy(printed), flags=re.DOTALL) is not None


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
