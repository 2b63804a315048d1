"""The verdict on a file: what it says, and that it says so only where everything was looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bntool
from bntool.inspection.verdict import Health, Verdict
from tests.places import SAMPLES


def trained(layers: int = 3) -> dict[str, torch.Tensor]:
    """A state dict with layers 0, 1, ... whose statistics are those of data."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(layers)))
    for _ in range(40):
        model(torch.randn(16, 4) * 2 + 1)
    return model.state_dict()


def judged(content: object, path: Path, **options: object) -> Verdict:
    torch.save(content, path / "m.pt")
    return bntool.inspect(path / "m.pt", **options).verdict


def test_a_sound_file_is_healthy(tmp_path: Path) -> None:
    assert judged(trained(), tmp_path) == Verdict(Health.HEALTHY, "healthy", 3, 0, 0)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"0.running_var": 0.0}, "1 layer suspicious"),
        ({"0.running_var": 0.0, "1.running_var": 0.0}, "2 layers suspicious"),
        ({"0.running_var": torch.nan}, "1 layer sick"),
        (
            {"0.running_var": torch.nan, "1.running_mean": torch.nan, "2.running_var": 0.0},
            "2 layers sick, 1 suspicious",
        ),
    ],
)
def test_warnings_are_suspicious_and_errors_are_sick(broken: dict[str, float], sentence: str, tmp_path: Path) -> None:
    state_dict = trained()
    for name, value in broken.items():
        state_dict[name][1] = value
    verdict = judged(state_dict, tmp_path)
    assert verdict.sentence == sentence
    assert verdict.health is (Health.SICK if "sick" in sentence else Health.SUSPICIOUS)


def test_layers_that_a_finding_of_a_state_dict_names_are_counted_once(tmp_path: Path) -> None:
    fresh = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(3))).state_dict()
    verdict = judged({"model": trained(), "model_ema": fresh}, tmp_path)
    assert (verdict.sentence, verdict.layers, verdict.sick) == ("3 layers sick", 6, 3)


def test_a_file_without_batchnorm(tmp_path: Path) -> None:
    assert judged(nn.Linear(3, 3).state_dict(), tmp_path) == Verdict(Health.NO_BATCH_NORM, "no BatchNorm", 0, 0, 0)


def test_what_was_not_selected_is_not_judged(tmp_path: Path) -> None:
    verdict = judged(trained(), tmp_path, layers=["1"])
    assert (verdict.health, verdict.sentence) == (
        Health.NOT_JUDGED,
        "not judged: 2 of 3 layers, which were not selected",
    )
    verdict = judged({"model": trained(), "other": trained()}, tmp_path, state_dict="model")
    assert (verdict.health, verdict.sentence) == (Health.NOT_JUDGED, "not judged: state dict 'other'")


def test_what_was_not_understood_is_not_judged(tmp_path: Path) -> None:
    odd = {"norm.gamma": torch.ones(4), "norm.pop_mean": torch.zeros(4), "norm.pop_variance": torch.ones(4)}
    verdict = judged(odd, tmp_path)
    assert (verdict.health, verdict.layers) == (Health.NOT_JUDGED, 0)
    assert verdict.sentence == "not judged: 'norm'"
    verdict = judged({**odd, **trained()}, tmp_path)
    assert (verdict.health, verdict.layers) == (Health.NOT_JUDGED, 3)


def test_relatives_that_keep_statistics_are_not_judged(tmp_path: Path) -> None:
    renorm = {f"r.{key}": torch.ones(4) for key in ("weight", "bias", "running_mean", "running_std")}
    verdict = judged({**trained(), **renorm}, tmp_path)
    assert (verdict.health, verdict.sentence) == (Health.NOT_JUDGED, "not judged: 1 BatchRenorm layer")


def test_a_file_without_state_dict_is_not_called_free_of_batchnorm(tmp_path: Path) -> None:
    assert judged({"epoch": 3}, tmp_path).sentence == "not judged: no state dict was found"


def test_a_sound_file_that_is_suspicious_to_load_is_not_healthy(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.system, ("true",)

    verdict = judged({"state_dict": trained(), "evil": Evil()}, tmp_path)
    assert verdict.health is Health.SUSPICIOUS
    assert verdict.sentence == "layers healthy, the file suspicious: suspicious global"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("digits.pt", "healthy"),
        ("digits_training.pt", "healthy"),
        ("broken_nan_variance.pt", "1 layer sick"),
        ("broken_never_updated.pt", "9 layers suspicious"),
        ("dead_channels.pt", "1 layer suspicious"),
        ("drifted.pt", "9 layers suspicious"),
    ],
)
def test_the_samples(name: str, sentence: str) -> None:
    assert bntool.inspect(SAMPLES / name).verdict.sentence == sentence


def test_channels_are_named(tmp_path: Path) -> None:
    state_dict = trained()
    state_dict["1.running_mean"][1] = torch.nan
    state_dict["1.running_var"][3] = torch.inf
    torch.save(state_dict, tmp_path / "m.pt")
    (finding,) = bntool.inspect(tmp_path / "m.pt").state_dicts[0]["1"].findings
    assert finding.channels == (1, 3)
