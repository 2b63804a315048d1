"""Every exit code of every command, in a real run with ``--json``: one document that fits the schema, errors too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import pytest
import torch

from bntool.checkpoints.outputs import OutputFiles
from bntool.cli.application import COMMANDS
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from tests import programs
from tests.places import INTEROP, SAMPLES
from tests.programs import copy_user_code
from tests.schemas import SCHEMAS, read_document

# words: @NAME is a sample, OUT a file to write, MODEL and DATA the samples' own, BAD a module whose code raises,
# EMPTY a checkpoint without state dicts, HDF5 a file that needs h5py; then the exit code and the code of the error
CASES = [
    ("inspect @digits.pt", 0, None),
    ("inspect @broken_nan_variance.pt --fail-on error", 1, None),
    ("inspect", 2, "usage"),
    ("inspect @digits.pt --nonsense", 2, "usage"),
    ("inspect @digits.pt --fail-on sometimes", 2, "usage"),
    ("inspect @digits.pt --state-dict none", 2, "usage"),
    ("inspect HDF5", 2, "missing-extra"),
    ("inspect absent.pt", 3, "unreadable"),
    ("inspect BAD", 3, "unknown-format"),
    ("inspect https://localhost:9/net.pt", 3, "unreachable"),
    ("inspect @digits.pt absent.pt BAD", 3, "unreadable"),
    ("recalibrate @drifted.pt MODEL DATA --samples 32 -o OUT", 0, None),
    ("recalibrate @drifted.pt", 2, "usage"),
    ("recalibrate @drifted.pt MODEL DATA", 2, "usage"),
    ("recalibrate @drifted.pt MODEL DATA --samples many --dry-run", 2, "usage"),
    ("recalibrate @drifted.pt MODEL --data absent.npz --dry-run", 3, "unreadable"),
    ("recalibrate @drifted.pt DATA --model timm:resnet18 --dry-run", 2, "missing-extra"),
    ("recalibrate absent.pt MODEL DATA --dry-run", 3, "unreadable"),
    ("recalibrate @drifted.pt MODEL DATA --samples 32 --shard 1/2 --partial OUT", 0, None),
    ("recalibrate @drifted.pt MODEL DATA --shard 0/2 --partial OUT", 2, "usage"),
    ("recalibrate @drifted.pt MODEL DATA --shard 1/2 --partial OUT --method exact", 4, "refused"),
    ("recalibrate @drifted.pt --from-partials nothing* -o OUT", 2, "usage"),
    ("recalibrate @drifted.pt --from-partials @digits.safetensors -o OUT", 3, "unknown-format"),
    ("recalibrate @drifted.pt MODEL DATA -o nowhere/out.pt", 3, "unwritable"),
    ("recalibrate EMPTY MODEL DATA --dry-run", 4, "refused"),
    ("recalibrate @drifted.pt MODEL DATA --layers none* --dry-run", 2, "usage"),
    ("recalibrate @digits.safetensors MODEL DATA --samples 32 -o DAMAGED", 5, "verification-failed"),
    ("recalibrate @drifted.pt --model BAD:model DATA --dry-run", 6, "user-code"),
    ("recalibrate @drifted.pt MODEL --data BAD:data --dry-run", 6, "user-code"),
    ("freeze @digits.pt -o OUT", 0, None),
    ("freeze @digits.pt", 2, "usage"),
    ("freeze @digits.pt --frozen-stages one --dry-run", 2, "usage"),
    ("freeze HDF5 --dry-run", 2, "missing-extra"),
    ("freeze absent.pt --dry-run", 3, "unreadable"),
    ("freeze @digits.pt -o nowhere/out.pt", 3, "unwritable"),
    ("freeze EMPTY --dry-run", 4, "refused"),
    ("freeze @digits.pt --layers none* --dry-run", 2, "usage"),
    ("freeze @digits.safetensors -o DAMAGED", 5, "verification-failed"),
    ("fold @digits.pt MODEL --input-shape 1,1,8,8 -o OUT", 0, None),
    ("fold @digits.pt --pair conv1 --dry-run", 2, "usage"),
    ("fold @digits.pt MODEL --input-shape big --dry-run", 2, "usage"),
    ("fold @digits.pt --model timm:resnet18 --input-shape 1,1,8,8 --dry-run", 2, "missing-extra"),
    ("fold absent.pt --dry-run", 3, "unreadable"),
    ("fold @digits.pt MODEL --input-shape 1,1,8,8 -o nowhere/out.pt", 3, "unwritable"),
    ("fold EMPTY --dry-run", 4, "refused"),
    ("fold @digits.pt MODEL --layers none* --input-shape 1,1,8,8 --dry-run", 2, "usage"),
    ("fold @digits.pt MODEL --pair layer1.0.conv1=layer1.1.bn2 --input-shape 1,1,8,8 -o OUT", 5, "verification-failed"),
    ("fold @digits.pt --model BAD:model --input-shape 1,1,8,8 --dry-run", 6, "user-code"),
    ("fold @digits.pt --model BAD:failing --input-shape 1,1,8,8 --dry-run", 6, "user-code"),
    ("diff @digits.pt @drifted.pt", 0, None),
    ("diff @digits.pt @drifted.pt --expect identical", 1, None),
    ("diff @digits.pt", 2, "usage"),
    ("diff @digits.pt @drifted.pt --expect miracles", 2, "usage"),
    ("diff @digits.pt HDF5", 2, "missing-extra"),
    ("diff @digits.pt absent.pt", 3, "unreadable"),
    ("diff BAD @digits.pt", 3, "unknown-format"),
    ("diff @digits.pt EMPTY", 4, "refused"),
    ("convert @digits.pt --to safetensors -o OUT", 0, None),
    ("convert @digits.pt --to stone --dry-run", 2, "usage"),
    ("convert HDF5 --to torch --dry-run", 2, "missing-extra"),
    ("convert absent.pt --to torch --dry-run", 3, "unreadable"),
    ("convert @digits.pt --to torch -o nowhere/out.pt", 3, "unwritable"),
    ("convert EMPTY --to torch --dry-run", 4, "refused"),
    ("convert @digits_training.pt --to safetensors --strict -o OUT", 4, "refused"),
    ("convert @digits.pt --to safetensors -o DAMAGED", 5, "verification-failed"),
    ("explain 4", 0, None),
    ("explain nonsense", 2, "usage"),
    ("average @digits.pt @drifted.pt -o OUT", 0, None),
    ("average @digits.pt --dry-run", 2, "usage"),
    ("average @digits.pt @drifted.pt", 2, "usage"),
    ("average @digits.pt HDF5 --dry-run", 2, "missing-extra"),
    ("average @digits.pt absent.pt --dry-run", 3, "unreadable"),
    ("average @digits.pt @drifted.pt -o nowhere/out.pt", 3, "unwritable"),
    ("average @digits.pt EMPTY --dry-run", 4, "refused"),
    ("average @digits.safetensors @drifted.pt -o DAMAGED", 5, "verification-failed"),
]
# those that no run can give: only inspect and diff judge, and these, convert and average run no model
IMPOSSIBLE = {
    ("inspect", 4), ("inspect", 5), ("inspect", 6), ("recalibrate", 1), ("freeze", 1), ("freeze", 6), ("fold", 1),
    ("diff", 5), ("diff", 6), ("convert", 1), ("convert", 6),
    ("average", 1), ("average", 6), ("explain", 1), ("explain", 3), ("explain", 4), ("explain", 5), ("explain", 6),
    ("explain", 130),  # it opens no file
}  # fmt: skip


def spell_out(case: str, folder: Path) -> list[str]:
    bad, empty, hdf5 = copy_user_code("bad", folder), folder / "empty.pt", folder / "a.h5"
    torch.save({"epoch": 1}, empty)
    hdf5.write_bytes((INTEROP / "keras_tiny.h5").read_bytes())
    words = {
        "MODEL": ["--model", f"{SAMPLES / 'digits_net.py'}:build"],
        "DATA": ["--data", str(SAMPLES / "digits_train.npz")],
        "OUT": [str(folder / "out")],
        "DAMAGED": [str(folder / "damaged.safetensors")],
        "EMPTY": [str(empty)],
        "HDF5": [str(hdf5)],
    }
    arguments = []
    for word in case.split():
        spelled = f"{SAMPLES / word[1:]}" if word.startswith("@") else word.replace("BAD", str(bad))
        arguments += words.get(word, [spelled])
    return [*arguments, "--json"]


def _list_files(folder: Path) -> list[Path]:
    """What lies in a folder but for what Python keeps of a user's module."""
    return sorted(path for path in folder.iterdir() if path.name != "__pycache__")


@pytest.mark.parametrize(("case", "code", "error"), CASES, ids=[case for case, _, _ in CASES])
def test_the_document_fits_the_schema(
    case: str,
    code: int,
    error: str | None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if error == "missing-extra":
        for package in ("h5py", "timm"):
            monkeypatch.setitem(sys.modules, package, None)
    if error == "unreachable":
        monkeypatch.setattr("bntool.checkpoints.remote.http._PAUSE", 0.0)
    if "DAMAGED" in case:
        _damage_what_is_written(monkeypatch)
    arguments = spell_out(case, tmp_path)
    before = _list_files(tmp_path)
    assert main(arguments) == code
    captured = capfd.readouterr()
    document = read_document(captured.out, arguments[0])
    errors = [facts["error"] for facts in document["files"] if "error" in facts]
    assert [one["code"] for one in errors][:1] == ([] if error is None else [error])
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.err
    assert len(captured.err.splitlines()) >= len(errors)
    if code not in (0, 1):
        assert _list_files(tmp_path) == before


def _damage_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between writing and reading back another name gets into the file."""
    flush = OutputFiles.flush

    def damage(self: OutputFiles) -> None:
        flush(self)
        for file in self._files:
            file.stream.seek(0)
            data = file.stream.read()
            file.stream.seek(0)
            file.stream.write(data.replace(b"bn1.weight", b"bn9.weight"))
            file.stream.flush()

    monkeypatch.setattr(OutputFiles, "flush", damage)


def test_no_exit_code_is_left_out() -> None:
    tried = {(case.split()[0], code) for case, code, _ in CASES} | {(name, 130) for name in INTERRUPTED}
    wanted = {(name, int(code)) for name in COMMANDS for code in ExitCode}
    assert tried == wanted - IMPOSSIBLE


INTERRUPTED = {
    name: next(case for case, code, _ in CASES if code == 0 and case.split()[0] == name)
    for name in COMMANDS
    if (name, 130) not in IMPOSSIBLE
}


@pytest.mark.parametrize("command", INTERRUPTED)
def test_an_interrupt_is_a_document_too(command: str, tmp_path: Path) -> None:
    arguments = spell_out(INTERRUPTED[command], tmp_path)
    done = programs.run("interrupted_command", *arguments, code=130)
    document = read_document(done.stdout, command)
    assert [facts["error"]["code"] for facts in document["files"]] == ["interrupted"]
    assert done.stderr.endswith("interrupted; nothing was written\n")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["--nonsense"], ["--nonsense", "inspect"]])
def test_without_a_command_there_is_no_schema_but_an_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    (facts,) = document["files"]
    jsonschema.validate(facts, {**SCHEMAS["inspect"]["$defs"]["failure"], "$defs": SCHEMAS["inspect"]["$defs"]})
    assert facts["error"]["code"] == "usage"
