"""Every payload in every container: really loaded, it leaves its trace, and bntool has not called it harmless."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

from tests.inspection.payloads import CONTAINERS, PAYLOADS
from tests.inspection.test_loaders import judge


def left(canary: Path) -> bool:
    """Whether something of the name of the canary lies in its folder, but not what the payload itself needs."""
    names = [path.name for path in canary.parent.iterdir()]
    return any(name.startswith(canary.name) and ".needed." not in name for name in names)


def choose() -> list[tuple[str, str]]:
    """Each payload in one container, and each container with some payloads; ``attack`` tries all of them."""
    rng = random.Random(1)
    pairs = [(name, rng.choice(list(CONTAINERS))) for name in PAYLOADS]
    return pairs + [(name, container) for container in CONTAINERS for name in rng.sample(list(PAYLOADS), 3)]


def attack(name: str, container: str, folder: Path) -> str:
    """The verdict on a file, after its loader showed that it does harm.

    Raises:
        AssertionError: bntool ran it, or it does no harm, which proves nothing.
    """
    canary = folder / "canary"
    save, load = CONTAINERS[container]
    path = save(folder, PAYLOADS[name](str(canary)))
    assert not left(canary)
    verdict = judge(path)
    assert not left(canary)
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        load(path)
    for reference in list(logging._handlerList):  # a file that a payload opened for a log
        handler = reference()
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == folder:
            handler.close()
    for _ in range(6000):  # another process may need a moment
        if left(canary):
            break
        time.sleep(0.01)
    assert left(canary), "the attack does not work, and proves nothing"
    return verdict


@pytest.mark.parametrize(("name", "container"), choose())
def test_a_payload_that_runs_is_not_called_harmless(name: str, container: str, tmp_path: Path) -> None:
    assert attack(name, container, tmp_path) in ("suspicious", "unknown", "unsafe", "corrupt", "unknown-format")


def attack_all() -> None:
    """Every payload in every container; prints how many there were for each verdict."""
    found: Counter[str] = Counter()
    for name in PAYLOADS:
        for container in CONTAINERS:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                verdict = attack(name, container, Path(folder))
            assert verdict != "harmless", (name, container)
            found[verdict] += 1
    print(dict(found))


if __name__ == "__main__":
    attack_all()
