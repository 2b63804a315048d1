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
    """Always the same elements for a name; variances are positive, and scales where that is asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: DType = FLOAT32
    positive: bool = False

    def chunks(self) -> Iterator[bytes]:
        generator = np.random.default_rng(zlib.crc32(self.name.encode()))
        numbers = generator.normal(size=self.shape)
        is_scale = len(self.shape) == 1 and self.name.endswith("weight")
        if self.name.endswith("running_var") or (self.positive and is_scale):
            numbers = np.abs(numbers) + 0.5
        yield numbers.astype("<f4").tobytes()


def draw_state_dict(shapes: Mapping[str, tuple[int, ...]], *, root: str = "", positive: bool = False) -> StateDict:
    """A state dict of these names and shapes; ``root`` is put before all names.

    Args:
        positive: no BatchNorm has a negative scale.
    """
    tensors = {root + name: DrawnTensor(name, shape, positive=positive) for name, shape in shapes.items()}
    return StateDict(key="", prefix="", tensors=tensors)
