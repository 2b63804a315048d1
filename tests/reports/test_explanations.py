"""bntool explain knows every finding, skip reason and exit code, without a network."""

from __future__ import annotations

import re

import pytest

from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.inspection.findings import FindingCode, Severity
from bntool.plan import SkipReason
from bntool.reports.explanations import explain

CODES = [
    *((code.value, "finding") for code in FindingCode),
    *((reason.value, "skip reason") for reason in SkipReason),
    *((str(int(code)), "exit code") for code in ExitCode),
]


@pytest.mark.parametrize(("code", "kind"), CODES, ids=[f"{kind}-{code}" for code, kind in CODES])
def test_every_code_is_explained(code: str, kind: str) -> None:
    (one,) = [one for one in explain(code) if one.kind == kind]
    assert any(len(value) > 10 for value in one.facts.values())
    assert not [value for value in one.facts.values() if "`" in value or "](" in value]
    beside = re.compile("as above|as below|(the )?same (of|in|as|for) ")  # of rows that are not printed beside it
    assert not any(beside.match(value) for value in one.facts.values())
    if kind == "finding":
        assert any(severity.value in one.facts["severity"] for severity in Severity)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "shared-output"]) == 0
    assert "skip reason" in capsys.readouterr().out
    assert main(["explain", "counterlow"]) == 2
    assert "did you mean counter-low" in capsys.readouterr().err
    assert main(["explain"]) == 0
    shown = capsys.readouterr().out
    assert all(code in shown for code, _ in CODES)
