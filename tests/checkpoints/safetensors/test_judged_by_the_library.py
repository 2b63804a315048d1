"""Files that bntool writes are opened by the safetensors library before they appear."""

import contextlib
import json
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import bntool
from bntool.checkpoints import creation
from bntool.checkpoints.safetensors import file_writing
from bntool.cli.main import main
from bntool.errors import CorruptFileError, LossWarning, VerificationError
from bntool.inspection.findings import FindingCode

STATE = {
    "bn.weight": torch.tensor([1.0, 2.0]),
    "bn.bias": torch.tensor([3.0, 4.0]),
    "bn.running_mean": torch.tensor([5.0, 6.0]),
    "bn.running_var": torch.tensor([7.0, 8.0]),
}


def write_with_gaps(path, *gaps):
    """A file whose tensors lie so many bytes apart; negative ones overlap."""
    header, data, position = {}, b"", 0
    for (name, tensor), gap in zip(STATE.items(), gaps, strict=True):
        position += gap
        data = data[:position].ljust(position, b"\xee")
        header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [position, position + 8]}
        data += tensor.numpy().tobytes()
        position += 8
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("gaps", [(0, 3, 0, 0), (0, 0, 16, 0), (5, 1, 2, 3)])
@pytest.mark.parametrize("verb", ["freeze", "convert", "rename"])
def test_holes_are_left_out_and_said(gaps, verb, tmp_path):
    path, output = write_with_gaps(tmp_path / "a.safetensors", *gaps), tmp_path / "b.safetensors"
    with pytest.raises(SafetensorError):
        load_file(path)
    (finding,) = [f for f in bntool.inspect(path).findings if f.code is FindingCode.HOLES]
    assert f"it holds {sum(gaps)} bytes between the tensors" in finding.message
    if verb == "freeze":
        with pytest.warns(LossWarning, match=rf"a\.safetensors holds {sum(gaps)} bytes between"):
            bntool.freeze_checkpoint(path, output)
        prefix = ""
    else:
        options = {"to": "safetensors"} if verb == "convert" else {"add_prefix": "net"}
        with pytest.warns(LossWarning) if verb == "rename" else contextlib.nullcontext():
            losses = bntool.convert(path, output, **options).losses
        assert any(loss.startswith(f"{sum(gaps)} bytes between") for loss in losses) or verb == "rename"
        prefix = "net." if verb == "rename" else ""
    loaded = load_file(output)
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
        prefix + name: tensor.tolist() for name, tensor in STATE.items()
    }
    assert FindingCode.HOLES not in {f.code for f in bntool.inspect(output).findings}


def test_a_file_without_any_change_is_written_without_holes(tmp_path):
    path = write_with_gaps(tmp_path / "a.safetensors", 0, 4, 0, 0)
    with bntool.open_checkpoint(path) as checkpoint, pytest.warns(LossWarning):
        bntool.save_checkpoint(checkpoint, tmp_path / "b.safetensors")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["bn.bias"], STATE["bn.bias"])


def test_holes_in_a_shard_are_said_too(tmp_path):
    write_with_gaps(tmp_path / "a.safetensors", 0, 4, 0, 0)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, "a.safetensors")}))
    (finding,) = [f for f in bntool.inspect(index).findings if f.code is FindingCode.HOLES]
    assert "4 bytes between the tensors" in finding.message
    assert "a.safetensors" in finding.message
    (tmp_path / "out").mkdir()
    with pytest.warns(LossWarning, match=r"4 bytes between the tensors .* \(in 'a\.safetensors'\)"):
        bntool.freeze_checkpoint(index, tmp_path / "out" / index.name)
    assert load_file(tmp_path / "out" / "a.safetensors").keys() == STATE.keys()


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_a_command_says_it_in_one_line(quiet, tmp_path, capsys):
    path, output = write_with_gaps(tmp_path / "a.safetensors", 0, 4, 0, 0), tmp_path / "b.safetensors"
    for _ in range(2):
        assert main(["freeze", str(path), "-o", str(output), "--force", *quiet]) == 0
        said = capsys.readouterr().err.splitlines()
        assert [line.partition(" holds 4 bytes")[0] for line in said] == [] if quiet else [f"bntool: warning: {path}"]


def test_data_that_overlap_are_an_error(tmp_path):
    with pytest.raises(CorruptFileError, match="overlaps that of another tensor"):
        bntool.open_checkpoint(write_with_gaps(tmp_path / "a.safetensors", 0, -4, 0, 0))


@pytest.mark.parametrize("verb", ["freeze", "convert"])
def test_what_the_library_refuses_does_not_appear(verb, tmp_path, monkeypatch):
    save_file(STATE, tmp_path / "a.safetensors")
    make_header = file_writing.make_header

    def with_a_hole(*arguments, **options):
        header = json.loads(make_header(*arguments, **options)[8:])
        for name, entry in header.items():
            if name != "__metadata__":
                entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + bytes(8)

    for module in (file_writing, creation):
        monkeypatch.setattr(module, "make_header", with_a_hole)
    write = {
        "freeze": bntool.freeze_checkpoint,
        "convert": lambda path, output: bntool.convert(path, output, to="safetensors"),
    }[verb]
    with pytest.raises(VerificationError, match="the safetensors library refuses the written file"):
        write(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
