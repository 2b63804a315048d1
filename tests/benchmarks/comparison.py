"""Cold ``bntool diff`` of checkpoints of ResNet-50's size, against ``bntool inspect`` and loading both in torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.benchmarks.inspection import resnet50_state
from tests.benchmarks.measuring import measure, print_table, python

_TORCH = (
    "import sys, torch; a, b = (torch.load(f, weights_only=True, mmap=True) for f in sys.argv[1:]); "
    "print(sum(not torch.equal(a[k], b[k]) for k in a))"
)


def run() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        a, b = (str(Path(folder) / name) for name in ("a.pt", "b.pt"))
        state = resnet50_state()
        torch.save(state, a)
        for name, tensor in state.items():
            if "running_mean" in name:
                state[name] = tensor + 0.1
        torch.save(state, b)
        commands = {
            "torch.load both, torch.equal": (python("-c", _TORCH, a, b), False),
            "bntool inspect A": (python("-m", "bntool", "inspect", a), False),
            "bntool diff A B": (python("-m", "bntool", "diff", a, b), False),
            "bntool diff A B --json": (python("-m", "bntool", "diff", a, b, "--json"), False),
            "bntool diff A B, terminal": (python("-m", "bntool", "diff", a, b), True),
        }
        print_table(measure(commands, rounds=5), peer="torch.load both, torch.equal")
