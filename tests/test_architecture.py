"""Imports point one way, and start-up imports little."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import torch

from tests import programs
from tests.places import ROOT

PACKAGE = ROOT / "bntool"


def read_floors() -> list[list[str]]:
    """The rooms as docs/architecture.md draws them, from the top down.

    Each may import those in lower lines; those of one line import only what is said beside them.
    """
    drawn = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), flags=re.DOTALL)[1]
    return [line.split() for line in drawn.splitlines()]


FLOORS = read_floors()
FORBIDDEN_NAMES = {"utils", "helpers", "common", "inspect", "json", "manager", "misc"}


def modules() -> list[Path]:
    rooms = {room for floor in FLOORS for room in floor}
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in rooms)


@functools.cache
def read_nodes(path: Path) -> list[ast.AST]:
    """All nodes of the syntax tree of a module; the first is the module."""
    return list(ast.walk(ast.parse(path.read_text())))


def name_module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def read_imports(paths: list[Path]) -> dict[str, set[str]]:
    """What each module imports of the others, also inside functions and for types."""
    names = {name_module(path): path for path in paths}
    imports: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for node in read_nodes(path):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [one if one in names else node.module for one in inner]
            imports[name] |= {one for one in found if one in names and one != name}
    return imports


def find_circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, by way of others too."""
    reached = {name: set(direct) for name, direct in imports.items()}
    while True:
        more = {name: found.union(*(reached[one] for one in found)) for name, found in reached.items()}
        if more == reached:
            break
        reached = more
    circles = {
        tuple(sorted(o for o in names if name in reached[o])) for name, names in reached.items() if name in names
    }
    return sorted(map(list, circles))


def test_imports_point_one_way() -> None:
    height = {room: number for number, floor in enumerate(reversed(FLOORS)) for room in floor}
    wrong = []
    for name, imports in read_imports(modules()).items():
        room = name.split(".")[1]
        rooms = {one.split(".")[1] for one in imports} - {room}
        wrong += [f"{name} imports {other}" for other in sorted(rooms) if height[other] >= height[room]]
    assert not wrong


def test_no_modules_import_each_other() -> None:
    catalogue = sorted((ROOT / "catalogue").glob("*.py"))
    assert not find_circles(read_imports([*modules(), *catalogue]))


def test_modules_have_names_and_say_what_they_hold() -> None:
    for path in modules():
        assert path.stem not in FORBIDDEN_NAMES, path
        module = read_nodes(path)[0]
        assert isinstance(module, ast.Module)
        assert ast.get_docstring(module), f"{path} does not say what it holds"


def test_rooms_can_be_looked_over() -> None:
    for folder in {path.parent for path in modules()}:
        assert len(list(folder.glob("*.py"))) <= 26, f"{folder} is a drawer"


def test_only_the_command_line_prints() -> None:
    for path in modules():
        if path.relative_to(PACKAGE).parts[0] != "cli":
            calls = [n for n in read_nodes(path) if isinstance(n, ast.Call)]
            assert not [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"], path


@pytest.mark.parametrize("start", ["import bntool", "import bntool.cli.main bntool.checkpoints.formats", "--help"])
def test_start_up_imports_neither_torch_nor_numpy(start: str) -> None:
    assert not {"torch", "numpy", "rich", "safetensors", "pydantic", "PIL"} & programs.list_loaded(*start.split())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_listing_imports_neither_writers_nor_other_formats_nor_other_commands(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(torch.nn.BatchNorm2d(4).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    names = programs.list_loaded("inspect", path)
    assert "typer" not in names
    loaded = {name.removeprefix("bntool.") for name in names if name.startswith("bntool.")}
    assert {"cli.listing", "checkpoints.torch.legacy" if legacy else "checkpoints.torch.zip"} <= loaded
    others = {
        *("keras", "caffe", "onnx", "tensorflow", "hdf5", "sharded", "safetensors", "distributed", "exported"),
        "torch.tar",
    }
    others |= {
        "writing",
        "changes",
        "patches",
        "creation",
        "application",
        "plan",
        "protobufs",
        "numpy",
        ".zip" * legacy,
    }
    found = {name for name in loaded if name.startswith("checkpoints.") or name == "plan"}
    assert not {name for name in found if any(other and other in name for other in others)}
    assert {name for name in loaded if name.startswith("cli.")} == {
        *("cli.main", "cli.exit_codes", "cli.output", "cli.completion", "cli.configuration", "cli.globs", "cli.listing")
    }


def test_everything_public_can_be_imported() -> None:
    import bntool

    for name in bntool.__all__:
        assert getattr(bntool, name) is not None
    assert set(bntool.__all__) <= set(dir(bntool))


def test_deciding_and_writing_a_fold_of_a_file_needs_no_torch() -> None:
    assert "torch" not in programs.list_loaded("import", "bntool.folding.checkpoint", "bntool.reports.folding")
