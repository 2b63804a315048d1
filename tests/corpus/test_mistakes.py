"""A small part of the corpus; ``make corpus`` makes all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import bntool
from tests.corpus import mistakes
from tests.corpus.__main__ import ALARMS, is_named
from tests.corpus.networks import NETWORKS

AUDIO = NETWORKS[-1]
# each stands on the one training that is shared
QUICK = (
    "named_parameters() saved",
    "EMA of parameters only",
    "update_bn on three batches",
    "a batch with NaN in train mode",
    "a filter exploded by one gradient",
    "mean and variance swapped",
    "statistics of another layer",
    "every tensor cast to half",
)


@pytest.mark.parametrize("title", QUICK)
def test_a_mistake_is_named(title: str, tmp_path: Path) -> None:
    (mistake,) = [mistake for mistake in mistakes.MISTAKES if mistake.title == title]
    assert is_named(mistake, AUDIO, tmp_path)


@pytest.mark.parametrize("make", [mistakes.sound_state_dict, mistakes.sound_module])
def test_a_sound_file_is_no_alarm(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make(AUDIO, tmp_path / "sound.pt")
    assert bntool.inspect(tmp_path / "sound.pt").verdict.health not in ALARMS
