"""Positions that the taps of a transposed convolution meet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Axis(NamedTuple):
    """One axis of a transposed convolution.

    Attributes:
        size: of its kernel.
        stride, dilation: as torch counts them.
        before, after: positions of the output that padding cuts off at either end.
        more: positions that are added at the end of the output.
    """

    size: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    more: int = 0


def meets_all_taps(axes: Iterable[Axis]) -> bool:
    """Return whether each position of the output meets all taps of the kernel, so that a shift of the input
    is a shift of the output.

    With a stride they take turns. Without one the border misses some, unless padding cuts it off: the output position o
    meets tap k at the input position o + before - dilation k, which has to be one from 0 to the length less 1.
    """
    return all(
        axis.stride == 1 and min(axis.before, axis.after - axis.more) >= axis.dilation * (axis.size - 1)
        for axis in axes
    )
