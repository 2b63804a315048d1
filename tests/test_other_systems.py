"""What Linux has alone is hidden: everything works without it, and writes the same bytes.

The tests run on Linux; other systems have more differences than these. docs/install.md says where what was run.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bntool
from bntool.checkpoints.addresses import Address, as_location
from bntool.checkpoints.containers.limits import limited_memory
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.outputs import OutputFiles
from bntool.cli import interrupts
from bntool.cli.main import main
from bntool.errors import UnwritableFileError
from bntool.recalibration.exact import memory
from tests.places import SAMPLES

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
