"""Flags of a model's own that decide what a fold means."""

from __future__ import annotations

from enum import Enum

import pytest
import torch
from torch import nn

import bntool
from bntool.folding.other_forwards.switches import find_flags
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
FURTHER = "abcdefghijkl"


class Many(FlaggedBlock):
    def __init__(self):
        super().__init__()
        vars(self).update(dict.fromkeys(FURTHER, False))

    def forward(self, x):
        further = (self.a, self.b, self.c, self.d, self.e, self.f, self.g, self.h, self.i, self.j, self.k, self.l)
        SEEN.append((self.normalise, self.raw, *further))
        return super().forward(x)


def test_a_model_is_run_for_twelve_values_at_most():
    model = randomise(Many())
    assert len(find_flags(model, ["bn"])) == 14
    SEEN.clear()
    bntool.fold(model, image())
    ways = [tuple(a != b for a, b in zip(seen, SEEN[0], strict=True)) for seen in SEEN]
    assert {sum(way) for way in ways} == {0, 1}
    assert sorted({way.index(True) for way in ways if any(way)}) == list(range(12))


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


class Mode(Enum):
    NORMALISED = 1
    RAW = 2


class Choosing(nn.Module):
    """Goes round its BatchNorm where an attribute says so."""

    def __init__(self, choice):
        super().__init__()
        self.conv, self.bn, self.choice, self.width, self.kind = (
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), choice, 8, "conv"
        )  # fmt: skip

    def forward(self, x):
        y = self.conv(x)
        if self.width != y.shape[1] or self.kind not in ("conv", "linear"):
            raise ValueError(f"{self.kind} of {self.width}")
        return self.bn(y) if self.is_normalised() else y


class ByText(Choosing):
    def is_normalised(self):
        return self.choice == "bn"


class ByOneOfTexts(Choosing):
    def is_normalised(self):
        choice = self.choice
        return {"bn": True, "none": False}[choice]


class ByNumber(Choosing):
    def is_normalised(self):
        return self.choice > 2


class ByNumberBehind(Choosing):
    def is_normalised(self):
        return self.choice >= 0.5


class ByOneOfNumbers(Choosing):
    def is_normalised(self):
        return self.choice in (1, 3)


class ByTruth(Choosing):
    def is_normalised(self):
        return bool(self.choice and self.conv)


class ByEnum(Choosing):
    def is_normalised(self):
        return self.choice is Mode.NORMALISED


CHOICES = [
    (ByText, "bn", ""), (ByOneOfTexts, "bn", "none"), (ByNumber, 3, 2), (ByNumberBehind, 0.5, -0.5),
    (ByOneOfNumbers, 3, 2), (ByTruth, 7, 0), (ByEnum, Mode.NORMALISED, Mode.RAW),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "other"), CHOICES)
def test_numbers_texts_and_enums_that_go_round_a_batchnorm_are_named(kind, value, other):
    model, x = randomise(nn.Sequential(kind(value), nn.ReLU())), image()
    result = bntool.fold(model, x)
    assert folded(result) == ["0.bn"]
    for one in (model, result.model):
        one[0].choice = other
    error = (result.model(x) - model(x)).abs().max() / model(x).abs().max()
    assert error > 0.1
    (said,) = result.plan.assumptions
    assert said.startswith(f"0.choice is {value!r}: with {other!r} the folded model computes something else (off by ")
    assert (model[0].width, model[0].kind) == (8, "conv")


class Asked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)


class AskedForText(Asked):
    def forward(self, x, mode="bn"):
        y = self.conv(x)
        return self.bn(y) if mode == "bn" else y


class AskedForNumber(Asked):
    def forward(self, x, *, level=1):
        y = self.conv(x)
        return self.bn(y) if level >= 1 else y


class AskedForKeyword(Asked):
    """Normalises, unless it is told otherwise."""

    def forward(self, x, **options):
        y = self.conv(x)
        return self.bn(y) if options.get("normalise", True) else y


ARGUMENTS = [(AskedForText, "mode=''"), (AskedForNumber, "level=0"), (AskedForKeyword, "normalise=False")]


@pytest.mark.parametrize(("kind", "told"), ARGUMENTS)
def test_arguments_of_other_kinds_that_go_round_a_batchnorm_are_named(kind, told):
    (said,) = bntool.fold(randomise(kind()), image()).plan.assumptions
    assert said.startswith(f"{told} is not given to the forward: the folded model then computes something else")
