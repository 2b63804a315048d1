"""What is left on disk when writing goes wrong: the old file, or the new one, never half of one.

Every command that writes runs in a process of its own and is killed, starved of disk space, or raced.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bntool.checkpoints.formats import open_checkpoint
from bntool.cli.main import main
from tests import programs, random_kills
from tests.checkpoints.foreign import write_sharded
from tests.checkpoints.samples import tiny_net
from tests.permissions import ordinary_permissions
from tests.places import INTEROP, SAMPLES
from tests.random_kills import LIGHT

SOURCE = SAMPLES / "digits_training.pt"
MODEL = ["--model", f"{SAMPLES / 'digits_net.py'}:build"]
COMMANDS = {
    "freeze": ["freeze", str(SOURCE)],
    "convert": ["convert", str(SOURCE), "--to", "safetensors"],
    "fold": ["fold", str(SAMPLES / "digits.pt"), *MODEL, "--input-shape", "1,1,16,16"],
    "recalibrate": [
        *("recalibrate", str(SAMPLES / "drifted.pt"), *MODEL, "--data", str(SAMPLES / "digits_train.npz")),
        *("--samples", "32"),
    ],
}
TINY = [
    *("recalibrate", "in/norm.pt", "--model", "torch.nn:BatchNorm1d", "--model-arg", "num_features=2"),
    *("--data", "in/data.npz"),
]
PROGRESS = ("bntool: importing torch", "bntool: pooled statistics:")  # told on a slow machine
SHARDED = ["freeze", "in/model.safetensors.index.json", "-o", "out/model.safetensors.index.json"]
ONNX = ["fold", "in/onnx_tiny_ext.onnx", "-o", "out/folded.onnx"]
CAFFE = [
    "fold",
    "in/caffe_tiny_std.caffemodel",
    "--prototxt",
    "in/caffe_tiny_std.prototxt",
    "-o",
    "out/folded.caffemodel",
]


def _run(arguments: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        arguments, capture_output=True, text=True, timeout=600, check=False, **options
    )


def _holds_a_whole_file(path: Path) -> bool:
    with open_checkpoint(path) as checkpoint:
        checkpoint.format.verify_checksums(checkpoint)
        return bool(checkpoint.state_dicts)


def _leftovers(folder: Path) -> list[Path]:
    """Temporary files: hidden, and never by a name that a checkpoint has."""
    left = [path for path in folder.iterdir() if path.name.startswith(".")]
    assert all(path.suffix == ".writing" for path in left)
    return left


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        ([*COMMANDS["freeze"], "-o", "out/new"], 1),
        (["fold", str(SAMPLES / "digits.pt"), "--pair", "conv1=bn1", "--eps", "1e-5", "-o", "out/new"], 1),
        ([*TINY, "-o", "out/new"], 1),
        ([*COMMANDS["convert"], "-o", "out/new.safetensors"], 1),
        (SHARDED, 3),
        (ONNX, 2),
        (CAFFE, 2),
    ],
    ids=["freeze", "fold", "recalibrate", "convert", "sharded", "onnx", "caffe"],
)
def test_killed_at_every_step_of_appearing(arguments: list[str], files: int, tmp_path: Path) -> None:
    """Each file is the old one or the new one, whole; several files may be of both kinds after SIGKILL.

    Nothing else is left after SIGTERM, and by the next run after SIGKILL.
    """
    (tmp_path / "in").mkdir()
    for name in ("onnx_tiny_ext.onnx", "onnx_tiny_ext.data", "caffe_tiny_std.caffemodel", "caffe_tiny_std.prototxt"):
        shutil.copy(INTEROP / name, tmp_path / "in")
    write_sharded(tiny_net().state_dict(), tmp_path / "in")
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), tmp_path / "in" / "norm.pt")
    np.savez(tmp_path / "in" / "data.npz", images=np.eye(8, 2, dtype=np.float32))
    run = programs.run_forked if "recalibrate" in arguments else programs.run  # the others import no torch
    done = run("killed_command", "SIGKILL SIGTERM", *arguments, cwd=tmp_path)
    written, *moments = map(int, done.stdout.split()[-3:])
    assert written == files
    assert min(moments) > 4 * files  # each is made, brought to the disk, given its mode and its name


def test_killed_at_random_moments(tmp_path: Path) -> None:
    commands = {name: LIGHT[name] for name in ("freeze.pt", "convert.safetensors", "fold.pt")}
    assert random_kills.run(6, tmp_path, commands, megabytes=8).total() == 6


@pytest.mark.parametrize("command", ["freeze", "convert"])
def test_no_space_left(command: str, tmp_path: Path) -> None:
    target = tmp_path / "out.pt"
    target.write_bytes(b"the old file")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails with an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    arguments = [sys.executable, "-m", "bntool", *COMMANDS[command], "-o", str(target), "--force"]
    result = _run(arguments, preexec_fn=limit)
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert str(target) in result.stderr
    assert target.read_bytes() == b"the old file"
    assert _leftovers(tmp_path) == []


def test_a_full_device(tmp_path: Path) -> None:
    """A file system of its own, where this process may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = _run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)])
    if mounted.returncode:
        pytest.skip("this process cannot mount a file system")
    try:
        (place / "out.pt").write_bytes(b"the old file")
        result = _run([sys.executable, "-m", "bntool", *COMMANDS["freeze"], "-o", str(place / "out.pt"), "--force"])
        assert (result.returncode, "space" in result.stderr) == (3, True), result.stderr
        assert [path.name for path in place.iterdir()] == ["out.pt"]
        assert (place / "out.pt").read_bytes() == b"the old file"
    finally:
        _run(["umount", str(place)])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    try:
        with ordinary_permissions():
            assert main([*COMMANDS[command], "-o", str(folder / "out.pt")]) == 3
        assert "no permission" in capsys.readouterr().err
    finally:
        folder.chmod(0o755)


def _as_it_is(path: Path) -> Path:
    return path


def _by_link(path: Path) -> Path:
    link = path.with_name("link.pt")
    link.symlink_to(path)
    return link


def _by_hard_link(path: Path) -> Path:
    link = path.with_name("hard.pt")
    os.link(path, link)
    return link


def _by_another_path(path: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


@pytest.mark.parametrize("spell", [_as_it_is, _by_link, _by_hard_link, _by_another_path])
@pytest.mark.parametrize("command", ["freeze", "convert", "fold", "recalibrate"])
def test_the_output_is_never_the_input(
    command: str, spell: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.pt"
    source.write_bytes(Path(COMMANDS[command][1]).read_bytes())
    before = source.read_bytes()
    arguments = [COMMANDS[command][0], str(source), *COMMANDS[command][2:], "-o", str(spell(source)), "--force"]
    assert main([*arguments, "--json"]) == 2
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    assert "the output is the input" in facts["error"]["message"]
    assert source.read_bytes() == before
    assert _leftovers(tmp_path) == []


def test_two_writers_at_once(tmp_path: Path) -> None:
    """Without --force exactly one wins; the other says that the file appeared, or that it exists."""
    target = tmp_path / "out.pt"
    arguments = [sys.executable, "-m", "bntool", *COMMANDS["freeze"], "-o", str(target), "--quiet"]
    writers = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    messages = [writer.communicate()[1] for writer in writers]
    assert sorted(writer.returncode for writer in writers) == [0, 3, 3], messages
    assert all("--force" in message for message, w in zip(messages, writers, strict=True) if w.returncode)
    assert _holds_a_whole_file(target)
    assert _leftovers(tmp_path) == []


def test_recalibrate_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, before = tmp_path / "out.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        code = main([*COMMANDS["recalibrate"], "-o", str(target), "--json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    printed, told = capsys.readouterr()
    assert code == 3, told
    said = [line for line in told.splitlines() if not line.startswith(PROGRESS)]
    assert len(said) == 1, said
    assert json.loads(printed)["files"][0]["error"]["code"] == "unwritable"
    assert not target.exists()
    assert _leftovers(tmp_path) == []
