"""``hf://datasets/OWNER/NAME``, by the library ``datasets`` itself, from an endpoint on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.places import ROOT
from tests.programs import copy_user_code
from tests.programs.file_server import FileServer, Handler, serve_files
from tests.programs.user_code import small_net

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
JSON = {"Content-Type": "application/json"}
FILES = {"test": 4, "train": 11}  # rows of each split
# what is run with the endpoint in the environment, which the library reads when it is imported
PROGRAM = """
import sys
from bntool.cli.main import main
for line in sys.stdin:
    print(main(line.split()), flush=True)
"""


class Hub:
    """What the library asks the hub for: what the dataset ``o/n`` is, its files, and ranges of them."""

    def __init__(self, server: FileServer, folder: Path) -> None:
        self.files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}
        server.behave = self.behave

    def behave(self, handler: Handler, _: bytes) -> bool:
        path, api = handler.path.partition("?")[0], "/api/datasets/o/n"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            names = [{"rfilename": name} for name in self.files]
            self.answer_json(handler, {"_id": "0", "id": "o/n", "sha": COMMIT, "private": False, "siblings": names})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self.answer_json(handler, list(self.list_folder(path.removeprefix(f"{api}/tree/{COMMIT}").strip("/"))))
        elif path.startswith("/datasets/o/n/resolve/"):
            self.answer_file(handler, path.removeprefix("/datasets/o/n/resolve/").partition("/")[2])
        else:
            handler.answer(404, b"{}", {**JSON, "X-Error-Code": "RepoNotFound"})
        return True

    def answer_json(self, handler: Handler, value: object) -> None:
        handler.answer(200, json.dumps(value).encode(), JSON)

    def list_folder(self, folder: str) -> Iterator[dict[str, object]]:
        if not folder:
            yield {"type": "directory", "oid": "0" * 40, "size": 0, "path": "data"}
        for name, content in self.files.items():
            if folder == "data":
                yield {"type": "file", "oid": sha1(content).hexdigest(), "size": len(content), "path": name}

    def answer_file(self, handler: Handler, name: str) -> None:
        headers = {"ETag": '"one"', "X-Repo-Commit": COMMIT}
        content = self.files.get(name)
        if content is None:
            handler.answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        elif "Range" in handler.headers:
            start, end = handler.read_range(len(content))
            part = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
            handler.answer(206, content[start:end], {**headers, **part})
        else:
            handler.answer(200, content, headers)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve_files() as serving:
        yield serving


def test_a_dataset_of_the_hub_gives_what_its_files_give(server: FileServer, tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(num_classes=3)})
    for split, count in FILES.items():
        photos = [Image.fromarray(draw.integers(0, 256, (9, 9, 3), "uint8")) for _ in range(count)]
        rows = {"photo": photos, "kind": [number % 3 for number in range(count)]}
        path = folder / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    hub = Hub(server, tmp_path / "repository")
    torch.manual_seed(0)
    torch.save(small_net.build().state_dict(), tmp_path / "net.pt")
    net = f"{copy_user_code('small_net', tmp_path)}:build"
    start = f"recalibrate {tmp_path}/net.pt --model {net} --batch-size 4 --preprocess mean=0.5,std=0.25 -q"
    commands = [
        f"{start} --data hf://datasets/o/n -o {tmp_path}/train.pt",
        f"{start} --data hf://datasets/o/n:test -o {tmp_path}/test.pt",
        f"{start} --data {folder}/train-00000-of-00001.parquet -o {tmp_path}/local.pt",
        *(f"{start} --data hf://datasets/o/n --shard {n}/2 --partial {tmp_path}/part-{n}" for n in (1, 2)),
        f"recalibrate {tmp_path}/net.pt --from-partials {tmp_path}/part-* -o {tmp_path}/merged.pt -q",
        f"{start} --data hf://datasets/o/n:none -o {tmp_path}/none.pt",
        f"{start} --data hf://datasets/o/absent -o {tmp_path}/none.pt",
    ]
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(commands),
        env={**{name: value for name, value in os.environ.items() if not name.startswith("HF_")}, **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.split() == ["0", "0", "0", "0", "0", "0", "2", "3"], done.stderr
    assert "the dataset has no split 'none', but train, test" in done.stderr
    assert "hf://datasets/o/absent: datasets cannot load it: " in done.stderr
    train, test, local = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("train", "test", "local"))
    assert all(torch.equal(tensor, local[name]) for name, tensor in train.items())
    assert not all(torch.equal(tensor, test[name]) for name, tensor in train.items())
    assert (tmp_path / "merged.pt").read_bytes() == (tmp_path / "train.pt").read_bytes()
    read = {path.partition("?")[0] for path, headers in server.asked if "range" in headers}
    assert read == {f"/datasets/o/n/resolve/{COMMIT}/{name}" for name in hub.files}
    assert not (tmp_path / "none.pt").exists()
