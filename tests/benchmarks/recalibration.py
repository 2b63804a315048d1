"""``recalibrate`` against torch's update_bn and fvcore's update_bn_stats: time, error, and the price of exactness.

All in one process with one thread, interleaved. A ResNet-50 (53 BatchNorm layers) with weights as they are initialised
for training; batches of 16 images of 128x128. The error is that of running_var against the same passes in float64. Much
of it is not of the moments but of the float32 activations: "the forward alone" is the error of moments taken in float64
of the very activations that the float32 forward gives, "the moments alone" is how far the pooled ones are from those.
Weights as initialised make much of rounding; a trained network, of the shared folder, is given beside.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bntool.recalibration import activation_moments
from bntool.recalibration import pooled as passes
from bntool.recalibration.live import recalibrate
from tests.benchmarks.calibration_batches import SHARED, load_images, load_resnet20

_BATCHES, _SIZE, _PIXELS, _ROUNDS = 3, 16, 128, 5


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


def build_resnet50() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks, inputs = [], 64
    for stage, (width, count) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for index in range(count):
            blocks.append(Bottleneck(inputs, width, 2 if stage and not index else 1))
            inputs = 4 * width
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def run() -> None:
    model = build_resnet50()
    batches = [torch.randn(_SIZE, 3, _PIXELS, _PIXELS) for _ in range(_BATCHES)]
    contenders = _find_contenders()
    models = {name: copy.deepcopy(model) for name in contenders}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(_ROUNDS):
        for name, recompute in contenders.items():
            start = time.process_time()
            recompute(models[name], batches)
            times[name].append(time.process_time() - start)
    exact = _compute_in_float64(model, batches)
    with mock.patch.object(passes, "measure", activation_moments._measure_exactly):
        floor = copy.deepcopy(model)
        recalibrate(floor, batches)
    print(f"{'':24}{'CPU best':>10}{'median':>10}{'images/s':>10}{'ratio best':>12}{'median':>8}{'variance error':>16}")
    ours = times["bntool pooled"]
    for name, seconds in times.items():
        best, median = min(seconds), statistics.median(seconds)
        error = "" if name in ("eval forward", "bntool exact") else f"{_largest_error(models[name], exact):.1e}"
        rate = _BATCHES * _SIZE / best
        ratios = f"{best / min(ours):>11.2f}x{median / statistics.median(ours):>7.2f}x"
        print(f"{name:24}{best:>8.2f} s{median:>8.2f} s{rate:>10.1f}{ratios}{error:>16}")
    print(f"{'the forward alone':76}{_largest_error(floor, exact):>14.1e}")
    of_activations = {name: m.running_var for name, m in floor.named_modules() if isinstance(m, nn.BatchNorm2d)}
    print(f"{'the moments alone':76}{_largest_error(models['bntool pooled'], of_activations):>14.1e}")
    if (SHARED / "weights").is_dir():
        print(f"{'pooled, a trained ResNet-20 on 1,000 images':76}{_measure_trained_error():>14.1e}")
    forward = times["eval forward"]
    for name in ("bntool pooled", "bntool exact"):
        rounds = [ours / eval_forward for ours, eval_forward in zip(times[name], forward, strict=True)]
        print(f"{name}: {statistics.median(rounds):.2f}x an eval forward (median of rounds)")
    print("ratio: CPU time relative to bntool pooled; above 1 is slower")


def _measure_trained_error() -> float:
    model, batches = load_resnet20(), load_images("cifar10_train_4000.npz")[0][:1000].split(100)
    exact = _compute_in_float64(model, list(batches))
    recalibrate(model, batches)
    return _largest_error(model, exact)


def _find_contenders() -> dict[str, Callable[[nn.Module, list[torch.Tensor]], None]]:
    contenders: dict[str, Callable[[nn.Module, list[torch.Tensor]], None]] = {
        "eval forward": _forward,
        "bntool pooled": lambda m, b: recalibrate(m, b) and None,
        "bntool bfloat16": lambda m, b: recalibrate(m, b, precision="bfloat16") and None,
        "bntool exact": lambda m, b: recalibrate(m, b, method="exact") and None,
        "torch update_bn": lambda m, b: update_bn(b, m),
    }
    try:
        from fvcore.nn.precise_bn import update_bn_stats
    except ImportError:
        print("fvcore is not installed: not compared")
    else:
        contenders["fvcore update_bn_stats"] = lambda m, b: update_bn_stats(m.train(), b, len(b))
    return contenders


def _forward(model: nn.Module, batches: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            model.eval()(batch)


def _compute_in_float64(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pooled unbiased variances: each batch normalised by torch in train mode, law of total variance, in float64."""
    oracle = copy.deepcopy(model).double().train()
    layers = {name: m for name, m in oracle.named_modules() if isinstance(m, nn.BatchNorm2d)}
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    positions: dict[str, int] = {}
    for name, layer in layers.items():

        def observe(_module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            values = args[0].transpose(0, 1).flatten(1)
            positions[name] = len(batches) * values.shape[1]
            sums[name].append(torch.stack([values.mean(1), values.var(1, correction=0)]))

        layer.register_forward_pre_hook(observe)
    with torch.no_grad():
        for batch in batches:
            oracle(batch.double())
    variances = {}
    for name, parts in sums.items():
        means, within = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
        biased = within.mean(0) + means.var(0, correction=0)
        variances[name] = biased * positions[name] / (positions[name] - 1)
    return variances


def _largest_error(model: nn.Module, exact: dict[str, torch.Tensor]) -> float:
    layers = dict(model.named_modules())
    return max(float((layers[name].running_var / variance - 1).abs().max()) for name, variance in exact.items())
