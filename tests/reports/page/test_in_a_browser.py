"""Pages in a real browser: their script runs, and nothing else does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bntool.cli.main import main
from tests.places import SAMPLES
from tests.reports.page.browser import Opened, Parsed, open_page

BROKEN = SAMPLES / "broken_nan_variance.pt"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("browser") / "page.html"
    assert main(["inspect", str(BROKEN), "--html", str(path), "--quiet"]) == 0
    return path


def list_rows(opened: Opened) -> dict[str, bool]:
    """Whether the row of each layer is shown."""
    rows = re.findall(r"<tr id=\"l\d+\"([^>]*)><th[^>]*>(?:<i.*?</i>)?<bdi>(.*?)</bdi>", opened.document)
    return {name: "hidden" not in attributes for attributes, name in rows}


def test_the_script_filters_by_what_the_address_says(page: Path) -> None:
    opened = open_page(page, "filter=layer2%20bn1")
    assert opened.console == []
    rows = list_rows(opened)
    assert [name for name, shown in rows.items() if shown] == ["layer2.0.bn1"]
    assert len(rows) == 9
    text = Parsed(opened.document).text
    assert "1 of 9 layers" in text
    assert "1 layer sick" in text
    assert text.count("Copy") >= 2  # the script adds the buttons


def test_what_was_slipped_into_a_page_does_not_run(page: Path, tmp_path: Path) -> None:
    evil = '<script>document.title = "owned"</script><img src=x onerror="document.title = \'owned\'">'
    (tmp_path / "evil.html").write_text(page.read_text().replace("<main", evil + "<main"))
    opened = open_page(tmp_path / "evil.html")
    assert len([line for line in opened.console if "Content Security Policy" in line]) >= 2
    assert "<title>owned" not in opened.document
    assert all(list_rows(opened).values())  # what is the page's own runs as ever, and without a filter shows all


ACTIONS = """
addEventListener("load", () => {
  const row = [...document.querySelectorAll("tbody tr")].find((one) => one.textContent.includes("layer2.0.bn1"));
  const point = (image, share) => {
    const box = image.getBoundingClientRect();
    const place = { clientX: box.left + share * box.width, clientY: box.top + 12, bubbles: true };
    image.dispatchEvent(new PointerEvent("pointermove", place));
    return document.getElementById("tip").textContent;
  };
  const strip = row.querySelector("img");
  const said = [point(strip, 5.5 / 32), point(strip, 6.5 / 32)];
  const heading = [...document.querySelectorAll("thead th")][1];
  const order = () => [...document.querySelectorAll("tbody tr")].map((one) => one.cells[1].textContent).join();
  heading.querySelector("button").click();
  const orders = [order(), heading.getAttribute("aria-sort")];
  heading.querySelector("button").click();
  orders.push(order(), heading.getAttribute("aria-sort"));
  document.querySelector("input[type=checkbox]").click();
  const shown = [...document.querySelectorAll("tbody tr")].filter((one) => !one.hidden).length;
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify({ said, orders, shown });
  document.body.append(result);
});
"""


def test_rows_are_sorted_and_strips_say_what_is_pointed_at(page: Path, tmp_path: Path) -> None:
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())  # so that a second script can act
    (tmp_path / "acted.html").write_text(text.replace("</body>", f"<script>{ACTIONS}</script></body>"))
    opened = open_page(tmp_path / "acted.html")
    assert opened.console == []
    found = json.loads(re.search(r'<pre id="result">(.*?)</pre>', opened.document, flags=re.DOTALL)[1])
    values = torch.load(BROKEN, weights_only=True)["layer2.0.bn1.running_var"]
    broken, sound = found["said"]
    assert broken == "channel 5: not finite"
    low, high = map(float, re.fullmatch(r"channel 6: (.*) to (.*)", sound).groups())
    assert low * 0.94 < values[6] < high * 1.06  # the ends have two digits
    falling, direction, rising, other = found["orders"]
    assert (direction, other) == ("descending", "ascending")
    assert falling == "32,32,32,32,12,12,12,12,12"
    assert rising == "12,12,12,12,12,32,32,32,32"
    assert found["shown"] == 1


LAYOUT = """
addEventListener("load", () => {
  const result = document.createElement("pre");
  result.id = "result";
  const names = [...document.querySelectorAll("tbody th[scope=row]")].map((one) => one.getBoundingClientRect().height);
  const wide = [...document.querySelectorAll(".scroll")].map((one) => one.scrollWidth - one.clientWidth);
  wide.push(document.documentElement.scrollWidth - document.documentElement.clientWidth);
  result.textContent = JSON.stringify({ names, wide });
  document.body.append(result);
});
"""


@pytest.mark.parametrize("width", [500, 1200])
@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_nothing_is_cut_or_broken_up(command: str, width: int, tmp_path: Path) -> None:
    files = [str(SAMPLES / "digits.pt"), str(SAMPLES / "drifted.pt")]
    page = tmp_path / "page.html"
    assert main([command, *files[-1 if command == "inspect" else 0 :], "--html", str(page), "--quiet"]) == 0
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    page.write_text(text.replace("</body>", f"<script>{LAYOUT}</script></body>"))
    opened = open_page(page, width=width)
    found = json.loads(re.search(r'<pre id="result">(.*?)</pre>', opened.document, flags=re.DOTALL)[1])
    assert len(found["names"]) == 9
    assert max(found["names"]) < 50  # a name has one line, or two
    assert max(found["wide"]) <= 0
