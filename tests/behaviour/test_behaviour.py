"""The guard sees a changed byte, text and exit code, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.behaviour.__main__ import differences, observe

LINES = {
    "0000 nothing": ["fold", "nothing", "out/0000.pt"],
    "0001 byte": ["fold", "byte", "out/0001.pt"],
    "0002 text": ["inspect", "text"],
    "0003 code": ["fold", "code"],
    "0004 nothing shown": ["inspect", "nothing"],
}


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """What the command lines do in a tree, and in a changed one."""
    inputs: Path = tmp_path_factory.mktemp("inputs")
    (inputs / "lines.json").write_text(json.dumps(LINES))
    runs = []
    for name in ("before", "changed"):
        tree: Path = tmp_path_factory.mktemp(name)
        (tree / "bntool" / "cli").mkdir(parents=True)
        (tree / "bntool" / "__init__.py").touch()
        shutil.copy(Path(__file__).with_name("pretended_main.py"), tree / "bntool" / "cli" / "main.py")
        (tree / "bntool" / "cli" / name).touch()
        for needless in ("h5py", "numpy", "onnx", "onnxruntime", "torch"):  # what pretends takes no seconds to import
            (tree / f"{needless}.py").touch()
        runs.append(observe(tree, inputs))
    return runs


def test_what_changed_is_told_and_nothing_else(observed) -> None:
    before, after = observed
    assert {name for name in before if "terminal" not in name} == set(LINES)
    assert "0004 nothing shown [terminal of 80]" in before
    told = {text.splitlines()[0]: text for text in differences(before, after)}
    terminals = {f"0002 text [terminal of {columns}]" for columns in (80, 120)}
    assert set(told) == {"0001 byte", "0002 text", "0003 code"} | terminals
    assert '"out/0001.pt": "' in told["0001 byte"]
    assert "done otherwise" in told["0002 text"]
    assert '+ "code": 3' in told["0003 code"]


def test_a_run_that_is_missing_is_told(observed) -> None:
    before, _ = observed
    fewer = {name: run for name, run in before.items() if name != "0003 code"}
    assert [text.splitlines()[0] for text in differences(before, fewer)] == ["0003 code"]
