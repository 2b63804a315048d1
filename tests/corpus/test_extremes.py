"""The thresholds of findings have a margin to the numbers of files that are as they should be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import bntool
from bntool.inspection.configuration import Configuration
from bntool.inspection.thresholds import DEFAULTS, ThresholdRule
from tests.corpus.extremes import MEASURED, SMALLEST, Extreme, measure_extremes, measure_jumps
from tests.documentation.threshold_table import PAGE, read_extremes, render_page
from tests.places import SAMPLES

# of how many times; a small Caffe network at hand, written by hand with a scale factor of 0, has scales of hundreds
_LEAST_MARGIN = {"exploding_scale": 2.0, "average_initial_share": 10.0}
_OF_OTHERS = 25.0
TRAINED = [SAMPLES / name for name in ("digits.pt", "digits_module.pt", "digits_training.pt")]


def test_the_page_has_what_was_recorded() -> None:
    assert render_page() == PAGE.read_text()


def test_every_threshold_that_is_measured_has_a_margin() -> None:
    real, sound = read_extremes()
    assert {*real, *sound} == {*MEASURED}
    for field in MEASURED:
        for found in (real, sound):
            if field in found:
                assert found[field].margin(field) >= _LEAST_MARGIN.get(field, _OF_OTHERS), (field, found[field])


def test_files_at_hand_come_no_nearer_than_what_was_recorded() -> None:
    real, _ = read_extremes()
    found = measure_extremes(TRAINED)
    assert len(found) >= 5
    for field, extreme in found.items():
        assert extreme.margin(field) >= real[field].margin(field) * (1 - 1e-12)


def test_what_is_measured_is_what_decides(tmp_path: Path) -> None:
    """A threshold just beyond the number that was measured gives the finding, one just short of it does not."""
    file = TRAINED[0]
    for field, extreme in measure_extremes([file]).items():
        for factor, raised in ((1 - 1e-6, False), (1 + 1e-6, True)):
            value = extreme.value * (factor if field in SMALLEST else 2 - factor)
            configuration = Configuration(tmp_path, thresholds=(ThresholdRule(field, value, (), (), "a test"),))
            codes = {
                finding.code.value
                for layer in bntool.inspect(file, configuration=configuration).state_dicts[0].layers
                for finding in layer.findings
            }
            assert bool(codes) is raised, (field, value, codes)


def test_jumps_are_measured_from_file_to_file(tmp_path: Path) -> None:
    tensors = torch.load(TRAINED[0])
    for place, factor in enumerate((1.0, 1.0, 50.0)):
        torch.save(tensors | {"bn1.running_var": factor * tensors["bn1.running_var"]}, tmp_path / f"{place}.pt")
    found = measure_jumps(tmp_path.iterdir())["variance_jump"]
    assert found.file == "2.pt"
    assert found.value == pytest.approx(50, rel=1e-3)


def test_a_margin_is_how_many_times_farther_the_threshold_is() -> None:
    assert Extreme(100.0, "a").margin("outlying_bias") == pytest.approx(DEFAULTS.outlying_bias / 100)
    assert Extreme(1e-6, "a").margin("vanishing_variance") == pytest.approx(1e6)
    assert Extreme(0.0, "a").margin("average_initial_share") == math.inf
