"""The page of `inspect`: what stands in it, how large it is, and that nothing in a file can become a part of it."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bntool
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.reports.page.inspection import describe_channels, make_inspection_page
from bntool.reports.page.rendering import render_page
from tests import programs
from tests.places import ROOT, SAMPLES
from tests.reports.page.browser import Parsed

BROKEN = SAMPLES / "broken_nan_variance.pt"


def draw(source: object, path: str = "net.pt") -> str:
    return render_page(make_inspection_page(path, bntool.inspect(source)))


def test_the_verdict_comes_first_and_a_finding_leads_to_its_row() -> None:
    page = Parsed(draw(BROKEN, str(BROKEN)))
    verdict = bntool.inspect(BROKEN).verdict.sentence
    assert verdict in page.text
    assert page.text.index(verdict, page.text.index("Skip to")) < page.text.index("non-finite")
    links = [one["href"] for one in page.all("a") if one["href"] != "#main"]
    anchors = {f"#{one['id']}" for _, one in page.elements if "id" in one}
    assert links
    assert set(links) <= anchors
    rows = re.findall(r'<tr id="(\w+)"[^>]*>.*?<bdi>(.*?)</bdi>', draw(BROKEN))
    assert dict(rows)[links[0].removeprefix("#")] == "layer2.0.bn1"
    assert "channel 5" in page.text


def test_what_a_picture_shows_is_said_in_words() -> None:
    page = Parsed(draw(BROKEN))
    strips = [one for one in page.all("img") if one.get("class") == "s"]
    assert len(strips) == 2 * 9
    assert all(one["alt"] for one in page.all("img"))
    assert sum("marked: channel 5" in one["alt"] for one in strips) == 2
    assert page.text.count("Layers: 9 layers") == 1  # the caption
    assert {one["scope"] for one in page.all("th")} == {"row", "col"}
    (language,) = page.all("html")
    assert language["lang"] == "en"


HOSTILE = {
    "script": "a<script>alert(1)</script>",
    "attribute": "a\"onmouseover=alert(1) x='y",
    "entity": "a&lt;b&#0;",
    "comment": "a--><!--",
    "template": "a{{ 7 * 7 }}{% raw %}",
    "bidi": "a\u202egnp.txt\u2066",
    "control": "a\x1b[31m\x00b",
    "surrogate": "a\ud800b",
    "long": "a" * 100_000,
}


def list_elements(page: Parsed) -> list[tuple[str, dict[str, str | None]]]:
    """Elements with what does not depend on the length of texts; ``w`` is the class of a long name."""
    kept = ("class", "scope", "id", "href", "role", "title")
    return [
        (tag, {name: text for name, text in attributes.items() if name in kept and (name, text) != ("class", "w")})
        for tag, attributes in page.elements
    ]


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_from_a_file_are_inert(kind: str) -> None:
    name = HOSTILE[kind]
    layer = nn.BatchNorm1d(4).state_dict()
    layer["running_var"][2] = math.nan
    plain, hostile = (draw({f"{one}.{role}": value for role, value in layer.items()}) for one in ("a", name))
    wanted, found = Parsed(plain), Parsed(hostile)
    # the same elements with the same attributes but one class for long names: the name changed nothing but texts
    assert list_elements(found) == list_elements(wanted)
    assert not [c for c in hostile if c in "\u202e\u2066\x1b\x00"]
    assert "7 * 7" in hostile or kind != "template"
    assert len(hostile) < len(plain) + 20_000
    hostile.encode("utf-8", "backslashreplace")


def test_the_policy_allows_only_what_the_page_brings() -> None:
    text = draw(BROKEN)
    (policy,) = [one["content"] for one in Parsed(text).all("meta") if one.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    sources = [address for _, one in Parsed(text).elements for name in ("src", "href") if (address := one.get(name))]
    assert sources
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in sources)
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")


def resnet152() -> dict[str, torch.Tensor]:
    """The BatchNorms of torchvision's ResNet-152: blocks of three and one that projects for each of four stages."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"bn1": 64}
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 8, 36, 3), strict=True), start=1):
        for block in range(blocks):
            names = {"bn1": width, "bn2": width, "bn3": 4 * width, **({"downsample.1": 4 * width} if not block else {})}
            sizes |= {f"layer{stage}.{block}.{name}": size for name, size in names.items()}
    state = {}
    for name, size in sizes.items():
        layer = nn.BatchNorm2d(size).state_dict()
        layer["running_var"] = torch.exp(torch.randn(size, generator=generator))
        layer["running_mean"] = torch.randn(size, generator=generator)
        layer["weight"] = torch.rand(size, generator=generator)
        layer["num_batches_tracked"] += 90_000
        state |= {f"{name}.{role}": tensor for role, tensor in layer.items()}
    return state


def test_a_large_network_fits_in_300_kb() -> None:
    state = resnet152()
    state["layer3.7.bn2.running_var"][200] = math.nan
    text = draw(state)
    assert "155 BatchNorm layers" in text
    assert len(text.encode()) <= 300_000
    assert "channel 200" in text


def test_channels_are_named_as_runs() -> None:
    assert describe_channels(()) == ""
    assert describe_channels([5]) == "channel 5"
    assert describe_channels([9, 1, 2, 3, 5]) == "channels 1 to 3, 5, 9"
    assert describe_channels(range(0, 60, 2)).endswith("and 18 more")


def test_the_command_writes_it_like_any_other_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "page.html"
    arguments = ["inspect", str(BROKEN), "--html", str(target)]
    assert main([*arguments, "--fail-on", "error"]) == ExitCode.FINDINGS
    assert f"wrote {target}" in capsys.readouterr().out
    assert target.read_text() == draw(BROKEN, str(BROKEN))
    before = target.read_bytes()
    assert main(arguments) == ExitCode.FILE
    assert "use --force" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert main([*arguments, "--force", "--json"]) == ExitCode.DONE
    assert capsys.readouterr().out.startswith("{")
    (tmp_path / "fifo").symlink_to("/dev/null")
    assert main([*arguments[:-1], str(tmp_path / "fifo"), "--force"]) == ExitCode.FILE
    assert main([*arguments[:-1], str(BROKEN), "--force"]) == ExitCode.USAGE
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "fifo"}


def test_the_whole_page_is_what_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SAMPLES)
    assert main(["inspect", "broken_nan_variance.pt", "--html", str(tmp_path / "page.html"), "--quiet"]) == 0
    page, snapshot = (tmp_path / "page.html").read_text(), ROOT / "tests" / "snapshots" / "inspect-broken.html"
    for name in (
        "parts.css",
        "page.css",
        "page.js",
    ):  # in it as they are
        text = (ROOT / "bntool" / "reports" / "page" / "templates" / name).read_text().strip()
        assert page.count(text) == 1
        page = page.replace(text, f"[{name}]")
    if os.environ.get("UPDATE_SNAPSHOTS"):
        snapshot.write_text(page)
    assert page == snapshot.read_text()


def test_jinja_is_imported_only_when_a_page_is_written(tmp_path: Path) -> None:
    assert "jinja2" not in programs.list_loaded("inspect", BROKEN)
    loaded = programs.list_loaded("inspect", BROKEN, "--html", tmp_path / "page.html")
    assert "jinja2" in loaded
    assert not {"torch", "numpy", "rich"} & loaded
