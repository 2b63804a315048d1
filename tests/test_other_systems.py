"""What Linux has alone is hidden: everything works without it, and writes the same bytes.

The tests run on Linux; other systems have more differences than these. docs/install.md says where what was run.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bntool
from bntool.checkpoints import outputs
from bntool.checkpoints.addresses import Address, as_location
from bntool.checkpoints.containers.limits import limited_memory
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.remote import cache
from bntool.cli import interrupts
from bntool.cli.main import main
from bntool.data.source import DataOptions
from bntool.errors import RefusedError, UnwritableFileError
from bntool.recalibration.exact import memory
from bntool.shells import join_words
from tests.places import ROOT, SAMPLES

Patch = pytest.MonkeyPatch
PAIR = ["--pair", "conv1=bn1", "--eps", "1e-5"]
COMMANDS = [
    ["inspect", "--verify-crc"],
    ["freeze", "-o", "frozen.pt"],
    ["fold", *PAIR, "-o", "folded.pt"],
    ["convert", "--to", "safetensors", "-o", "converted.safetensors"],
]


def refuse(*_: object, **__: object) -> None:
    raise OSError("not on this file system")


def hide_flags(patch: Patch) -> None:
    """Systems without them have no fcntl."""
    for name in ("O_NONBLOCK", "O_NOFOLLOW"):
        patch.delattr(os, name, raising=False)
    patch.setitem(sys.modules, "fcntl", None)


HIDDEN: dict[str, Callable[[Patch], None]] = {
    "pread": lambda patch: patch.delattr(os, "pread"),
    "copy_file_range": lambda patch: patch.delattr(os, "copy_file_range"),
    "copies within the kernel": lambda patch: patch.setattr(os, "copy_file_range", refuse),
    "sync_file_range": lambda patch: patch.setattr(outputs, "_find_sync_file_range", lambda: None),
    "writev": lambda patch: patch.delattr(os, "writev"),
    "O_NONBLOCK and O_NOFOLLOW": hide_flags,
    "hard links": lambda patch: patch.setattr(os, "link", refuse),
    "locks": lambda patch: patch.setitem(sys.modules, "fcntl", None),
    "resource": lambda patch: patch.setitem(sys.modules, "resource", None),
    "register_at_fork": lambda patch: patch.delattr(os, "register_at_fork"),
    "/proc": lambda patch: hide_files(patch, "/proc", "/sys"),
}


def hide_files(patch: Patch, *folders: str) -> None:
    """As if they were not there."""
    given = io.open

    def open_others(file: object, *arguments: object, **options: object) -> object:
        if str(file).startswith(folders):
            raise FileNotFoundError(file)
        return given(file, *arguments, **options)

    patch.setattr(io, "open", open_others)
    patch.setattr(builtins, "open", open_others)


def hide(patch: Patch, name: str) -> None:
    for one in HIDDEN if name == "all of them" else [name]:
        if one != "copies within the kernel" or name != "all of them":
            HIDDEN[one](patch)


def run_commands(folder: Path) -> dict[str, bytes]:
    """All files that the commands write there."""
    folder.mkdir()
    for name, *options in COMMANDS:
        arguments = [str(folder / option) if "." in option and option != "1e-5" else option for option in options]
        assert main([name, str(SAMPLES / "digits.pt"), *arguments, "--quiet"]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return run_commands(tmp_path_factory.mktemp("linux") / "files")


@pytest.mark.parametrize("name", [*HIDDEN, "all of them"])
def test_commands_do_without(name: str, written: dict[str, bytes], tmp_path: Path, monkeypatch: Patch) -> None:
    hide(monkeypatch, name)
    assert run_commands(tmp_path / "files") == written
    assert main(["freeze", str(SAMPLES / "drifted.pt"), "-o", str(tmp_path / "files" / "frozen.pt"), "--quiet"]) == 3
    assert main(["freeze", str(SAMPLES / "drifted.pt"), "-o", str(tmp_path / "files" / "frozen.pt"), "--force"]) == 0
    assert bntool.diff(SAMPLES / "drifted.pt", tmp_path / "files" / "frozen.pt").identical


def test_nothing_is_renamed_or_removed_while_it_is_open(tmp_path: Path, monkeypatch: Patch) -> None:
    """Windows refuses that."""
    hide(monkeypatch, "locks")  # they keep the file open, and Windows has none of them
    looked_at = []

    def check(path: Path) -> None:
        looked_at.append(path)
        for descriptor in Path("/proc/self/fd").iterdir():
            try:
                assert not path.samefile(descriptor), f"{path} is open"
            except FileNotFoundError:
                continue

    def guard(act: Callable[..., object]) -> Callable[..., object]:
        def guarded(path: Path, *arguments: object) -> object:
            check(path)
            return act(path, *arguments)

        return guarded

    for name in ("replace", "unlink", "rename"):
        monkeypatch.setattr(Path, name, guard(getattr(Path, name)))
    run_commands(tmp_path / "files")
    run_commands(tmp_path / "again")
    for name, *options in COMMANDS[1:]:
        arguments = [
            str(tmp_path / "files" / option) if "." in option and option != "1e-5" else option for option in options
        ]
        assert main([name, str(SAMPLES / "digits.pt"), *arguments, "--force", "--quiet"]) == 0
    assert len(looked_at) > 6


def test_two_outputs_that_the_file_system_takes_for_one_are_refused(tmp_path: Path) -> None:
    """As ``out.pt`` and ``OUT.pt`` are where case does not matter; here by a link to the folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")

    def write(*, force: bool) -> None:
        with OutputFiles(force=force) as files:
            for name in ("folder", "link"):
                files.open(tmp_path / name / "out.pt").write(name.encode())

    for force in (False, True):
        with pytest.raises(UnwritableFileError):
            write(force=force)
        assert not list((tmp_path / "folder").iterdir())


def test_threads_share_a_file_without_pread(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.delattr(os, "pread")
    data = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(data)
    wrong = []
    with SourceFile(tmp_path / "file") as file:

        def read(start: int) -> None:
            places = range(start, len(data) - 1000, 7001)
            wrong.extend(at for at in places if file.read(at, 1000) != data[at : at + 1000])

        threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_signals_that_are_not_there_are_not_handled(monkeypatch: Patch) -> None:
    handled: list[int] = []
    for name in ("SIGHUP", "pthread_kill", "SIGCHLD"):
        monkeypatch.delattr(signal, name)
    monkeypatch.delattr(os, "register_at_fork")
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", lambda number, handler: handled.append(number))
    handler = interrupts.InterruptHandler()
    handler.install()
    assert handled == [signal.SIGTERM]
    handler._is_waiting = True
    interrupted = threading.Event()
    monkeypatch.setitem(sys.modules, "_thread", type("", (), {"interrupt_main": interrupted.set}))
    handler._remind()
    assert interrupted.is_set()


def test_memory_that_nothing_tells_of_is_unknown(monkeypatch: Patch) -> None:
    hide(monkeypatch, "/proc")
    hide(monkeypatch, "resource")
    assert memory.find_available(None) is None
    assert memory.find_thread_space() == 0
    with limited_memory(1):
        assert len(bytearray(1 << 24)) == 1 << 24


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii", "cp932"])
@pytest.mark.parametrize("drawn", [False, True])
def test_consoles_without_utf_8_show_everything(encoding: str, drawn: bool, tmp_path: Path, monkeypatch: Patch) -> None:
    torch.save(
        {"κανάλι.😀." + key: value for key, value in nn.BatchNorm2d(4).state_dict().items()}, tmp_path / "net.pt"
    )
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("COLUMNS", "100")
    if drawn:
        monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["inspect", str(tmp_path / "net.pt"), "--fail-on", "warning"]) == 1
    assert main(["inspect", str(tmp_path / "absent-κ.pt")]) == 3
    printed = out.buffer.getvalue().decode(encoding)
    assert "never-updated" in printed
    assert "\\U0001f600" in printed
    assert "absent-" in err.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("text", [r"C:\runs\net.pt", "C:/runs/net.pt", "c://net.pt", "./https:/net.pt", "net.pt"])
def test_paths_with_drives_are_no_addresses(text: str) -> None:
    assert isinstance(as_location(text), Path)
    assert isinstance(as_location("https://host/net.pt"), Address)


def test_globs_that_no_shell_has_expanded_name_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shells of Windows leave them to programs."""
    for name in ("epoch_10.pt", "epoch_9.pt", "other.pt", "[1].pt"):
        shutil.copy(SAMPLES / "digits.pt", tmp_path / name)
    assert main(["inspect", str(tmp_path / "epoch_*.pt"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [Path(file["file"]).name for file in shown["files"]] == ["epoch_10.pt", "epoch_9.pt"]
    assert main(["inspect", str(tmp_path / "[1].pt"), "--quiet"]) == 0
    assert main(["inspect", str(tmp_path / "none_*.pt")]) == 3
    assert "none_*.pt: there is no such file" in capsys.readouterr().err
    assert main(["average", str(tmp_path / "epoch_*.pt"), "-o", str(tmp_path / "out.pt"), "--quiet"]) == 0


@pytest.mark.parametrize("word", [r"C:\my runs\net.pt", 'say "so" now', "ends in \\ \\", "two words\\"])
def test_command_lines_are_quoted_as_windows_takes_them(word: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert join_words(["bntool", "inspect", word]) == subprocess.list2cmdline(["bntool", "inspect", word])
    assert join_words([r"C:\runs\net.pt"]) == r"C:\runs\net.pt"
    assert join_words(["a&b", "c%d%", "e'f"]) == '"a&b" c%d% "e\'f"'


def test_a_file_that_another_program_has_open_is_said_to_be(tmp_path: Path, monkeypatch: Patch, capsys) -> None:
    """As Windows refuses to replace one."""

    class SharingViolation(PermissionError):
        winerror = 32

    def refuse_to_replace(path: Path, target: Path) -> None:
        raise SharingViolation(13, "The process cannot access the file", str(target))

    (tmp_path / "out.pt").write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", refuse_to_replace)
    assert main(["freeze", str(SAMPLES / "digits.pt"), "-o", str(tmp_path / "out.pt"), "--force"]) == 3
    assert "another program has it open" in capsys.readouterr().err
    assert (tmp_path / "out.pt").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.pt"]


def test_bounded_memory_is_refused_where_it_cannot_be_given_back(tmp_path: Path, monkeypatch: Patch) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RefusedError, match="on Linux only; leave out --memory"):
        bntool.recalibrate(model, [torch.randn(4, 1, 8, 8)] * 2, method="exact", memory="1GB")


def test_cores_are_counted_without_affinity(monkeypatch: Patch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert DataOptions(batch_size=4).decoding_workers == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert DataOptions(batch_size=4).decoding_workers == 3


def test_caches_lie_where_each_system_keeps_them(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("BNTOOL_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for system, place in {
        "linux": ".cache/bntool",
        "darwin": "Library/Caches/bntool",
        "win32": "AppData/Local/bntool/Cache",
    }.items():
        monkeypatch.setattr(sys, "platform", system)
        assert cache.find_folder() == tmp_path / place


def test_no_text_is_read_or_written_in_the_encoding_of_the_system() -> None:
    """Which is UTF-8 here, and cp1252 on Windows."""
    found = []
    for path in (ROOT / "bntool").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(one.arg == "encoding" for one in node.keywords):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            mode = next((one.value for one in node.keywords if one.arg == "mode"), None)
            texts = [one.value for one in (*node.args, mode) if isinstance(one, ast.Constant)]
            is_binary = any(isinstance(one, str) and "b" in one for one in texts)
            opens = isinstance(node.func, ast.Name) and name == "open" and not is_binary
            if opens or (name == "read_text" and not node.args) or name == "write_text":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
