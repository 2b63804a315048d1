"""The files that the command lines are run on: samples, fixtures, and state dicts of known architectures."""

from __future__ import annotations

import gzip
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests.places import FIXTURES, copy_samples

ARCHITECTURES = ("torchvision:mobilenet_v2", "torchvision:lraspp_mobilenet_v3_large", "timm:ghostnet_100")


def make_inputs(folder: Path) -> None:
    """Fill a folder with the same bytes each time, whatever bntool there is."""
    copy_samples(folder / "samples")
    shutil.copytree(FIXTURES, folder / "fixtures", ignore=shutil.ignore_patterns("__pycache__"))
    for file in sorted(folder.rglob("*")):
        file.chmod(0o755 if file.is_dir() else 0o644)
    (folder / "architectures").mkdir()
    for name in ARCHITECTURES:
        save_architecture(name.partition(":")[2], folder / "architectures" / f"{name.replace(':', '_')}.safetensors")


def save_architecture(name: str, path: Path) -> None:
    """Write a state dict of the architecture, whose numbers mean nothing."""
    recorded = json.loads(gzip.decompress((FIXTURES / "architectures.json.gz").read_bytes()))
    (shapes,) = [one["shapes"] for one in recorded if one["name"].partition(":")[2] == name]
    safetensors.numpy.save_file({name: _draw(name, shape) for name, shape in shapes}, path)


def _draw(name: str, shape: list[int]) -> np.ndarray:
    """Numbers that depend on the name alone; variances are positive, counters one."""
    if name.endswith("num_batches_tracked"):
        return np.ones(shape, dtype=np.int64)
    numbers = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    return (np.abs(numbers) + 0.5 if name.endswith("running_var") else numbers).astype(np.float32)
