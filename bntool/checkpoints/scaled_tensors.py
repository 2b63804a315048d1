"""Tensors of a file times factors, and plus a few addends, computed when they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.dtypes import DType
from bntool.checkpoints.files import Chunk
from bntool.checkpoints.tensors import Tensor
from bntool.plan import Scaled


def scale(source: Tensor, recipe: Scaled) -> ScaledTensor:
    """Return the tensor that a recipe makes of its source."""
    return ScaledTensor(
        source,
        view=recipe.view,
        factors=recipe.factors,
        factor_shape=recipe.factor_shape,
        others=recipe.others,
        other_shape=recipe.other_shape,
        flush=recipe.flush,
        places=recipe.places,
        addends=recipe.addends,
    )


@dataclass(frozen=True, slots=True)
class ScaledTensor(AsArray):
    """Another tensor times factors along some of its dimensions, computed when it is read.

    The product is taken in float64 and rounded once to the source's dtype.

    Attributes:
        source: the tensor to scale, of a floating dtype.
        view: a shape with as many elements as ``source``; its first dimension is the one that is streamed over.
        factors: float64 factors.
        factor_shape: shape of the factors, of the length of ``view``; 1 where a dimension is not scaled.
        others, other_shape: factors of other dimensions, which those are multiplied by first; () for none.
        flush: products that are subnormal numbers of the dtype become zero.
        places: of the elements that something is added to, in C order, ascending.
        addends: what is added to the product there, before it is rounded.
    """

    source: Tensor
    view: tuple[int, ...]
    factors: Sequence[float] = field(repr=False)
    factor_shape: tuple[int, ...]
    others: Sequence[float] = field(default=(), repr=False)
    other_shape: tuple[int, ...] = ()
    flush: bool = False
    places: Sequence[int] = field(default=(), repr=False)
    addends: Sequence[float] = field(default=(), repr=False)

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def chunks(self) -> Iterator[Chunk]:
        """See :class:`Tensor`.

        Raises:
            OverflowError: a result is too large for the dtype.
        """
        from bntool.checkpoints.arrays import scale_chunks  # numpy, which plans do not need

        yield from scale_chunks(
            self.source,
            self.factors,
            view=self.view,
            factor_shape=self.factor_shape,
            others=self.others,
            other_shape=self.other_shape,
            flush=self.flush,
            places=self.places,
            addends=self.addends,
        )
