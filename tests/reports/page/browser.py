"""A browser without a window, for pages that tests look at."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = ("--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--enable-logging=stderr")


@dataclass(frozen=True)
class Opened:
    """A page after its script ran: the document as HTML, and what stands in the console."""

    document: str
    console: list[str]


def find_browser() -> str:
    """A program; without one the test is skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser is installed here: one of {', '.join(NAMES)}")
    return found


def open_page(path: Path, fragment: str = "", *, width: int = 1200) -> Opened:
    """Open a page in a browser that has no profile and no sandbox, which a container may not have either."""
    profile = path.parent / "profile"
    url = path.resolve().as_uri() + (f"#{fragment}" if fragment else "")
    options = [*OPTIONS, "--no-sandbox", f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom"]
    options.append(f"--window-size={width},900")
    environment = {**os.environ, "HOME": str(path.parent)}
    done = subprocess.run(
        [find_browser(), *options, url], check=False, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    console = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    return Opened(done.stdout, console)


class Parsed(HTMLParser):
    """A document as its elements, and the text that a reader sees.

    Attributes:
        elements: name and attributes, in order.
        text: of all elements but scripts and styles.
    """

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of that name."""
        return [attributes for name, attributes in self.elements if name == tag]
