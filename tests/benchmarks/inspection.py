"""Cold ``bntool inspect`` against ``torch.load(weights_only=True, mmap=True)`` on a checkpoint of ResNet-50's size.

Also a 10 GB safetensors file (sparse), of which only the BatchNorm tensors should ever be read.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import warnings
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save_file
from torch import nn

from tests.benchmarks.measuring import measure, print_table, python

_ROLES = ("weight", "bias", "running_mean", "running_var")
_FILES = 40
WIDTHS = ((64, 3), (128, 4), (256, 6), (512, 3))


def resnet50_state() -> dict[str, torch.Tensor]:
    """The state dict of torchvision's resnet50, key for key: 25.6 M parameters, 53 BatchNorm layers."""
    modules: dict[str, nn.Module] = {"conv1": nn.Conv2d(3, 64, 7, bias=False), "bn1": nn.BatchNorm2d(64)}
    width_in = 64
    for stage, (width, depth) in enumerate(WIDTHS, start=1):
        for block in range(depth):
            name = f"layer{stage}.{block}"
            shapes = ((width_in, width, 1), (width, width, 3), (width, 4 * width, 1))
            for index, (source, target, size) in enumerate(shapes, start=1):
                modules[f"{name}.conv{index}"] = nn.Conv2d(source, target, size, bias=False)
                modules[f"{name}.bn{index}"] = nn.BatchNorm2d(target)
            if block == 0:
                modules[f"{name}.downsample.0"] = nn.Conv2d(width_in, 4 * width, 1, bias=False)
                modules[f"{name}.downsample.1"] = nn.BatchNorm2d(4 * width)
            width_in = 4 * width
    modules["fc"] = nn.Linear(2048, 1000)
    state = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for name, value in state.items():
        if "running" in name:
            value.uniform_(0.1, 2.0)
        if "tracked" in name:
            value.fill_(1000)
    return state


def write_sparse_safetensors(path: Path, *, gigabytes: int) -> None:
    """A huge file with 53 BatchNorm layers between large weights; the weights are holes on disk."""
    header: dict[str, object] = {}
    position = 0
    large = gigabytes * (1 << 30) // 53 // 4

    def add(name: str, count: int) -> None:
        nonlocal position
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [position, position + 4 * count]}
        position += 4 * count

    for layer in range(53):
        add(f"layer{layer}.conv.weight", large)
        for role in ("weight", "bias", "running_mean", "running_var"):
            add(f"layer{layer}.bn.{role}", 512)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the library does
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)


def write_other_layouts(state: dict[str, torch.Tensor], folder: Path) -> dict[str, Path]:
    """The same tensors in other layouts: TorchScript, .pt2, torch.distributed.checkpoint, a pickle of arrays."""
    from tests.checkpoints.foreign import save_distributed, write_numpy_pickle

    root = nn.Module()
    for name, tensor in state.items():
        owner, leaf = root, name.rpartition(".")[2]
        for part in name.split(".")[:-1]:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(leaf, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(root).save(folder / "r50_script.pt")
        root.forward = lambda x: x + root.get_buffer("bn1.running_mean")[0]  # type: ignore[assignment]
        torch.export.save(torch.export.export(root, (torch.zeros(1),)), folder / "r50.pt2")
    save_distributed(state, folder / "r50_folder")
    return {
        "r50_script.pt": folder / "r50_script.pt",
        "r50.pt2": folder / "r50.pt2",
        "r50_folder": folder / "r50_folder",
        "r50.pkl": write_numpy_pickle(state, folder),
    }


def write_caffemodel(state: dict[str, torch.Tensor], path: Path) -> Path:
    """The same tensors as a Caffe model: BatchNorm with a scale factor, and Scale."""
    from bntool.checkpoints.containers.protobufs.writing import embed, packed_integers

    def write_layer(stream: IO[bytes], name: str, kind: str, blobs: list[torch.Tensor]) -> None:
        pieces = [*embed(1, name.encode()), *embed(2, kind.encode()), *embed(3, b"x"), *embed(4, b"x")]
        for blob in blobs:
            data = blob.detach().numpy().tobytes()
            pieces += embed(7, *embed(7, packed_integers(1, blob.shape)), *embed(5, data))
        stream.write(b"".join(embed(100, *pieces)))

    with path.open("wb") as stream:
        for name in dict.fromkeys(key.rpartition(".")[0] for key in state):
            own = {role: state[f"{name}.{role}"] for role in _ROLES if f"{name}.{role}" in state}
            if "running_mean" in own:
                factor = torch.tensor([999.98])
                statistics = [own["running_mean"] * factor, own["running_var"] * factor, factor]
                write_layer(stream, name, "BatchNorm", statistics)
                write_layer(stream, f"{name}.scale", "Scale", [own["weight"], own["bias"]])
            else:
                kind = "Convolution" if own["weight"].dim() == 4 else "InnerProduct"
                write_layer(stream, name, kind, [*own.values()])
    return path


def run(rounds: int = 9) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        zipped, safe, sparse = (Path(folder) / name for name in ("r50.pt", "r50.safetensors", "10gb.safetensors"))
        legacy = Path(folder) / "r50_legacy.pth"
        state = resnet50_state()
        torch.save(state, zipped)
        torch.save(state, legacy, _use_new_zipfile_serialization=False)
        save_file(state, safe)
        write_sparse_safetensors(sparse, gigabytes=10)
        copies = [str(Path(folder) / f"r50_{number}.pt") for number in range(_FILES)]
        for copy in copies:
            os.link(zipped, copy)
        others = write_other_layouts(state, Path(folder))
        others["r50.caffemodel"] = write_caffemodel(state, Path(folder) / "r50.caffemodel")
        load = f"import torch; torch.load({str(zipped)!r}, weights_only=True, mmap=True)"
        inspect = ("-m", "bntool", "inspect")
        peer = "import torch; torch.load(.pt, mmap=True)"
        commands = {
            peer: (python("-c", load), False),
            "inspect r50.pt --json": (python(*inspect, str(zipped), "--json"), False),
            "inspect r50.pt, piped": (python(*inspect, str(zipped)), False),
            "inspect r50.pt, terminal": (python(*inspect, str(zipped)), True),
            "inspect r50_legacy.pth --json": (python(*inspect, str(legacy), "--json"), False),
            "inspect r50.safetensors --json": (python(*inspect, str(safe), "--json"), False),
            "inspect 10gb.safetensors --json": (python(*inspect, str(sparse), "--json"), False),
            **{
                f"inspect {name} --json": (python(*inspect, str(path), "--json"), False)
                for name, path in others.items()
            },
            f"inspect {_FILES} of r50.pt --json": (python(*inspect, *copies, "--json"), False),
            f"inspect {_FILES} of r50.pt, piped": (python(*inspect, *copies), False),
            "bntool --help": (python("-m", "bntool", "--help"), False),
        }
        print_table(measure(commands, rounds=rounds), peer=peer)
