"""Tensors computed from several others when they are written: averages over files, sums of kernels of convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.dtypes import DType
from bntool.checkpoints.files import Chunk
from bntool.checkpoints.tensors import Tensor


@dataclass(frozen=True, slots=True)
class _CombinedTensor(AsArray):
    """A tensor of the dtype and shape of the first of its sources.

    Attributes:
        sources: of floating dtypes that numpy or bntool decodes, not necessarily the same.
    """

    sources: tuple[Tensor, ...] = field(repr=False)

    @property
    def dtype(self) -> DType:
        return self.sources[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sources[0].shape


@dataclass(frozen=True, slots=True)
class AveragedTensor(_CombinedTensor):
    """The weighted mean of tensors of one shape, taken in float64 and rounded once to the dtype of the first.

    Attributes:
        sources: of one shape.
        weights: one each; they sum to 1.
    """

    weights: tuple[float, ...]

    def chunks(self) -> Iterator[Chunk]:
        """See :class:`Tensor`.

        Raises:
            OverflowError: a mean is too large for the dtype.
        """
        from bntool.checkpoints.arrays import average_chunks  # numpy, which plans do not need

        yield from average_chunks(self.sources, self.weights)


@dataclass(frozen=True, slots=True)
class MergedTensor(_CombinedTensor):
    """Kernels times factors of output and input channels, summed in float64 and rounded once to the dtype of the first.

    Attributes:
        sources: of the shape of the first, or with smaller kernels, which lie in the middle.
        factors: of each source, as many as it has rows.
        inputs: of each source, as many as its second dimension has, or none.
        places: of the elements that something is added to, in C order, ascending.
        addends: what is added to the sum there, before it is rounded.
    """

    factors: tuple[Sequence[float], ...] = field(repr=False)
    inputs: tuple[Sequence[float], ...] = field(repr=False)
    places: Sequence[int] = field(default=(), repr=False)
    addends: Sequence[float] = field(default=(), repr=False)

    def chunks(self) -> Iterator[Chunk]:
        """See :class:`Tensor`.

        Raises:
            OverflowError: a sum is too large for the dtype.
        """
        from bntool.checkpoints.arrays import merge_chunks  # numpy, which plans do not need

        yield from merge_chunks(self.sources, self.factors, self.inputs, places=self.places, addends=self.addends)
