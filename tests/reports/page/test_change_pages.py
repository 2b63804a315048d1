"""The pages of `diff`, `recalibrate` and `fold`: before and after, held against torch."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.representation import format_number
from tests.places import SAMPLES
from tests.reports.page.browser import Parsed

DIGITS, DRIFTED = SAMPLES / "digits.pt", SAMPLES / "drifted.pt"
MODEL = ["--model", f"{SAMPLES / 'digits_net.py'}:build"]


def read(path: Path) -> Parsed:
    return Parsed(path.read_text())


def list_strips(page: Parsed) -> list[str]:
    return [str(one["alt"]) for one in page.all("img") if one.get("class") == "s"]


def describe(values: torch.Tensor) -> str:
    """How a strip says what it shows."""
    numbers = (values.min(), values.max(), values.sort().values[len(values) // 2])
    return "from {} to {}, median {}".format(*(format_number(number.item(), 2) for number in numbers))


def test_a_comparison_shows_each_channel_before_and_after(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    code = main(["diff", str(DIGITS), str(DRIFTED), "--expect", "norm-eval", "--html", str(target), "-q"])
    assert code == ExitCode.FINDINGS
    page = read(target)
    a, b = (torch.load(path, weights_only=True) for path in (DIGITS, DRIFTED))
    old, new = (one["bn1.running_var"].double() for one in (a, b))
    ratios = (new + 1e-5) / (old + 1e-5)
    distances = (a["bn1.running_mean"].double() - b["bn1.running_mean"].double()).abs() / (new + 1e-5).sqrt()
    strips = list_strips(page)
    assert strips[:4] == [
        f"running_var, A, of 12 channels {describe(old)}",
        f"running_var, B, of 12 channels {describe(new)}",
        f"variance ratio of 12 channels {describe(ratios)}",
        f"mean shift in standard deviations of 12 channels {describe(distances)}",
    ]
    assert len(strips) == 4 * 9
    assert "not as expected: 9 of 9 BatchNorm layers changed, 0 of 12 other tensors" in page.text
    assert {"#l0", "#l8"} <= {one["href"] for one in page.all("a")}


def test_the_command_to_copy_compares_the_same_again(tmp_path: Path) -> None:
    training, target = str(SAMPLES / "digits_training.pt"), tmp_path / "page.html"
    arguments = ["diff", training, training, "--state-dict", "state_dict", "--state-dict-b", "ema_state_dict"]
    assert main([*arguments, "--html", str(target), "-q"]) == ExitCode.DONE
    assert shlex.join(["bntool", *arguments]) in target.read_text()


def test_what_differs_beside_the_layers_is_listed(tmp_path: Path) -> None:
    state = torch.load(DIGITS, weights_only=True)
    state["fc.bias"] += 1
    del state["neck.bias"]
    torch.save(state, tmp_path / "b.pt")
    target = tmp_path / "page.html"
    assert main(["diff", str(DIGITS), str(tmp_path / "b.pt"), "--html", str(target), "-q"]) == ExitCode.DONE
    text = " ".join(read(target).text.split())
    assert "0 of 9 BatchNorm layers changed, 2 of 12 other tensors" in text
    assert "fc.bias changed" in text.replace("fc.biaschanged", "fc.bias changed")
    assert "only in A" in text


def test_a_recalibration_shows_the_stored_and_the_new_statistics(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    data = str(SAMPLES / "digits_train.npz")
    arguments = ["recalibrate", str(DRIFTED), *MODEL, "--data", data, "--samples", "64", "-o", str(tmp_path / "o.pt")]
    assert main([*arguments, "--html", str(target), "-q"]) == ExitCode.DONE
    page = read(target)
    stored, new = (torch.load(path, weights_only=True)["bn1.running_var"] for path in (DRIFTED, tmp_path / "o.pt"))
    assert list_strips(page)[:2] == [
        f"running_var, stored, of 12 channels {describe(stored)}",
        f"running_var, data, of 12 channels {describe(new)}",
    ]
    assert "top1" in page.text
    assert "the column outputs shows" in page.text
    assert "outputs</span>" in target.read_text()
    assert f"torch.load({str(tmp_path / 'o.pt')!r}" in page.text


def test_a_fold_shows_its_weights_before_and_after(tmp_path: Path) -> None:
    target, output = tmp_path / "page.html", tmp_path / "o.pt"
    pairs = ["--pair", "conv1=bn1", "--pair", "neck=neck_bn", "--eps", "1e-5"]
    assert main(["fold", str(DIGITS), *pairs, "-o", str(output), "--html", str(target), "-q"]) == ExitCode.DONE
    page = read(target)
    before, after = (torch.load(path, weights_only=True) for path in (DIGITS, output))
    expected = []
    for name in ("conv1.weight", "neck.weight"):
        sides = [state[name].double().flatten(1).abs().amax(1) for state in (before, after)]
        words = zip(("before", "folded"), sides, strict=True)
        expected += [f"max|w| {word} of {len(side)} channels {describe(side)}" for word, side in words]
    assert list_strips(page) == expected
    assert "2 of 9 BatchNorm layers folded" in page.text
    assert "layer2.0.bn1" in page.text  # left alone


@pytest.mark.parametrize("command", ["fold", "recalibrate"])
def test_a_page_cannot_take_the_place_of_the_output(command: str, tmp_path: Path) -> None:
    target = str(tmp_path / "o.pt")
    arguments = [command, str(DIGITS), *MODEL, "--data", str(SAMPLES / "digits_train.npz"), "-o", target]
    assert main([*arguments, "--html", f"{tmp_path}/../{tmp_path.name}/o.pt"]) == ExitCode.USAGE
    assert list(tmp_path.iterdir()) == []
