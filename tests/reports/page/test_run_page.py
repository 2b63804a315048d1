"""The page of several files: layers by files with the break, the file that broke whole."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import bntool
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.inspection.run import inspect_run
from tests.places import SAMPLES
from tests.reports.page.browser import Parsed

FILES, BROKEN_AT = 12, 7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Epochs of a net whose second layer breaks in channel 3, in all files from one on."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)) for _ in range(4)))
    state, paths = net.state_dict(), []
    for index in range(4):
        state[f"{index}.1.running_var"].uniform_(0.5, 2)
        state[f"{index}.1.running_mean"].normal_()
        state[f"{index}.1.weight"].uniform_(0.5, 1)
    for epoch in range(FILES):
        for name, tensor in state.items():
            tensor.add_(500) if "tracked" in name else tensor.mul_(1.01) if "running" in name else None
        if epoch == BROKEN_AT:
            state["1.1.running_mean"][3] = torch.nan
        paths.append(folder / f"epoch_{epoch}.pt")
        torch.save({"epoch": epoch, "model": state}, paths[-1])
    return paths


@pytest.fixture(scope="module")
def page(run: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    target = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["inspect", *map(str, run), "--html", str(target), "-q", "--fail-on", "error"]) == ExitCode.FINDINGS
    return Parsed(target.read_text())


def read_strip(attributes: dict[str, str | None]) -> Image.Image:
    data = base64.b64decode(str(attributes["src"]).partition(",")[2])
    image = Image.open(io.BytesIO(data))
    image.load()
    return image.convert("RGBA")


def test_the_file_that_broke_is_the_verdict(page: Parsed) -> None:
    assert f"sick first in epoch_{BROKEN_AT}.pt" in page.text
    assert f"since epoch {BROKEN_AT}, channel 3" in " ".join(page.text.split())
    assert f"epoch_{BROKEN_AT - 1}.pt was healthy" in page.text


def test_a_layer_is_dated_by_the_worst_that_was_found_in_it(tmp_path: Path) -> None:
    """Few updates at first, which is a warning, and much later an error."""
    state, paths = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).state_dict(), []
    state["1.running_mean"].normal_()
    for epoch, (count, first) in enumerate(((5, 0.1), (500, 0.1), (900, torch.nan), (990, 0.1))):
        state["1.num_batches_tracked"].fill_(count)
        state["1.running_mean"][0] = first
        paths.append(tmp_path / f"epoch_{epoch}.pt")
        torch.save({"epoch": epoch, "model": state}, paths[-1])
    assert main(["inspect", *map(str, paths), "--html", str(tmp_path / "page.html"), "-q"]) == 0
    text = (tmp_path / "page.html").read_text()
    row = text.partition('<tr id="r0"')[2].partition("</tr>")[0]
    assert re.findall(r'class="error">(epoch \d)<', row) == ["epoch 2"]


def test_the_heat_map_has_a_place_for_each_file_and_shows_the_break(page: Parsed) -> None:
    strips = [one for one in page.all("img") if one.get("class") == "s" and "file" in str(one["alt"])]
    assert len(strips) == 2 * 4
    images = [read_strip(one) for one in strips[::2]]  # running_var
    wide = (images[0].width - 1) // FILES
    for layer, image in enumerate(images):
        assert image.width == FILES * wide + 1
        free = [x for x in range(image.width) if image.getpixel((x, 3))[3] == 0]
        assert free == [BROKEN_AT * wide]
        notches = [x for x in range(image.width) if image.getpixel((x, 0))[3]]
        assert notches == (list(range(BROKEN_AT * wide + 1, image.width)) if layer == 1 else [])
    # hatched where it is not finite
    assert images[1].getpixel((images[1].width - 1, 5))[3] == 0
    assert images[0].getpixel((images[0].width - 1, 5))[3] == 255


def test_the_file_that_broke_is_shown_whole_and_all_files_are_listed(page: Parsed, run: list[Path]) -> None:
    assert f"Layers of model in {run[BROKEN_AT]}" in page.text
    assert sum("running_var of 8 channels" in str(one["alt"]) for one in page.all("img") if "alt" in one) == 4
    for path in run:
        assert str(path) in page.text
    links = {one["href"] for one in page.all("a")} - {"#main"}
    assert links
    assert links <= {f"#{one['id']}" for _, one in page.elements if "id" in one}


def test_the_ends_of_the_scale_enclose_the_numbers(page: Parsed, run: list[Path]) -> None:
    heading = next(one for one in page.all("th") if "data-low" in one)
    names = str(heading["data-places"]).split("\n")
    assert names == [f"epoch {epoch}" for epoch in range(FILES)]
    assert heading["data-gap"] == str(BROKEN_AT)
    states = [torch.load(path, weights_only=True)["model"] for path in run]
    largest = [tensor.max() for state in states for name, tensor in state.items() if "running_var" in name]
    low, high = (10 ** float(str(heading[f"data-{end}"])) for end in ("low", "high"))
    assert low <= min(largest)
    assert max(largest) <= high


def test_files_that_cannot_be_read_are_said(
    run: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, absent = tmp_path / "page.html", tmp_path / "epoch_99.pt"
    assert main(["inspect", *map(str, run[:3]), str(absent), "--html", str(target), "-q"]) == ExitCode.FILE
    page = Parsed(target.read_text())
    assert "4 files: 1 failed, 3 healthy" in page.text
    assert "unreadable" in page.text
    assert main(["inspect", str(absent), str(absent), "--html", str(tmp_path / "none.html"), "-q"]) == ExitCode.FILE
    assert not (tmp_path / "none.html").exists()


def test_a_run_shows_itself_in_a_notebook(run: list[Path]) -> None:
    looked_at = inspect_run(run[:4])
    assert "Layers by files" in looked_at._repr_html_()
    assert len(repr(looked_at)) < 700


def test_a_hundred_files_of_a_large_network_fit_in_300_kb(tmp_path: Path) -> None:
    """The summary of one file a hundred times, which is what the page is made of."""
    from dataclasses import replace

    from bntool.inspection.run import Run
    from bntool.reports.page.rendering import render_page
    from bntool.reports.page.run import make_run_page

    state = {}
    for index in range(53):  # as many as ResNet-50 has, of its names and its mean width
        layer = nn.BatchNorm2d(512).state_dict()
        layer["running_var"] = torch.rand(512) + 0.1
        layer["num_batches_tracked"] += 9000
        state |= {f"layer3.{index}.downsample.1.{role}": tensor for role, tensor in layer.items()}
    torch.save(state, tmp_path / "epoch.pt")
    (file,) = inspect_run([tmp_path / "epoch.pt"]).files
    files = []
    for epoch in range(100):  # each strip with colours of its own
        layers = {
            name: replace(one, largest_variance=float(10 ** (4 * torch.rand(()) - 2)))
            for name, one in file.layers.items()
        }
        files.append(replace(file, path=f"run/epoch_{epoch}.pt", progress={"epoch": epoch}, layers=layers))
    whole = bntool.inspect(tmp_path / "epoch.pt")
    text = render_page(make_run_page(Run(tuple(files), "epoch"), looked_at=(files[0], whole)))
    assert len(text.encode()) <= 300_000


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (["digits", "drifted"], "suspicious first in 1.pt"),
        (["drifted", "digits", "drifted"], "suspicious again in 2.pt"),
        (["broken_nan_variance", "digits"], "sick already in the first file, 0.pt"),
    ],
)
def test_it_is_said_whether_it_was_so_before(order: list[str], said: str, tmp_path: Path, capsys) -> None:
    paths = [shutil.copy(SAMPLES / f"{name}.pt", tmp_path / f"{at}.pt") for at, name in enumerate(order)]
    assert main(["inspect", *map(str, paths), "--html", str(tmp_path / "page.html")]) == 0
    assert said in capsys.readouterr().out
    assert said in Parsed((tmp_path / "page.html").read_text()).text
