"""Files on a server are read as those that lie here, by a small part of their bytes."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import bntool
from bntool.checkpoints.addresses import Address
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.remote.files import _Ranges, open_url
from bntool.checkpoints.remote.http import Limits
from bntool.cli.main import main
from bntool.errors import UnreachableFileError
from bntool.reports.inspection import describe_inspection
from tests.checkpoints.samples import WRITERS, assert_holds, tiny_net
from tests.places import INTEROP, ROOT, SAMPLES
from tests.programs import list_loaded
from tests.programs.file_server import FileServer, Handler
from tests.schemas import read_document


def serve_folder(server: FileServer, folder: Path, pattern: str = "**/*") -> None:
    server.files |= {
        f"/{path.relative_to(folder)}": path.read_bytes() for path in folder.glob(pattern) if path.is_file()
    }


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_from_a_server(name: str, server: FileServer, tmp_path: Path) -> None:
    tensors = tiny_net().state_dict()
    (tmp_path / "files").mkdir()
    with open_checkpoint(WRITERS[name](tensors, tmp_path / "files")) as here:
        path = here.path.relative_to(tmp_path / "files")
    serve_folder(server, tmp_path / "files")
    with open_checkpoint(f"{server.url}/{path}") as checkpoint:
        assert checkpoint.format.name == name
        assert_holds(checkpoint, tensors)


@pytest.mark.parametrize(
    "name",
    [
        "keras_bf16.keras",
        "caffe_tiny_std.caffemodel",  # which has a .prototxt beside it
        "caffe_tiny_std.caffemodel.h5",
        "onnx_tiny_ext.onnx",  # whose tensors are in another file
        "tensorflow/saved_model/variables/variables.index",  # whose graph is in the folder above
        "exported.pt",
    ],
)
def test_real_files_are_what_they_are_here(name: str, server: FileServer) -> None:
    serve_folder(server, INTEROP, "tensorflow/saved_model/**/*" if "/" in name else f"{name.partition('.')[0]}*")
    here, there = (
        describe_inspection(bntool.inspect(place), every_tensor=True)
        for place in (INTEROP / name, f"{server.url}/{name}")
    )
    there.pop("notes")
    assert here == there
    assert here["state_dicts"]


def make_large(kind: str) -> bytes:
    """100 MB, with 24 BatchNorms."""
    tensors = {}
    for number in range(24):
        tensors[f"conv{number}.weight"] = torch.zeros(1024, 1024)
        layer = nn.BatchNorm2d(512)
        tensors |= {f"bn{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
    if kind == ".safetensors":
        return safetensors.torch.save(tensors)
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


@pytest.mark.parametrize("kind", [".pt", ".safetensors"])
def test_a_listing_reads_less_than_a_hundredth_and_then_a_byte(kind: str, server: FileServer, tmp_path: Path) -> None:
    data = make_large(kind)
    server.files["/net" + kind] = data
    (tmp_path / f"net{kind}").write_bytes(data)
    wanted = describe_inspection(bntool.inspect(tmp_path / f"net{kind}"), every_tensor=False)
    found = describe_inspection(bntool.inspect(f"{server.url}/net{kind}"), every_tensor=False)
    first = server.sent
    assert len(data) > 100_000_000
    assert first < len(data) / 100
    assert found.pop("notes") == [f"{first:,} of {len(data):,} bytes were read from {server.url[7:]}"]
    assert found == wanted
    again = describe_inspection(bntool.inspect(f"{server.url}/net{kind}"), every_tensor=False)
    assert server.sent == first + 1
    again.pop("notes")
    assert again == wanted


def test_what_the_cache_holds_of_another_version_is_not_taken(server: FileServer) -> None:
    server.files["/net.pt"] = (SAMPLES / "digits.pt").read_bytes()
    before = bntool.inspect(f"{server.url}/net.pt")
    server.files["/net.pt"] = (SAMPLES / "drifted.pt").read_bytes()
    server.behave = lambda handler, data: handler.answer_range(data, etag='"two"') is None
    after = bntool.inspect(f"{server.url}/net.pt")
    assert after.state_dicts[0].layers[0].running_var.tolist() != before.state_dicts[0].layers[0].running_var.tolist()


def test_what_is_damaged_in_the_cache_is_read_again(server: FileServer, cache: Path) -> None:
    server.files["/net.pt"] = (SAMPLES / "digits.pt").read_bytes()
    bntool.inspect(f"{server.url}/net.pt")
    (kept,) = cache.iterdir()
    assert kept.stat().st_mode & 0o77 == 0
    for damaged in (kept.read_bytes()[:-10], b"", b"[]\n", b'{"ranges": [[-5, 2]], "size": 1, "tag": ""}\nxx'):
        kept.write_bytes(damaged)
        assert bntool.inspect(f"{server.url}/net.pt").verdict.sentence == "healthy"


def test_an_interrupt_while_it_is_written_leaves_nothing_in_the_cache(server, cache: Path, monkeypatch) -> None:
    server.files["/digits.pt"] = (SAMPLES / "digits.pt").read_bytes()
    checkpoint = open_checkpoint(f"{server.url}/digits.pt")
    monkeypatch.setattr("bntool.checkpoints.remote.cache.json.dumps", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.close()
    assert list(cache.iterdir()) == []


def interrupt(_header: object) -> None:
    raise KeyboardInterrupt


def test_what_another_thread_lets_go_of_is_asked_for_again(server: FileServer, monkeypatch) -> None:
    data = server.files["/net.pt"] = bytes(range(256)) * 1000
    with open_url(Address(f"{server.url}/net.pt"), limits=Limits()) as file:
        fetch, lost = file._fetch, []

        def fetch_and_lose(start: int, end: int) -> None:
            fetch(start, end)
            if not lost:
                lost.append(start)
                file._ranges = _Ranges()

        monkeypatch.setattr(file, "_fetch", fetch_and_lose)
        assert file.read(200_000, 100) == data[200_000:200_100]
        assert lost


def test_without_a_folder_for_it_nothing_is_kept(server: FileServer, cache: Path, monkeypatch) -> None:
    server.files["/net.pt"] = (SAMPLES / "digits.pt").read_bytes()
    for place in ("", str(SAMPLES / "digits.pt")):
        monkeypatch.setenv("BNTOOL_CACHE", place)
        assert bntool.inspect(f"{server.url}/net.pt").verdict.sentence == "healthy"
    assert not cache.exists()


def test_commands_that_write_take_an_address(server: FileServer, tmp_path: Path) -> None:
    server.files["/digits.pt"] = (SAMPLES / "digits.pt").read_bytes()
    for command in (["freeze"], ["convert", "--to", "safetensors"], ["fold", "--pair", "conv1=bn1", "--eps", "1e-5"]):
        name, *options = command
        here, there = tmp_path / f"here-{name}", tmp_path / f"there-{name}"
        assert main([name, str(SAMPLES / "digits.pt"), *options, "-o", str(here), "--quiet"]) == 0
        assert main([name, f"{server.url}/digits.pt", *options, "-o", str(there), "--quiet"]) == 0
        assert bntool.diff(here, there, expect="identical").identical


def test_files_to_average_and_statistics_are_taken_from_addresses(server: FileServer, tmp_path: Path, capsys) -> None:
    for name in ("digits", "drifted"):
        server.files[f"/{name}.pt"] = (SAMPLES / f"{name}.pt").read_bytes()
    for place in (server.url, str(SAMPLES)):
        files = [f"{place}/digits.pt", f"{place}/drifted.pt", "--statistics-from", f"{place}/digits.pt"]
        assert main(["average", *files, "-o", str(tmp_path / f"{len(place)}.pt")]) == 0
    one, two = tmp_path.glob("*.pt")
    assert bntool.diff(one, two, expect="identical").identical
    assert capsys.readouterr().err.count("bytes were read from") == 2


def test_a_fold_that_is_run_beside_its_original_needs_it_here(server: FileServer, tmp_path: Path, capsys) -> None:
    server.files["/net.onnx"] = write_onnx()
    assert main(["inspect", f"{server.url}/net.onnx"]) == 0
    assert main(["fold", f"{server.url}/net.onnx", "--dry-run"]) == 0
    assert main(["fold", f"{server.url}/net.onnx", "-o", str(tmp_path / "folded.onnx")]) == 4
    assert "download the model first" in capsys.readouterr().err


def write_onnx() -> bytes:
    import onnx
    from onnx import helper, numpy_helper

    layer = {"scale": 1.0, "bias": 0.0, "mean": 0.5, "var": 2.0}
    tensors = [numpy_helper.from_array(np.full(3, value, np.float32), name) for name, value in layer.items()]
    tensors.append(numpy_helper.from_array(np.ones((3, 2, 1, 1), np.float32), "weight"))
    nodes = [
        helper.make_node("Conv", ["x", "weight"], ["y"]),
        helper.make_node("BatchNormalization", ["y", *layer], ["z"], name="bn"),
    ]
    ends = [helper.make_tensor_value_info(name, 1, [1, c, 4, 4]) for name, c in (("x", 2), ("z", 3))]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors)
    model: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    onnx.checker.check_model(model)
    return model


def test_a_remote_file_that_changes_before_the_output_appears_is_not_taken(
    server: FileServer, tmp_path: Path, capsys
) -> None:
    data = server.files["/digits.pt"] = (SAMPLES / "digits.pt").read_bytes()

    def behave(handler: Handler, _: bytes) -> bool:
        last = handler.headers["Range"] == "bytes=0-0"  # the question at the end
        handler.answer_range(data, etag='"two"' if last else '"one"')
        return True

    server.behave = behave
    assert main(["freeze", f"{server.url}/digits.pt", "-o", str(tmp_path / "out.pt")]) == 3
    assert "was changed on the server" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


def test_diff_and_a_run_take_addresses(server: FileServer, capsys) -> None:
    for name in ("digits", "drifted"):
        server.files[f"/{name}.pt"] = (SAMPLES / f"{name}.pt").read_bytes()
    assert main(["diff", f"{server.url}/digits.pt", str(SAMPLES / "digits.pt"), "--json"]) == 0
    compared = capsys.readouterr().out
    assert read_document(compared, "diff")["files"][0]["notes"][1] == []
    assert main(["diff", f"{server.url}/digits.pt", str(SAMPLES / "digits.pt"), "--expect", "identical"]) == 0
    assert "bytes were read from" in capsys.readouterr().out
    assert main(["inspect", f"{server.url}/digits.pt?key=secret", f"{server.url}/drifted.pt", "--json"]) == 0
    printed = capsys.readouterr().out
    assert "secret" not in printed
    assert [file["file"] for file in read_document(printed, "inspect")["files"]] == [
        f"{server.url}/digits.pt",
        f"{server.url}/drifted.pt",
    ]


def test_a_server_without_ranges_gives_all_of_a_small_file_and_that_is_said(server: FileServer) -> None:
    server.files["/net.pt"] = (SAMPLES / "digits.pt").read_bytes()
    server.behave = lambda handler, data: handler.answer(200, data) is None
    inspection = bntool.inspect(f"{server.url}/net.pt")
    size = len(server.files["/net.pt"])
    assert inspection.verdict.sentence == "healthy"
    assert inspection.checkpoint.notes == (f"the server gives no parts of files: all {size:,} bytes were fetched",)
    assert server.sent == size


def test_a_server_without_ranges_is_not_asked_for_large_files(server: FileServer, monkeypatch) -> None:
    monkeypatch.setattr("bntool.checkpoints.remote.transfers.MAX_WHOLE", 90_000)
    server.files["/net.pt"] = (SAMPLES / "digits.pt").read_bytes()
    for headers in ({}, {"Transfer-Encoding": "identity"}):
        server.behave = lambda handler, data, h=headers: handler.answer(200, data, h) is None
        with pytest.raises(UnreachableFileError, match="as a whole only"):
            bntool.inspect(f"{server.url}/net.pt")


def test_files_that_lie_here_import_nothing_of_the_network() -> None:
    loaded = list_loaded("inspect", SAMPLES / "digits.pt", "--quiet")
    assert not [name for name in loaded if name.startswith("bntool.checkpoints.remote")]
    talking = re.compile(r"^\s*(?:import|from) (?:http|urllib\.request|socket|ssl)\b", re.MULTILINE)
    modules = [path for path in (ROOT / "bntool").rglob("*.py") if talking.search(path.read_text())]
    assert {path.parent.name for path in modules} == {"remote"}


def test_the_address_of_a_page_is_said_to_be_one(server: FileServer, capsys: pytest.CaptureFixture[str]) -> None:
    """As that of a file in the browser's view of a repository."""
    server.files["/owner/name/blob/main/net.pt"] = b"\n\n<!DOCTYPE html>\n<html>...</html>"
    assert main(["inspect", f"{server.url}/owner/name/blob/main/net.pt"]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "this is a web page, not a checkpoint; name the address of the file itself" in said
    assert "/raw/" in said
