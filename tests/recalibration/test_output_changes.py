"""What new statistics do to the outputs: against plain eval forwards after load_state_dict."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bntool.data.batches import as_batches
from bntool.errors import UserCodeError
from bntool.models.loading import load_model
from bntool.recalibration.live import plan_recalibration, set_live_statistics
from bntool.recalibration.output_changes import measure_output_changes
from tests.places import SAMPLES


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.load(SAMPLES / "digits_train.npz")["images"][:200])


def load(name):
    model = load_model(f"{SAMPLES / 'digits_net.py'}:build", arguments={})
    model.load_state_dict(torch.load(SAMPLES / name, weights_only=True))
    return model


def run_with(model, state, inputs):
    other = copy.deepcopy(model).eval()
    other.load_state_dict({**model.state_dict(), **state})
    with torch.no_grad():
        return other(inputs)


def test_changes_are_those_of_plain_forwards(images):
    model = load("drifted.pt").train()
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = plan_recalibration(model, images.split(50))
    output_changes = measure_output_changes(model, as_batches(images.split(50)), result)
    assert model.training
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())
    recalibrated = copy.deepcopy(model)
    set_live_statistics(recalibrated, result)
    new = recalibrated.state_dict()
    few = images[:32]  # of the first batch of 50
    stored = run_with(model, {}, few)
    assert (output_changes.samples, output_changes.finite) == (32, True)
    assert set(output_changes.alone) == {
        drift.layer for drift in sorted(result.drifts, key=lambda drift: -drift.severity)[:5]
    }
    assert "bn1" in output_changes.alone
    cases = {"": output_changes.together, **{f"{layer}.": change for layer, change in output_changes.alone.items()}}
    for prefix, change in cases.items():
        outputs = run_with(model, {n: t for n, t in new.items() if n.startswith(prefix) and "running" in n}, few)
        assert change.relative == pytest.approx(float((outputs - stored).norm() / stored.norm()), rel=1e-4)
        assert change.flipped == float((outputs.argmax(1) != stored.argmax(1)).float().mean())
        assert change.finite
    assert output_changes.together.flipped > 0.3
    assert 0 < output_changes.alone["layer1.1.bn1"].relative < output_changes.alone["bn1"].relative


def test_outputs_that_only_the_new_statistics_make_finite(images):
    model = load("broken_nan_variance.pt")
    result = plan_recalibration(model, [images])
    output_changes = measure_output_changes(model, as_batches([images]), result)
    assert not output_changes.finite
    assert output_changes.together.finite
    assert output_changes.together.relative is None
    assert output_changes.alone["layer2.0.bn1"].finite  # the one that was broken
    assert not output_changes.alone["neck_bn"].finite


class Several(nn.Module):
    """Outputs of any kind: a dict of a map and a list; in ``boxes`` as many rows as positive values."""

    def __init__(self, *, boxes=False):
        super().__init__()
        self.bn, self.boxes = nn.BatchNorm1d(3), boxes

    def forward(self, x):
        y = self.bn(x)
        return y[y > 0.3] if self.boxes else {"map": y.reshape(-1, 3, 1, 1), "more": [y * 2, (y > 0)]}


def test_outputs_that_are_no_classes(images):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    model = Several()
    result = plan_recalibration(model, [x])
    change = measure_output_changes(model, as_batches([x]), result).together
    stored, new = (x[:32] / (1 + 1e-5) ** 0.5).double(), ((x - x.mean(0)) / (x.var(0) + 1e-5).sqrt())[:32].double()
    assert change.flipped is None
    assert change.relative == pytest.approx(float((new - stored).norm() / stored.norm()), rel=1e-5)
    model = Several(boxes=True)
    change = measure_output_changes(model, as_batches([x]), plan_recalibration(model, [x])).together
    assert (change.relative, change.flipped, change.finite) == (None, None, True)


def test_a_batch_with_nan_is_passed_over_and_none_is_nothing():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    model = Several()
    result = plan_recalibration(model, [x])
    bad = x.clone()
    bad[3, 1] = float("nan")
    assert measure_output_changes(model, as_batches([bad]), result) is None
    assert measure_output_changes(model, as_batches([bad, x[:7]]), result).samples == 7


def test_a_model_that_raises_is_the_users():
    model, x = Several(), torch.randn(8, 3)
    result = plan_recalibration(model, [x])
    with pytest.raises(UserCodeError, match="running the model"):
        measure_output_changes(model, as_batches([torch.randn(8, 5)]), result)
    assert torch.equal(model.bn.running_mean, torch.zeros(3))
