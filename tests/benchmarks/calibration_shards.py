"""What shards and ``--resume`` cost: CPU and wall time beside one run, and CPU time of merging 64 partials.

Processes that have started and warmed up measure themselves: "one" runs all batches, "two" are two processes at once
with a shard each, "kept" is one that writes what it measured after each second batch (seconds of work for a larger
data set, where 30 are usual).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.places import ROOT

_BATCHES, _SIZE, _ROUNDS, _SHARDS = 12, 8, 3, 64
_SINGLE = "one-batch"  # a partial
_WAYS = {"one": ["1/1"], "two": ["1/2", "2/2"], "kept": ["1/1 kept"]}


def run() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rounds = [{way: _measure(tasks, folder) for way, tasks in _WAYS.items()} for _ in range(_ROUNDS)]
        for way in _WAYS:
            print(f"{way:5}", *(f"{cpu:6.2f} s CPU {wall:6.2f} s wall;" for cpu, wall, _ in (r[way] for r in rounds)))
        for way in ("two", "kept"):
            cpu, wall = (statistics.median(r[way][place] / r["one"][place] for r in rounds) for place in (0, 1))
            print(f"{way} / one: CPU {cpu:.3f}x, wall {wall:.3f}x (medians of rounds)")
        writes = [r["kept"][2] for r in rounds]
        print(f"writing what was measured once: {1000 * statistics.median(writes):.1f} ms of CPU")
        _make_partials(folder)
        command = [sys.executable, "-m", "bntool", "recalibrate", "net.pt", "--from-partials", "many-*", "--quiet"]
        for turn in range(_ROUNDS):
            before = os.times()
            subprocess.run([*command, "-o", f"out{turn}.pt"], cwd=folder, env=_environment(), check=True)
            after = os.times()
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            print(f"merging {_SHARDS} partials of ResNet-50, the start of Python included: {spent:.2f} s of CPU")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _measure(tasks: list[str], folder: Path) -> tuple[float, float, float]:
    """CPU seconds of all, wall seconds from the first start to the last end, and CPU seconds of one writing."""
    command = [sys.executable, "-m", "tests.benchmarks.calibration_shards", str(folder)]
    jobs = [
        subprocess.Popen([*command, task], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment())
        for task in tasks
    ]
    for job in jobs:  # all are warm before one begins
        assert job.stdout is not None
        assert job.stdin is not None
        job.stdout.readline()
    for job in jobs:
        job.stdin.write("\n")  # type: ignore[union-attr]
        job.stdin.flush()  # type: ignore[union-attr]
    found = [json.loads(job.communicate()[0]) for job in jobs]
    wall = max(one["end"] for one in found) - min(one["start"] for one in found)
    return sum(one["cpu"] for one in found), wall, sum(one["writing"] for one in found)


def _run_task(folder: Path, task: str) -> None:
    from bntool.recalibration import keeping
    from bntool.recalibration.checkpoint import recalibrate_checkpoint
    from tests.benchmarks.recalibration import build_resnet50

    shard, _, kept = task.partition(" ")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, path = build_resnet50(), folder / "net.pt"
    if not path.exists():
        torch.save(model.state_dict(), path)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(_SIZE, 3, 128, 128, generator=generator) for _ in range(_BATCHES)]
    part = folder / f"part-{shard.replace('/', '-of-')}"
    recalibrate_checkpoint(path, model=model, data=batches[:1], partial=folder / _SINGLE, force=True)
    spent: list[float] = []
    original, start = keeping.write_partial, 0.0

    def write(partial: keeping.Partial, path: Path, *, force: bool) -> None:
        before = time.process_time()
        original(partial, path, force=force)
        spent.append(time.process_time() - before)

    keeping.write_partial = write
    print("ready", flush=True)
    sys.stdin.readline()
    start, cpu = time.monotonic(), time.process_time()
    options = {"resume": folder / "kept", "resume_every": 2.0} if kept else {}
    recalibrate_checkpoint(path, model=model, data=batches, shard=shard, partial=part, force=True, **options)  # type: ignore[arg-type]
    cpu, end = time.process_time() - cpu, time.monotonic()
    writing = sum(spent) / len(spent) if spent else 0.0
    print(json.dumps({"cpu": cpu, "start": start, "end": end, "writing": writing}))


def _make_partials(folder: Path) -> None:
    """Partials of 64 shards of 100 batches each, of which all hold the same numbers."""
    from bntool.data.shares import Share
    from bntool.recalibration.batch_tree import BatchTree
    from bntool.recalibration.partials import read_partial, write_partial

    partial = read_partial(folder / _SINGLE)
    one, total = BatchTree(dict(partial.nodes)).finish(), 100 * _SHARDS
    for shard in range(_SHARDS):
        share, tree = Share(shard, _SHARDS), BatchTree()
        for position in share.find_run(total):
            tree.add(position, one)
        made = dataclasses.replace(partial, share=share, count=total, position=total, nodes=tree.nodes)
        write_partial(made, folder / f"many-{shard}", force=True)


if __name__ == "__main__":
    _run_task(Path(sys.argv[1]), sys.argv[2])
