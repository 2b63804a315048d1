"""The verdict on what loading a file may run."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bntool.checkpoints.formats import open_checkpoint
from bntool.cli.main import main
from bntool.inspection.safety import SafetyVerdict, judge_safety
from tests.checkpoints.foreign import rezip


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


class Unheard:
    pass


def _make(kind: str, folder: Path) -> Path:
    tensors: dict[str, Any] = {"bn.weight": torch.ones(2)}
    path = folder / "model.pt"
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path)
    elif kind == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            torch.jit.script(torch.nn.BatchNorm1d(2)).save(path)
    elif kind == "numpy":
        path.write_bytes(pickle.dumps({"a.weight": torch.ones(2).numpy()}))
    else:
        extra: dict[str, Any] = {"plain": {}, "unknown": {"x": Unheard()}, "suspicious": {"x": Unheard(), "y": Runs()}}
        torch.save({"model": tensors, **extra[kind]}, path)
    return path


CASES = [
    ("plain", SafetyVerdict.HARMLESS, [0, 0, 0]),
    ("safetensors", SafetyVerdict.HARMLESS, [0, 0, 0]),
    ("numpy", SafetyVerdict.HARMLESS, [0, 0, 0]),
    ("unknown", SafetyVerdict.UNKNOWN, [1, 0, 0]),
    ("script", SafetyVerdict.UNKNOWN, [1, 0, 0]),
    ("suspicious", SafetyVerdict.SUSPICIOUS, [1, 1, 0]),
]


@pytest.mark.parametrize(("kind", "verdict", "codes"), CASES)
def test_verdict_and_fail_on(
    kind: str, verdict: SafetyVerdict, codes: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _make(kind, tmp_path)
    with open_checkpoint(path) as checkpoint:
        assert judge_safety(checkpoint).verdict is verdict
    main(["inspect", str(path), "--json"])
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    assert facts["safety"]["verdict"] == verdict.value
    found = {finding["code"] for finding in facts["findings"]}
    assert ("suspicious-global" in found) == (verdict is SafetyVerdict.SUSPICIOUS)
    assert bool(found & {"unknown-global", "holds-code"}) == bool(codes[0])
    main(["inspect", str(path)])
    shown = capsys.readouterr().out
    assert (f"safety: {verdict.value} (" in shown) == (kind != "safetensors")


@pytest.mark.parametrize(("kind", "verdict", "codes"), CASES)
def test_gates(kind: str, verdict: SafetyVerdict, codes: list[int], tmp_path: Path) -> None:
    path = _make(kind, tmp_path)
    with open_checkpoint(path) as checkpoint:
        has_layers = any("running_mean" in name for s in checkpoint.state_dicts for name in s.tensors)
    for severity, code in zip(("notice", "warning", "error"), codes, strict=True):
        expected = 1 if severity == "notice" and not has_layers else code  # no-batch-norm is a notice as well
        if kind == "script" and severity == "warning":
            expected = 1  # a BatchNorm that was never updated
        assert main(["inspect", str(path), "--fail-on", severity, "--quiet"]) == expected, (kind, severity)


def test_a_scripted_container_is_not_suspicious(tmp_path: Path) -> None:
    """torch.jit names the classes of its copies ``___torch_mangle_0``."""
    path = tmp_path / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.nn.Sequential(torch.nn.Sequential(torch.nn.BatchNorm1d(2)), torch.nn.Sequential(torch.nn.ReLU()))
        torch.jit.script(net).save(path)
    with open_checkpoint(path) as checkpoint:
        assert any("___torch_mangle" in g.path for g in checkpoint.globals)
        assert judge_safety(checkpoint).verdict is SafetyVerdict.UNKNOWN


def test_a_frozen_script_says_why_it_shows_no_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        torch.jit.freeze(torch.jit.script(net)).save(path)
    assert main(["inspect", str(path)]) == 0
    assert "no state dict was found: torch.jit.freeze" in capsys.readouterr().out
    assert main(["fold", str(path), "--pair", "0=1", "-o", str(tmp_path / "out.pt")]) == 4
    assert "no state dict was found in this file: torch.jit.freeze" in capsys.readouterr().err


def test_classes_of_an_archives_own_code_are_no_imports(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Sequential(torch.nn.BatchNorm2d(2))), tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        safety = judge_safety(checkpoint)
        assert any(name.path.startswith("__torch__.") for name in checkpoint.globals)
    assert (safety.verdict, safety.unknown, safety.holds_code) == (SafetyVerdict.UNKNOWN, (), True)
    torch.save({"a": 1}, tmp_path / "b.pt")  # in a plain pickle it is a module that would be imported
    (tmp_path / "b.pt").write_bytes(rezip(tmp_path / "b.pt", _name_own_class))
    with open_checkpoint(tmp_path / "b.pt") as checkpoint:
        assert judge_safety(checkpoint).unknown == ("__torch__.M",)


def _name_own_class(name: str, data: bytes) -> tuple[str, bytes]:
    return name, b"\x80\x02c__torch__\nM\n." if name.endswith("data.pkl") else data


def test_a_finding_of_long_names_is_a_whole_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = b"".join(b"c" + b"a" * 400 + b"%d\nx\n" % number for number in range(5))
    torch.save({"a": 1}, tmp_path / "a.pt")
    data = rezip(tmp_path / "a.pt", lambda n, d: (n, b"\x80\x02(" + names + b"l." if n.endswith("data.pkl") else d))
    (tmp_path / "a.pt").write_bytes(data)
    assert main(["inspect", str(tmp_path / "a.pt")]) == 0
    out = capsys.readouterr().out
    assert "and 2 more, of which nothing is known" in out
    assert "runs what it finds under these names\n" in out
