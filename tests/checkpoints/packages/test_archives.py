"""Archives of TorchServe and NeMo: what is inside is read, and code beside it named."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import bntool
from bntool.checkpoints.formats import open_checkpoint
from bntool.errors import BntoolError, CorruptFileError, RefusedError, UnknownFormatError, UnsafeFileError
from bntool.inspection.safety import SafetyVerdict
from tests.checkpoints.foreign import write_nemo, write_torchserve
from tests.checkpoints.samples import assert_holds, tiny_net


def weights() -> bytes:
    stream = io.BytesIO()
    torch.save(tiny_net().state_dict(), stream)
    return stream.getvalue()


def write_mar(folder: Path, manifest: Any, *, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(folder / "m.mar", "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    return folder / "m.mar"


def manifest(handler: str = "image_classifier", name: str = "m.pt") -> dict[str, Any]:
    return {"runtime": "python", "model": {"serializedFile": name, "handler": handler}}


def test_deflated_weights_are_those_that_were_archived(tmp_path: Path) -> None:
    path = write_mar(tmp_path, manifest(), m_pt=weights())
    with open_checkpoint(path) as checkpoint:
        assert_holds(checkpoint, tiny_net().state_dict())
        assert checkpoint.format.verify_checksums(checkpoint) > 2
    assert bntool.inspect(path).safety.verdict is SafetyVerdict.HARMLESS


@pytest.mark.parametrize(
    ("handler", "members", "verdict"),
    [
        ("handler.py", {"handler_py": b"import os"}, SafetyVerdict.UNKNOWN),
        ("image_classifier", {"requirements_txt": b"x"}, SafetyVerdict.UNKNOWN),
        ("os", {}, SafetyVerdict.UNKNOWN),
    ],
)
def test_code_beside_the_weights_is_said(
    handler: str, members: dict[str, bytes], verdict: SafetyVerdict, tmp_path: Path
) -> None:
    found = bntool.inspect(write_mar(tmp_path, manifest(handler), m_pt=weights(), **members))
    assert found.safety.verdict is verdict
    assert len(found.state_dicts[0].layers) == 1


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_script_inside_is_code(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(tiny_net().eval(), torch.zeros(1, 3, 6, 6)), stream)
    found = bntool.inspect(write_mar(tmp_path, manifest(), m_pt=stream.getvalue()))
    assert found.safety.holds_code
    assert found.state_dicts[0].layers[0].layer.eps == 1e-5


@pytest.mark.parametrize("write", [write_torchserve, write_nemo])
def test_a_state_dict_is_taken_out(write: Any, tmp_path: Path) -> None:
    state = tiny_net().state_dict()
    path = write(state, tmp_path)
    with pytest.raises(RefusedError, match="only read: take its state dict out"):
        bntool.fold_checkpoint(path, tmp_path / "o.mar", pairs={"1": "0"}, eps=1e-5)
    bntool.convert(path, tmp_path / "o.pt", to="torch")
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_nemo_archive_names_classes_that_are_imported(tmp_path: Path) -> None:
    assert bntool.inspect(write_nemo(tiny_net().state_dict(), tmp_path)).safety.verdict is SafetyVerdict.UNKNOWN


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ({"model": {"handler": "x"}}, UnknownFormatError, "names no file of weights"),
        ({"model": {"serializedFile": "../m.pt"}}, UnknownFormatError, "names no file of weights"),
        ([1], UnknownFormatError, "names no file of weights"),
        (manifest(name="text.txt"), UnknownFormatError, "'text.txt' in the archive is of no format"),
        (manifest(name="broken.pt"), CorruptFileError, "zip directory is missing"),
        (manifest(name="inner.mar"), UnsafeFileError, "another archive of this kind"),
    ],
)
def test_an_archive_without_weights_is_one_error(
    content: Any, error: type[BntoolError], words: str, tmp_path: Path
) -> None:
    inner = write_torchserve(tiny_net().state_dict(), tmp_path).read_bytes()
    members = {"m_pt": weights(), "text_txt": b"hello", "broken_pt": weights()[:100], "inner_mar": inner}
    with pytest.raises(error, match=words) as caught:
        open_checkpoint(write_mar(tmp_path, content, **members))
    assert caught.value.path == str(tmp_path / "m.mar")


def test_a_member_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "m.nemo", "w:") as archive:
        for name in ("model_weights.ckpt", "./model_weights.ckpt"):
            info = tarfile.TarInfo(name)
            info.size = len(weights())
            archive.addfile(info, io.BytesIO(weights()))
    with pytest.raises(CorruptFileError, match="two members"):
        open_checkpoint(tmp_path / "m.nemo")
