"""Recalibration by other projects: the same where they are right, and where they are not.

The oracle is torch: inputs of every layer in float64 while torch normalises each batch in train mode, pooled by numpy.
What fvcore and torch.optim.swa_utils store is recorded (``tests/oracles/precise_bn.py``).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bntool.operations.recalibration import recalibrate
from tests.operations.calibration_network import CASES, Network, make_batches

torch.set_num_threads(1)
RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "precise_bn.json").read_text())


def pool(case):
    """What all positions of all batches have, by numpy in float64; dropout is off, as in eval mode."""
    model, seen = Network().double().train(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
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
    model = Network(CASES[case][2])
    recalibrate(model, make_batches(case), method=method)
    return model.statistics()


@pytest.mark.parametrize("case", CASES)
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


def test_update_bn_agrees_on_full_batches_with_the_method_paper():
    assert distance(RECORDED["update_bn"]["full batches"], torch_tensors(ours("full batches", "paper"))) < 1e-5


def torch_tensors(statistics):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in statistics.items()}


def test_update_bn_counts_a_small_batch_as_much_as_a_large_one():
    assert (
        distance(RECORDED["update_bn"]["a small last batch of outliers"], pool("a small last batch of outliers")) > 0.2
    )


@pytest.mark.parametrize("project", ["fvcore", "update_bn"])
def test_both_leave_dropout_on(project):
    assert distance(RECORDED[project]["dropout"], pool("dropout")) > 0.1
