"""Write docs/python.md, every public name under its room: ``python -m tests.documentation.python_calls``."""

from __future__ import annotations

import bntool
from tests.places import ROOT
from tests.test_architecture import FLOORS

PAGE = ROOT / "docs" / "python.md"
_HEAD = """\
# Every call of Python

All of these are names of `bntool` itself; [by example](api.md) shows them at work. Made by `make docs`.
"""


def write_page() -> str:
    """The text of the page."""
    sections: dict[str, list[str]] = {room: [] for floor in FLOORS for room in floor}
    values = []
    for name, module in bntool._PUBLIC.items():
        _, room, *inner = module.split(".")
        is_call = inner and name.islower()
        (sections[room] if is_call else values).append(f"::: {module}.{name}\n    options: {{ heading_level: 3 }}\n")
    titled = {**{room.capitalize(): calls for room, calls in sections.items()}, "Values": values}
    return "\n".join([_HEAD, *(text for title, calls in titled.items() if calls for text in (f"## {title}\n", *calls))])


if __name__ == "__main__":
    PAGE.write_text(write_page())
