"""Flags of a model's own that decide what a fold means."""

from __future__ import annotations

import torch
from torch import nn

import bntool
from bntool.folding.switches import find_flags
from tests.folding.test_unusual_models import folded, image, randomise


class Flagged(nn.Module):
    """The same decided by attributes: in the module that holds the BatchNorm, by a method, by the one around it."""

    def __init__(self):
        super().__init__()
        self.block = FlaggedBlock()
        self.scaled, self.drawn, self.checked, self.unread = False, False, True, True

    def forward(self, x):
        if not self.checked:
            raise ValueError("not for this model")
        y = self.block(x)
        if self.drawn:  # no two results are the same
            y = y + torch.rand_like(y)
        return y * 2 if self.scaled else y


class FlaggedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.normalise, self.raw = True, False

    @property
    def is_on(self):
        return self.normalise

    def forward(self, x):
        return self._normalise(self.conv(x))

    def _normalise(self, y):
        return y[:, :4] if self.raw else self.out(self.bn(y) if self.is_on else y)


class TwoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = Flagged(), FlaggedBlock()

    def forward(self, x):
        return self.last(self.first(x)[:, :3])


def test_a_flag_of_the_model_that_goes_round_a_batchnorm_is_named():
    model, x = randomise(Flagged()), image()
    result = bntool.fold(model, x)
    assert folded(result) == ["block.bn"]
    for name, value in (("normalise", False), ("raw", True)):
        for one in (model, result.model):
            setattr(one.block, name, value)
        assert (result.model(x) - model(x)).abs().max() > 0.1
        for one in (model, result.model):
            setattr(one.block, name, not value)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-10)
    said = result.plan.assumptions
    assert [text.partition(": with")[0] for text in said] == ["block.normalise is True", "block.raw is False"]
    assert all("computes something else (off by " in text for text in said)


def test_flags_of_one_class_are_named_together_and_given_back():
    model, x = randomise(TwoBlocks()), image(2, 3, 12, 12)
    before = [(name, dict(vars(module))) for name, module in model.named_modules()]
    said = bntool.fold(model, x).plan.assumptions
    assert [text.partition(": with")[0] for text in said] == [
        "first.block.normalise is True (and 1 more of its class)",
        "first.block.raw is False (and 1 more of its class)",
    ]
    for (_, kept), module in zip(before, model.modules(), strict=True):
        assert {k: v for k, v in vars(module).items() if isinstance(v, bool)} == {
            k: v for k, v in kept.items() if isinstance(v, bool)
        }


SEEN: list[tuple[bool, ...]] = []


class Many(FlaggedBlock):
    def __init__(self):
        super().__init__()
        self.a = self.b = self.c = self.d = self.e = self.f = self.g = self.h = False

    def forward(self, x):
        SEEN.append((self.normalise, self.raw, self.a, self.b, self.c, self.d, self.e, self.f, self.g, self.h))
        return super().forward(x)


def test_a_model_is_run_for_eight_flags_at_most():
    model = randomise(Many())
    assert len(find_flags(model, ["bn"])) == 10
    SEEN.clear()
    bntool.fold(model, image())
    ways = [tuple(a != b for a, b in zip(seen, SEEN[0], strict=True)) for seen in SEEN]
    assert {sum(way) for way in ways} == {0, 1}
    assert sorted({way.index(True) for way in ways if any(way)}) == list(range(8))


def test_flags_are_those_that_code_reads_around_what_is_folded():
    model = randomise(Flagged())
    assert [str(flag) for flag in find_flags(model, ["block.bn"])] == [
        "scaled is False", "drawn is False", "checked is True", "block.normalise is True", "block.raw is False"
    ]  # fmt: skip
    assert find_flags(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), ["1"]) == []
    assert [flag.name for flag in find_flags(nn.Sequential(model, nn.Linear(2, 2)), ["1"])] == []


def test_flags_inside_of_wrappers_are_found():
    model, x = nn.DataParallel(randomise(Flagged())), image()
    said = bntool.fold(model, x).plan.assumptions
    assert [text.partition(": with")[0] for text in said] == [
        "block.normalise is True", "block.raw is False"
    ]  # fmt: skip
