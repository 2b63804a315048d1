"""Exact statistics: after it the network in eval mode sees what is stored."""

import copy
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bntool.checkpoints.formats import open_checkpoint
from bntool.errors import RefusedError, UserCodeError
from bntool.models.loading import load_model
from bntool.modules.loading import load_state
from bntool.recalibration.exact import paused_forwards
from bntool.recalibration.exact.paused_forwards import PausedForward
from bntool.recalibration.live import recalibrate
from tests import programs
from tests.places import SAMPLES


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.load(SAMPLES / "digits_train.npz")["images"][:500])


@pytest.fixture
def digits():
    model = load_model(f"{SAMPLES / 'digits_net.py'}:build", arguments={})
    with open_checkpoint(SAMPLES / "drifted.pt") as checkpoint:
        load_state(model, checkpoint.state_dicts[0])
    return model


def measure_residual(model, images):
    """Largest difference between what each layer stores and what it sees in eval mode, in float64."""
    seen, layers = {}, {n: m for n, m in model.named_modules() if hasattr(m, "running_var")}
    handles = [
        layer.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0].double()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    worst = 0.0
    for name, layer in layers.items():
        values = seen[name].transpose(0, 1).flatten(1)
        shift = (values.mean(1) - layer.running_mean).abs() / values.std(1)
        ratio = (layer.running_var / values.var(1)).log().abs()
        worst = max(worst, float(shift.max()), float(ratio.max()))
    return worst


def find_forwards():
    """Threads of batches that have not ended; those of other tests may end at any time."""
    return [thread for thread in threading.enumerate() if thread.name == "bntool-forward"]


def statistics_of(model):
    return torch.cat([t.double() for n, t in model.state_dict().items() if n.endswith(("running_mean", "running_var"))])


@pytest.mark.parametrize("size", [1, 7, 64, 500])
def test_eval_mode_sees_exactly_what_is_stored(digits, images, size):
    images = images[: 60 * size]
    recalibrate(digits, images.split(size), method="exact")
    assert measure_residual(digits, images) < 1e-6
    assert not find_forwards()


def test_pooled_is_not_exact(digits, images):
    images = images[:100]
    recalibrate(digits, images.split(4))
    assert measure_residual(digits, images) > 1e-2


def test_neither_batch_size_nor_order_matters(digits, images):
    images = images[:150]
    recalibrate(digits, [images], method="exact")
    expected = statistics_of(digits)
    shuffled = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    for batches in (images.split(7), shuffled.split(64), images.flip(0).split(3)):
        recalibrate(digits, batches, method="exact")
        assert (statistics_of(digits) - expected).abs().max() < 1e-5


@pytest.mark.usefixtures("shared")
def test_a_trained_network_has_one_answer_whatever_the_batches():
    from tests.benchmarks.calibration_batches import load_images, load_resnet20

    images, labels = load_images("cifar10_train_4000.npz", contrast=0.25)
    images, by_class = images[:40], images[:40][labels[:40].argsort(stable=True)]
    shuffled = images[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    ways = [images], images.split(1), shuffled.split(7), by_class.split(32)
    answers = []
    for batches in ways:
        model = load_resnet20()
        recalibrate(model, batches, method="exact")
        answers.append([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    worst = 0.0
    for layers in answers[1:]:
        for ours, first in zip(layers, answers[0], strict=True):
            shift = (ours.running_mean - first.running_mean).abs() / first.running_var.sqrt()
            ratio = (ours.running_var.double() / first.running_var).log().abs()
            worst = max(worst, float(shift.max()), float(ratio.max()))
    assert 0 < worst < 1e-6  # 3e-7 as measured; docs/recalibration.md


def test_unequal_image_sizes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    batches = [torch.randn(2, 1, 8, 8), torch.randn(1, 1, 12, 9), torch.randn(3, 1, 6, 7)]
    recalibrate(model, batches, method="exact")
    seen = [model[3](model.eval()[:3](batch)).transpose(0, 1).flatten(1) for batch in batches]
    values = torch.cat(seen, dim=1).double()
    assert ((model[4].running_mean - values.mean(1)) / values.std(1)).abs().max() < 1e-6
    assert (model[4].running_var / values.var(1)).log().abs().max() < 1e-6


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x):
        positive = bool(x.mean() > 0)
        x = self.first(x)
        return self.a(x) if positive else self.b(x)


def test_different_paths_are_refused_with_both_named():
    model = Branching()
    with pytest.raises(RefusedError, match=r"samples 0 to 2 .* is at a, samples 3 to 5 .* at b"):
        recalibrate(model, [torch.ones(3, 2), -torch.ones(3, 2)], method="exact")
    assert not find_forwards()


def measure_residual_of_calls(model, inputs):
    """As measure_residual, with all calls of a layer pooled; the model runs in float64."""
    oracle, seen = copy.deepcopy(model).double().eval(), {}
    layers = {n: m for n, m in oracle.named_modules() if hasattr(m, "running_var")}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _m, args, name=name: seen.setdefault(name, []).append(args[0].transpose(0, 1).flatten(1))
        )
    with torch.no_grad():
        oracle(inputs.double())
    worst = {}
    for name, layer in layers.items():
        values = torch.cat(seen[name], dim=1)
        shift = (values.mean(1) - layer.running_mean).abs() / (values.std(1) + 1e-6)
        ratio = ((layer.running_var + 1e-5) / (values.var(1) + 1e-5)).log().abs()
        worst[name] = max(float(shift.max()), float(ratio.max()))
    return worst


def tower(depth):
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()]
    return nn.Sequential(*layers)


class Pyramid(nn.Module):
    """A head shared by three levels of different size and scale, as detectors have it."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.last = tower(2), tower(4), nn.BatchNorm1d(9)

    def forward(self, x):
        x = self.backbone(x)
        levels = [x, nn.functional.avg_pool2d(x, 2) * 3 + 1, nn.functional.avg_pool2d(x, 4) - 2]
        return self.last(torch.cat([self.head(level).mean((2, 3)) for level in levels], dim=1))


class Twins(nn.Module):
    """Two inputs through the same layers, compared."""

    def __init__(self):
        super().__init__()
        self.branch, self.last = tower(8), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.last(self.branch(x) - self.branch(x.flip(0) * 2 + 1))


class Recurrent(nn.Module):
    """Each call of the layer normalises what an earlier one gave."""

    def __init__(self):
        super().__init__()
        self.first, self.step = nn.Conv2d(3, 3, 1), tower(1)

    def forward(self, x):
        state = self.first(x)
        for _ in range(3):
            state = state + 0.5 * self.step(state)
        return state


@pytest.mark.parametrize("size", [5, 40])
@pytest.mark.parametrize("build", [Pyramid, Twins, Recurrent])
def test_layers_called_several_times_hold_the_statistics_of_all_calls(build, size):
    torch.manual_seed(1)
    model, x = build(), torch.randn(40, 3, 8, 8) * 2 + 1
    if build is Twins:
        x = torch.cat([x.split(5)[0]] * 8)  # flip(0) is within a batch: let batches of 5 and of 40 pair the same
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_var.fill_(float("nan"))  # nothing of what was stored is used
    result = recalibrate(model, x.split(size), method="exact")
    assert not result.plan.skips
    worst = measure_residual_of_calls(model, x)
    assert max(worst.values()) < 2e-6, worst
    calls = {"Pyramid": ("head.1", 3), "Twins": ("branch.1", 2), "Recurrent": ("step.1", 3)}[build.__name__]
    assert int(model.get_submodule(calls[0]).num_batches_tracked) == calls[1] * len(x) // size


def test_pooled_statistics_of_layers_called_several_times_are_not_those():
    torch.manual_seed(1)
    model, x = Pyramid(), torch.randn(40, 3, 8, 8) * 2 + 1
    recalibrate(model, x.split(5))
    assert max(measure_residual_of_calls(model, x).values()) > 1e-2


def test_a_layer_without_statistics_that_hold_is_left_alone_and_the_others_are_exact():
    class Flickering(nn.Module):
        """The second call is given much if the first looks large, and then the first looks small: it never settles."""

        def __init__(self):
            super().__init__()
            self.once, self.twice = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            large = self.twice(x).square().mean() > 0.5
            return self.once(self.twice(x * torch.where(large, 4.0, 0.1)))

    model, x = Flickering(), torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) * 3
    result = recalibrate(model, [x], method="exact")
    assert [(skip.layer, skip.reason.value) for skip in result.plan.skips] == [("twice", "reused")]
    assert "called 2 times in a forward" in result.plan.skips[0].detail
    assert torch.equal(model.twice.running_var, torch.ones(2))
    assert measure_residual_of_calls(model, x)["once"] < 1e-6


class Swallowing(nn.Module):
    """Multiplies batches of four, then calls a layer and hides what it raises."""

    def __init__(self, factor):
        super().__init__()
        self.bn, self.factor = nn.BatchNorm1d(2), factor

    def forward(self, x):
        try:
            return self.bn(x * self.factor if len(x) == 4 else x)
        except Exception:
            return x


class Raising(nn.Module):
    def forward(self, x):
        if len(x) == 4:
            raise ValueError("broken")
        return x


def test_code_that_swallows_exceptions_cannot_keep_a_forward_alive():
    batches = [torch.ones(3, 2), torch.ones(4, 2), torch.ones(3, 2)]
    with pytest.raises(RefusedError, match=r"NaN or infinity at 0\.bn, from samples 3 to 6"):
        recalibrate(nn.Sequential(Swallowing(float("inf")), nn.BatchNorm1d(2)), batches, method="exact")
    with pytest.raises(UserCodeError, match="broken"):
        recalibrate(nn.Sequential(Swallowing(1), Raising(), nn.BatchNorm1d(2)), batches, method="exact")
    assert not find_forwards()


class Locked(nn.Module):
    """Lets one forward at a time through a layer."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        with self.lock:
            return self.norm(x)


def test_a_forward_that_waits_for_another_is_refused(monkeypatch):
    monkeypatch.setattr(paused_forwards, "_PAUSE", 0.02)
    model, batches = Locked(), [torch.randn(4, 3, 5, 5) for _ in range(3)]
    with pytest.raises(RefusedError, match="lock"):
        recalibrate(model, batches, method="exact")
    assert not find_forwards()
    assert not model.lock.locked()
    recalibrate(model, batches)


def test_a_process_that_was_stopped_itself_waits_on(monkeypatch):
    """As by Ctrl-Z: however long, the one wait that it was in has ended, and nothing has used CPU time."""
    waits = [False] * (paused_forwards._LOOKS - 1)
    monkeypatch.setattr(paused_forwards, "time", SimpleNamespace(process_time=lambda: 0.0))
    forward = PausedForward(lambda: None)
    back = forward._back
    forward._back = SimpleNamespace(
        acquire=lambda timeout: waits.pop() if waits else back.acquire(), release=back.release
    )
    forward.advance()
    assert not waits
    assert forward.reached is None


class Regained(nn.Module):
    """Computes with other weights than it holds, which it takes back at the end of a forward."""

    def __init__(self, way):
        super().__init__()
        self.way, self.gain = way, 2.0
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        if self.way == "functional_call":
            weights = {k: v * self.gain if v.ndim == 4 else v for k, v in self.net.named_parameters()}
            return torch.func.functional_call(self.net, weights, (x,))
        self.net[0].weight.data.mul_(self.gain)
        out = self.net(x)
        self.net[0].weight.data.div_(self.gain)
        return out


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("way", ["functional_call", "in place"])
def test_weights_that_change_for_the_time_of_a_forward_are_refused(way, count):
    """The first batch sees them as they should be, each later one those that the others have not taken back yet."""
    model = Regained(way)
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(8, 3, 5, 5) for _ in range(count)]
    with pytest.raises(RefusedError, match="changes its weights while it runs"):
        recalibrate(model, batches, method="exact")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    recalibrate(model, batches)
    with torch.no_grad():
        seen = nn.functional.conv2d(torch.cat(batches), 2 * model.net[0].weight, model.net[0].bias)
    torch.testing.assert_close(model.net[1].running_var, seen.var((0, 2, 3)))
    # alone there is nothing else that could change them
    recalibrate(model, [torch.cat(batches)], method="exact")
    torch.testing.assert_close(model.net[1].running_var, seen.var((0, 2, 3)))


class SecondChance(nn.Module):
    """Falls back on another layer where one raises, whatever it raises; later batches raise in earnest."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        try:
            x = self.second(x)
        except:  # noqa: E722 as model code has it
            x = self.third(x)
        if x.max() > 3:
            raise ValueError("boom")
        return x


def test_a_forward_that_falls_back_on_another_layer_is_ended_all_the_same():
    batches = [torch.randn(8, 3, 6, 6) for _ in range(3)]
    batches[0][5] = 1000
    with pytest.raises(UserCodeError, match="boom"):
        recalibrate(SecondChance(), batches, method="exact")
    assert not find_forwards()


def test_autocast_holds_in_all_threads():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(64, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recalibrate(model, x.split(8), method="exact")
        expected = model[0](x).double()
    assert expected.dtype is torch.float64
    assert (model[1].running_mean - expected.mean(0)).abs().max() < 1e-6


class TestMemory:
    """What does not fit is refused before the sweep, with the number of samples that would."""

    def test_refused_with_the_number(self, digits, images, monkeypatch):
        monkeypatch.setattr("bntool.recalibration.exact.reading.find_available", lambda _device: 2_000_000)
        before = statistics_of(digits)
        with pytest.raises(
            RefusedError, match=r"\d+ samples .* 2\.0 MB are free: about \d+ samples fit, use --samples \d+"
        ):
            recalibrate(digits, images.split(10), method="exact")
        assert torch.equal(statistics_of(digits), before)

    def test_as_many_as_fit_on_request(self, digits, images, monkeypatch):
        monkeypatch.setattr("bntool.recalibration.exact.reading.find_available", lambda _device: 2_000_000)
        result = recalibrate(digits, images.split(10), method="exact", fit_memory=True)
        assert 10 <= result.samples < 500
        assert result.memory <= 2_000_000
        monkeypatch.setattr("bntool.recalibration.exact.reading.find_available", lambda _device: 1000)
        with pytest.raises(RefusedError, match=r"^10 samples .* about 0 samples fit, use a smaller --batch-size"):
            recalibrate(digits, images.split(10), method="exact", fit_memory=True)

    def test_an_endless_loader_ends(self, digits, images, monkeypatch):
        monkeypatch.setattr("bntool.recalibration.exact.reading.find_available", lambda _device: 2_000_000)

        def endless():
            while True:
                yield images[:10]

        with pytest.raises(RefusedError, match="fit"):
            recalibrate(digits, endless(), method="exact")

    @pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v as Linux has it")
    def test_an_address_space_that_is_limited_is_not_run_out_of(self):
        refused, done = programs.run("limited_memory").stdout.splitlines()
        assert "samples on their way would need" in refused
        assert "allocate" not in refused
        assert done.startswith("done with")

    def test_the_forecast_is_about_what_a_forward_keeps(self):
        from bntool.recalibration.exact.memory import LiveTensors

        with LiveTensors() as memory, torch.no_grad():
            x = torch.ones(1000)
            y = x * 2
            assert memory.live == 8000
            del x
            z = y[:10]
            assert memory.live == 4000
            del y
            assert memory.live == 4000
            del z
        assert memory.live == 0
        assert memory.peak == 8000

    def test_tensors_may_end_in_several_threads_at_once(self):
        from bntool.recalibration.exact.memory import LiveTensors

        class Interrupted(dict):
            def pop(self, *arguments):
                others.clear()  # as another thread would, in the middle of it
                return super().pop(*arguments)

        with LiveTensors() as memory:
            one, others = torch.ones(1000), [torch.ones(10)]
            memory._sizes = Interrupted(memory._sizes)
            del one
        assert memory.live == 0
