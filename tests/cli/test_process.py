"""How the process ends, and what becomes of streams that are closed."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bntool.__main__ import _start_few_threads
from bntool.cli.main import main
from tests import programs
from tests.places import ROOT, SAMPLES
from tests.programs import copy_user_code, run_bntool

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shells and signals")
BNTOOL = f"{sys.executable} -m bntool"


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", line], check=False, cwd=cwd, capture_output=True, text=True, timeout=600, env=environment
    )


def make_model(folder: Path) -> None:
    copy_user_code("late_model", folder)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(net.state_dict(), folder / "in.pt")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("shape", "code"), [("1,3,8,8", 0), ("1,5,8,8", 6)])
def test_what_the_users_code_left_is_brought_to_its_end(model: Path, shape: str, code: int) -> None:
    arguments = f"fold in.pt --model late_model.py:build --input-shape {shape} --dry-run -q"
    # one process is started as users start it
    done = shell(f"{BNTOOL} {arguments}", model) if code == 0 else run_bntool(*arguments.split(), cwd=model, code=code)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == ["thread", "function for the end"]
    assert (model / "text").read_text() == "not flushed"
    assert (model / "raw").read_bytes() == b"bytes"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_numpy_starts_no_threads_where_no_code_of_the_user_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = "import os, numpy; print(len(os.listdir('/proc/self/task')))"
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    for options, few in (([], True), (["--model", "a.py:b"], False), (["--data=a.py:c"], False)):
        monkeypatch.setattr(sys, "argv", ["bntool", "fold", "a.pt", *options])
        with monkeypatch.context() as undone:
            undone.setenv("OPENBLAS_NUM_THREADS", "0")
            undone.delenv("OPENBLAS_NUM_THREADS")
            _start_few_threads()
            assert (os.environ.get("OPENBLAS_NUM_THREADS") == "1") == few
            if few:
                counted = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
                assert counted.stdout.strip() == "1"
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    monkeypatch.setattr(sys, "argv", ["bntool", "inspect", "a.pt"])
    _start_few_threads()
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_nobodys_files(model: Path, closed: str) -> None:
    done = shell(f"{BNTOOL} inspect {SAMPLES / 'digits.pt'} {closed}", model)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    done = shell(f"{BNTOOL} fold in.pt --pair 0=1 --eps 1e-5 -o out.pt {closed}", model)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(torch.load(model / "out.pt", weights_only=True)) == 2


@pytest.mark.parametrize("options", ["", "--json", "--all", "--json --fail-on notice"])
def test_a_reader_that_goes_early_changes_no_exit_code(tmp_path: Path, options: str) -> None:
    command = f"{BNTOOL} inspect {SAMPLES / 'dead_channels.pt'} {options}"
    done = shell(f"({command}; echo $? >&2) | sleep 0", tmp_path)
    *reasons, code = done.stderr.splitlines()
    assert code == ("1" if "--fail-on" in options else "0")
    assert bool(reasons) == ("--fail-on" in options)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_writing_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    arguments = ["freeze", SAMPLES / "digits.pt", "-o", tmp_path / "o.pt"]
    process = programs.start("command_that_waits", *arguments)
    with process.stdout, process.stderr:
        assert process.stdout.readline() == "writing\n"
        assert list(tmp_path.iterdir())
        process.send_signal(sent)
        said = process.stderr.read()
    assert process.wait() == (130 if sent == signal.SIGINT else -sent)
    assert said == "bntool: error: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", ["", "--force"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "link to a device", "link to a file", "link to nothing"])
def test_only_regular_files_are_replaced(
    model: Path, kind: str, options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model)
    place = model / "out.pt"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(place))
    elif kind == "device":
        try:
            os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    else:
        place.symlink_to({"link to a device": "/dev/null", "link to a file": "in.pt"}.get(kind, "nowhere"))
    before = place.lstat()
    code = main(["freeze", "in.pt", "-o", "out.pt", *options.split()])
    assert code == (2 if kind == "link to a file" else 3)  # which is the input here
    assert "out" in capsys.readouterr().err
    assert (place.lstat().st_ino, place.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert not [path for path in model.iterdir() if path.name[0] == "."]


WRONG = [
    ("recalibrate in.pt --model late_model.py:build --data x.npz", "-o OUT"),
    ("recalibrate in.pt -o o.pt", "--model SPEC"),
    ("recalibrate in.pt --model timm:resnet18 --data x.npz -o o.pt", "pip install timm"),
    ("recalibrate in.pt --model what --data x.npz -o o.pt", "cannot be understood"),
    ("recalibrate in.pt --model none.py:build --data x.npz -o o.pt", "no such file"),
    ("recalibrate in.pt --model late_model.py:build --data folder -o o.pt", "bntool[images]"),
    ("recalibrate in.pt --model late_model.py:build --data x.npz -o o.pt --model-arg x", "NAME=VALUE"),
    ("recalibrate in.pt --model late_model.py:build --data x.npz -o o.pt --samples x", "at least 1"),
    ("recalibrate in.pt --model late_model.py:build --data in.pt -o in.pt", "output is the input"),
    ("fold in.pt --model late_model.py:build", "-o OUT"),
    ("fold in.pt --model mmdet:in.pt -o o.pt", "pip install mmdet"),
    ("fold in.pt --model late_model.py:build --export o.onnx --input-shape 1,3,8,8", "bntool[onnx]"),
    ("fold in.pt --export o.onnx", "give --model"),
    ("fold in.pt --model late_model.py:build --export o.pt2", "give --input-shape"),
    ("fold in.pt --benchmark -o o.pt", "give --model"),
    ("fold in.pt --model late_model.py:build --tolerance 0 -o o.pt", "positive"),
    ("fold in.pt --model late_model.py:build -o in.pt", "output is the input"),
    ("fold in.pt --model late_model.py:build --pair a -o o.pt", "PRODUCER=BATCHNORM"),
]


@pytest.fixture(scope="module")
def said_of_wrong_commands(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, bool]]:
    folder = tmp_path_factory.mktemp("wrong")
    make_model(folder)
    (folder / "folder").mkdir()
    lines = "\n".join(arguments for arguments, _ in WRONG)
    done = programs.run("commands_without_torch", input=lines, cwd=folder)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[arguments for arguments, _ in WRONG])
def test_what_is_wrong_with_a_command_is_said_before_torch_is_imported(
    said_of_wrong_commands: list[tuple[int, str, bool]], number: int
) -> None:
    code, said, imported = said_of_wrong_commands[number]
    assert code == 2, said
    assert WRONG[number][1] in said
    assert not imported
