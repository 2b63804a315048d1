"""Recalibration by other projects: the same where they are right, and where they are not.

The oracle is torch: inputs of every layer in float64 while torch normalises each batch in train mode, pooled by numpy.
What fvcore, torch.optim.swa_utils and mmpretrain store is recorded (``tests/oracles/precise_bn.py``).
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

from bntool.recalibration.live import recalibrate
from tests.places import FIXTURES
from tests.recalibration.calibration_network import CASES, DIGITS, build_model, make_batches, read_statistics

RECORDED = json.loads((FIXTURES / "precise_bn.json").read_text())


def pool(case):
    """What all positions of all batches have, by numpy in float64; dropout is off, as in eval mode."""
    model, seen = build_model(case).double().train(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.register_forward_pre_hook(
                lambda _m, args, name=name: seen.setdefault(name, []).append(
                    np.moveaxis(args[0].numpy(), 1, -1).reshape(-1, args[0].shape[1])
                )
            )
    with torch.no_grad():
        for batch in make_batches(case):
            model(batch.double())
    pooled = {}
    for name, parts in seen.items():
        values = np.concatenate(parts)
        pooled[f"{name}.running_mean"] = torch.from_numpy(values.mean(0))
        pooled[f"{name}.running_var"] = torch.from_numpy(values.var(0, ddof=1))
    return pooled


def distance(statistics, expected):
    """Largest difference of a mean, in standard deviations, and of the logarithm of a variance."""
    worst = 0.0
    for name, value in expected.items():
        found = torch.as_tensor(statistics[name], dtype=torch.float64)
        spread = expected[name.replace("running_mean", "running_var")].sqrt()
        difference = (found / value).log() if name.endswith("var") else (found - value) / spread
        worst = max(worst, float(difference.abs().nan_to_num(float("inf")).max()))
    return worst


def ours(case, method="pooled"):
    model = build_model(case)
    recalibrate(model, make_batches(case), method=method)
    return read_statistics(model)


@pytest.mark.parametrize("case", [*CASES, *DIGITS])
def test_pooled_is_what_all_positions_have(case):
    # at 1e3 the layers after the first get what float32 leaves of it
    assert distance(ours(case), pool(case)) < (2e-4 if case == "mean 1e3" else 1e-6)


def test_fvcore_agrees_on_full_and_on_unequal_batches():
    for case in ("full batches", "a small last batch of outliers"):
        # it pools unbiased variances of batches: off by one part in the positions of a batch
        assert distance(RECORDED["fvcore"][case], pool(case)) < 2e-3
        assert distance(RECORDED["fvcore"][case], torch_tensors(ours(case))) < 2e-3


def test_fvcore_loses_the_variance_of_large_means():
    assert distance(RECORDED["fvcore"]["mean 1e3"], pool("mean 1e3")) > 0.02


@pytest.mark.parametrize("case", ["full batches", "a small last batch of outliers"])
def test_update_bn_computes_what_the_method_paper_does(case):
    assert distance(RECORDED["update_bn"][case], torch_tensors(ours(case, "paper"))) < 1e-6


def torch_tensors(statistics):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in statistics.items()}


def test_update_bn_counts_a_small_batch_as_much_as_a_large_one():
    assert (
        distance(RECORDED["update_bn"]["a small last batch of outliers"], pool("a small last batch of outliers")) > 0.2
    )


@pytest.mark.parametrize("project", ["fvcore", "update_bn"])
def test_both_leave_dropout_on(project):
    assert distance(RECORDED[project]["dropout"], pool("dropout")) > 0.1


@pytest.mark.parametrize("case", [case for case in (*CASES, *DIGITS) if case != "dropout"])
def test_mmpretrain_computes_what_the_method_paper_does(case):
    # at 1e3 the mean itself has the digits of float32
    limit = 2e-4 if case == "mean 1e3" else 1e-6
    assert distance(RECORDED["mmpretrain"][case], torch_tensors(ours(case, "paper"))) < limit


@pytest.mark.parametrize(
    ("case", "least", "most"),
    [
        ("full batches", 1e-3, 3e-3),
        ("digits, full batches", 0.01, 0.03),
        ("digits, sorted by class", 0.05, 0.2),  # the variance of the batch means is missing
        ("digits, two left over", 0.3, 1.0),  # two images count as much as fifty
        ("a small last batch of outliers", 0.3, 1.0),
        ("dropout", 0.5, 2.0),  # is on
    ],
)
def test_mmpretrain_is_off_by_what_batches_do_not_share(case, least, most):
    assert least < distance(RECORDED["mmpretrain"][case], pool(case)) < most


def test_mmpretrain_asked_for_all_samples_leaves_out_those_of_a_smaller_last_batch():
    case = "a small last batch of outliers"
    assert RECORDED["mmpretrain"][f"{case}, 26 samples"] != RECORDED["mmpretrain"][case]
    first = build_model(case)
    recalibrate(first, make_batches(case)[:-1], method="paper")
    asked = RECORDED["mmpretrain"][f"{case}, 26 samples"]
    assert distance(asked, torch_tensors(read_statistics(first))) < 1e-6


def test_mmpretrain_asked_for_less_than_a_batch_stores_zeros():
    stored = RECORDED["mmpretrain"]["a small last batch of outliers, 7 samples"]
    assert {value for values in stored.values() for value in values} == {0.0}
