"""CPU time and memory of whole commands, interleaved so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measurement:
    """One command: CPU seconds (user + system) of the best and the median round, and resident memory at its peak.

    Attributes:
        wall: seconds by the clock, of the median round.
        best_wall: seconds by the clock, of the best round.
    """

    best: float
    median: float
    megabytes: float
    wall: float
    best_wall: float


def run_command(command: Sequence[str], *, terminal: bool = False) -> tuple[float, float, float]:
    """Run a command to its end; CPU seconds, peak resident megabytes and seconds by the clock of that process.

    Args:
        terminal: give it a terminal of 120 columns to write to, else /dev/null.
    """
    launcher = Path(__file__).with_name("launching.py")
    how = "terminal" if terminal else "pipe"
    arguments = [sys.executable, "-S", "-E", str(launcher), how, *command]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    code, seconds, kilobytes, wall = done.stdout.split()
    if code != "0":
        raise RuntimeError(f"{command} failed: {done.stderr}")
    return float(seconds), int(kilobytes) / 1024, float(wall)


def measure(
    commands: Mapping[str, tuple[Sequence[str], bool]], *, rounds: int, written: Sequence[Path] = ()
) -> dict[str, Measurement]:
    """Measure commands in turn, ``rounds`` times.

    Args:
        commands: each is (command line, whether it gets a terminal).
        written: files that are removed before each command: to free what an old one holds takes its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    walls: dict[str, list[float]] = {name: [] for name in commands}
    megabytes: dict[str, float] = dict.fromkeys(commands, 0.0)
    for _ in range(rounds):
        for name, (command, terminal) in commands.items():
            for path in written:
                path.unlink(missing_ok=True)
            cpu, memory, wall = run_command(command, terminal=terminal)
            seconds[name].append(cpu)
            walls[name].append(wall)
            megabytes[name] = max(megabytes[name], memory)
    return {
        name: Measurement(
            min(times),
            statistics.median(times),
            megabytes[name],
            wall=statistics.median(walls[name]),
            best_wall=min(walls[name]),
        )
        for name, times in seconds.items()
    }


def print_table(measurements: Mapping[str, Measurement], *, peer: str) -> None:
    """One row for each command, with how many times less CPU it takes than the peer."""
    reference = measurements[peer]
    print(f"{'':44}{'CPU best':>10}{'median':>10}{'resident':>11}{'ratio best':>12}{'median':>8}")
    for name, m in measurements.items():
        print(
            f"{name:44}{m.best * 1000:>7.0f} ms{m.median * 1000:>7.0f} ms{m.megabytes:>8.0f} MB"
            f"{reference.best / m.best:>11.1f}x{reference.median / m.median:>7.1f}x"
        )


def python(*arguments: str) -> tuple[str, ...]:
    """A command line of the interpreter that runs this."""
    return (sys.executable, *arguments)
