"""Models that keep something of their first call, take other arguments, slice or compute their statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from bntool import recalibrate

METHODS = pytest.mark.parametrize("method", ["pooled", "exact", "paper"])


def assert_stores(layer, values, channels=slice(None)):
    """A layer holds mean and unbiased variance of values, (N, C, ...)."""
    flat = values.detach().double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.running_mean[channels].double(), flat.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.running_var[channels].double(), flat.var(1), atol=1e-5, rtol=1e-5)


class HooksItself(nn.Module):
    """As transformers' Segformer: the first call registers hooks, and a flag says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fuse = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.kept = []

    def features(self, x):
        a = self.a(x)
        return self.fuse(torch.cat([a, self.b(a)], 1))

    def forward(self, x):
        if not getattr(self, "_hooked", False):
            for module in (self.a, self.b):
                module.register_forward_hook(lambda _m, _a, out: self.kept.append(out))
            self._hooked = True
        self.kept.clear()
        self.b(self.a(x))
        return self.norm(self.fuse(torch.cat(self.kept[:2], 1)))


@METHODS
@pytest.mark.parametrize("called", [False, True])
def test_a_model_that_registers_hooks_at_its_first_call(method, called):
    model, x = HooksItself().eval(), torch.randn(32, 3, 5, 5) * 2 + 1
    if called:
        model(x)
    reference = HooksItself()
    hooks = len(model.a._forward_hooks)
    recalibrate(model, list(x.split(8)), method=method)
    if method == "paper":
        parts = [reference.features(part) for part in x.split(8)]
        mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
        torch.testing.assert_close(model.norm.running_mean, mean)
    else:
        assert_stores(model.norm, reference.features(x))
    assert len(model.a._forward_hooks) == hooks
    assert getattr(model, "_hooked", False) is called


class Domains(nn.Module):
    """One convolution, two BatchNorms, of which an argument or an attribute chooses one."""

    def __init__(self):
        super().__init__()
        self.conv, self.clean, self.adversarial = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x, clean=True, scale=1.0):
        return (self.clean if clean else self.adversarial)(self.conv(x) * scale)


@METHODS
@pytest.mark.parametrize("key", ["x", "image"])  # the name that forward gives it, and another
def test_arguments_without_tensors_reach_the_forward(method, key):
    model, x = Domains(), torch.randn(32, 3, 9, 9) * 3 + 1
    batches = [{key: part, "clean": False, "scale": 2.0, "path": ["a.png"] * len(part)} for part in x.split(8)]
    recalibrate(model, batches, method=method)
    assert (model.clean.num_batches_tracked, model.adversarial.num_batches_tracked) == (0, 4)
    if method != "paper":
        assert_stores(model.adversarial, model.conv(x) * 2)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False)
        self.embedding, self.last = nn.Embedding(5, 8), nn.BatchNorm1d(8)

    def forward(self, z, y):
        return self.last(self.norm(self.linear(z)) * self.embedding(y))


class GeneratorWithDefault(Generator):
    def forward(self, z, y=None):
        return super().forward(z, torch.zeros(len(z), dtype=torch.long) if y is None else y)


class NeedsLabels(Generator):
    def forward(self, z, labels):
        return super().forward(z, labels)


class Keywords(Generator):
    def forward(self, **inputs):
        return super().forward(inputs["z"], inputs["classes"])


@pytest.mark.parametrize(
    ("kind", "name"), [(Generator, "y"), (GeneratorWithDefault, "y"), (NeedsLabels, "labels"), (Keywords, "classes")]
)
def test_a_label_that_the_forward_needs_reaches_it(kind, name):
    model, z, y = kind(), torch.randn(240, 6), torch.randint(5, (240,))
    reference = copy.deepcopy(model).train()
    recalibrate(model, [{"z": a, name: b} for a, b in zip(z.split(40), y.split(40), strict=True)], method="exact")
    assert_stores(model.norm, reference.linear(z))
    normalised = functional.batch_norm(reference.linear(z), model.norm.running_mean, model.norm.running_var)
    assert_stores(model.last, normalised * reference.embedding(y))
