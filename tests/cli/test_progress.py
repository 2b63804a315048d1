"""How far long work is: a line every ten seconds in a log, one line that is erased on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bntool.cli import progress as module
from bntool.cli.main import main
from bntool.cli.progress import show_progress
from bntool.progress import Progress
from tests.places import ROOT, SAMPLES
from tests.programs import copy_user_code
from tests.programs.forking import ForkedProcess

PHASES = ("before", "pooled statistics", "after")


class Log(io.StringIO):
    """A stream that says when a line is written."""

    def __init__(self) -> None:
        super().__init__()
        self.line = threading.Semaphore(0)

    def write(self, text: str) -> int:
        written = super().write(text)
        if text.endswith("\n"):
            self.line.release()
        return written


def work(
    *, as_json: bool = False, quiet: bool = False, total: int | None = 100, wait: Callable[[], object] = lambda: None
) -> None:
    with show_progress(as_json=as_json, quiet=quiet) as tell:
        for phase in PHASES:
            for done in (0, 50, 100):
                tell(Progress(phase, done, total, PHASES))
                wait()


@pytest.mark.parametrize("total", [100, None])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_log_says_how_far_the_work_is(monkeypatch, total: int | None, as_json: bool) -> None:
    def wait() -> None:
        for _ in range(2):  # the first may have been on its way before
            assert log.line.acquire(timeout=600)

    monkeypatch.setattr(module, "_LOG_INTERVAL", 0.01)
    monkeypatch.setattr("bntool.reports.progress.time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr("sys.stderr", log := Log())
    work(as_json=as_json, total=total, wait=wait)
    lines = log.getvalue().splitlines()
    assert all(line.startswith("bntool: ") for line in lines)
    how_far = "50 of 100 samples, 0 s left" if total else "50 samples, 0 s"
    assert any(re.fullmatch(f"bntool: pooled statistics: {how_far}", line) for line in lines)
    assert {line.split(":")[1].strip() for line in lines} == set(PHASES)
    assert ("of 100" in "".join(lines)) == (total is not None)


def test_short_work_says_nothing(monkeypatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    work()
    assert log.getvalue() == ""


def test_quiet_is_quiet_and_other_ranks_are(monkeypatch) -> None:
    monkeypatch.setattr(module, "_LOG_INTERVAL", 0.001)
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    work(quiet=True, wait=lambda: time.sleep(0.01))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    work(wait=lambda: time.sleep(0.01))
    assert log.getvalue() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="terminals")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_terminal_is_left_as_if_nothing_had_been_shown(tmp_path: Path, workers: int) -> None:
    copy_user_code("slow", tmp_path)
    torch.save(torch.nn.ModuleDict({"bn": torch.nn.BatchNorm1d(2)}).state_dict(), tmp_path / "in.pt")
    options = ["--workers", str(workers), "--batch-size", "4", "--dry-run"]
    command = ["recalibrate", "in.pt", "--model", "slow.py:Announced", "--data", "slow.py:Samples", *options]
    command = [sys.executable, "-m", "bntool", *command]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    terminal, its = pty.openpty()
    with open(its, "r+b", buffering=0) as streams:
        # one process is started as users start it
        start = subprocess.Popen if workers else ForkedProcess
        child = start(command, stdin=streams, stdout=streams, stderr=streams, env=environment, cwd=tmp_path)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 1 << 16)
        except OSError:
            break
    os.close(terminal)
    text = shown.decode()
    assert child.wait() == 0, text
    assert "importing torch" in text or not workers  # the forked one has imported it
    assert "pooled statistics: " in text
    assert "━" in text
    assert "the user says this" in text
    assert text.count("item 39") >= 3
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    result = text[text.rindex("\x1b[?25h") :]
    assert "nothing was written" in result
    assert "samples, " not in result


def test_a_process_that_is_forked_later_keeps_its_streams(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    in_child: list[Callable[[], None]] = []
    monkeypatch.setattr(os, "register_at_fork", lambda *, after_in_child: in_child.append(after_in_child))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with show_progress(as_json=False, quiet=False):
        assert sys.stderr is not terminal
        in_child[0]()
        assert sys.stderr is terminal
    monkeypatch.setattr("sys.stderr", later := io.StringIO())
    in_child[0]()
    assert sys.stderr is later


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["inspect", "{}", "--verify-crc"], {"computing checksums"}),
        (["inspect", "{}", "--stats"], {"reading the tensors"}),
        (["diff", "{}", "{}"], {"comparing tensors"}),
        (["inspect", "{}"], set()),
    ],
)
def test_what_reads_large_files_whole_says_how_far_it_is(
    monkeypatch, tmp_path: Path, arguments: list[str], lines: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for size, said in ((1, lines), (1 << 40, set())):
        monkeypatch.setattr(module, "_LARGE", size)
        seen: list[Progress] = []
        monkeypatch.setattr(module._DrawnWork, "update", lambda self, progress, seen=seen: seen.append(progress))
        assert main([word.format(SAMPLES / "digits.pt") for word in arguments]) == 0
        assert {progress.phase for progress in seen} == said
        counts = [progress.done for progress in seen if progress.total]
        assert counts == sorted(counts)
        assert all(progress.unit == "byte" and progress.done < progress.total for progress in seen if progress.total)
