"""What a BatchNorm among 20,000 costs beside one among 2,000: whether a command takes time for its layers alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.benchmarks.measuring import measure, python

_COUNTS = (2_000, 20_000)
_COMMANDS = {
    "inspect": ("inspect", "IN"),
    "inspect --json": ("inspect", "IN", "--json"),
    "inspect --all": ("inspect", "IN", "--all"),
    "freeze": ("freeze", "IN", "-o", "OUT", "--force"),
}


def run(rounds: int = 3) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {}
        for count in _COUNTS:
            generator = torch.Generator().manual_seed(0)
            state = {
                f"layer{layer}.bn.{role}": torch.rand(4, generator=generator) + 0.5
                for layer in range(count)
                for role in ("weight", "bias", "running_mean", "running_var")
            }
            torch.save(state, Path(folder) / f"{count}.pt")
            save_file(state, Path(folder) / f"{count}.safetensors")
            for ending in (".pt", ".safetensors"):
                places = {"IN": f"{folder}/{count}{ending}", "OUT": f"{folder}/out{ending}"}
                for name, arguments in _COMMANDS.items():
                    line = [places.get(argument, argument) for argument in arguments]
                    commands[f"{name} {ending} {count}"] = (python("-m", "bntool", *line), False)
        found = measure(commands, rounds=rounds)
    few, many = _COUNTS
    print(f"{'CPU of a layer, median':32}{f'among {few:,}':>16}{f'among {many:,}':>16}{'ratio':>8}")
    for ending in (".pt", ".safetensors"):
        for name in _COMMANDS:
            one, other = (found[f"{name} {ending} {count}"].median / count * 1e6 for count in _COUNTS)
            print(f"{name + ' ' + ending:32}{one:>13.0f} us{other:>13.0f} us{other / one:>8.2f}")
