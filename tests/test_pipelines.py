"""What GitHub and pre-commit read of this repository: each ``run:`` of the action is run, the rest is read."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT, SAMPLES

yaml = pytest.importorskip("yaml")  # of the group of packages for tests

from tests.workflow_steps import StepResult, read_steps, run_step  # noqa: E402

STEPS = read_steps("action.yml")
BINARIES = str(Path(sys.executable).parent)
USED = re.compile(r"[\w-]+/[\w./-]+@(v\d+|release/v\d+)")


def find_step(word: str) -> dict[str, Any]:
    (step,) = [step for step in STEPS if step.get("name", "").startswith(word)]
    return step


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "repository"
    (folder / "runs with spaces").mkdir(parents=True)
    shutil.copy(SAMPLES / "digits.pt", folder / "runs with spaces" / "healthy.pt")
    shutil.copy(SAMPLES / "digits.pt", folder / "net.pt")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "a commit")
    return git(folder, "rev-parse", "HEAD")


def inspect(repository: Path, checkpoints: str, fail_on: str = "error") -> StepResult:
    values = {"inputs.checkpoints": checkpoints, "inputs.fail-on": fail_on}
    temporary = repository.parent / "runner"
    return run_step(find_step("Inspect"), values=values, folder=repository, temporary=temporary, path=BINARIES)


def list_inspected(repository: Path, *names: str) -> None:
    """What the step before leaves for the one that compares."""
    (repository.parent / "runner").mkdir()
    (repository.parent / "runner" / "bntool-checkpoints.txt").write_text("".join(f"{name}\n" for name in names))


def compare(repository: Path, base: str, expect: str = "") -> StepResult:
    values = {"github.event.pull_request.base.sha": base, "inputs.expect": expect}
    temporary = repository.parent / "runner"
    return run_step(find_step("Compare"), values=values, folder=repository, temporary=temporary, path=BINARIES)


def test_the_action_is_built_as_github_wants_it() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert {"name", "description", "inputs", "outputs", "runs"} == set(action)
    assert action["runs"]["using"] == "composite"
    for step in STEPS:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert USED.fullmatch(step["uses"])
        else:
            assert step["shell"] == "bash"
            assert "${{" not in step["run"]  # what others write would become a part of the script
    named = set(re.findall(r"inputs\.([\w-]+)", (ROOT / "action.yml").read_text()))
    assert named == set(action["inputs"])
    assert action["outputs"]["sarif"]["value"] == "${{ steps.inspect.outputs.sarif }}"


def test_a_healthy_checkpoint_passes_and_a_sick_one_is_annotated(repository: Path) -> None:
    for name in ("--help.pt", "$(touch x);`touch y`.pt"):  # no options, and no programs
        shutil.copy(SAMPLES / "digits.pt", repository / name)
    passed = inspect(repository, "runs with spaces/*.pt\n\n*.pt\n")
    assert passed.code == 0, passed.printed
    assert "4 healthy" in passed.summary
    assert [path.name for path in repository.iterdir() if len(path.name) == 1] == []
    shutil.copy(SAMPLES / "broken_nan_variance.pt", repository / "runs with spaces" / "sick.pt")
    failed = inspect(repository, "**/*.pt")
    assert failed.code == 1, failed.printed
    listed = (repository.parent / "runner" / "bntool-checkpoints.txt").read_text().splitlines()
    assert sorted(listed) == sorted(str(path.relative_to(repository)) for path in repository.rglob("*.pt"))
    assert "::error file=runs with spaces/sick.pt,title=bntool non-finite::" in failed.printed
    sarif = Path(failed.outputs.strip().removeprefix("sarif="))
    results = json.loads(sarif.read_text())["runs"][0]["results"]
    assert "non-finite" in {result["ruleId"] for result in results}


def test_a_gate_that_looks_at_nothing_fails(repository: Path) -> None:
    assert inspect(repository, "absent/*.pt\n").code == 2
    assert inspect(repository, "").code == 2
    partly = inspect(repository, "absent/*.pt\nnet.pt")
    assert partly.code == 0
    assert "::warning title=bntool::nothing is named absent/*.pt" in partly.printed


def test_what_a_pull_request_changes_is_compared_with_its_base(repository: Path) -> None:
    base = git(repository, "rev-parse", "HEAD")
    shutil.copy(SAMPLES / "drifted.pt", repository / "net.pt")
    shutil.copy(SAMPLES / "drifted.pt", repository / "new.pt")
    commit(repository)
    list_inspected(repository, "net.pt", "new.pt", "runs with spaces/healthy.pt", "https://127.0.0.1:9/net.pt")
    compared = compare(repository, base)
    assert compared.code == 0, compared.printed
    assert "9 of 9 BatchNorm layers changed" in compared.summary
    assert compared.summary.count("BatchNorm layers changed") == 1  # neither of what is new nor of what is the same
    refused = compare(repository, base, expect="norm-eval")
    assert refused.code == 1
    assert "::error file=net.pt,title=bntool expectation::" in refused.printed
    git(repository, "checkout", "--quiet", base)
    assert compare(repository, base).summary == ""


def test_the_base_is_fetched_where_it_is_missing(repository: Path) -> None:
    base = git(repository, "rev-parse", "HEAD")
    shutil.copy(SAMPLES / "drifted.pt", repository / "net.pt")
    commit(repository)
    shallow = repository.parent / "shallow"
    git(repository.parent, "clone", "--quiet", "--depth", "1", f"file://{repository}", str(shallow))
    git(repository, "config", "uploadpack.allowAnySHA1InWant", "true")
    list_inspected(repository, "net.pt")
    assert "9 of 9 BatchNorm layers changed" in compare(shallow, base).summary


HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())


def test_hooks_fail_on_sick_checkpoints_only(repository: Path) -> None:
    environment = {**os.environ, "PATH": BINARIES + os.pathsep + os.environ["PATH"]}
    (entry,) = {hook["entry"] for hook in HOOKS}
    for name, code in (("drifted.pt", 0), ("broken_nan_variance.pt", 1)):
        command = [*shlex.split(entry), str(SAMPLES / name), str(SAMPLES / "digits.pt")]
        assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == code


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_hooks_take_files_that_are_named_like_checkpoints(hook: dict[str, Any]) -> None:
    taken = ["a.pt", "b/c.pth", "model.safetensors", "x.pth.tar", "net.caffemodel", "m.onnx", "k.keras", "k.weights.h5"]
    taken += ["k.hdf5", "p.pdparams", "f.msgpack", "n.nemo", "s.mar", "e.pt2"]
    assert all(re.search(hook["files"], name) for name in taken)
    assert not re.search(hook["files"], "a.ptx")
    assert hook["language"] in ("python", "system")


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_use_what_is_named_with_a_version_and_run_targets_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if "uses" in step:
                assert USED.fullmatch(step["uses"])
            for line in step.get("run", "").splitlines():
                if line.startswith("make "):
                    assert {word for word in line.split()[1:] if word.isalpha()} <= targets


def test_other_systems_have_runners_and_the_classifiers_say_no_more_than_was_run() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    systems = {job["runs-on"] for job in jobs.values()} | set(jobs["other-systems"]["strategy"]["matrix"]["os"])
    assert {"ubuntu-latest", "windows-latest", "macos-latest"} <= systems
    classifiers = re.findall(r'"(Operating System :: [^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert classifiers == ["Operating System :: POSIX :: Linux"]
