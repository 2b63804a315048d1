"""Streams of tar archives beside the same images in an .npz: throughput of ``recalibrate``, memory, and decoding.

ResNet-20 and the 4,000 images of the shared folder, repeated; ``.npy`` in tar archives, or PNG. Each way is a process
of its own with one thread of torch, and what counts is the CPU time of it and its workers. Reading alone is measured as
well: what decoding takes is the difference between PNG and ``.npy``. Needs webdataset.
"""

from __future__ import annotations

import io
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.benchmarks.measuring import python
from tests.places import SHARED

_ROUNDS, _SHARD = 3, 1000
_MEGABYTE = 1 << 20


def run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for copies in (1, 16):
            _write(Path(folder), copies)
        rates: dict[str, list[float]] = {}
        for _ in range(_ROUNDS):
            for way in ("npz", "npy", "npy, PNG"):
                rates.setdefault(way, []).append(_measure("recalibrate", way.rpartition(" ")[2].lower(), 1, folder)[0])
        print(f"pooled, 4,000 images: {'images/s':>10}{'of the .npz':>14}")
        for way, found in rates.items():
            rate = statistics.median(found)
            print(f"{way:22}{rate:>10.0f}{rate / statistics.median(rates['npz']):>14.1%}")
        print(f"reading alone: {'us an image':>14}{'images':>10}{'peak':>10}")
        for kind, copies in (("npz", 1), ("npz", 16), ("npy", 1), ("npy", 16), ("png", 1)):
            rate, peak = _measure("read", kind, copies, folder)
            print(f"{kind:15}{1e6 / rate:>14.1f}{4000 * copies:>10,}{peak:>7.0f} MB")


def _write(folder: Path, copies: int) -> None:
    arrays = np.load(SHARED / "data" / "cifar10_train_4000.npz")
    images, labels = (np.tile(arrays[name], (copies, *[1] * (arrays[name].ndim - 1))) for name in ("images", "labels"))
    np.savez(folder / f"npz-{copies}.npz", images=images, labels=labels)
    for kind in ("npy", "png") if copies < 16 else ("npy",):
        for first in range(0, len(images), _SHARD):
            path = folder / f"{kind}-{copies}-{first // _SHARD:04d}.tar"
            _write_shard(path, kind, images[first : first + _SHARD], labels[first : first + _SHARD])


def _write_shard(path: Path, kind: str, images: np.ndarray, labels: np.ndarray) -> None:
    with tarfile.open(path, "w") as archive:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            for name, content in ((kind, _encode(image, kind)), ("cls", b"%d" % label)):
                info = tarfile.TarInfo(f"{index:05d}.{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _encode(image: np.ndarray, kind: str) -> bytes:
    content = io.BytesIO()
    if kind == "npy":
        np.save(content, image)
    else:
        Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def _measure(what: str, kind: str, copies: int, folder: str) -> tuple[float, float]:
    """Images in a second of CPU time, and the peak of resident memory in megabytes."""
    command = python("-m", "tests.benchmarks.calibration_streams", what, kind, str(copies), folder)
    rate, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(rate), float(peak)


def _run_alone(what: str, kind: str, copies: int, folder: Path) -> Iterator[float]:
    from bntool.data.loading import load_data
    from bntool.data.preprocessing import parse_preprocessing
    from bntool.recalibration.live import recalibrate
    from tests.benchmarks.calibration_batches import load_resnet20

    torch.set_num_threads(1)
    name = f"npz-{copies}.npz" if kind == "npz" else f"{kind}-{copies}-*.tar"
    data = load_data(
        str(folder / name),
        batch_size=64,
        preprocessing=parse_preprocessing("cifar10"),
        workers=0 if what == "read" else None,
    )
    model = load_resnet20()
    start = time.process_time()
    samples = sum(batch.samples for batch in data) if what == "read" else recalibrate(model, data).samples
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield samples / (time.process_time() - start + workers.ru_utime + workers.ru_stime)
    yield resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MEGABYTE


if __name__ == "__main__":
    print(*_run_alone(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
