"""What a notebook shows of results: some lines, and parts of a page that run nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import pytest
import torch
from torch import nn

import bntool
from bntool.cli.main import main
from tests.places import SAMPLES
from tests.reports.page.browser import Parsed

LONGEST = 700  # characters: some lines of a notebook


class Net(nn.Sequential):
    """Twelve layers of 64 channels."""

    def __init__(self) -> None:
        blocks = (nn.Sequential(nn.Conv1d(64, 64, 1), nn.BatchNorm1d(64)) for _ in range(12))
        super().__init__(*blocks)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of each kind, of a model with many channels, some of them broken."""
    torch.manual_seed(0)
    model = Net().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.uniform_(layer.running_var, 0.5, 2)
            layer.num_batches_tracked += 900
    path = tmp_path_factory.mktemp("notebook") / "m.pt"
    torch.save(model.state_dict(), path)
    broken = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken["7.1.running_var"][:50] = torch.nan
    batches = [torch.randn(4, 64, 3) for _ in range(2)]
    with bntool.open_checkpoint(path) as checkpoint:
        (layer, *_) = bntool.find_batchnorms(checkpoint.state_dicts[0])
        made = {"checkpoint": checkpoint, "state dict": checkpoint.state_dicts[0], "BatchNorm": layer}
        made = {name: (value, value._repr_html_()) for name, value in made.items()}
    inspection = bntool.inspect(broken)
    fold = bntool.fold_checkpoint(path, pairs={f"{index}.1": f"{index}.0" for index in range(12)}, eps=1e-5)
    live = bntool.fold(model, batches[0])
    others = {
        "inspect": inspection,
        "inspect, a state dict": inspection.state_dicts[0],
        "inspect, a layer": inspection.state_dicts[0]["7.1"],
        "diff": bntool.diff(path, broken),
        "fold": live,
        "fold_checkpoint": fold,
        "plan": fold.plan,
        "freeze_checkpoint": bntool.freeze_checkpoint(path, emit="python"),
        "convert": bntool.convert(path, to="safetensors"),
        "recalibrate_checkpoint": bntool.recalibrate_checkpoint(path, model=Net(), data=batches),
        "recalibrate": bntool.recalibrate(model, batches),
        "average": bntool.average_checkpoints([path, path]),
        "partial": bntool.recalibrate_checkpoint(
            path, model=Net(), data=batches, shard="1/2", partial=path.with_name("part.safetensors")
        ),
        "freeze": bntool.freeze(model),
    }
    return {**made, **{name: (value, show(value)) for name, value in others.items()}}


def show(value: Any) -> str:
    """As a notebook asks for it: by the formatter of IPython where that is installed."""
    if importlib.util.find_spec("IPython") is None:
        return value._repr_html_()
    from IPython.core.formatters import DisplayFormatter

    data, _ = DisplayFormatter().format(value)
    return data["text/html"]


NAMES = (
    *("checkpoint", "state dict", "BatchNorm", "inspect", "inspect, a state dict", "inspect, a layer", "diff", "fold"),
    *("fold_checkpoint", "plan", "freeze_checkpoint", "convert", "recalibrate_checkpoint", "recalibrate", "freeze"),
    *("average", "partial"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_some_lines_and_a_part_of_a_page(name: str, results: dict[str, Any]) -> None:
    value, html = results[name]
    assert len(repr(value)) <= LONGEST
    assert "12" in html or name in ("inspect, a layer", "BatchNorm")
    page = Parsed(html)
    assert not page.all("script")
    assert len(html) < 80_000
    # styles reach only into the part, and anchors do not meet those of another cell
    style = html.partition("<style>")[2].partition("</style>")[0]
    selectors = re.sub(r"@media[^{]*{|{[^{}]*}", "\n", style).replace("}", "\n").split("\n")
    selectors = [one for line in selectors for one in re.split(r",(?![^(]*\))", line) if one.strip()]
    assert len(selectors) > 30
    assert {one for one in selectors if not one.startswith(".bntool")} == set()
    anchors = [str(one["id"]) for _, one in page.elements if "id" in one]
    assert all(re.match(r"bntool\d+-", anchor) for anchor in anchors)
    links = {one["href"] for one in page.all("a")}
    assert links <= {f"#{anchor}" for anchor in anchors}


def walk(value: object, depth: int = 4) -> Iterator[object]:
    """A value and what its fields hold."""
    yield value
    if not depth or isinstance(value, Enum | nn.Module | torch.Tensor):
        return
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.repr:
                yield from walk(getattr(value, field.name), depth - 1)
    elif isinstance(value, Mapping):
        for inner in list(value.values())[:3]:
            yield from walk(inner, depth - 1)
    elif isinstance(value, tuple | list):
        for inner in value[:3]:
            yield from walk(inner, depth - 1)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_result_holds_shows_itself_shortly_too(name: str, results: dict[str, Any]) -> None:
    value, _ = results[name]
    seen = {type(one).__name__: len(repr(one)) for one in walk(value) if dataclasses.is_dataclass(one)}
    assert seen
    assert {kind: length for kind, length in seen.items() if length > LONGEST} == {}


def test_finite_and_broken_channels_are_told_apart(results: dict[str, Any]) -> None:
    _, html = results["inspect, a layer"]
    assert "channels 0 to 49" in html
    assert "50 not finite" in html


def test_of_a_long_table_a_notebook_shows_so_many_rows(results: dict[str, Any]) -> None:
    _, html = results["state dict"]
    assert html.count("<tr") == 1 + 40
    assert f"and {12 * 7 - 40} more" in html


def test_a_result_is_drawn_by_what_the_command_draws(results: dict[str, Any], tmp_path: Any) -> None:
    broken, page = SAMPLES / "broken_nan_variance.pt", tmp_path / "page.html"
    assert main(["inspect", str(broken), "--html", str(page), "-q"]) == 0
    strips = [one["src"] for one in Parsed(page.read_text()).all("img")]
    assert [one["src"] for one in Parsed(bntool.inspect(broken)._repr_html_()).all("img")] == strips


def test_a_sick_layer_far_down_is_among_the_rows_that_are_shown(tmp_path: Any) -> None:
    state_dict = {
        f"blocks.{number}.bn.{name}": tensor.clone()
        for number in range(60)
        for name, tensor in nn.BatchNorm2d(4).state_dict().items()
    }
    for name, tensor in state_dict.items():
        if name.endswith("running_mean"):
            tensor.uniform_(0.5, 2)
    state_dict["blocks.55.bn.running_mean"][2] = torch.nan
    torch.save(state_dict, tmp_path / "c.pt")
    html = bntool.inspect(tmp_path / "c.pt")._repr_html_()
    (anchor,) = set(re.findall(r'href="#([^"]+)"[^>]*>[^<]*(?:<bdi>)?blocks\.55\.bn', html))
    assert f'id="{anchor}"' in html
    assert "and 20 more" in html
