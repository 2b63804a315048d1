"""A source that is written to while it is read gives an error and no file; one that is replaced gives the old bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch

from bntool.checkpoints.formats import FORMATS
from bntool.checkpoints.outputs import OutputFiles
from bntool.cli.main import main
from tests.checkpoints.samples import WRITERS, tiny_net

FORMAT_OF = {format_.name: format_ for format_ in FORMATS}


def files_of(place: Path) -> list[Path]:
    folder = place if place.is_dir() else place.parent
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def overwrite(path: Path) -> None:
    """Other bytes in the second half, in place: each with one bit flipped, so that numbers stay near what they were."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(data) // 2)
        file.write(bytes(byte ^ 1 for byte in data[len(data) // 2 :]))


def overwrite_and_set_back(path: Path) -> None:
    """The same, with the times that the file had."""
    status = path.stat()
    overwrite(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def when_writing_begins(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Call something once, when the first output is opened."""
    begin, done = OutputFiles.open, []

    def begin_and_change(self: OutputFiles, path: Path) -> IO[bytes]:
        if not done:
            done.append(path)
            change()
        return begin(self, path)

    monkeypatch.setattr(OutputFiles, "open", begin_and_change)


COMMANDS = {
    "convert": ["convert", "--to", "safetensors"],
    "fold": ["fold", "--pair", "0=1", "--eps", "1e-5", "--layout", "same-keys"],
}


@pytest.mark.parametrize("change", [overwrite, overwrite_and_set_back, append])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", WRITERS)
def test_a_source_that_changes_is_noticed(
    name: str,
    command: str,
    change: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    format_ = FORMAT_OF[name]
    if format_.read_only and (command == "fold" or not format_.is_pytorch):
        pytest.skip("nothing is written from it")
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    source = Path(WRITERS[name](tiny_net().state_dict(), tmp_path / "in"))
    largest = max(files_of(source), key=lambda path: path.stat().st_size)
    when_writing_begins(monkeypatch, lambda: change(largest))
    target = tmp_path / "out" / ("out.safetensors" if command == "convert" else source.name)
    assert main([COMMANDS[command][0], str(source), *COMMANDS[command][1:], "-o", str(target)]) in (3, 5)
    assert not list((tmp_path / "out").iterdir())
    assert largest.name in capsys.readouterr().err or name in ("sharded", "distributed")


@pytest.mark.parametrize("name", ["torch-zip", "torch-legacy", "safetensors", "numpy-pickle"])
def test_a_source_that_is_replaced_gives_the_bytes_of_before(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    source = Path(WRITERS[name](tiny_net().state_dict(), tmp_path / "in"))
    shutil.copy(source, tmp_path / "kept")
    (tmp_path / "new").write_bytes(b"another file")
    when_writing_begins(monkeypatch, lambda: (tmp_path / "new").replace(source) and None)
    target = tmp_path / "out.pt"
    assert main(["convert", str(source), "--to", "torch", "-o", str(target)]) == 0
    shutil.copy(tmp_path / "kept", source)
    assert main(["convert", str(source), "--to", "torch", "-o", str(tmp_path / "again.pt")]) == 0
    found, wanted = torch.load(target), torch.load(tmp_path / "again.pt")
    assert all(torch.equal(found[key], wanted[key]) for key in {*found, *wanted})


def test_reading_alone_does_not_count_as_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(WRITERS["torch-zip"](tiny_net().state_dict(), tmp_path))
    when_writing_begins(monkeypatch, lambda: source.read_bytes() and None)
    assert main(["convert", str(source), "--to", "safetensors", "-o", str(tmp_path / "out.safetensors")]) == 0
