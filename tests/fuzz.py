"""Mutated files of every format: each is read, or refused with an error of bntool, in bounded time and memory.

Bytes are changed, and fields of the structures that the containers hold. What can be opened is then given to one of the
commands, with its report.

The suite runs five hundred; ``python -m tests.fuzz 100000`` runs as many as one likes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_norms
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.origin import describe_origin
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import StoredTensor, read_bytes
from bntool.cli.application import build_app
from bntool.errors import BntoolError, LossWarning, RefusedError, UsageError, VerificationError
from bntool.folding.planning import plan_fold
from bntool.graphs.sources import read_stored_graph
from bntool.inspection.safety import judge_safety
from bntool.plan import Operation, Plan, Record, RemoveTensor, Step
from tests.structured_mutants import mutate_structure

RECORDED = (  # files of other programs, each with those beside it that it needs
    ("exported/torch_2.7.1.pt2",),
    ("exported/torch_2.1.2.pt2",),
    ("interop/keras_tiny.keras",),
    ("interop/keras_tiny.h5",),
    ("interop/keras_tiny.weights.h5",),
    ("interop/keras_bn_trainable_false.keras",),
    ("interop/tfkeras2_tiny.h5",),
    ("interop/tfkeras2_tiny_w.weights.h5",),
    ("interop/flax/train_state.msgpack",),
    ("interop/flax/chunked.msgpack",),
    ("interop/mxnet/gluon.params",),
    ("interop/mindspore/training.ckpt",),
    ("interop/onnx_tiny.onnx",),
    ("interop/onnx_tiny_ext.onnx", "interop/onnx_tiny_ext.data"),
    ("interop/caffe_tiny_std.caffemodel", "interop/caffe_tiny_std.prototxt"),
    ("interop/caffe_tiny_nv5_f16.caffemodel", "interop/caffe_tiny_nv5_f16.prototxt"),
    ("interop/caffe_v1_conv.caffemodel",),
    ("interop/caffe_tiny_std.caffemodel.h5", "interop/caffe_tiny_std.prototxt"),
)
MEMORY_LIMIT = 300  # MiB that a run may take beyond what it had when it began: no mutant may cause a spike
TIME_LIMIT = 5  # seconds of the processor for one file; each has at most some kilobytes
_INTERESTING = (0, 1, 2, 3, 0x7F, 0x80, 0xFE, 0xFF, 0x2E, 0x28, 0x52, 0x71, 0x74, 0x86, 0x94, 0x95)
_WIDE = (0, 1, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)


@dataclass
class Outcome:
    """What a run of mutants gave."""

    accepted: int = 0
    commands: int = 0
    refused: int = 0
    slowest: float = 0.0


class TooSlow(BaseException):
    """A file took longer than :data:`TIME_LIMIT`."""


def make_seeds(folder: Path) -> list[Path]:
    """Small valid files of every format and of several contents."""
    import torch

    from tests.checkpoints.foreign import as_arrays, write_sharded_bin
    from tests.checkpoints.samples import TORCH_FORMATS, WRITERS, tiny_net

    states = {
        "plain": tiny_net().state_dict(),
        "training": {"model": tiny_net().state_dict(), "optimizer": {"state": {0: torch.ones(2)}, "param_groups": []}},
        "module": torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)),
    }
    seeds = []
    for label, state in states.items():
        for name, write in WRITERS.items():
            if label == "plain" or name in TORCH_FORMATS:
                place = folder / f"{label}-{name}"
                place.mkdir()
                seeds.append(write(state, place))
    place = folder / "bin"
    place.mkdir()
    seeds.append(write_sharded_bin(states["plain"], place))
    seeds += _make_compiled(folder)
    arrays = {"model": as_arrays(states["plain"]), 3: [states["plain"]]}
    for zipped in (True, False):
        place = folder / f"arrays-{zipped}"
        place.mkdir()
        torch.save(arrays, place / "model.pt", _use_new_zipfile_serialization=zipped)
        seeds.append(place / "model.pt")
    for protocol in (0, 4):
        place = folder / f"protocol-{protocol}"
        place.mkdir()
        torch.save(states["training"], place / "model.pt", pickle_protocol=protocol or 2)
        seeds.append(place / "model.pt")
    return seeds


def _make_compiled(folder: Path) -> list[Path]:
    """TorchScript and torch.export archives, and what is recorded of two processes and of TensorFlow."""
    from tests.checkpoints.torch_programs.compiled_net import MAKERS

    seeds = []
    for name, (make, _) in MAKERS.items():
        place = folder / f"compiled-{name}"
        place.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            make(place / name)
        seeds.append(place / name)
    fixtures = Path(__file__).parent / "fixtures"
    shutil.copytree(fixtures / "layouts" / "distributed", folder / "distributed")
    seeds.append(folder / "distributed" / ".metadata")
    for name in ("keras2", "snappy"):
        place = folder / name
        place.mkdir()
        for path in (fixtures / "interop" / "tensorflow").glob(f"{name}.*"):
            shutil.copy(path, place)
        seeds.append(place / f"{name}.index")
    for number, names in enumerate(RECORDED):
        place = folder / f"recorded-{number}"
        place.mkdir()
        seeds += [Path(shutil.copy(fixtures / name, place)) for name in names][:1]
    return seeds


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:  # noqa: C901 (one branch for each damage)
    """A damaged copy."""
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not mutant:
            break
        # most of a file is data, where nothing can go wrong: the beginning and the end are more rewarding
        place = rng.choice(
            (
                rng.randrange(len(mutant)),
                rng.randrange(min(len(mutant), 600)),
                -rng.randrange(min(len(mutant), 400)) - 1,
            )
        )
        place %= len(mutant)
        kind = rng.randrange(9)
        if kind == 0:
            mutant[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutant[place] = rng.choice(_INTERESTING)
        elif kind == 2:
            mutant[place] = rng.randrange(256)
        elif kind == 3:
            width = rng.choice((2, 4, 8))
            value = rng.choice(_WIDE) & ((1 << 8 * width) - 1)
            mutant[place : place + width] = value.to_bytes(width, "little")
        elif kind == 4:
            del mutant[place : place + rng.choice((1, 2, 8, 100))]
        elif kind == 5:
            run = mutant[place : place + rng.choice((1, 4, 30, 300))]
            mutant[place:place] = run * rng.choice((1, 1, 2, 50))
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            mutant[place : place + rng.choice((0, 20))] = other[start : start + rng.choice((4, 40, 400))]
        elif kind == 7:
            del mutant[place:]
        else:
            old = bytes([mutant[place]])
            at = mutant.find(old, rng.randrange(len(mutant)))
            mutant[at] = rng.choice(_INTERESTING)
    return bytes(mutant)


def fix_checksums(data: bytes) -> bytes:
    """Make the checksums of a zip archive agree again, so that what lies behind them is reached too."""
    import zipfile
    import zlib

    fixed = bytearray(data)
    position = data.find(b"PK\x01\x02")
    while 0 <= position <= len(data) - zipfile.sizeCentralDir:
        fields = zipfile.struct.unpack(zipfile.structCentralDir, data[position : position + zipfile.sizeCentralDir])
        size, header = fields[10], fields[18]
        local = data[header : header + 30]
        if len(local) == 30 and fields[4] in (0, 8):
            start = header + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            if size < len(data):
                fixed[position + 16 : position + 20] = zlib.crc32(data[start : start + size]).to_bytes(4, "little")
        position = data.find(b"PK\x01\x02", position + 1)
    return bytes(fixed)


def fix_table(data: bytes) -> bytes:
    """The same for the blocks of a TensorFlow index, as far as its footer still says where they are."""
    from bntool.checkpoints.containers.leveldb_table import read_varint
    from tests.checkpoints.tensorflow.bundle_files import masked_crc32c

    fixed = bytearray(data)
    place = len(data) - 48
    with contextlib.suppress(BntoolError):
        start = 0
        for _ in range(2):  # the data lie before the block with metadata, and the index after it
            offset, place = read_varint(data, place)
            size, place = read_varint(data, place)
            for begin, end in ((start, offset - 5), (offset, offset + size)):
                if 0 <= begin < end < len(data) - 48 and end - begin < 10_000:
                    fixed[end + 1 : end + 5] = masked_crc32c(bytes(fixed[begin : end + 1]))
            start = offset + size + 5
    return bytes(fixed)


def exercise(checkpoint: Checkpoint, target: Path) -> None:
    """Everything that a user may do with a file that could be opened."""
    describe_origin(checkpoint)
    judge_safety(checkpoint)
    for state_dict in checkpoint.state_dicts:
        find_norms(state_dict)
        for tensor in state_dict.tensors.values():
            if isinstance(tensor, StoredTensor) and tensor.wrapper is None and tensor.nbytes < 1 << 20:
                read_bytes(tensor)
    if checkpoint.format.read_only:
        return
    with contextlib.suppress(RefusedError, UsageError):  # it cannot be folded; the rest can be done
        fold(checkpoint, target)
    if checkpoint.state_dicts:
        state_dict = checkpoint.state_dicts[-1]
        steps: list[Step] = [Record({"n": 1})] if checkpoint.format.can_record(checkpoint, state_dict) else []
        if not checkpoint.format.graph_reader and not state_dict.is_module and len(state_dict.tensors) > 1:
            steps.append(RemoveTensor(state_dict.strip(next(iter(state_dict.tensors)))))
        checkpoint = apply_plan(checkpoint, Plan(Operation.FOLD, state_dict=state_dict.key, steps=tuple(steps)))
    save_checkpoint(checkpoint, target, force=True)


def choose_command(source: Path, original: Path, target: Path, rng: random.Random) -> list[str]:
    """One of the command lines that a user may give for a file; ``original`` is the same file before its damage."""
    state = [] if rng.random() < 0.8 else ["--state-dict", rng.choice(("model", "", "state_dict"))]
    written = ["-o", str(target), "--force"]
    choices = [
        ["inspect", str(source), *rng.choice(([], ["--json"], ["--stats"], ["--all"]))],
        ["inspect", str(source), "--fail-on", "warning", "--json"],
        ["diff", str(original), str(source), *rng.choice(([], ["--json"], ["--expect", "frozen"]))],
        ["diff", str(source), str(source), *state],
        [
            "convert",
            str(source),
            "--to",
            rng.choice(("torch", "safetensors", "frozen-batchnorm", "batchnorm")),
            *written,
            *state,
        ],
        ["convert", str(source), "--strip-prefix", "model.", "--add-prefix", "net.", *written, *state],
        [
            "freeze",
            str(source),
            *written,
            *rng.choice(([], ["--as", "constant", "--eps", "1e-5"], ["--no-requires-grad"])),
        ],
        ["freeze", str(source), "--emit", rng.choice(("python", "mmdet", "timm")), *state],
    ]
    if source.suffix != ".onnx":  # whose runtime takes a second to start; folds of its graph are planned above
        choices.append(["fold", str(source), *written, *rng.choice(([], ["--pair", "0=1", "--eps", "1e-5"])), *state])
    return rng.choice(choices)


@functools.cache
def build_command(name: str) -> Any:
    """A command; building one costs more than most mutants."""
    return typer.main.get_command(build_app([name]))


def run_command(arguments: list[str]) -> None:
    """A command with its report, as a user sees it.

    Raises:
        BntoolError: the command refuses; all other exceptions are findings.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        build_command(arguments[0]).main(args=arguments, prog_name="bntool", standalone_mode=False)


def fold(checkpoint: Checkpoint, target: Path) -> None:
    """Fold a file that holds its graph, and freeze it where the format is a program."""
    graph = read_stored_graph(checkpoint)
    if graph is None or not checkpoint.state_dicts:
        return
    state_dict = checkpoint.state_dicts[0]
    plan = plan_fold(state_dict, graph)
    if plan.steps:
        save_checkpoint(apply_plan(checkpoint, plan), target, force=True)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """So many seconds of the processor, since the machine may have more to do; or 60 times as many on the clock."""

    def stop(*_: object) -> None:
        raise TooSlow

    previous = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(60 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def choose_mutant(contents: dict[Path, bytes], folder: Path, rng: random.Random) -> tuple[Path, bytes]:
    """One of the files in the folder of a seed, and a damaged copy of it, its checksums made right or not."""
    victim = rng.choice([path for path in contents if path.parent == folder])
    if rng.random() < 0.4:
        structured = mutate_structure(contents[victim], rng)
        if structured is not None:
            return victim, structured
    mutant = mutate(contents[victim], rng, list(contents.values()))
    if mutant.startswith(b"PK") and rng.random() < 0.8:
        mutant = fix_checksums(mutant)
    if victim.name.endswith(".index") and rng.random() < 0.8:
        mutant = fix_table(mutant)
    return victim, mutant


def run(  # noqa: C901, PLR0915 (one branch for each finding)
    count: int, folder: Path, *, seed: int = 0, report: bool = False
) -> Outcome:
    """Read ``count`` mutants.

    Raises:
        AssertionError: some gave an exception that is not bntool's, took too long or too much memory, or left a
            temporary file; they are kept in ``folder``.
    """
    warnings.filterwarnings("ignore", category=LossWarning)  # it says what a writer leaves out
    rng = random.Random(seed)
    seeds = make_seeds(folder)
    contents = {
        path: path.read_bytes() for place in dict.fromkeys(p.parent for p in seeds) for path in sorted(place.iterdir())
    }
    out, kept_whole = folder / "out", folder / "originals"
    out.mkdir()
    originals = {place: kept_whole / place.name for place in {seed.parent for seed in seeds}}
    for place, copy in originals.items():
        shutil.copytree(place, copy)
    outcome = Outcome()
    found: list[str] = []
    before, bound = _peak(), MEMORY_LIMIT
    for number in range(count):
        source = rng.choice(seeds)
        victim, mutant = choose_mutant(contents, source.parent, rng)
        victim.write_bytes(mutant)
        wrong = []
        started = time.perf_counter()
        try:
            with time_limit(TIME_LIMIT), open_checkpoint(source) as checkpoint:
                exercise(checkpoint, out / source.name)
            outcome.accepted += 1
            original = originals[source.parent] / source.name
            command = choose_command(source, original, out / source.name, rng)
            with time_limit(TIME_LIMIT), contextlib.suppress(BntoolError, typer.Exit):
                run_command(command)
            outcome.commands += 1
        except VerificationError as error:  # what was written is not what was planned
            wrong.append(f"gave {error!r}")
        except BntoolError:
            outcome.refused += 1
        except (Exception, TooSlow) as error:
            wrong.append(f"gave {error!r}")
            if report:
                traceback.print_exc()
        finally:
            victim.write_bytes(contents[victim])
        outcome.slowest = max(outcome.slowest, time.perf_counter() - started)
        for left in [path for path in out.iterdir() if path.suffix in (".writing", ".replaced")]:
            wrong.append("left a temporary file")
            left.unlink()
        if (grown := _peak() - before) > bound:
            wrong.append(f"took the process to {grown} MiB more than it began with")
            bound = grown + MEMORY_LIMIT  # the peak stays; what follows did not cause it
        if wrong:
            kept = folder / f"find-{number}{victim.suffix}"
            kept.write_bytes(mutant)
            found.append(f"mutant {number} of {victim.name} (seed {seed}) {', '.join(wrong)}; see {kept}")
        if report and number % 5000 == 4999:
            print(f"{number + 1}: {outcome}, {grown} MiB at most beside the seeds", flush=True)
    assert not found, "\n".join(found)
    return outcome


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def fuzz() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    memory = "/dev/shm"  # ten times as fast as a disk: every mutant is written out
    folder = Path(tempfile.mkdtemp(prefix="bntool-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    print(run(count, folder, seed=seed, report=True))


if __name__ == "__main__":
    fuzz()
