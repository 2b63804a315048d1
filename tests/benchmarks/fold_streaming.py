"""``bntool fold`` and ``freeze`` of files without a model against ``cp`` of them, by CPU time and by the clock.

``multiply`` is the floor: it reads, multiplies in float64, rounds and writes, and neither plans nor measures anything.
A file of ResNet-152's size as safetensors and as .pt, and one of many layers: GIGABYTES=10 for the size of the promise.
cp ends when the bytes are in memory, bntool when they are on the disk.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.benchmarks import inspection, multiplying
from tests.benchmarks.measuring import Measurement, measure, python

_DEPTHS = ((64, 3), (128, 8), (256, 36), (512, 3))  # ResNet-152


def run() -> None:
    """Print a row for each file and command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, rounds = _write_resnet152(folder), int(os.environ.get("ROUNDS", "9"))
        columns = f"{'cp':>7}{'start':>7}{'rest':>7}{'best':>7}{'median':>7}"
        print(f"{'':25}{'CPU ms, and the rest in times cp':>35}{'by the clock':>39}{'resident':>11}")
        print(f"{'':25}{columns}{columns:>39}")
        for kind in ("safetensors", "pt"):
            _compare(folder, f"resnet152.{kind}", small, rounds=rounds)
        gigabytes = int(os.environ.get("GIGABYTES", "2"))
        _write_large(folder / f"{gigabytes}gb.safetensors", gigabytes=gigabytes)
        pairs = "\n".join(f"conv{layer}=bn{layer}" for layer in range(gigabytes * 113))
        (folder / f"{gigabytes}gb.txt").write_text(pairs)
        _compare(folder, f"{gigabytes}gb.safetensors", small, rounds=min(rounds, 5))


def _compare(folder: Path, name: str, small: dict[str, str], *, rounds: int) -> None:
    """Both commands, each also on a tiny file for what starting takes."""
    source, kind = folder / name, name.rpartition(".")[2]
    target, copy = folder / f"out.{kind}", folder / "copy"
    os.sync()  # or the first to sync its output pays for what made these files
    commands = {"cp": (("cp", "--reflink=never", "--sparse=never", str(source), str(copy)), False)}
    for file, pairs in ((source, source.stem), (Path(small[kind]), "tiny")):
        end = ("-o", str(target), "--quiet")
        declared = ("--pair", f"@{folder / pairs}.txt", "--eps", "1e-5")
        commands[f"fold {file.stem}"] = (python("-m", "bntool", "fold", str(file), *declared, *end), False)
        commands[f"freeze {file.stem}"] = (python("-m", "bntool", "freeze", str(file), *end), False)
        commands[f"multiply {file.stem}"] = (python(multiplying.__file__, str(file), str(target)), False)
    found = measure(commands, rounds=rounds, written=(copy, target))
    for verb in ("multiply", "fold", "freeze"):
        _print_row(f"{verb} {name}", found["cp"], found[f"{verb} {source.stem}"], found[f"{verb} tiny"])


def _print_row(title: str, peer: Measurement, whole: Measurement, start: Measurement) -> None:
    by_cpu = _describe((peer.best, start.best, whole.best), (peer.median, start.median, whole.median))
    by_clock = _describe((peer.best_wall, start.best_wall, whole.best_wall), (peer.wall, start.wall, whole.wall))
    print(f"{title:25}{by_cpu}    {by_clock}{whole.megabytes:>8.0f} MB")


def _describe(best: tuple[float, float, float], median: tuple[float, float, float]) -> str:
    """Return milliseconds of cp, of starting and of the rest, and the rest in relation to cp."""
    peer, start, whole = best
    cells = "".join(f"{1000 * seconds:>7.0f}" for seconds in (peer, start, whole - start))
    return cells + "".join(f"{(whole - start) / peer:>6.1f}x" for peer, start, whole in (best, median))


def _write_resnet152(folder: Path) -> dict[str, str]:
    """The file, its pairs, and a tiny one; where the tiny ones lie, by format."""
    depths, inspection.WIDTHS = inspection.WIDTHS, _DEPTHS
    state = inspection.resnet50_state()
    inspection.WIDTHS = depths
    pairs = []
    for name in state:
        path, _, role = name.rpartition(".")
        if role == "running_mean":
            parent, point, leaf = path.rpartition(".")
            conv = leaf.replace("bn", "conv") if leaf.startswith("bn") else "0"
            pairs.append(f"{parent}{point}{conv}={path}")
    tiny = {name: state[name].clone() for name in state if name.startswith(("conv1.", "bn1."))}
    for stem, tensors, lines in (("resnet152", state, pairs), ("tiny", tiny, ["conv1=bn1"])):
        save_file(tensors, folder / f"{stem}.safetensors")
        torch.save(tensors, folder / f"{stem}.pt")
        (folder / f"{stem}.txt").write_text("\n".join(lines))
    return {kind: str(folder / f"tiny.{kind}") for kind in ("safetensors", "pt")}


def _write_large(path: Path, *, gigabytes: int) -> None:
    """113 convolutions of 9 MiB for each gigabyte, with their BatchNorms."""
    shapes = {"conv.weight": [512, 512, 3, 3]} | {
        f"bn.{role}": [512] for role in ("weight", "bias", "running_mean", "running_var")
    }
    header: dict[str, object] = {}
    position = 0
    for layer in range(gigabytes * 113):
        for name, shape in shapes.items():
            size = 4 * torch.Size(shape).numel()
            owner, role = name.split(".")
            offsets = [position, position + size]
            header[f"{owner}{layer}.{role}"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    torch.manual_seed(0)
    layer_bytes = b"".join(torch.rand(shape).numpy().tobytes() for shape in shapes.values())
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _ in range(gigabytes * 113):
            stream.write(layer_bytes)
