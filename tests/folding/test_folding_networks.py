"""Random networks: folding is exact, or it is refused; it is never wrong."""

from __future__ import annotations

import os
import random
from collections import Counter

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from bntool.folding.options import Layout
from bntool.folding.unchanged_outputs import find_points
from bntool.graphs.traced.tracing import trace
from bntool.verification.layer_agreement import compare_layers, watch
from tests.folding.folding_networks import LAYOUTS, fold, largest_difference, randomise

SIZE, LAYERS = 6, 14


class OwnBias(nn.Module):
    """A parameter that is added, one element for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        return x + self.offset


class OwnFactor(nn.Module):
    """A parameter that is multiplied by, one element for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x):
        return self.implicit * x


class OwnProductAdded(nn.Module):
    """Both at once, by one operation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.offset = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        return torch.addcmul(self.offset, self.implicit, x, value=-2)


class RandomNetwork(nn.Module):
    """A program over a growing list of images of equal size, drawn step by step."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.steps: list[tuple] = []
        self.made: list[tuple[str, nn.Module, int, int]] = []
        self.channels = [4]
        for _ in range(chance.randint(3, LAYERS)):
            self.add_step(chance)
        if chance.random() < 0.5:
            self.head(chance)
        count = min(len(self.channels), chance.choice([0, 0, 1, 2]))
        self.returned = chance.sample(range(len(self.channels)), count)
        self.returned.append(len(self.channels) - 1)
        order = chance.sample(range(len(self.made)), len(self.made))
        for position in order:  # names and order of registration say nothing about who feeds whom
            self.register_module(f"m{(position * 7 + 3) % 101}_{position}", self.made[position][1])

    def add_step(self, chance: random.Random) -> None:  # noqa: C901 a list of cases
        # the last image is the likeliest: chains are what can be folded
        source = chance.choice([len(self.channels) - 1] * 8 + list(range(len(self.channels))))
        channels = self.channels[source]
        kinds = [
            "conv",
            "conv",
            "conv",
            "bn",
            "bn",
            "bn",
            "relu",
            "relu_",
            "add",
            "add_",
            "cat",
            "chunk",
            "max",
            "mean",
            "reuse",
            "functional",
            "turned",
            "view",
            "clone",
            "scale",
            "shape",
            "leaky",
            "leaky_",
            "negative",
            "difference",
            "gate",
            "mirrored",
            "counted",
            "own bias",
            "residual",
            "residual",
            "branch",
            "averaged",
        ]
        kind = chance.choice(kinds)
        if kind == "conv":
            self.module(self.convolution(chance, channels), source)
        elif kind == "bn":
            self.module(self.batchnorm(chance, channels), source)
        elif kind == "functional":
            self.made.append(("bn", nn.BatchNorm2d(channels), channels, channels))
            # by number of steps, so that seeds give the networks that they gave
            is_sliced = len(self.steps) % 5 == 3 and channels > 1
            self.step(("sliced" if is_sliced else kind, source, len(self.made) - 1), channels)
        elif kind == "reuse":
            fitting = [i for i, (_, _, ingoing, _) in enumerate(self.made) if ingoing == channels]
            if fitting:
                index = chance.choice(fitting)
                self.step(("module", source, index), self.made[index][3])
        elif kind == "own bias":
            self.made.append(("bias", OwnBias(channels), -1, -1))
            self.step(("module", source, len(self.made) - 1), channels)
        elif kind == "scale" and len(self.steps) % 5 == 3:
            self.made.append(("factor", OwnFactor(channels), -1, -1))
            self.step(("module", source, len(self.made) - 1), channels)
        elif kind == "scale" and len(self.steps) % 5 == 1:
            self.made.append(("factor", OwnProductAdded(channels), -1, -1))
            self.step(("module", source, len(self.made) - 1), channels)
        elif kind in ("residual", "branch", "averaged"):
            self.block(chance, kind, source)
        elif kind in ("add", "add_", "cat", "difference"):
            others = [i for i, c in enumerate(self.channels) if kind == "cat" or c == channels]
            other = chance.choice(others)
            kind = "lerp" if kind == "difference" and len(self.steps) % 5 == 2 else kind
            self.step((kind, source, other), channels + self.channels[other] if kind == "cat" else channels)
        elif kind == "chunk" and channels % 2 == 0:
            self.step((kind, source, chance.randint(0, 1)), channels // 2)
        elif kind != "chunk":
            kind = "sigmoid" if kind == "shape" and len(self.steps) % 5 == 4 else kind
            self.step((kind, source), channels)

    def block(self, chance: random.Random, kind: str, source: int) -> None:
        """x + conv(relu(bn(x))), or bn(x) + conv(x), or bn(average(conv(x)))."""
        channels = self.channels[source]
        groups = chance.choice([g for g in (1, 2, 4) if channels % g == 0])
        convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=chance.random() < 0.5)
        norm = self.batchnorm(chance, channels)
        self.made += [norm, ("conv", convolution, channels, channels)]
        activation = chance.choice(["relu", "relu_", "leaky", "clone"])
        self.step((kind, source, len(self.made) - 2, activation), channels)

    def step(self, step: tuple, channels: int) -> None:
        self.steps.append(step)
        self.channels.append(channels)

    def module(self, made: tuple[str, nn.Module, int, int], source: int) -> None:
        self.made.append(made)
        self.step(("module", source, len(self.made) - 1), made[3])

    @staticmethod
    def convolution(chance: random.Random, channels: int) -> tuple[str, nn.Module, int, int]:
        groups = chance.choice([g for g in (1, 2, 4) if channels % g == 0])
        out = chance.choice([4, 8])
        size = chance.choice([1, 3])
        kind = chance.choice([nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d])
        bias = chance.random() < 0.5
        return "conv", kind(channels, out, size, padding=size // 2, groups=groups, bias=bias), channels, out

    @staticmethod
    def batchnorm(chance: random.Random, channels: int) -> tuple[str, nn.Module, int, int]:
        eps, affine = chance.choice([1e-5, 1e-3]), chance.choice([True, True, False])
        return "bn", nn.BatchNorm2d(channels, eps=eps, affine=affine), channels, channels

    def head(self, chance: random.Random) -> None:
        channels = self.channels[-1]
        linear, batchnorm = nn.Linear(channels, 5, bias=chance.random() < 0.5), nn.BatchNorm1d(5)
        self.made += [("linear", linear, -1, -1), ("bn", batchnorm, -1, -1)]
        self.step(("head", len(self.channels) - 1, len(self.made) - 2, chance.random() < 0.5), 5)

    def forward(self, x):
        values = [x * 1]
        for kind, source, *more in self.steps:
            values.append(self.run(kind, values[source], values, more))
        return [values[index] for index in self.returned]

    def run(self, kind, x, values, more):  # noqa: PLR0911 a list of cases
        if kind == "module":
            return self.made[more[0]][1](x)
        if kind == "functional":
            bn = self.made[more[0]][1]
            return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-4)
        if kind == "sliced":
            bn, half = self.made[more[0]][1], x.shape[1] // 2
            parts = []
            for part in (slice(half), slice(half, None)):
                vectors = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
                parts.append(F.batch_norm(x[:, part], *(vector[part] for vector in vectors), eps=1e-4))
            return torch.cat(parts, 1)
        if kind == "head":
            linear, batchnorm = self.made[more[0]][1], self.made[more[0] + 1][1]
            if more[1]:
                return batchnorm(linear(x.mean((2, 3))))
            tokens = linear(x.flatten(2).transpose(1, 2))
            return batchnorm(tokens.transpose(1, 2))
        if kind == "averaged":
            norm, convolution = self.made[more[0]][1], self.made[more[0] + 1][1]
            return norm(self.run("mean", convolution(x), values, ()))
        if kind == "residual":
            norm, convolution = self.made[more[0]][1], self.made[more[0] + 1][1]
            return x + convolution(self.run(more[1], norm(x), values, ()))
        if kind == "branch":
            norm, convolution = self.made[more[0]][1], self.made[more[0] + 1][1]
            return self.run(more[1], norm(x) + convolution(x), values, ())
        simple = {
            "leaky": lambda: F.leaky_relu(x, 0.2),
            "leaky_": lambda: F.leaky_relu_(x, 0.2),
            "negative": lambda: -x,
            "difference": lambda: torch.sub(x, values[more[0]], alpha=2),
            "lerp": lambda: torch.lerp(x, values[more[0]], -0.3),
            "gate": lambda: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
            "mirrored": lambda: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, stride=1),
            "counted": lambda: F.avg_pool2d(x, 3, stride=1, padding=1),
            "relu": lambda: F.relu(x),
            "relu_": lambda: F.relu_(x),
            "add": lambda: x + values[more[0]],
            "add_": lambda: x.add_(values[more[0]]),
            "cat": lambda: torch.cat([x, values[more[0]]], 1),
            "chunk": lambda: x.chunk(2, 1)[more[0]],
            "max": lambda: F.max_pool2d(x, 3, stride=1, padding=1),
            "mean": lambda: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
            "turned": lambda: x.flip(3).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
            "view": lambda: x.flatten(1).view(x.shape),
            "clone": lambda: x.detach().clone(),
            "scale": lambda: x * 0.5,
            "shape": lambda: x + torch.ones_like(x),
            "sigmoid": lambda: torch.sigmoid(x),  # of which nothing can be stored otherwise
        }
        return simple[kind]()


class RandomChain(nn.Module):
    """Layers of one to three dimensions in a row, some of them tied or called again; a second reader at times."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.dimensions = chance.choice([1, 2, 3])
        plain, transposed, self.norm, self.pool = (
            getattr(source, f"{name}{self.dimensions}d")
            for source, name in ((nn, "Conv"), (nn, "ConvTranspose"), (nn, "BatchNorm"), (F, "max_pool"))
        )
        made = []
        for _ in range(chance.randint(2, 5)):
            kind, groups = chance.choice([plain, transposed]), chance.choice([1, 2, 4])
            made.append(kind(4, 4, 1, groups=groups, bias=chance.random() < 0.5))
            made += [self.norm(4)] * chance.choice([1, 1, 1, 2])
        if chance.random() < 0.3:  # two modules, one parameter
            first, second = chance.sample([m for m in made if not isinstance(m, self.norm)], 2)
            if first.weight.shape == second.weight.shape:
                second.weight = first.weight
        if chance.random() < 0.2:
            made.append(chance.choice(made))  # one module, called twice
        self.between = [chance.choice(["", "", "", "relu", "pool", "kept"]) for _ in made]
        for position in chance.sample(range(len(made)), len(made)):
            self.register_module(f"m{position}", made[position])
        self.length = len(made)

    def forward(self, x):
        kept = []
        for position, between in enumerate(self.between):
            x = getattr(self, f"m{position}")(x)
            if between == "relu":
                x = F.relu(x)
            elif between == "pool":
                x = self.pool(x, 3, stride=1, padding=1)
            elif between == "kept":
                kept.append(x.sum())
        return [x, *kept]


@settings(derandomize=True, max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.sampled_from(LAYOUTS))
def test_chains_of_other_dimensions(seed: int, layout: Layout) -> None:
    model = RandomChain(random.Random(seed))
    dimensions = model.dimensions
    model = randomise(model.double(), seed=seed % 7)
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(2, 4, *([5] * dimensions), dtype=torch.float64, generator=generator)
    folded, plan = fold(model, inputs, layout=layout)
    assert largest_difference(model, folded, inputs) < 1e-9
    chains.update(f"{f.level.value} {dimensions}d" for f in plan.folds)
    chains.update(skip.reason.value for skip in plan.skips)


chains: Counter[str] = Counter()
seen: Counter[str] = Counter()


@settings(
    derandomize=True,
    max_examples=int(os.environ.get("BNTOOL_NETWORKS", "150")),
    suppress_health_check=list(HealthCheck),
)
@example(1123033, Layout.FOLDED)  # one layer, called with two eps
@example(690660660, Layout.FOLDED)  # a sum that the use of others leaves with one unknown
@example(4276676700, Layout.FOLDED)  # scales 10^21 apart: shifts that follow from one another lose their digits
@example(743623041, Layout.FOLDED)  # one layer, of whose calls one stores its output otherwise
@given(st.integers(0, 2**32), st.sampled_from(LAYOUTS))
def test_random_networks_are_folded_exactly_or_not_at_all(seed: int, layout: Layout) -> None:
    network = RandomNetwork(random.Random(seed))
    model = draw_values(network, seed)
    inputs = torch.randn(2, 4, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded, plan = fold_network(model, inputs, layout, change_padding=layout is Layout.FOLDED and seed % 4 == 0)
    others = torch.randn(3, 4, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    assert largest_difference(model, folded, others) < 1e-9
    points = find_points(trace(model, inputs), plan)
    for layer in agreement_inside(model, folded, others, points, plan):
        transform = plan.stored.get(layer.at)
        shift = 0 if transform is None else max(map(abs, transform.shift))
        assert layer.exact < 1e-9 + shift * 2**-51  # to take a shift away again costs its last digit
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    seen.update(f.level.value for f in plan.folds)
    seen.update(["another padding"] * len(plan.padding))
    seen.update(skip.reason.value for skip in plan.skips)


def draw_values(network: RandomNetwork, seed: int) -> RandomNetwork:
    """Random values; in two networks of three no scale is tiny, in one of these all are positive."""
    model = randomise(network.double(), seed=seed % 7)
    for _, module, *_ in model.made:
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None and seed % 3:
            with torch.no_grad():
                small = module.weight.abs().clamp(min=0.1)
                module.weight.copy_(small if seed % 3 == 2 else small * module.weight.sign())
        if isinstance(module, OwnFactor | OwnProductAdded) and seed % 4 == 1:
            with torch.no_grad():
                module.implicit[0, seed % module.implicit.shape[1]] = 0
    return model


def agreement_inside(model: RandomNetwork, folded: nn.Module, inputs: torch.Tensor, points: dict[str, str], plan):
    found = []
    for each in (model, folded):
        with watch(each, points.values()) as seen, torch.no_grad():
            each(inputs)
        found.append(seen)
    return compare_layers(points, tuple(found), tuple(found), plan.stored)


def fold_network(model: RandomNetwork, inputs: torch.Tensor, layout: Layout, *, change_padding: bool = False):
    """Fold a copy; its list of modules has to follow what takes their place."""
    folded, plan = fold(model, inputs, layout=layout, change_padding=change_padding)
    names = {id(module): name for name, module in model._modules.items()}
    folded.made = [
        (kind, folded._modules[names[id(module)]], ingoing, outgoing) for kind, module, ingoing, outgoing in model.made
    ]
    return folded, plan


def test_the_random_networks_are_not_all_alike() -> None:
    """Guards the test above against drawing only networks in which there is nothing to decide."""
    if sum(seen.values()) > 100:  # not where it was run alone
        levels = {"direct", "through", "forward", "branch", "transform"}
        assert {*levels, "another padding", "shared output", "not adjacent"} <= set(seen)
    if sum(chains.values()) > 100:
        assert {"direct 1d", "direct 2d", "direct 3d", "reused", "shared output", "not adjacent"} <= set(chains)
