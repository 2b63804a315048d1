"""State dicts whose elements are drawn when they are asked for: only names and shapes have to be recorded."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import FLOAT32, DType


@dataclass(frozen=True)
class DrawnTensor:
    """Always the same elements for a name; variances are positive."""

    name: str
    shape: tuple[int, ...]
    dtype: DType = FLOAT32

    def chunks(self) -> Iterator[bytes]:
        generator = np.random.default_rng(zlib.crc32(self.name.encode()))
        numbers = generator.normal(size=self.shape)
        if self.name.endswith("running_var"):
            numbers = np.abs(numbers) + 0.5
        yield numbers.astype("<f4").tobytes()


def draw_state_dict(shapes: Mapping[str, tuple[int, ...]], *, root: str = "") -> StateDict:
    """A state dict of these names and shapes; ``root`` is put before all names."""
    tensors = {root + name: DrawnTensor(name, shape) for name, shape in shapes.items()}
    return StateDict(key="", prefix="", tensors=tensors)
