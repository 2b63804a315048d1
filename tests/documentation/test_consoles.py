"""The commands of the README and the guides are run, in order, on a copy of sample_ckpts."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from bntool.cli.application import COMMANDS
from tests.behaviour.inputs import save_architecture
from tests.documentation.cli_reference import help_of
from tests.documentation.consoles import Console, find_prompts, matches, read_consoles, read_options, run_console
from tests.places import ROOT, copy_samples
from tests.programs import write_commands

ALL = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "sample_ckpts" / "README.md"]
# what blocks of commands begin with that need another place or more time, and what runs them
ELSEWHERE = {
    "pip install": "tests/packaging/clone.py",
    "git clone": "tests/packaging/clone.py",
    "source .venv/bin/activate": "tests/packaging/clone.py",
    'eval "$(_BNTOOL_COMPLETE=': "tests/cli/test_completion.py",
    "bntool inspect hf://": "tests/checkpoints/remote/test_hub.py",
    "torchrun --standalone --nproc-per-node 4 -m": "tests/cli/test_recalibration_ranks.py",
    "torchrun --standalone --nproc-per-node 4 --max-restarts": "tests/oracles/torchrun.py",
    "make catalogue": "catalogue/build.py",  # tests/graphs holds what it writes against the networks
    "python make_samples.py": "sample_ckpts/make_samples.py",
}
# files that pages call by names which stand for a reader's own, and what the tests give for them
CAFFE = "tests/fixtures/interop/caffe_tiny_std"
STAND_INS = {
    "ckpt.pt": "sample_ckpts/drifted.pt",
    "net.py": "sample_ckpts/digits_net.py",
    "calibration.npz": "sample_ckpts/digits_train.npz",
    "net.caffemodel": f"{CAFFE}.caffemodel",
    "train_val.prototxt": f"{CAFFE}.prototxt",
    "resnet50.a1_in1k/model.safetensors": "tests/fixtures/torch_tiny.safetensors",
    "resnet50.a1_in1k/config.json": "docs/schema/inspect.json",
}


def list_consoles(page: Path) -> list[Console]:
    return [one for one in read_consoles(page) if not one.command.startswith(tuple(ELSEWHERE))]


@pytest.mark.parametrize("page", [page for page in ALL if list_consoles(page)], ids=lambda page: page.name)
def test_console_blocks_print_what_the_page_says(page: Path, tmp_path: Path) -> None:
    copy_samples(tmp_path / "sample_ckpts")
    consoles = list_consoles(page)
    for name, file in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / name)
    for name in ("mobilenet_v2", "repvgg_a0"):
        if any(f"{name}.safetensors" in console.command for console in consoles):
            save_architecture(name, tmp_path / f"{name}.safetensors")
    binaries = Path(sys.executable).parent
    (tmp_path / "bin").mkdir()
    server = write_commands(tmp_path / "bin", binaries)
    path = os.pathsep.join([str(tmp_path / "bin"), str(binaries), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore"}
    for console in consoles:
        code, printed = run_console(console, folder=tmp_path, environment=environment, inherited=(server,))
        if console.output is None:
            assert code == 0, f"$ {console.command}\n{printed}"
            continue
        assert matches(console.output, printed), (
            f"$ {console.command}\n{printed}\n--- but {page.name} says\n{console.output}"
        )


@pytest.mark.parametrize("beginning", ELSEWHERE)
def test_what_is_run_elsewhere_is_on_a_page(beginning: str) -> None:
    assert any(one.command.startswith(beginning) for page in ALL for one in read_consoles(page))
    assert (ROOT / ELSEWHERE[beginning]).is_file()


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_commands_stand_in_blocks_that_are_run(page: Path) -> None:
    indented = re.compile(r"^ {4,}(?:bntool|pip|python|torchrun|make|git) \w", flags=re.MULTILINE)
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not indented.findall(text)


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_options_of_commands_on_pages_exist(page: Path) -> None:
    for command, option in read_options(page):
        assert command in COMMANDS, (command, option)
        assert re.search(rf"{option}\b", help_of(command)), (command, option)


def test_the_readme_has_something_to_run() -> None:
    assert len(read_consoles(ROOT / "README.md")) >= 6


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_commands_can_be_pasted(page: Path) -> None:
    assert not find_prompts(page)


def test_prompts_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ ls\n```\n```sh\n$ ls\nls \\\n> x\n```\n```text\n$ is no prompt here\n```\n")
    assert find_prompts(page) == ["a block of console", "$ ls", "> x"]
