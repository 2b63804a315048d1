"""docs/architecture.md is held against the code: its names, its floors, and the order of both walks."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import bntool
from bntool.cli.main import main
from tests.places import ROOT, SAMPLES
from tests.test_architecture import FLOORS, PACKAGE

TEXT = (ROOT / "docs" / "architecture.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py): ([\w.]+)`", TEXT)


def list_definitions(path: Path) -> set[str]:
    """Functions, classes and methods of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_every_function_is_where_the_page_says(path: str, name: str) -> None:
    assert name in list_definitions(PACKAGE / path)


def test_every_path_exists_and_every_room_is_named() -> None:
    paths = {path.partition(":")[0] for path in re.findall(r"`([\w/]+/|[\w/]+/[\w/]*\.py(?:: [\w.]+)?)`", TEXT)}
    assert paths
    assert not [path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()]
    rooms = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("__init__.py")} - {"./"}
    assert rooms <= paths


def test_every_room_has_a_floor() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {path.stem for path in PACKAGE.glob("*.py")}
    assert rooms - {"__init__", "__main__"} == {room for floor in FLOORS for room in floor}


def list_calls(act: Callable[[], Any]) -> list[tuple[str, str]]:
    """Functions of bntool in the order in which they are called first."""
    seen: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            path = frame.f_code.co_filename.removeprefix(f"{PACKAGE}/")
            owner = type(frame.f_locals["self"]).__name__ + "." if "self" in frame.f_locals else ""
            seen[path, owner + frame.f_code.co_name] = None

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return list(seen)


def fold_file(folder: Path) -> None:
    pair = ["--pair", "conv1=bn1", "--eps", "1e-5"]
    assert main(["fold", str(SAMPLES / "digits.pt"), *pair, "-o", str(folder / "folded.pt")]) == 0


def recalibrate_model(_folder: Path) -> None:
    bntool.recalibrate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), [torch.randn(8, 3, 6, 6)] * 2)


@pytest.mark.parametrize(("title", "act"), [("`fold`", fold_file), ("`recalibrate`", recalibrate_model)])
def test_a_walk_is_the_way_that_the_code_takes(title: str, act: Callable[[Path], None], tmp_path: Path) -> None:
    section = TEXT.partition(f"through {title}")[2].partition("\n## ")[0]
    walk = re.findall(r"^\| \d+ \| `([\w/]+\.py): ([\w.]+)`", section, flags=re.MULTILINE)
    assert len(walk) > 10
    calls = list_calls(lambda: act(tmp_path))
    assert [call for call in calls if call in walk] == walk
