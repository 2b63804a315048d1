"""Sums of kernels of convolutions, computed when they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.dtypes import DType
from bntool.checkpoints.files import Chunk
from bntool.checkpoints.tensors import Tensor


@dataclass(frozen=True, slots=True)
class MergedTensor(AsArray):
    """Kernels times factors of output and input channels, summed in float64 and rounded once to the dtype of the first.

    Attributes:
        sources: of the shape of the first, or with smaller kernels, which lie in the middle.
        factors: of each source, as many as it has rows.
        inputs: of each source, as many as its second dimension has, or none.
        places: of the elements that something is added to, in C order, ascending.
        addends: what is added to the sum there, before it is rounded.
    """

    sources: tuple[Tensor, ...] = field(repr=False)
    factors: tuple[Sequence[float], ...] = field(repr=False)
    inputs: tuple[Sequence[float], ...] = field(repr=False)
    places: Sequence[int] = field(default=(), repr=False)
    addends: Sequence[float] = field(default=(), repr=False)

    @property
    def dtype(self) -> DType:
        return self.sources[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sources[0].shape

    def chunks(self) -> Iterator[Chunk]:
        """See :class:`Tensor`.

        Raises:
            OverflowError: a sum is too large for the dtype.
        """
        from bntool.checkpoints.arrays import merge_chunks  # numpy, which plans do not need

        yield from merge_chunks(self.sources, self.factors, self.inputs, places=self.places, addends=self.addends)
