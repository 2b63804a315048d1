"""Errors become one sentence and a documented exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st

from bntool import errors
from bntool.cli.application import COMMANDS, build_app
from bntool.cli.exit_codes import ExitCode, exit_code_of
from bntool.cli.main import main, read_plain_listing
from bntool.reports.forms.form import ReportForm


def all_errors() -> list[type[errors.BntoolError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.BntoolError) and value is not errors.BntoolError
    ]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_has_an_exit_code_and_a_stable_name(kind: type[errors.BntoolError]) -> None:
    assert exit_code_of(kind("x")) in (
        ExitCode.INTERRUPTED,
        ExitCode.USAGE,
        ExitCode.FILE,
        ExitCode.REFUSED,
        ExitCode.VERIFICATION,
        ExitCode.USER_CODE,
    )
    others = [other for other in all_errors() if not issubclass(other, kind) and not issubclass(kind, other)]
    assert kind.code not in {other.code for other in others}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, ""),
        (["nonsense"], 2, "nonsense"),
        (["inspect"], 2, "CKPT"),
        (["inspect", "--nonsense", "x"], 2, "--nonsense"),
        (["inspect", "/nowhere/x.pt"], 3, "no such file"),
        (["inspect", "."], 3, "folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert says in err
    assert len(err.splitlines()) <= 1
    assert "Traceback" not in err


def test_an_error_under_json_is_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--state-dict", "none", "--json", str(Path(__file__))]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["files"][0]["error"]["code"] == "unknown-format"


def test_a_usage_error_under_json_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", "--nonsense"]) == 2
    assert json.loads(capsys.readouterr().out)["files"][0]["error"]["code"] == "usage"


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bntool.inspection.checkpoint.inspect", interrupt)
    assert main(["inspect", "x.pt"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_unexpected_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("bntool.inspection.checkpoint.inspect", fail)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "x.pt"])


def test_versions_for_a_bug_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("bntool ")
    assert "Python 3." in out
    assert "torch 2." in out


def test_every_command_explains_itself_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert f"bntool {name} " in out.replace("Usage: bntool", "")
        for option in ("--json", "--quiet"):
            assert option in out


WORDS = [
    "inspect",
    "--json",
    "a.pt",
    "run/b c.pt",
    "--all",
    "--",
    "-",
    "-q",
    "--js",
    "--json=1",
    "",
    "diff",
    "-h",
    "*.pt",
]


@given(st.lists(st.sampled_from(WORDS), max_size=5))
@example(["inspect", "--json", "a.pt", "--json"])
@example(["--json", "inspect", "a.pt"])
@example(["inspect", "hf://a/b", "--json"])
def test_a_plain_listing_is_what_typer_reads_it_as(words: list[str]) -> None:
    plain = read_plain_listing(words)
    if plain is None:
        return
    command = typer.main.get_command(build_app(words)).commands["inspect"]  # type: ignore[attr-defined]
    read = command.make_context("", words[1:]).params
    assert words[0] == "inspect"
    form = ReportForm.JSON if read.pop("as_json") else None
    assert plain == ([*read.pop("checkpoints")], form)
    assert not any(read.values())


@pytest.mark.parametrize("words", [["inspect", "a.pt"], ["inspect", "--json", "a.pt", "b.pt"]])
def test_the_listing_that_most_people_ask_for_is_plain(words: list[str]) -> None:
    assert read_plain_listing(words) is not None
