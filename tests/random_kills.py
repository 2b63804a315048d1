"""Commands that write, killed at random moments: what is there afterwards is the old file or the new one, whole.

After SIGTERM nothing else is left; what SIGKILL leaves is removed by the next run. ``python -m tests.random_kills 200``
runs as many moments as one likes; the suite runs a few.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.places import INTEROP, SAMPLES

_MODEL = ["--model", str(SAMPLES / "digits_net.py") + ":build"]
_CAFFE = str(INTEROP / "caffe_tiny_std.caffemodel")
LIGHT = {  # without torch
    "freeze.pt": ["freeze", "big.pt"],
    "freeze.safetensors": ["freeze", "big.safetensors"],
    "convert.safetensors": ["convert", "big.pt", "--to", "safetensors"],
    "convert.pt": ["convert", "big.safetensors", "--to", "torch"],
    "rename.pt": ["convert", "big.pt", "--add-prefix", "net."],
    "frozen.pt": ["convert", "big.pt", "--to", "frozen-batchnorm", "--eps", "1e-5"],
    "constant.pt": ["freeze", "big.pt", "--as", "constant", "--eps", "1e-5"],
    "fold.pt": ["fold", "big.pt", "--pair", "conv=bn", "--eps", "1e-5"],
    "fold.safetensors": ["fold", "big.safetensors", "--pair", "conv=bn", "--eps", "1e-5"],
    "freeze.keras": ["freeze", str(INTEROP / "keras_tiny.keras")],
    "fold.h5": ["fold", str(INTEROP / "keras_tiny.h5")],
    "fold.caffemodel": ["fold", _CAFFE, "--prototxt", _CAFFE.replace(".caffemodel", ".prototxt")],
}
HEAVY = {
    "fold.onnx": ["fold", str(INTEROP / "onnx_tiny.onnx")],
    "model.pt": ["fold", str(SAMPLES / "digits.pt"), *_MODEL, "--input-shape", "1,1,16,16"],
    "recalibrate.pt": [
        *("recalibrate", str(SAMPLES / "drifted.pt"), *_MODEL, "--data", str(SAMPLES / "digits_train.npz")),
        *("--samples", "32"),
    ],
}


@dataclass
class Try:
    """A command that was killed.

    Attributes:
        code: how it ended.
        found: old, new or absent, of its output.
        left: names of temporary files.
    """

    code: int
    found: str
    left: list[str]


def make_inputs(folder: Path, megabytes: int) -> None:
    """Files that take a moment to be written, in which that can be killed."""
    import safetensors.torch
    import torch

    state = {"conv.weight": torch.randn(16, 3, 3, 3), "other": torch.randn(megabytes * 250_000)}
    state |= {f"bn.{name}": tensor for name, tensor in torch.nn.BatchNorm2d(16).state_dict().items()}
    torch.save(state, folder / "big.pt")
    safetensors.torch.save_file(state, folder / "big.safetensors")


def start(folder: Path, arguments: list[str], output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bntool", *arguments, "-o", str(output), "--force"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Target:
    """An output of a command, what it holds when nobody kills it, and how long that takes."""

    def __init__(self, folder: Path, name: str, arguments: list[str]) -> None:
        self.folder, self.arguments = folder / f"for-{name}", arguments
        self.folder.mkdir()
        self.inputs = folder
        self.output = self.folder / name
        self.output.write_bytes(b"old")  # so that all runs replace it
        started = time.perf_counter()
        code = start(folder, arguments, self.output).wait()
        assert code == 0, (arguments, code)
        self.seconds = time.perf_counter() - started
        self.new = self.read()

    def read(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if not path.name.startswith(".")}

    def left(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.name.startswith(".")]

    def kill(self, sent: signal.Signals, rng: random.Random) -> Try:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        old = dict.fromkeys(self.new, b"old")
        for name, data in old.items():
            (self.folder / name).write_bytes(data)
        process = start(self.inputs, self.arguments, self.output)
        if rng.random() < 0.6:  # while it writes
            deadline = time.monotonic() + 60
            while not self.left() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(rng.expovariate(1 / 0.01))
        else:
            time.sleep(self.seconds * rng.uniform(0.1, 1.1))
        process.send_signal(sent)
        code = process.wait()
        found = self.read()
        assert found.keys() == self.new.keys(), (self.arguments, found.keys())
        assert all(one in (old[name], self.new[name]) for name, one in found.items()), (self.arguments, "half written")
        kind = "old" if found == old else "new" if found == self.new else "some of both"
        result = Try(code, kind, self.left())
        if sent == signal.SIGKILL:
            assert start(self.inputs, self.arguments, self.output).wait() == 0
            assert not self.left(), (self.arguments, "the next run left", self.left())
            assert self.read() == self.new
        else:
            assert not result.left, (self.arguments, result)
            assert code in (0, -sent), (self.arguments, code)
            assert kind in ("old", "new"), (self.arguments, kind)
        return result


def run(
    count: int,
    folder: Path,
    commands: dict[str, list[str]],
    *,
    megabytes: int = 40,
    seed: int = 0,
    report: bool = False,
) -> Counter[str]:
    """Kill commands ``count`` times; how often each ended how.

    Raises:
        AssertionError: a file is neither the old nor the new one, or something is left.
    """
    rng = random.Random(seed)
    make_inputs(folder, megabytes)
    targets = [Target(folder, name, arguments) for name, arguments in commands.items()]
    outcomes: Counter[str] = Counter()
    for number in range(count):
        sent = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP))
        result = targets[number % len(targets)].kill(sent, rng)
        state = "ended before" if result.code == 0 else "killed"
        outcomes[f"{sent.name} {state}: {result.found}{', temporary file' * bool(result.left)}"] += 1
        if report and number % 20 == 19:
            print(f"{number + 1}: {dict(outcomes)}", flush=True)
    return outcomes


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory(prefix="bntool-kills-") as folder:
        for outcome, times in sorted(run(count, Path(folder), {**LIGHT, **HEAVY}, report=True).items()):
            print(f"{times:5} {outcome}")


if __name__ == "__main__":
    main()
