"""What is shown on terminals and in pipes, held as snapshots.

``UPDATE_SNAPSHOTS=1 make test`` writes them anew; look at the difference.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
import torch

from bntool.cli.main import main
from tests import programs
from tests.places import ROOT, SAMPLES

SNAPSHOTS = ROOT / "tests" / "snapshots"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(arguments: list[str], monkeypatch: pytest.MonkeyPatch, *, columns: int | None, **environment: str) -> str:
    stream: io.StringIO = io.StringIO() if columns is None else Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    if columns is not None:
        environment = {"COLUMNS": str(columns), **environment}
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(SAMPLES)
    main(arguments)
    return stream.getvalue()


BROKEN = ["inspect", "broken_nan_variance.pt"]
RUN = ["inspect", "digits.pt", "dead_channels.pt", "drifted.pt", "broken_nan_variance.pt", "digits_module.pt"]
DIFF = ["diff", "digits.pt", "drifted.pt", "--expect", "norm-eval"]
FREEZE = ["freeze", "digits.pt", "--emit", "python", "--layers", "layer1.*"]
FOLD = ["fold", "digits.pt", "--pair", "conv1=bn1", "--pair", "layer1.0.conv1=layer1.0.bn1", "--eps", "1e-5"]
RECALIBRATE = ["recalibrate", "drifted.pt", "--model", "digits_net.py:build", "--data", "digits_train.npz"]
# columns: None for a pipe
CASES: dict[str, tuple[list[str], int | None, dict[str, str]]] = {
    "inspect-broken-80": (BROKEN, 80, {}),
    "inspect-broken-120": (BROKEN, 120, {}),
    "inspect-broken-200": (BROKEN, 200, {}),
    "inspect-broken-pipe": (BROKEN, None, {}),
    "inspect-broken-pipe-force-color": (BROKEN, None, {"FORCE_COLOR": "1", "COLUMNS": "100"}),
    "inspect-training-pipe": (["inspect", "digits_training.pt"], None, {}),
    "inspect-dead-80-no-color": (["inspect", "dead_channels.pt"], 80, {"NO_COLOR": "1"}),
    "inspect-drifted-60": (["inspect", "drifted.pt"], 60, {"NO_COLOR": "1"}),
    "inspect-drifted-48": (["inspect", "drifted.pt"], 48, {"NO_COLOR": "1"}),
    "inspect-drifted-dumb": (["inspect", "drifted.pt"], 120, {"TERM": "dumb"}),
    "inspect-module-all-80": (["inspect", "digits_module.pt", "--all", "--layers", "layer1.0*"], 80, {}),
    "inspect-stats-120": (["inspect", "digits.safetensors", "--stats", "--layers", "neck*"], 120, {"NO_COLOR": "1"}),
    "inspect-run-80": (RUN, 80, {}),
    "inspect-run-120-no-color": (RUN, 120, {"NO_COLOR": "1"}),
    "inspect-run-200": (RUN, 200, {}),
    "inspect-run-pipe": (RUN, None, {}),
    "diff-80": (DIFF, 80, {}),
    "diff-120-no-color": (DIFF, 120, {"NO_COLOR": "1"}),
    "diff-pipe": (DIFF, None, {}),
    "diff-200": (DIFF, 200, {}),
    "fold-80": ([*FOLD, "--dry-run"], 80, {}),
    "fold-120-no-color": ([*FOLD, "--dry-run"], 120, {"NO_COLOR": "1"}),
    "fold-pipe": ([*FOLD, "--dry-run"], None, {}),
    "recalibrate-80": ([*RECALIBRATE, "--samples", "64", "--dry-run"], 80, {}),
    "recalibrate-120-no-color": ([*RECALIBRATE, "--samples", "64", "--dry-run"], 120, {"NO_COLOR": "1"}),
    "freeze-120": (["freeze", "digits_training.pt", "--dry-run"], 120, {}),
    "freeze-emit-80": (FREEZE, 80, {}),
    "freeze-emit-pipe": (FREEZE, None, {}),
    "convert-80": (["convert", "digits_training.pt", "--to", "safetensors", "--dry-run"], 80, {}),
    "help-80": (["--help"], 80, {}),
    "help-inspect-120": (["inspect", "--help"], 120, {}),
    "help-inspect-pipe": (["inspect", "--help"], None, {"COLUMNS": "100"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_terminal_shows_what_it_showed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, columns, environment = CASES[name]
    text = shown(arguments, monkeypatch, columns=columns, **environment)
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text)
    assert text == path.read_text()
    is_coloured = (columns is not None or "FORCE_COLOR" in environment) and environment.get("TERM") != "dumb"
    assert ("\x1b[" in text) == is_coloured
    if "NO_COLOR" in environment:  # bold and dim are no colours
        assert not re.search(r"\x1b\[[0-9;]*[349][0-7]", text)
    if columns is not None and "--emit" not in arguments:
        assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines())) <= columns


def write_deep_network(path: Path) -> None:
    """Sixty layers in four stages, two of them sick; the same numbers on every machine."""
    tensors: dict[str, torch.Tensor] = {}
    for number in range(60):
        channels = 16 << number // 15
        waves = torch.arange(channels, dtype=torch.float64).mul(0.7 + number).sin()
        name = f"layer{1 + number // 15}.{number % 15}.bn1"
        tensors[f"{name.removesuffix('bn1')}conv1.weight"] = torch.ones(channels, 1, 1, 1)
        tensors[f"{name}.weight"] = (1 + 0.2 * waves).float()
        tensors[f"{name}.bias"] = (0.1 * waves).float()
        tensors[f"{name}.running_mean"] = waves.float()
        tensors[f"{name}.running_var"] = (10 ** (waves - number / 60)).float()
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(9000)
    tensors["layer3.4.bn1.running_var"][7] = float("nan")
    tensors["layer4.11.bn1.running_var"][3] = 1e9
    torch.save(tensors, path)


@pytest.mark.parametrize(("columns", "colour"), [(80, True), (120, True), (120, False), (200, True)])
def test_layers_of_a_stage_share_a_row(
    columns: int, colour: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_deep_network(tmp_path / "deep.pt")
    monkeypatch.setattr("tests.cli.test_terminal.SAMPLES", tmp_path)
    text = shown(["inspect", "deep.pt"], monkeypatch, columns=columns, **({} if colour else {"NO_COLOR": "1"}))
    path = SNAPSHOTS / f"inspect-grouped-{columns}{'' if colour else '-no-color'}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text)
    assert text == path.read_text()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert plain.count("layer1") == 1  # sixty layers are some rows
    assert max(map(len, plain.splitlines())) <= columns


def test_python_to_paste_is_never_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder with a very long name and several spaces in it so that lines must break somewhere"
    folder.mkdir()
    path, out = folder / "m.pt", folder / "out.pt"
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict(), path)
    for command in (
        ["freeze", str(path), "-o", str(out)],
        ["fold", str(path), "--pair", "0=1", "--eps", "1e-5", "-o", str(out), "--force"],
        ["convert", str(path), "--to", "torch", "-o", str(out), "--force"],
    ):
        text = re.sub(r"\x1b\[[0-9;]*m", "", shown(command, monkeypatch, columns=80))
        lines = [line for line in text.splitlines() if repr(str(out)) in line]
        code = [line for line in lines if not line.strip().startswith("bntool ")]  # those are for a shell
        assert code, text
        for line in code:
            compile(line.strip(), "pasted", "exec")
        assert f"wrote {out}" in text.splitlines()


def test_pipes_import_no_rich(tmp_path: Path) -> None:
    sample, out = str(SAMPLES / "digits.pt"), str(tmp_path / "out.pt")
    commands = (
        ["inspect", sample],
        ["inspect", sample, "--json"],
        ["inspect", "--help"],
        ["diff", sample, sample],
        ["freeze", sample, "-o", out],
        ["convert", sample, "--to", "safetensors", "--dry-run"],
        ["fold", sample, "--pair", "conv1=bn1", "--eps", "1e-5", "--dry-run"],
        ["inspect", "nowhere.pt"],
    )
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    together = [word for command in commands for word in (*command, ";")][:-1]
    loaded = programs.list_loaded(*together, code=3, env={**environment, "PYTHONPATH": str(ROOT)})
    assert not {"rich", "pygments"} & loaded
