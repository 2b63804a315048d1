"""Imports point one way, and start-up imports little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bntool"

# each room and the rooms it may import, besides itself
ALLOWED = {
    "errors": set(),
    "version": set(),
    "batchnorm": {"errors"},
    "plan": {"errors"},
    "checkpoints": {"errors", "batchnorm", "plan"},
    "graphs": {"errors", "batchnorm", "plan", "checkpoints", "layers", "models"},
    "models": {"errors", "batchnorm", "plan", "checkpoints"},
    "data": {"errors", "batchnorm", "plan", "checkpoints", "models", "layers"},
    "layers": {"errors", "batchnorm", "plan", "checkpoints"},
    "operations": {"errors", "batchnorm", "plan", "checkpoints", "graphs", "models", "data", "layers", "version"},
    "integrations": {"errors", "batchnorm", "plan", "checkpoints", "layers", "operations"},
    "reports": {"errors", "batchnorm", "plan", "checkpoints", "operations", "graphs", "data", "layers"},
    "cli": {
        "errors",
        "batchnorm",
        "plan",
        "checkpoints",
        "operations",
        "graphs",
        "data",
        "layers",
        "models",
        "reports",
        "version",
    },
}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "inspect", "json", "manager", "misc"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ALLOWED)


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a module imports at run time, also inside functions; imports for types only do not count."""
    rooms = set()
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "bntool":
            names = [f"bntool.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("bntool.")}
    return rooms


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported_rooms(path) - {room} <= ALLOWED[room]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_are_named_and_sized_as_rooms(path: Path) -> None:
    assert path.stem not in FORBIDDEN_NAMES
    assert len(path.read_text().splitlines()) <= 330, "probably two things"
    if path.stem != "__init__" or path.read_text().strip():
        assert ast.get_docstring(ast.parse(path.read_text())), "says what it holds"


def test_only_the_command_line_prints() -> None:
    for path in modules():
        if path.relative_to(PACKAGE).parts[0] != "cli":
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            assert not [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"], path


@pytest.mark.parametrize(
    "statement", ["import bntool", "import bntool.cli.main as m; m.build_app()", "import bntool.checkpoints.formats"]
)
def test_start_up_imports_neither_torch_nor_numpy(statement: str) -> None:
    heavy = "{'torch', 'numpy', 'rich', 'safetensors', 'pydantic', 'PIL'}"
    script = f"{statement}; import sys; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_listing_imports_neither_writers_nor_other_formats_nor_other_commands(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(torch.nn.BatchNorm2d(4).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    script = (
        "import sys; from bntool.cli.main import main; assert main(['inspect', sys.argv[1], '--quiet']) == 0; "
        "print(*sorted(name.removeprefix('bntool.') for name in sys.modules if name.startswith('bntool.')))"
    )
    arguments = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(arguments, check=True, cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert {"cli.inspection", "checkpoints.torch_legacy" if legacy else "checkpoints.torch_zip"} <= loaded
    others = {
        "keras",
        "caffe",
        "onnx",
        "tensorflow",
        "hdf5",
        "sharded",
        "safetensors",
        "distributed",
        "exported",
        "tar",
    }
    others |= {"writing", "changes", "patches", "creation", "application", "plan", "protobufs", "numpy", "zip" * legacy}
    found = {name for name in loaded if name.startswith("checkpoints.") or name == "plan"}
    assert not {name for name in found if any(other and other in name for other in others)}
    assert {name for name in loaded if name.startswith("cli.")} == {
        *("cli.main", "cli.help", "cli.output", "cli.options", "cli.inspection")
    }


def test_everything_public_can_be_imported() -> None:
    import bntool

    for name in bntool.__all__:
        assert getattr(bntool, name) is not None
    assert set(bntool.__all__) <= set(dir(bntool))


def test_deciding_and_writing_a_fold_of_a_file_needs_no_torch() -> None:
    script = "import bntool.operations.checkpoint_folding, bntool.reports.folding, bntool.cli.writing, sys"
    subprocess.run([sys.executable, "-c", f"{script}; assert 'torch' not in sys.modules"], check=True, cwd=ROOT)
