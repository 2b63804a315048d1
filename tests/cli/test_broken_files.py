"""What someone reads who was sent a broken file: one sentence that names it and says what to do, and exit code 3."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bntool.checkpoints.files import SourceFile
from bntool.cli.main import main
from bntool.errors import BntoolError
from tests.checkpoints.broken_files import BROKEN
from tests.checkpoints.foreign import rezip, save_distributed, write_sharded, write_zip
from tests.checkpoints.samples import tiny_net
from tests.permissions import ordinary_permissions
from tests.places import INTEROP, SAMPLES
from tests.schemas import read_document

RAW = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def read(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and the one sentence on stderr, without what begins each."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("bntool: warning: ")]
    assert len(lines) == 1, captured.err
    assert not RAW.search(captured.out + captured.err)
    assert lines[0].startswith("bntool: error: ")
    return code, lines[0].removeprefix("bntool: error: ")


@pytest.mark.parametrize("name", [name for name, (_, error, _) in BROKEN.items() if error is not None])
def test_a_broken_file_is_one_sentence_and_exit_code_3(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # reaching the real limits, which takes seconds, is tested where files are read
    monkeypatch.setattr("bntool.checkpoints.containers.pickles.reading.MAX_OBJECTS", 300_000)
    monkeypatch.setattr("bntool.checkpoints.torch.modules.MAX_EFFORT", 10_000)
    make, error, words = BROKEN[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = tmp_path / "in" / name
    path.write_bytes(make())
    code, sentence = read(capsys, "convert", path, "--to", "torch", "-o", tmp_path / "out" / "out.pt")
    assert code == 3
    assert sentence.startswith(str(tmp_path / "in"))
    assert re.search(words, sentence)
    assert error is BntoolError or sentence.endswith(("again", "first", "anew", "comes from"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["in", "out", name])
    code = main(["inspect", str(path), "--json"])  # which does not read the elements of tensors
    document = read_document(capsys.readouterr().out, "inspect")
    (facts,) = document["files"]
    assert code == (3 if "error" in facts else 0)
    if code:
        assert facts["error"]["message"] in sentence


def _no_permission(path: Path) -> Path:
    path.write_bytes(b"x")
    path.chmod(0)
    return path


def _made(path: Path, make: Callable[[Path], object]) -> Path:
    make(path)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.pt", "there is no such file"),
        (lambda folder: _made(folder / "x.pt", os.mkfifo), "a pipe or a device"),
        (lambda folder: _made(folder / "x.pt", lambda p: p.symlink_to("/dev/zero")), "a pipe or a device"),
        (lambda folder: _made(folder / "x.pt", lambda p: p.symlink_to(p)), "symbolic links"),
        (lambda folder: _made(folder / "x.pt", lambda p: p.write_bytes(b"")), "the file is empty"),
        (lambda folder: _no_permission(folder / "x.pt"), "no permission"),
        (lambda folder: folder / ("x" * 300), "too long"),
        (lambda folder: folder / "x\udcff.pt", "there is no such file"),  # a byte that is no UTF-8
        (lambda folder: folder, "nothing that is named like a checkpoint"),
    ],
)  # fmt: skip
def test_what_the_system_does_not_give(
    make: Callable[[Path], Path], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    for arguments in (["inspect", path], ["freeze", path, "--dry-run"]):
        with ordinary_permissions():
            code, sentence = read(capsys, *arguments)
        assert code == 3
        assert words in sentence


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tiny_net().state_dict(), tmp_path)
    opened = SourceFile.__init__

    def shrink(self: SourceFile, path: Path) -> None:
        opened(self, path)
        os.truncate(path, 100)

    monkeypatch.setattr(SourceFile, "__init__", shrink)
    code, sentence = read(capsys, "inspect", path)
    assert code == 3
    assert "became shorter while it was read" in sentence


def test_a_flipped_bit_in_a_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state_dict = tiny_net().state_dict()
    path = write_zip(state_dict, tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(next(iter(state_dict.values())).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    for arguments in (
        ["inspect", path, "--verify-crc"],
        ["convert", path, "--to", "torch", "-o", out],  # the new file would have a checksum that fits the damage
        ["convert", path, "--to", "safetensors", "-o", out],
        ["fold", path, "--pair", "0=1", "--eps", "1e-5", "-o", out],
    ):
        code, sentence = read(capsys, *arguments)
        assert code == 3
        assert "checksum of record" in sentence
        assert not out.exists()
    assert main(["freeze", str(path), "-o", str(out)]) == 0  # copies the record as it is
    capsys.readouterr()
    assert read(capsys, "inspect", out, "--verify-crc")[0] == 3


def test_a_missing_part_says_which_file_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sharded", "distributed", "onnx", "tensorflow"):
        (tmp_path / name).mkdir()
    index = write_sharded(tiny_net().state_dict(), tmp_path / "sharded")
    next(p for p in index.parent.iterdir() if p != index).unlink()
    save_distributed({"a.weight": torch.ones(2)}, tmp_path / "distributed")
    (tmp_path / "distributed" / "__0_0.distcp").unlink()
    model = Path(shutil.copy(INTEROP / "onnx_tiny_ext.onnx", tmp_path / "onnx"))
    table = Path(shutil.copy(INTEROP / "tensorflow" / "keras2.index", tmp_path / "tensorflow"))
    for path, owner in ((index, index), (tmp_path / "distributed", Path(".metadata")), (model, model), (table, table)):
        code, sentence = read(capsys, "inspect", path)
        assert code == 3
        assert f"there is no such file, which {owner.name} needs" in sentence


def test_a_folder_names_a_file_that_may_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = write_sharded(tiny_net().state_dict(), tmp_path)
    code, sentence = read(capsys, "inspect", tmp_path)
    assert code == 3
    assert sentence.endswith(f"name a file of it, such as '{index.name}'")
    (run := tmp_path / "my run").mkdir()
    for name in ("epoch_1.pt", "epoch_2.pt", "log.txt"):
        (run / name).write_bytes(b"")
    assert f"such as 'epoch_1.pt', or bntool inspect '{run}'/*.pt to look at all" in read(capsys, "inspect", run)[1]


def test_a_part_of_a_distributed_checkpoint_names_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_distributed({"a.weight": torch.ones(2)}, tmp_path)
    code, sentence = read(capsys, "inspect", tmp_path / "__0_0.distcp")
    assert code == 3
    assert sentence.endswith("name the folder")


def test_a_plain_pickle_that_does_harm_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pkl").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    (tmp_path / "y.pkl").write_bytes(pickle.dumps([1]))
    assert "'os.system', which can run code" in read(capsys, "inspect", tmp_path / "x.pkl")[1]
    assert "run code" not in read(capsys, "inspect", tmp_path / "y.pkl")[1]


def test_a_long_path_or_name_does_not_cost_a_sentence_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("x" * 200) / ("y" * 200)
    folder.mkdir(parents=True)
    name = "z" * 1000
    header = json.dumps({name: {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (folder / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    code, sentence = read(capsys, "inspect", folder / "a.safetensors")
    assert code == 3
    assert sentence.startswith(str(folder))
    assert "z…z" in sentence  # a name loses its middle
    assert len(sentence) < 1000
    assert sentence.endswith("z: unknown dtype 'F99'; fetch or copy the file again")


@pytest.mark.parametrize("target", ["safetensors", "torch"])
def test_an_expanded_tensor_that_is_not_written_is_named(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a.weight": torch.ones(1).expand(1 << 15, 1 << 15)}, tmp_path / "a.pt")
    path = tmp_path / "a.pt"
    if target == "torch":  # where a big-endian storage is not taken as it is
        path.write_bytes(rezip(path, lambda n, d: (n, b"big" if n.endswith("byteorder") else d)))
    code, sentence = read(capsys, "convert", path, "--to", target, "-o", tmp_path / "out")
    assert code == 3
    assert ": a.weight: shape [32768, 32768] expands 4 stored bytes" in sentence


def test_a_model_without_tensors_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.nn.ReLU(), tmp_path / "a.pt")
    for target in ("safetensors", "torch"):
        code, sentence = read(capsys, "convert", tmp_path / "a.pt", "--to", target, "-o", tmp_path / "out")
        assert code == 4
        assert "holds no tensors" in sentence
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("command", ["freeze", "fold", "recalibrate", "convert"])
def test_a_file_without_anything_to_change_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"epoch": 1}, tmp_path / "a.pt")
    options = {
        "convert": ["--to", "torch"],
        "recalibrate": ["--model", f"{SAMPLES}/digits_net.py:build", "--data", "x.npz"],
    }
    code, sentence = read(capsys, command, tmp_path / "a.pt", "--dry-run", *options.get(command, []))
    assert code == 4
    assert sentence == f"{tmp_path / 'a.pt'}: no state dict was found in this file"


def test_a_failed_verification_names_the_file_and_what_to_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--pair", "layer1.0.conv1=layer1.1.bn2", "--model", f"{SAMPLES / 'digits_net.py'}:build"]
    code, sentence = read(capsys, "fold", SAMPLES / "digits.pt", *pair, "--input-shape", "1,1,8,8", "--dry-run")
    assert code == 5
    assert sentence.startswith(f"{SAMPLES / 'digits.pt'}: in float64 the outputs differ by ")
    assert sentence.endswith("the pairs and the eps that were given are those of the file")


def test_missing_data_are_told_like_a_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", f"{SAMPLES / 'digits_net.py'}:build", "--data", tmp_path / "none.npz", "--dry-run"]
    code, sentence = read(capsys, "recalibrate", SAMPLES / "digits.pt", *options)
    assert (code, sentence) == (3, f"{tmp_path / 'none.npz'}: there is no such file")


def test_an_unknown_state_dict_is_told_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a.weight": torch.ones(2), **{f"k{i}": {"a.weight": torch.ones(2)} for i in range(20)}}, tmp_path / "a")
    code, sentence = read(capsys, "inspect", tmp_path / "a", "--state-dict", "none")
    assert code == 2
    assert sentence.endswith(
        "in this file; it holds '' (the root), 'k0', 'k1', 'k2', 'k3', 'k4', 'k5', 'k6' and 13 more"
    )


def test_a_refusal_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "a.pt")
    code, sentence = read(capsys, "freeze", tmp_path / "a.pt", "--dry-run")
    assert code == 4
    assert sentence.startswith(f"{tmp_path / 'a.pt'}: nothing could be done safely: ")
