"""Python on the pages is run, but for what needs a framework, whose names are looked up; other tests run api.md."""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import torch

import bntool
from tests.places import ROOT, copy_samples

PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = ("freezing.md", "folding.md", "gates.md", "recalibration.md")
# what blocks hold that are only read here, and what runs them
ELSEWHERE = {
    "timm.utils.reparameterize_model": "tests/oracles/deploy_forms.py",
    "import ray": "tests/oracles/ray_data.py",
    "def mean_iou": "tests/recalibration/test_evaluation.py",
}


def read_blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


@pytest.mark.parametrize("name", RUN)
def test_blocks_run_in_their_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of the repository, with the model that the page is about."""
    copy_samples(tmp_path / "sample_ckpts")
    monkeypatch.chdir(tmp_path)
    settings = read_blocks(ROOT / "docs" / name, "toml")
    Path("bntool.toml").write_text("\n".join(settings))
    spec = importlib.util.spec_from_file_location("digits_net_of_pages", "sample_ckpts/digits_net.py")
    assert spec is not None
    assert spec.loader is not None
    net = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(net)
    state_dict = torch.load("sample_ckpts/digits.pt", weights_only=True)
    bntool.freeze_checkpoint("sample_ckpts/digits.pt", "frozen.pt")
    bntool.fold_checkpoint("sample_ckpts/digits.pt", "folded.pt", pairs=["conv1=bn1"], eps=1e-5)
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    names = {"bntool": bntool, "build": net.build, "example_inputs": images, "loader": images.split(4)}
    run = 0
    for block in read_blocks(ROOT / "docs" / name, "python"):
        if not any(part in block for part in ELSEWHERE):
            names["model"] = net.build()
            names["model"].load_state_dict(state_dict)
            exec(compile(block.replace("backbone.*", "layer1.*"), name, "exec"), names)
            run += 1
    assert run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_name_what_bntool_has(page: Path) -> None:
    for block in read_blocks(page, "python"):
        if block.startswith(">>>"):
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bntool."):
                file = ROOT / f"{node.module.replace('.', '/')}.py"
                defined = {one.name for one in ast.parse(file.read_text()).body if hasattr(one, "name")}
                assert {alias.name for alias in node.names} <= defined, page.name


@pytest.mark.parametrize("part", ELSEWHERE)
def test_what_runs_elsewhere_is_on_a_page(part: str) -> None:
    assert any(part in block for page in PAGES for block in read_blocks(page, "python"))
    assert (ROOT / ELSEWHERE[part]).is_file()
