"""Averages over tensors of several files, computed when they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.dtypes import DType
from bntool.checkpoints.files import Chunk
from bntool.checkpoints.tensors import Tensor


@dataclass(frozen=True, slots=True)
class AveragedTensor(AsArray):
    """The weighted mean of tensors of one shape, taken in float64 and rounded once to the dtype of the first.

    Attributes:
        sources: of floating dtypes that numpy or bntool decodes, not necessarily the same.
        weights: one each; they sum to 1.
    """

    sources: tuple[Tensor, ...] = field(repr=False)
    weights: tuple[float, ...]

    @property
    def dtype(self) -> DType:
        return self.sources[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sources[0].shape

    def chunks(self) -> Iterator[Chunk]:
        """See :class:`Tensor`.

        Raises:
            OverflowError: a mean is too large for the dtype.
        """
        from bntool.checkpoints.arrays import average_chunks  # numpy, which plans do not need

        yield from average_chunks(self.sources, self.weights)
