"""Recalibrating live models, held against torch itself."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bntool.data.policies import OnBadData
from bntool.errors import RefusedError, UsageError, UserCodeError
from bntool.plan import SkipReason
from bntool.recalibration.live import plan_recalibration, recalibrate
from bntool.recalibration.options import Method


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Convolutions, a residual sum, dropout and a head; every statistic wrong at first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 36, 5), nn.BatchNorm1d(5, momentum=0.0))
        for layer in (self.stem[1], self.branch[1], self.head[2]):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.1, 5)
            layer.num_batches_tracked.fill_(99)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.branch(x))


LAYERS = ("stem.1", "branch.1", "head.2")


def batches_of(x, size):
    return list(x.split(size))


def statistics(model):
    return {
        name: (m.running_mean.double(), m.running_var.double())
        for name, m in model.named_modules()
        if getattr(m, "running_mean", None) is not None
    }


def distance(a, b):
    """Largest difference in sigmas of the mean, and of the logarithm of the variance."""
    return max(
        max(((a[n][0] - b[n][0]) / b[n][1].sqrt()).abs().max().item(), (a[n][1] / b[n][1]).log().abs().max().item())
        for n in b
    )


def one_big_batch(model, x):
    """What torch stores after one train-mode forward of everything in float64."""
    oracle = copy.deepcopy(model).double().eval()
    for m in oracle.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.train()
            m.momentum = 1.0
    oracle(x.double())
    return statistics(oracle)


@pytest.mark.parametrize("method", [Method.POOLED, Method.PAPER])
def test_one_batch_is_what_torch_computes_in_float64(method):
    model, x = Net(), randn(40, 2, 8, 8) * 3 + 1
    result = recalibrate(model, [x], method=method)
    assert distance(statistics(model), one_big_batch(model, x)) < 1e-6
    assert result.plan.layers == LAYERS
    assert all(int(m.num_batches_tracked) == 1 for m in (model.stem[1], model.branch[1], model.head[2]))


def pooled_oracle(model, batches):
    """Activations seen by each layer, captured by hooks while torch normalises each batch itself; pooled by numpy."""
    oracle = copy.deepcopy(model).double().eval()
    seen = {}
    for name, m in oracle.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.train()
            m.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0].numpy()))
    with torch.no_grad():
        for batch in batches:
            oracle(batch.double())
    pooled = {}
    for name, parts in seen.items():
        flat = np.concatenate([np.moveaxis(part, 1, -1).reshape(-1, part.shape[1]) for part in parts])
        pooled[name] = (torch.from_numpy(flat.mean(0)), torch.from_numpy(flat.var(0, ddof=1)))
    return pooled


def test_pooled_weights_all_positions_equally():
    model, x = Net(), randn(43, 2, 8, 8)
    x[40:] += 20  # a small last batch of outliers
    recalibrate(model, batches_of(x, 8))
    assert distance(statistics(model), pooled_oracle(Net(), batches_of(x, 8))) < 1e-6
    assert int(model.stem[1].num_batches_tracked) == 6


def test_paper_is_update_bn_where_batches_are_full():
    ours, theirs, x = Net(), Net(), randn(48, 2, 8, 8)
    theirs.branch[2].p = 0.0  # update_bn leaves dropout on
    recalibrate(ours, batches_of(x, 8), method="paper")
    update_bn(batches_of(x, 8), theirs)
    assert distance(statistics(ours), statistics(theirs)) < 1e-5
    assert int(ours.stem[1].num_batches_tracked) == int(theirs.stem[1].num_batches_tracked) == 6


def test_pooled_is_right_where_update_bn_is_not():
    x = torch.cat([randn(64, 2, 8, 8), randn(1, 2, 8, 8) + 10])
    layer = nn.BatchNorm2d(2)
    theirs = copy.deepcopy(layer)
    update_bn(batches_of(x, 8), theirs)
    recalibrate(layer, batches_of(x, 8))
    true_mean, true_variance = x.double().mean((0, 2, 3)), x.double().transpose(0, 1).flatten(1).var(1)
    assert (layer.running_mean - true_mean).abs().max() < 1e-6
    assert (layer.running_var / true_variance - 1).abs().max() < 1e-6
    assert (theirs.running_mean - true_mean).abs().max() > 0.5


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_means(mean):
    x = randn(64, 3, 32, 32) + mean
    layer = nn.BatchNorm2d(3)
    result = plan_recalibration(layer, batches_of(x, 16))
    exact = x.double().transpose(0, 1).flatten(1).numpy()
    assert np.abs(result.statistics[""].variance / exact.var(1, ddof=1) - 1).max() < 1e-6
    assert np.abs(result.statistics[""].mean - exact.mean(1)).max() < 1e-6


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [(m.training, getattr(m, "momentum", None), len(m._forward_pre_hooks)) for m in model.modules()]
    return state, modes, torch.get_rng_state(), [p.requires_grad for p in model.parameters()]


def assert_same(before, after, *, but=()):
    for name in before[0]:
        if not name.startswith(but) if but else True:
            assert torch.equal(before[0][name], after[0][name]), name
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert before[3] == after[3]


@pytest.mark.parametrize("method", list(Method))
def test_planning_gives_the_model_back_as_it_was(method):
    model = Net()
    model.stem.eval()
    before = snapshot(model)
    plan_recalibration(model, batches_of(randn(20, 2, 8, 8), 5), method=method)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_raises_gives_the_model_back(method, error):
    def batches():
        yield randn(4, 2, 8, 8)
        raise error("broken loader")

    model = Net()
    before = snapshot(model)
    with pytest.raises((UserCodeError, ValueError, KeyboardInterrupt)):
        recalibrate(model, batches(), method=method)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("method", list(Method))
def test_a_forward_that_raises_is_the_users_error(method):
    model = Net()
    before = snapshot(model)
    with pytest.raises(UserCodeError, match="running the model on samples 4 to 7"):
        recalibrate(model, [randn(4, 2, 8, 8), randn(4, 3, 8, 8)], method=method)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("method", list(Method))
def test_only_selected_layers_change(method):
    model, x = Net(), randn(32, 2, 8, 8)
    before = snapshot(model)
    result = recalibrate(model, batches_of(x, 8), method=method, layers=["branch*"])
    assert_same(before, snapshot(model), but="branch.1.")
    assert result.plan.layers == ("branch.1",)
    assert not result.plan.skips
    # the layer before it normalised by its stored statistics
    oracle = Net().eval()
    activations = oracle.branch[0](oracle.stem(x)).double().transpose(0, 1).flatten(1)
    assert (model.branch[1].running_mean - activations.mean(1)).abs().max() < 1e-5


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), fill))

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale


class BatchNormAct2d(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class NormEval(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def test_layers_that_are_left_alone_are_named_with_their_reason():
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        FrozenBatchNorm2d(3),
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.LazyBatchNorm2d(),
        NormEval(nn.BatchNorm2d(3), nn.BatchNorm2d(3)),
        BatchNormAct2d(3),
        nn.SyncBatchNorm(3),
    )
    model.unused = nn.Identity()
    model._modules["unused"] = nn.BatchNorm2d(3)
    model.forward = lambda x: [x := layer(x) for name, layer in model._modules.items() if name not in ("unused", "4")][
        -1
    ]
    model[4].eval()
    before = {name: t.clone() for name, t in model.state_dict().items() if not name.startswith("4.")}
    result = recalibrate(model, [randn(8, 3, 4, 4) + 3])
    assert result.plan.layers == ("0", "5.0", "6", "7")
    assert {skip.layer: skip.reason for skip in result.plan.skips} == {
        "1": SkipReason.FROZEN,
        "5.1": SkipReason.FROZEN,
        "3": SkipReason.NO_STATISTICS,
        "4": SkipReason.NOT_INITIALISED,
        "unused": SkipReason.NEVER_REACHED,
    }
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items() if n.startswith(("1.", "2.", "5.1.", "unused.")))


def test_frozen_layers_are_recalibrated_where_they_are_asked_for():
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.ReLU())
    x = randn(16, 3, 4, 4) * 2 + 3
    with pytest.raises(RefusedError, match="frozen"):
        recalibrate(model, [x])
    recalibrate(model, [x], layers=["0"])
    assert (model[0].running_mean - x.mean((0, 2, 3))).abs().max() < 1e-6


def test_a_layer_in_eval_mode_in_a_model_that_trains_is_frozen():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model.train()
    model[0].eval()
    assert recalibrate(model, [randn(8, 3, 4, 4)]).plan.layers == ("1",)
    model.eval()
    assert recalibrate(model, [randn(8, 3, 4, 4)]).plan.layers == ("0", "1")


@pytest.mark.parametrize("method", list(Method))
def test_sequences_and_wrappers_that_transpose(method):
    class ChannelsLastBatchNorm(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    x = randn(10, 3, 7) + 2
    plain, last = nn.BatchNorm1d(3), ChannelsLastBatchNorm(3)
    recalibrate(plain, batches_of(x, 5), method=method)
    recalibrate(last, batches_of(x.transpose(1, 2), 5), method=method)
    for layer in (plain, last):
        assert (layer.running_mean - x.mean((0, 2))).abs().max() < 1e-6
    assert torch.allclose(plain.running_var, last.running_var)


def test_shared_modules_are_pooled_over_their_calls_and_written_under_all_names():
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Linear(3, 3), shared)
    result = recalibrate(model, [randn(8, 3) + 1, randn(8, 3, seed=1)])
    assert [step.name for step in result.plan.steps if step.name.endswith("mean")] == [
        "0.running_mean",
        "2.running_mean",
    ]
    assert int(shared.num_batches_tracked) == 4


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_stops_or_is_left_out_whole(method, bad):
    class Poisoned(Net):
        def forward(self, x):
            poison = bad if x.abs().max() > 1e3 else 1.0
            return self.head(self.branch(self.stem(x) * poison) + 0)

    x = randn(32, 2, 8, 8)
    with_bad = [*batches_of(x, 8)[:2], x[:8] * 1e6, *batches_of(x, 8)[2:]]
    model = Poisoned()
    before = snapshot(model)
    with pytest.raises(
        RefusedError, match=r"NaN or infinity at branch\.1, from samples 16 to 23 of .* \(all 8 .*; --on-bad-data"
    ):
        recalibrate(model, with_bad, method=method)
    assert_same(before, snapshot(model))
    result = recalibrate(model, with_bad, method=method, on_bad_data="skip")
    assert [left_out.samples for left_out in result.left_out] == [8]
    assert result.samples == 32
    clean = Poisoned()
    recalibrate(clean, batches_of(x, 8), method=method)
    assert distance(statistics(model), statistics(clean)) == 0


@pytest.mark.parametrize("method", list(Method))
def test_bad_inputs_are_noticed_before_the_model_runs(method):
    x = randn(8, 2, 8, 8)
    x[3, 0, 0, 0] = float("nan")
    with pytest.raises(RefusedError, match=r"NaN or infinity in sample 3 of the batches given \(all 8"):
        recalibrate(Net(), [x], method=method)
    with pytest.raises(RefusedError, match="no sample is left: 8 were left out, first NaN"):
        recalibrate(Net(), [x], method=method, on_bad_data=OnBadData.SKIP)


@pytest.mark.parametrize("method", list(Method))
def test_no_data(method):
    with pytest.raises(UsageError, match="gave no batch"):
        recalibrate(Net(), [], method=method)


def test_a_batch_of_one_cannot_be_normalised_by_itself():
    with pytest.raises(RefusedError, match="one value for each channel") as caught:
        recalibrate(Net(), [randn(8, 2, 8, 8), randn(1, 2, 8, 8)])
    assert caught.value.tensor == "head.2"
    recalibrate(Net(), [randn(8, 2, 8, 8), randn(1, 2, 8, 8)], method="exact")


@pytest.mark.parametrize("method", [Method.POOLED, Method.EXACT])
def test_a_prior_blends_old_and_new(method):
    x, model = randn(30, 2, 8, 8) + 1, nn.Sequential(nn.BatchNorm2d(2))
    model[0].running_mean.fill_(5)
    model[0].running_var.fill_(3)
    recalibrate(model, batches_of(x, 10), method=method, prior=10)
    expected = 0.25 * 5 + 0.75 * x.mean((0, 2, 3)), 0.25 * 3 + 0.75 * x.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(model[0].running_mean, expected[0])
    torch.testing.assert_close(model[0].running_var, expected[1])
    with pytest.raises(UsageError, match="prior"):
        recalibrate(model, [x], prior=-1)
    model[0].running_var[0] = float("nan")
    with pytest.raises(RefusedError, match="cannot serve as a prior"):
        recalibrate(model, [x], prior=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [Method.POOLED, Method.EXACT])
def test_half_precision_models(dtype, method):
    model, x = Net().to(dtype), randn(64, 2, 8, 8)
    recalibrate(model, batches_of(x, 16), method=method)
    reference = Net()
    recalibrate(reference, batches_of(x, 16), method=method)
    assert model.stem[1].running_mean.dtype is dtype
    assert distance(statistics(model), statistics(reference)) < 0.03


def test_statistics_that_half_precision_cannot_hold_are_refused():
    layer = nn.BatchNorm2d(2, eps=1e-9).half()
    with pytest.raises(RefusedError, match="float16 cannot hold the new variance"):
        recalibrate(layer, [(randn(16, 2, 4, 4) * 400).half()])
    with pytest.raises(RefusedError, match="float16 cannot hold the new variance"):
        recalibrate(layer, [(randn(16, 2, 4, 4) * 1e-4).half()])
    assert torch.equal(layer.running_var, torch.ones(2).half())


def test_wrapped_models_have_plans_without_the_prefix():
    model = nn.DataParallel(Net())
    result = recalibrate(model, [randn(8, 2, 8, 8)], layers=["stem.*"])
    assert [step.name for step in result.plan.steps] == [
        "stem.1.running_mean",
        "stem.1.running_var",
        "stem.1.num_batches_tracked",
    ]


def test_drift_says_where_stored_statistics_part():
    model, x = Net(), randn(64, 2, 8, 8)
    recalibrate(model, batches_of(x, 16), method="exact")
    model.branch[1].running_mean += 3 * model.branch[1].running_var.sqrt()
    model.branch[1].running_var *= 4
    result = plan_recalibration(model, batches_of(x, 16), method=Method.EXACT)
    first, second, _ = result.drifts
    assert not first.has_parted
    assert second.has_parted
    assert second.mean_shift == pytest.approx(3, rel=1e-3)
    assert second.variance_ratio == pytest.approx(0.25, rel=1e-3)
    assert second.positions == 64 * 36


def test_the_sampling_error_is_that_of_the_mean():
    layer = nn.BatchNorm1d(400)
    result = plan_recalibration(layer, batches_of(randn(1000, 400), 50))
    assert result.drifts[0].sampling_error == pytest.approx(1000**-0.5, rel=0.05)


@pytest.mark.parametrize("method", list(Method))
def test_models_that_view_contiguous_activations(method):
    """Images channels last, which are tried first, make these fail."""

    class Flattening(nn.Module):
        def forward(self, x):
            return x.view(len(x), -1).view(x.shape)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), Flattening(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    x = randn(32, 2, 8, 8).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view"):
        model(x)
    result = recalibrate(model, batches_of(x.contiguous(), 8), method=method)
    assert result.batches == 4
    assert (result.samples, len(result.drifts)) == (32, 2)
