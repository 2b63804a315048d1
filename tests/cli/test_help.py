"""What --help shows at every width."""

from __future__ import annotations

import pytest

from bntool.cli.application import COMMANDS
from bntool.cli.main import main


def show(
    arguments: list[str], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*arguments, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_summaries_of_commands_are_whole(columns: int, monkeypatch, capsys) -> None:
    text = show([], columns, monkeypatch, capsys)
    assert "..." not in text.partition("Commands:")[2]
    assert "what is wrong with them." in " ".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [60, 80])
def test_lines_fit_and_groups_come_once(command: str, columns: int, monkeypatch, capsys) -> None:
    lines = show([command], columns, monkeypatch, capsys).splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert len(set(titles)) == len(titles)
    assert titles[0] == "Arguments:"
    assert titles[-1] == "Output:"
    assert "{" not in lines[0]
    assert max(map(len, lines)) <= columns
