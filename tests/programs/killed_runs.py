"""Runs of ``recalibrate --resume`` killed at random moments: each must end with the bytes of a run that nobody kills.

``python -m tests.programs.killed_runs KILLS [SAMPLES [SEED]]``, in processes forked from this one, which has torch.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from bntool.cli.main import main
from bntool.recalibration.partials import read_partial
from tests.places import SAMPLES

_KILLS_OF_A_RUN = 12


def _start(arguments: list[str], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    os.chdir(folder)
    os._exit(main(arguments))


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(kills: int, samples: int, seed: int) -> None:
    """Kill as often, and hold what is written at the end against a run that is not killed."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["recalibrate", str(SAMPLES / "drifted.pt"), "--model", f"{SAMPLES / 'digits_net.py'}:build"]
        arguments += ["--data", str(SAMPLES / "digits_train.npz"), "--batch-size", "20", "--prior", "3", "--json"]
        arguments += ["--samples", str(samples)]
        start = time.monotonic()
        assert _wait(_start([*arguments, "-o", "one.pt"], folder)) == 0
        duration, expected = time.monotonic() - start, (folder / "one.pt").read_bytes()
        done = runs = went_on = 0
        while done < kills:
            position = 0
            for _ in range(min(draw.randint(1, _KILLS_OF_A_RUN), kills - done)):
                every = draw.choice(["0", "0.05"])
                child = _start([*arguments, "-o", "out.pt", "--resume", "kept", "--resume-every", every], folder)
                time.sleep(draw.uniform(0, duration * draw.choice([0.3, 1.2])))
                os.kill(child, signal.SIGKILL)
                if _wait(child) == 0:  # it was done before
                    break
                done += 1
                if (folder / "kept").exists():
                    found = read_partial(folder / "kept").position
                    assert found >= position, "what was measured was lost"
                    went_on += found > position
                    position = found
            if not (folder / "out.pt").exists():
                assert _wait(_start([*arguments, "-o", "out.pt", "--resume", "kept"], folder)) == 0
                left = sorted(path.name for path in folder.iterdir())
                assert left == ["one.pt", "out.pt"], left
            assert (folder / "out.pt").read_bytes() == expected, f"run {runs}: other bytes"
            runs += 1
            for path in folder.iterdir():
                if path.name != "one.pt":
                    path.unlink()
        print(f"{done} kills in {runs} runs, {went_on} of them after something was kept: the same bytes each time")


if __name__ == "__main__":
    run(*(int(given or usual) for given, usual in itertools.zip_longest(sys.argv[1:], (100, 1437, 0))))
