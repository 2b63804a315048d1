"""Reading by position and replacing atomically."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bntool.checkpoints import files, outputs
from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.files import CHUNK, SourceFile
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.saving import save_checkpoint
from bntool.errors import BntoolError, CorruptFileError, UnreadableFileError, UnwritableFileError, UsageError
from bntool.plan import Operation, Plan, SetTensor, Values
from tests import programs
from tests.checkpoints.foreign import write_safetensors, write_sharded, write_zip
from tests.checkpoints.samples import tiny_net
from tests.permissions import ordinary_permissions

# reading


def test_reads_exactly_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    with SourceFile(path) as source:
        assert source.size == 100
        assert source.read(10, 5) == bytes(range(10, 15))
        assert source.read(100, 0) == source.read(5, -1) == b""
        assert b"".join(source.chunks(0, 100)) == bytes(range(100))
        for offset, length in ((99, 2), (-1, 1), (200, 1), (0, 1 << 62)):
            with pytest.raises(CorruptFileError):
                source.read(offset, length)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "a folder"),
        (os.mkfifo, "not a regular file"),
        (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
        (lambda p: p.symlink_to("/dev/null"), "not a regular file"),
        (lambda p: p.symlink_to(p), "symbolic links"),
        (lambda p: p.symlink_to("nowhere"), "no such file"),
    ],
)
def test_what_is_no_file_is_one_clear_error(make: Any, words: str, tmp_path: Path) -> None:
    make(tmp_path / "f.pt")
    with pytest.raises(UnreadableFileError, match=words) as caught:
        open_checkpoint(tmp_path / "f.pt")
    assert caught.value.path == str(tmp_path / "f.pt")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "a/" * 3000, "\udfff"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError):
        open_checkpoint(tmp_path / name)
    source = write_zip(tiny_net().state_dict(), tmp_path)
    with pytest.raises(BntoolError):
        save_checkpoint(open_checkpoint(source), tmp_path / name)
    assert os.listdir(tmp_path) == ["model.pt"] or name == "\udfff"


def test_no_permission_to_read(tmp_path: Path) -> None:
    (tmp_path / "f.pt").touch(mode=0)
    with ordinary_permissions(), pytest.raises(UnreadableFileError, match="permission"):
        open_checkpoint(tmp_path / "f.pt")


def test_no_permission_to_enter_the_folder(tmp_path: Path) -> None:
    source = write_zip(tiny_net().state_dict(), tmp_path)
    tmp_path.chmod(0)
    try:
        with ordinary_permissions(), pytest.raises(UnreadableFileError, match="permission"):
            open_checkpoint(source)
    finally:
        tmp_path.chmod(0o700)


def test_no_permission_to_write(tmp_path: Path) -> None:
    source = write_zip(tiny_net().state_dict(), tmp_path)
    (tmp_path / "locked").mkdir(mode=0o500)
    with ordinary_permissions(), pytest.raises(UnwritableFileError, match="permission"):
        save_checkpoint(open_checkpoint(source), tmp_path / "locked" / "x.pt")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_safetensors(tiny_net().state_dict(), tmp_path)
    checkpoint = open_checkpoint(path)
    os.truncate(path, 300)
    for chunk_copy in (True, False):
        if not chunk_copy:
            checkpoint = _edited(checkpoint)
        with pytest.raises(UnreadableFileError, match="shorter"):
            save_checkpoint(checkpoint, tmp_path / "out.safetensors")
    assert os.listdir(tmp_path) == [path.name]


def test_a_read_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    path = write_zip(tiny_net().state_dict(), tmp_path)
    monkeypatch.setattr(SourceFile, "_read_once", fail)
    with pytest.raises(UnreadableFileError, match="input/output error"):
        open_checkpoint(path)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = SourceFile._read_once
    monkeypatch.setattr(SourceFile, "_read_once", lambda self, offset, length: read(self, offset, min(length, 7)))
    path = write_zip(tiny_net().state_dict(), tmp_path)
    save_checkpoint(open_checkpoint(path), tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == path.read_bytes()


def test_a_piece_that_was_read_is_not_taken_for_that_of_another_thread(tmp_path: Path) -> None:
    class Meanwhile(int):
        def __eq__(self, other: object) -> bool:
            source.read(4, 4)  # as another thread would, in the middle of it
            return int(self) == other

        __hash__ = int.__hash__

    (tmp_path / "file").write_bytes(b"abcdefgh")
    with SourceFile(tmp_path / "file") as source:
        assert [source.read(0, 4), source.read(Meanwhile(0), 4)] == [b"abcd"] * 2


@pytest.mark.parametrize("available", [True, False])
def test_copying_a_range(available: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(3 * CHUNK + 5)
    (tmp_path / "a").write_bytes(data)
    if not available:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    with SourceFile(tmp_path / "a") as source, (tmp_path / "b").open("w+b") as target:
        target.write(b"head")
        source.copy_to(target, offset=3, length=2 * CHUNK + 1)
        target.write(b"tail")
        target.seek(0)
        assert target.read() == b"head" + data[3 : 2 * CHUNK + 4] + b"tail"


# writing


def _edited(checkpoint: Any) -> Any:
    steps = (SetTensor("1.running_mean", Values((1, 2, 3, 4), (4,))),)
    return apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=steps))


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    with OutputFiles() as output:
        for name in ("a", "b"):
            output.open(tmp_path / name).write(name.encode())
        assert not (tmp_path / "a").exists()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"a", "b": b"b"}
    with pytest.raises(KeyboardInterrupt), OutputFiles() as output:  # noqa: PT012
        output.open(tmp_path / "c").write(b"c")
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no sync_file_range")
def test_bytes_go_to_the_disk_while_the_next_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, sent = outputs._find_sync_file_range(), []
    assert begin is not None

    def begin_and_note(descriptor: int, offset: int, length: int, flags: int) -> int:
        sent.append((offset, offset + length))
        return begin(descriptor, offset, length, flags)

    monkeypatch.setattr(outputs, "_find_sync_file_range", lambda: begin_and_note)
    monkeypatch.setattr(outputs, "_STEP", 1 << 20)
    monkeypatch.setattr(files, "_COPIED", 1 << 20)
    data = os.urandom(5 << 20)
    (tmp_path / "a").write_bytes(data)
    with SourceFile(tmp_path / "a") as source, OutputFiles() as output:
        stream = output.open(tmp_path / "b")
        for start in range(0, 3 << 20, CHUNK):
            stream.write(data[start : start + CHUNK])
        source.copy_to(stream, offset=3 << 20, length=2 << 20)
        stream.seek(7)  # as for a checksum that is known at the end
        stream.write(b"7")
    assert [start for start, _ in sent] == [0, *(end for _, end in sent[:-1])]  # all once, in order
    assert sent[-1][1] == 5 << 20
    assert len(sent) >= 4
    assert (tmp_path / "b").read_bytes() == data[:7] + b"7" + data[8:]


@pytest.mark.parametrize("has_writev", [True, False])
def test_a_stream_writes_and_reads_as_the_files_of_python_do(
    has_writev: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_writev:
        monkeypatch.delattr(os, "writev", raising=False)
    else:  # a kernel that takes a part of what it is given
        whole = os.writev
        monkeypatch.setattr(os, "writev", lambda descriptor, parts: whole(descriptor, [memoryview(parts[0])[:300_000]]))
    numbers = random.Random(0)
    with OutputFiles() as output, (tmp_path / "peer").open("w+b") as peer:
        stream = output.open(tmp_path / "file")
        for _ in range(100):
            size = numbers.choice((0, 1, 70, 1 << 14, CHUNK, 2 << 20, numbers.randrange(CHUNK)))
            data = numbers.randbytes(size)
            place = numbers.randrange(peer.tell() + 9)
            match numbers.randrange(9):
                case 0:
                    assert stream.seek(place) == peer.seek(place)
                    assert stream.read(size) == peer.read(size)
                case 1:
                    back = numbers.randrange(peer.tell() + 1)
                    assert stream.seek(-back, os.SEEK_CUR) == peer.seek(-back, os.SEEK_CUR)
                case 2:
                    assert stream.seek(0, os.SEEK_END) == peer.seek(0, os.SEEK_END)
                case 3:  # memory that is used for something else afterwards
                    changed = bytearray(data)
                    assert stream.write(memoryview(changed).toreadonly() if size < 70 else changed) == peer.write(data)
                    changed[:] = bytes(size)
                case _:
                    assert stream.write(data) == peer.write(data)
            assert stream.tell() == peer.tell()
        stream.seek(0)
        peer.seek(0)
        assert stream.read() == peer.read()
    assert (tmp_path / "file").read_bytes() == (tmp_path / "peer").read_bytes()


def test_if_one_file_cannot_appear_none_does(tmp_path: Path) -> None:
    with pytest.raises(UnwritableFileError, match="appeared"), OutputFiles() as output:  # noqa: PT012
        output.open(tmp_path / "a")
        output.open(tmp_path / "b")
        (tmp_path / "b").write_bytes(b"somebody else's")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"b": b"somebody else's"}


def test_files_that_were_replaced_come_back_when_a_later_one_fails(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    first.write_bytes(b"old")
    with pytest.raises(UnwritableFileError), OutputFiles(force=True) as output:  # noqa: PT012
        for path in (first, second, third):
            output.open(path).write(b"new")
        third.mkdir()
        (third / "kept").touch()
    assert first.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "third"]


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    source = write_zip(tiny_net().state_dict(), tmp_path)
    target = tmp_path / "out.pt"
    target.write_bytes(b"old")
    target.chmod(0o600)
    with pytest.raises(UnwritableFileError, match="--force"):
        save_checkpoint(open_checkpoint(source), target)
    assert target.read_bytes() == b"old"
    source.chmod(0o664)
    save_checkpoint(open_checkpoint(source), target, force=True)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o664
    dangling = tmp_path / "dangling.pt"
    dangling.symlink_to("nowhere")
    with pytest.raises(UnwritableFileError, match="--force"):
        save_checkpoint(open_checkpoint(source), dangling)


def test_without_a_mode_the_process_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_mask = os.umask
    previous = set_mask(0o027)
    monkeypatch.delattr(os, "umask")  # to ask for the mask is to set it, also for files that other threads make then
    try:
        with OutputFiles() as output:
            output.open(tmp_path / "a")
    finally:
        set_mask(previous)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("force", [True, False])
def test_the_input_is_never_the_output(force: bool, tmp_path: Path) -> None:
    source = write_zip(tiny_net().state_dict(), tmp_path)
    before = source.read_bytes()
    (tmp_path / "link.pt").symlink_to(source)
    os.link(source, tmp_path / "hard.pt")
    for name in ("model.pt", "link.pt", "hard.pt", "../" + tmp_path.name + "/model.pt"):
        with pytest.raises(UsageError, match="output is the input"):
            save_checkpoint(open_checkpoint(source), tmp_path / name, force=force)
    assert source.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["hard.pt", "link.pt", "model.pt"]


def test_a_shard_is_never_the_output(tmp_path: Path) -> None:
    source = write_sharded(tiny_net().state_dict(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="output is the input"):
        save_checkpoint(open_checkpoint(source), tmp_path / "other.safetensors.index.json", force=True)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("name", "words"), [("none/out.pt", "no folder"), ("folder", "existing folder"), ("model.pt/out.pt", "no folder")]
)
def test_places_where_nothing_can_be_written(name: str, words: str, tmp_path: Path) -> None:
    source = write_zip(tiny_net().state_dict(), tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnwritableFileError, match=words):
        save_checkpoint(open_checkpoint(source), tmp_path / name)


def test_long_names_can_be_written(tmp_path: Path) -> None:
    source = write_zip(tiny_net().state_dict(), tmp_path)
    for name in ("x" * 252 + ".pt", "界" * 84 + ".pt"):
        save_checkpoint(open_checkpoint(source), tmp_path / name)


@pytest.mark.parametrize("write", [write_zip, write_safetensors])
@pytest.mark.parametrize("allowed", [0, 100, 3000])
def test_a_full_disk_leaves_nothing_behind(write: Any, allowed: int, tmp_path: Path) -> None:
    source = write({**tiny_net().state_dict(), "big.weight": torch.zeros(200_000)}, tmp_path)
    edited = _edited(open_checkpoint(source))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
    try:
        with pytest.raises(UnwritableFileError) as caught:
            save_checkpoint(edited, tmp_path / "out.file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.path == str(tmp_path / "out.file")
    assert os.listdir(tmp_path) == [source.name]


def test_no_space_left_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write_zip(tiny_net().state_dict(), tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UnwritableFileError, match="no space is left"):
        save_checkpoint(open_checkpoint(source), tmp_path / "out.pt")
    assert os.listdir(tmp_path) == [source.name]


def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    source = write_zip(tiny_net().state_dict(), tmp_path)
    monkeypatch.setattr(os, "link", fail)
    save_checkpoint(open_checkpoint(source), tmp_path / "out.pt")
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "out.pt"]


@pytest.mark.parametrize("round_", range(8))
def test_of_two_writers_the_second_stops(round_: int, tmp_path: Path) -> None:
    """Neither takes the other's temporary file for one that a killed process left."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads meet in every gap
    source = write_zip(tiny_net().state_dict(), tmp_path)
    results: list[str] = []
    barrier = threading.Barrier(4)

    def write() -> None:
        barrier.wait()
        try:
            save_checkpoint(open_checkpoint(source), tmp_path / "out.pt")
            results.append("done")
        except UnwritableFileError:
            results.append("stopped")

    threads = [threading.Thread(target=write) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(results) == ["done", "stopped", "stopped", "stopped"]
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "out.pt"]


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    source = write_zip(tiny_net().state_dict(), tmp_path)
    (tmp_path / "broken.pt").write_bytes(source.read_bytes()[:-40])
    open_before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(20):
        open_checkpoint(source).close()
        save_checkpoint(open_checkpoint(source), tmp_path / "out.pt", force=True)
        with pytest.raises(CorruptFileError):
            open_checkpoint(tmp_path / "broken.pt")
    if open_before:
        assert len(os.listdir("/proc/self/fd")) <= open_before + 1
    assert files.CHUNK == CHUNK


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(("view", "copied"), [((1, 4, 1 << 22), 1 << 27), ((1 << 20, 4, 4), 4)])
def test_memory_stays_bounded_whatever_the_size(view: tuple[int, ...], copied: int, tmp_path: Path) -> None:
    """A tensor of 64 MiB is scaled, another is copied."""
    end = (1 << 26) + copied
    a = {"dtype": "F32", "shape": [1 << 24], "data_offsets": [0, 1 << 26]}
    b = {"dtype": "F32", "shape": [copied // 4], "data_offsets": [1 << 26, end]}
    header = json.dumps({"a.weight": a, "b.weight": b}).encode()
    source, target = tmp_path / "big.safetensors", tmp_path / "out.safetensors"
    with source.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
        stream.seek(8 + len(header))
        stream.write(torch.arange(4.0).numpy().tobytes())
    assert int(programs.run("scaled_file", source, target, *view).stdout) < 120
    with safetensors.safe_open(target, "pt") as written:
        assert written.get_slice("a.weight")[:5].tolist() == [0, 0.5, 1, 1.5, 0]
        assert set(written.keys()) == {"a.weight", "a.bias", "b.weight"}
    target.unlink()
