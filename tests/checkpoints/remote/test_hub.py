"""Addresses of the hub, and huggingface_hub itself against an endpoint on this machine, where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import bntool
from bntool.checkpoints.addresses import Address
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.hub_files import _KNOWN as KNOWN
from bntool.checkpoints.hub_files import choose_file
from bntool.cli.main import main
from bntool.errors import MissingExtraError, UnreachableFileError, UnreadableFileError, UsageError
from tests.checkpoints.samples import WRITERS, assert_holds, tiny_net
from tests.places import ROOT, SAMPLES
from tests.programs.file_server import FileServer, Handler

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://timm/resnet50.a1_in1k", ("timm/resnet50.a1_in1k", None, "")),
        ("hf://o/n/model.safetensors", ("o/n", None, "model.safetensors")),
        ("hf://o/n@v1.0/onnx/model.onnx", ("o/n", "v1.0", "onnx/model.onnx")),
        ("hf://o/n@refs/pr/3/model.pt", ("o/n", "refs/pr/3", "model.pt")),
        ("hf://o/n@feature%2Fx", ("o/n", "feature/x", "")),
        ("hf://o/n/with@sign.pt", ("o/n", None, "with@sign.pt")),
    ],
)
def test_an_address_has_parts(text: str, parts: tuple[str, str | None, str]) -> None:
    from bntool.checkpoints.remote.hub import parse_address

    assert tuple(parse_address(Address(text))) == parts


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://o", "hf://o/n@", "hf://o//x", "hf://o/n/../x", "hf://o/n/a//", "hf://datasets/o/n", "hf://ö/n"],
)
def test_what_is_no_address_is_said_to_be_none(text: str) -> None:
    from bntool.checkpoints.remote.hub import parse_address

    with pytest.raises(UsageError):
        parse_address(Address(text))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["pytorch_model.bin", "model.safetensors", "tf_model.h5", "config.json"], "model.safetensors"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "model.safetensors.index.json"),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin"),
        (["yolov8n.pt", "README.md", "onnx/model.onnx"], "yolov8n.pt"),
        (["parakeet.nemo", "README.md"], "parakeet.nemo"),
        (["export.pkl", "app.py"], "export.pkl"),
        (["best.pt", "vocabulary.pkl"], "best.pt"),
        (["a.pkl", "b.pdparams"], None),
        (["a.pt", "b.pt"], None),
        (["README.md"], None),
    ],
)
def test_the_file_with_the_weights_is_chosen_as_libraries_choose_it(names: list[str], chosen: str | None) -> None:
    found = choose_file(names)
    assert (None if found is None else found.name) == chosen


def test_the_page_names_the_files_in_their_order() -> None:
    page = (ROOT / "docs" / "remote.md").read_text(encoding="utf-8")
    places = [page.find(f"`{name}`") for name in KNOWN if not name.startswith(("diffusion", "pytorch_model.bin.index"))]
    assert -1 not in places
    assert places == sorted(places)


def fill_repository(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tiny_net().state_dict()))
    torch.save(tiny_net().state_dict(), folder / "pytorch_model.bin")


def test_the_folder_of_a_repository_stands_for_its_weights(tmp_path: Path, capsys) -> None:
    fill_repository(tmp_path / "net")
    with open_checkpoint(tmp_path / "net") as checkpoint:
        assert checkpoint.path == tmp_path / "net" / "model.safetensors"
    assert main(["inspect", str(tmp_path / "net")]) == 0
    said = "'model.safetensors' of it is read, which libraries load before 'pytorch_model.bin'"
    assert said in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "net"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["notes"] == [said]


def test_a_folder_with_several_checkpoints_is_not_guessed_at(tmp_path: Path) -> None:
    shutil.copy(SAMPLES / "digits.pt", tmp_path / "a.pt")
    shutil.copy(SAMPLES / "digits.pt", tmp_path / "b.pt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnreadableFileError, match=r"several checkpoints: 'a.pt', 'b.pt'; name one"):
        bntool.inspect(tmp_path)


def test_shards_in_the_cache_of_the_hub_are_links_and_are_read(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / COMMIT, tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tensors = tiny_net().state_dict()
    index = WRITERS["sharded"](tensors, snapshot)
    for number, path in enumerate(list(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    index.rename(snapshot / "model.safetensors.index.json")
    (snapshot / "config.json").write_text("{}")
    with open_checkpoint(snapshot) as checkpoint:
        assert_holds(checkpoint, tensors)


def test_without_the_package_its_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r'pip install "bntool\[hub\]"'):
        bntool.inspect("hf://o/n")


class Hub:
    """The little of the hub's API that is used: a repository, and where its files are redirected to."""

    def __init__(self, server: FileServer, folder: Path) -> None:
        self.server, self.files = server, {path.name: path.read_bytes() for path in folder.iterdir()}
        server.files |= {f"/cdn/{name}": data for name, data in self.files.items()}
        server.behave = self.behave

    def behave(self, handler: Handler, _: bytes) -> bool:
        path = handler.path.partition("?")[0]
        if path.startswith("/api/models/o/n"):
            names = [{"rfilename": name} for name in self.files]
            known = path in ("/api/models/o/n", "/api/models/o/n/revision/main", "/api/models/o/n/revision/v1")
            body = json.dumps({"_id": "0", "id": "o/n", "sha": COMMIT, "siblings": names}).encode()
            headers = {"Content-Type": "application/json"}
            if known:
                handler.answer(200, body, headers)
            else:
                handler.answer(404, b"{}", {**headers, "X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/"):
            handler.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith(f"/o/n/resolve/{COMMIT}/") and path.rpartition("/")[2] in self.files:
            handler.answer(302, b"", {"Location": f"{self.server.url}/cdn/{path.rpartition('/')[2]}?signed=1"})
        else:
            return False
        return True


@pytest.fixture
def hub(server: FileServer, tmp_path: Path, monkeypatch) -> Hub:
    constants = pytest.importorskip("huggingface_hub.constants")
    fill_repository(tmp_path / "repository")
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url,  # from HF_ENDPOINT and HF_HOME, when the package is imported
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return Hub(server, tmp_path / "repository")


def test_a_repository_of_the_hub_is_read_by_ranges(hub: Hub) -> None:
    inspection = bntool.inspect("hf://o/n")
    assert str(inspection.checkpoint.path) == "hf://o/n/model.safetensors"
    assert "which libraries load before 'pytorch_model.bin'" in inspection.checkpoint.notes[0]
    assert bntool.diff("hf://o/n@v1/pytorch_model.bin", "hf://o/n/model.safetensors").layers
    asked = [(path, headers.get("authorization")) for path, headers in hub.server.asked]
    assert {token for path, token in asked if path.startswith(("/api/models", "/o"))} == {"Bearer hf_secret"}
    assert all("range" in headers for path, headers in hub.server.asked if path.startswith("/cdn"))


def test_endpoint_and_cache_are_those_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.server.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bntool", "inspect", "hf://o/n@main", "--quiet"]
    subprocess.run(command, env=environment, check=True, timeout=600)
    assert "/api/models/o/n/revision/main" in [path for path, _ in hub.server.asked]


def test_what_the_hub_does_not_have_is_said(hub: Hub, capsys) -> None:
    for address, sentence in (
        ("hf://o/absent", "no such repository"),
        ("hf://o/n@absent", "no revision 'absent'"),
        ("hf://o/n/absent.pt", "there is no such file"),
    ):
        assert main(["inspect", address]) == 3
        assert sentence in capsys.readouterr().err


def test_offline_the_cache_of_the_hub_is_read(hub: Hub, tmp_path: Path, monkeypatch, capsys) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["inspect", "hf://o/n"]) == 3
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    snapshot = tmp_path / "hub" / "models--o--n" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "repository", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    assert main(["inspect", "hf://o/n"]) == 0
    assert "it was in the cache of huggingface_hub" in capsys.readouterr().out
    assert main(["inspect", "hf://o/n/pytorch_model.bin", "--quiet"]) == 0


def test_a_token_leaves_this_machine_by_https_only(hub: Hub, monkeypatch, capsys) -> None:
    from bntool.checkpoints.remote import http

    monkeypatch.setattr(http, "_resolve", lambda *_: ["93.184.216.34"])
    assert main(["inspect", "hf://o/n"]) == 2
    assert "plain http is read from this machine only" in capsys.readouterr().err
    assert not hub.server.asked


def test_a_hub_that_does_not_answer_is_one_sentence(hub: Hub, monkeypatch) -> None:
    from bntool.checkpoints.remote.http import Limits

    monkeypatch.setattr("bntool.checkpoints.remote.opening.LIMITS", Limits(answer=0.5))
    hub.server.behave = lambda handler, _: handler.files.over.wait(5) or True
    with pytest.raises(UnreachableFileError, match="takes too long"):
        bntool.inspect("hf://o/n")
