"""Tensors that are no plain numbers, in every role of a convolution and its BatchNorm, through every command."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main

ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda t: torch.atleast_1d(t).to_sparse(),
    "meta": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "quantized": lambda t: torch.quantize_per_tensor(torch.atleast_1d(t).float(), 0.1, 0, torch.qint8),
    "bool": lambda t: t.bool(),
    "empty": lambda t: t.reshape(-1)[:0],
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "uint16": lambda t: t.to(torch.uint16),
}
COMMANDS = (
    ("inspect", "ODD"),
    ("diff", "ODD", "PLAIN"),
    ("fold", "ODD", "--pair", "conv=norm", "--eps", "1e-5"),
    ("freeze", "ODD"),
    ("freeze", "ODD", "--as", "constant", "--eps", "1e-5"),
    ("convert", "ODD", "--to", "frozen-batchnorm", "--eps", "1e-5", "--target-eps", "1e-3"),
    ("convert", "ODD", "--to", "safetensors"),
    ("convert", "ODD", "--add-prefix", "net."),
    ("average", "ODD", "PLAIN"),
    ("average", "PLAIN", "ODD"),
    ("average", "ODD", "ODD"),
    ("average", "PLAIN", "PLAIN", "--statistics-from", "ODD"),
)
ROLES = ("conv.weight", "conv.bias", "norm.weight", "norm.running_var", "norm.num_batches_tracked")
WORDS = (ExitCode.DONE, ExitCode.FINDINGS, ExitCode.FILE, ExitCode.REFUSED)


@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_left_alone_or_refused_by_name(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = nn.Sequential()
    net.conv, net.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    plain = net.state_dict()
    torch.save(plain, tmp_path / "plain.pt")
    for name in ROLES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are deprecated
            torch.save({**plain, name: ODD[kind](plain[name])}, tmp_path / "odd.pt")
        for number, command in enumerate(COMMANDS):
            places = {"ODD": str(tmp_path / "odd.pt"), "PLAIN": str(tmp_path / "plain.pt")}
            output = tmp_path / f"{number}.out"
            wanted = [] if command[0] in ("inspect", "diff") else ["-o", str(output)]
            code = main([places.get(word, word) for word in command] + wanted)
            said = capsys.readouterr().err
            assert code in WORDS, (name, command, code, said)
            assert output.exists() == (bool(wanted) and code == ExitCode.DONE), (name, command, said)
            # one that stops the command is named, or its layer
            assert code in (ExitCode.DONE, ExitCode.FINDINGS) or "norm" in said or "conv" in said, (name, command, said)
            output.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("first", "second"), [*itertools.permutations((torch.float32, torch.int64, torch.complex64), 2)]
)
def test_an_average_never_takes_one_of_two_dtypes(
    first: torch.dtype, second: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, dtype in enumerate((first, second)):
        torch.save({"weight": torch.arange(4).to(dtype)}, tmp_path / f"{number}.pt")
    files = [str(tmp_path / f"{number}.pt") for number in (0, 1)]
    assert main(["average", *files, "-o", str(tmp_path / "out.pt")]) == ExitCode.REFUSED
    assert "weight" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
