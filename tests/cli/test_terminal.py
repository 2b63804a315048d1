"""What the terminal shows, held as snapshots.

``UPDATE_SNAPSHOTS=1 make test`` writes them anew; look at the difference.
"""

from __future__ import annotations

import io
import os

import pytest

from bntool.cli.main import main
from tests.places import ROOT, SAMPLES

SNAPSHOTS = ROOT / "tests" / "snapshots"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(arguments: list[str], monkeypatch: pytest.MonkeyPatch, *, columns: int | None, colour: bool = True) -> str:
    stream: io.StringIO = io.StringIO() if columns is None else Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(SAMPLES)
    main(arguments)
    return stream.getvalue()


CASES = {
    "inspect-broken-80": (["inspect", "broken_nan_variance.pt"], 80, True),
    "inspect-broken-200": (["inspect", "broken_nan_variance.pt"], 200, True),
    "inspect-training-pipe": (["inspect", "digits_training.pt"], None, False),
    "inspect-dead-80-no-color": (["inspect", "dead_channels.pt"], 80, False),
    "inspect-drifted-60": (["inspect", "drifted.pt"], 60, False),
    "inspect-module-all-80": (["inspect", "digits_module.pt", "--all", "--layers", "layer1.0*"], 80, True),
    "inspect-stats-120": (["inspect", "digits.safetensors", "--stats", "--layers", "neck*"], 120, False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_terminal_shows_what_it_showed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, columns, colour = CASES[name]
    text = shown(arguments, monkeypatch, columns=columns, colour=colour)
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text)
    assert text == path.read_text()
    assert ("\x1b[" in text) == colour
    if columns is not None and not colour:
        assert max(map(len, text.splitlines())) <= columns
