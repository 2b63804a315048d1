"""What shells offer, through the entry point that they call, and through bash, zsh and fish themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bntool.cli.main import main
from tests import programs
from tests.places import ROOT, SAMPLES

Complete = Callable[..., list[str]]
BIN = Path(sys.executable).parent


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Complete:
    """What bash is offered for the last of some words; it takes a colon for the end of a word."""
    monkeypatch.chdir(SAMPLES)

    def complete(*words: str) -> list[str]:
        monkeypatch.setenv("_BNTOOL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(("bntool", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        assert main([]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line]

    return complete


def test_layers_and_globs_are_those_of_the_file(offers: Complete) -> None:
    found = offers("inspect", "digits.pt", "--layers", "layer2")
    names = ["layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.1"]
    assert found == ["layer2.\\*", "layer2.0.\\*", *names]
    assert offers("inspect", "digits.pt", "--layers", "=", "layer2.0.d") == names[2:]
    assert offers("inspect", "digits.pt", "--layers=layer2.0.d") == names[2:]
    assert offers("freeze", "digits.safetensors", "--policy", "eval", "--layers", "bn") == ["bn1"]
    assert offers("diff", "digits.pt", "drifted.pt", "--layers", "bn") == ["bn1"]
    assert offers("inspect", "no such file", "--layers", "") == []
    assert offers("inspect", "digits_net.py", "--layers", "") == []
    assert offers("inspect", "--layers", "") == []


def test_layers_are_offered_as_the_command_names_them(offers: Complete, tmp_path: Path) -> None:
    tensors = torch.load(SAMPLES / "digits.pt")
    flat = {f"ema_{name}".replace(".", "_"): tensor for name, tensor in tensors.items()}
    path = str(tmp_path / "mmcv.pth")
    torch.save({"state_dict": {**tensors, **flat}}, path)
    assert offers("inspect", path, "--layers", "ema_layer2") == [
        "ema_layer2_0_bn1",
        "ema_layer2_0_bn2",
        "ema_layer2_0_downsample_1",
    ]
    assert offers("freeze", path, "--layers", "ema_") == []  # the model's layers are frozen
    assert offers("diff", path, path, "--prefix", "ema_", "--layers", "bn") == ["bn1"]
    torch.save({f"{part}.{name}": t for part in ("net", "ema") for name, t in tensors.items()}, path)
    assert offers("diff", path, path, "--prefix", "net.", "--layers", "b") == ["bn1"]
    assert offers("diff", path, path, "--prefix", "none.", "--layers", "net.b") == ["net.bn1"]


def test_layers_are_those_of_the_state_dict_that_is_named(offers: Complete, tmp_path: Path) -> None:
    torch.save(
        {
            "net": nn.Sequential(nn.BatchNorm2d(2)).state_dict(),
            "aux": {"head.bn." + k: v for k, v in nn.BatchNorm1d(2).state_dict().items()},
        },
        tmp_path / "two.pt",
    )
    path = str(tmp_path / "two.pt")
    assert offers("inspect", path, "--state-dict", "") == ["net", "aux"]
    assert offers("diff", path, "digits_training.pt", "--state-dict-b", "e") == ["ema_state_dict"]
    assert offers("inspect", path, "--state-dict", "aux", "--layers", "") == ["head.bn"]
    assert offers("inspect", path, "--layers", "") == ["0"]


def test_architectures_are_those_that_the_file_may_be(offers: Complete, tmp_path: Path) -> None:
    assert "resnet50" in offers("fold", "digits.pt", "--arch", "torchvision", ":", "resnet")
    assert offers("fold", "digits.pt", "--arch", "torchvision", ":", "resnet1") == [
        "resnet101",
        "resnet152",
        "resnet18",
    ]
    from tests.benchmarks.inspection import resnet50_state

    torch.save(resnet50_state(), tmp_path / "net.pt")
    found = offers("fold", str(tmp_path / "net.pt"), "--arch", "")
    assert "torchvision:resnet50" in found
    assert len(found) < 20


def test_models_are_files_what_these_define_and_those_of_libraries(offers: Complete) -> None:
    assert "digits_net.py:" in offers("recalibrate", "digits.pt", "--model", "dig")
    assert set(offers("recalibrate", "digits.pt", "--model", "digits_net.py", ":")) == {
        "BasicBlock",
        "DigitsNet",
        "build",
    }
    assert offers("recalibrate", "digits.pt", "--model", f"{ROOT}/mk") == []
    assert f"{ROOT}/tests/" in offers("recalibrate", "digits.pt", "--model", f"{ROOT}/te")
    assert "resnet18" in offers("fold", "digits.pt", "--model", "torchvision", ":", "resnet1")


def test_other_values(offers: Complete) -> None:
    assert offers("recalibrate", "digits.pt", "--preprocess", "ima") == ["imagenet"]
    assert "crop=" in offers("recalibrate", "digits.pt", "--preprocess", "imagenet,c")[0]
    assert offers("inspect", "digits.pt", "--report", "s") == ["sarif"]
    assert "counter-low" in offers("explain", "counter-l")
    assert offers("ins") == ["inspect"]
    assert offers("inspect", "dig") == []  # the shell has files


def test_names_that_a_shell_could_run_are_not_offered(offers: Complete, tmp_path: Path) -> None:
    layers = ["$(touch x)", "a`touch x`", "a;b", "a b", 'a"b', "a'b", "\\$(touch x)", "-o", "*", "a\nb", "sound"]
    tensors = {f"{name}.{key}": value for name in layers for key, value in nn.BatchNorm2d(2).state_dict().items()}
    torch.save(tensors, tmp_path / "hostile.pt")
    assert offers("inspect", str(tmp_path / "hostile.pt"), "--layers", "") == ["sound"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_themselves(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    words = "bntool inspect digits.pt --layers layer2.0.b"
    source = f"_BNTOOL_COMPLETE=source_{shell} bntool"
    lines = {
        "bash": f'eval "$({source})"; COMP_WORDS=({words}); COMP_CWORD=4; _bntool_completion bntool; '
        'printf "%s\\n" "${COMPREPLY[@]}"',
        # zsh completes on a terminal only: what it would be given is what it evaluates
        "zsh": f'compdef() {{ }}; _arguments() {{ print -r -- "$1"; }}; eval "$({source})"; '
        f"words=({words}); CURRENT=5; _bntool_completion",
        "fish": f"{source} | source; complete -C '{words}'",
    }
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    options = {"bash": ["--norc", "-c"], "zsh": ["-f", "-c"], "fish": ["--no-config", "-c"]}[shell]
    done = subprocess.run(
        [shell, *options, lines[shell]], cwd=SAMPLES, env=environment, capture_output=True, text=True, check=False
    )
    assert "layer2.0.bn1" in done.stdout, done.stderr
    assert "layer2.0.bn2" in done.stdout
    assert "downsample" not in done.stdout


def test_completion_imports_neither_torch_nor_numpy() -> None:
    done = programs.run("completions", cwd=SAMPLES)
    assert done.stderr == ""
    assert done.stdout.split()[0] == "layer1.\\*"
    assert "inception" in done.stdout.split()


def test_installing_ends_with_0(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "--norc", "-c", "bntool --install-completion; echo $?"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert (tmp_path / ".bash_completions" / "bntool.sh").is_file()
