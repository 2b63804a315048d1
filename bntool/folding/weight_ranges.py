"""The ranges of weights that take scales: how even their channels are, and what becomes subnormal.

The weights of a file are measured on their way into the new file, so that they are read once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np

from bntool.batchnorm import BUFFERS
from bntool.checkpoints.arrays import (
    FAR_FROM_OVERFLOW,
    Array,
    Product,
    as_bits,
    as_numbers,
    whole_rows,
)
from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from bntool.checkpoints.files import Chunk
from bntool.checkpoints.scaled_tensors import ScaledTensor
from bntool.checkpoints.tensors import Tensor, count_elements, read_bytes
from bntool.plan import Plan, RenameTensor, Scaled, SetTensor

# float16 is not among them: its subnormals are ordinary small weights, and CPUs calculate them in float32
_SLOW = (FLOAT64, FLOAT32, BFLOAT16)
_INFINITY = {FLOAT64: 0x7FF << 52, FLOAT32: 0xFF << 23, BFLOAT16: 0xFF << 7, FLOAT16: 0x1F << 10}  # its bits
PlanKind = TypeVar("PlanKind", bound=Plan)
_UNEVEN = 1 / 8  # of the range of the tensor: the average channel has lost 3 of the bits of a per-tensor quantisation


@dataclass(frozen=True)
class ChannelRange:
    """The largest magnitudes max|w| of the output channels of a weight, without channels that are all zero.

    Attributes:
        smallest: of the channel with the smallest one.
        largest: of the channel with the largest one.
        evenness: mean over channels of max|w| in relation to ``largest``, 1 where all channels fill the range of the
            tensor: the mean channel precision of Nagel et al. 2019, "Data-Free Quantization", section 4.1.1.
        magnitudes: max|w| of every output channel, as float32 unless the weight is of float64.
    """

    smallest: float
    largest: float
    evenness: float
    magnitudes: Sequence[float] = field(default=(), repr=False, compare=False)

    def describe(self) -> dict[str, float]:
        """Return the facts as JSON data, without the channels."""
        return {"smallest": self.smallest, "largest": self.largest, "evenness": self.evenness}


@dataclass(frozen=True)
class WeightRange:
    """One weight before and after it took scales.

    Attributes:
        name: of the weight.
        before, after: its channels; those of an all-zero weight are 0.
        subnormal_before, subnormal: how many elements are subnormal numbers of its dtype (not counted in float16).
        flushed: how many were set to zero instead.
    """

    name: str
    before: ChannelRange
    after: ChannelRange
    subnormal_before: int
    subnormal: int
    flushed: int = 0

    def describe(self) -> dict[str, Any]:
        """Return the facts as JSON data."""
        return {**vars(self), "before": self.before.describe(), "after": self.after.describe()}

    @property
    def is_uneven(self) -> bool:
        """Whether folding makes per-tensor quantisation lose at least one bit more, and few are left."""
        return self.after.evenness <= _UNEVEN and self.after.evenness <= self.before.evenness / 2


@dataclass(frozen=True)
class Removed:
    """The number of elements that a state dict lost: those removed without those added."""

    parameters: int
    buffers: int


@dataclass(frozen=True)
class _Extremes:
    """The extremes of the magnitudes of each output channel.

    Attributes:
        largest: of the channel.
        smallest: no element that is not zero is smaller; infinity where all are zero.
    """

    largest: Array
    smallest: Array


class _RowExtremes:
    """The extremes of a weight whose rows come some at a time; NaN for a row that holds one.

    Bits are compared, as integers, which is faster.

    Args:
        count: of all rows.
        dtype: of the elements.
    """

    def __init__(self, count: int, dtype: DType) -> None:
        self._dtype, self._added = dtype, 0
        kind = np.dtype(f"<i{dtype.itemsize}")
        self._mask = np.iinfo(kind).max  # all but the sign
        self._largest, self._smallest, self._magnitudes = (
            np.empty(count, kind),
            np.empty(count, kind),
            np.empty(0, kind),
        )

    def add(self, rows: Array) -> float:
        """Take the next rows and return their largest magnitude.

        Args:
            rows: as :func:`~bntool.checkpoints.arrays.as_bits` gives them.
        """
        if self._magnitudes.size < rows.size:  # used again: faulting in new memory costs as much as the comparing
            self._magnitudes = np.empty(rows.size, rows.dtype)
        here = slice(self._added, self._added + len(rows))
        self._added = here.stop
        magnitudes = self._magnitudes[: rows.size].reshape(rows.shape)
        np.bitwise_and(rows, self._mask, out=magnitudes)
        largest = magnitudes.max(axis=1, out=self._largest[here]).max()
        smallest = magnitudes.min()  # of all at once, which is faster
        if not smallest:  # less one, zeros are the largest integers without a sign, and pass no minimum
            np.subtract(magnitudes, 1, out=magnitudes)
            smallest = magnitudes.view(f"<u{rows.itemsize}").min(axis=1).view(rows.dtype) + 1
            smallest[smallest == 0] = _INFINITY[self._dtype]
        self._smallest[here] = smallest
        return float(as_numbers(largest.tobytes(), self._dtype)[0])

    def result(self) -> _Extremes:
        """Return the extremes of the rows that came."""
        ends = (self._largest, self._smallest)
        return _Extremes(*(as_numbers(found[: self._added].tobytes(), self._dtype) for found in ends))


@dataclass
class MeasuredProduct(AsArray):
    """A weight times one factor for each output channel, whose extremes before are taken whenever it is written.

    Attributes:
        product: the weight after it took the factors; one row for each output channel.
        extremes: of the weight before, from the last reading that came to its end; None before.
    """

    product: ScaledTensor
    extremes: _Extremes | None = field(default=None, compare=False, repr=False)

    @property
    def dtype(self) -> DType:
        return self.product.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.product.shape

    def chunks(self) -> Iterator[Chunk]:
        """See :class:`~bntool.checkpoints.tensors.ScaledTensor`."""
        dtype, columns = self.dtype, count_elements(self.shape[1:])
        factors = np.asarray(self.product.factors).reshape(-1, 1)
        product = Product(dtype, flush=self.product.flush)
        bound = FAR_FROM_OVERFLOW[dtype] / max(float(np.abs(factors).max(initial=0)), 1.0)
        measured = _RowExtremes(len(factors), dtype)
        first = 0
        for data in whole_rows(self.product.source.chunks(), columns * dtype.itemsize) if columns else ():
            rows = as_bits(data, dtype).reshape(-1, columns)
            here = factors[first : first + len(rows)]
            first += len(rows)
            yield product.round(data, rows.shape, here, is_bounded=measured.add(rows) < bound)
        self.extremes = measured.result()

    def take_extremes(self) -> _Extremes | None:
        """Return the extremes and keep them no longer: those of thousands of layers add up."""
        extremes, self.extremes = self.extremes, None
        return extremes


def measure_on_the_way(state_dict: StateDict, plan: Plan) -> StateDict:
    """Let the weights of a folded state dict be measured when they are written; :func:`measure_ranges` need not read
    them then.

    Args:
        state_dict: after the plan.
        plan: what scaled its weights.
    """
    tensors = dict(state_dict.tensors)
    names = {step.name: step.new_name for step in plan.steps_of(RenameTensor)}
    for step in plan.steps_of(SetTensor):
        name = names.get(state_dict.prefix + step.name, state_dict.full_name(step.name))
        scaled = tensors.get(name)
        if isinstance(step.value, Scaled) and isinstance(scaled, ScaledTensor) and _is_by_row(step.value, scaled):
            tensors[name] = MeasuredProduct(scaled)
    return replace(state_dict, tensors=tensors)


def measure_ranges(before: StateDict, after: StateDict, plan: Plan) -> tuple[WeightRange, ...]:
    """Measure the channels of every weight that a plan scales, aliases once; weights are read a few channels at a
    time.
    """
    seen: dict[str, WeightRange] = {}
    names = {before.strip(step.name): step.new_name for step in plan.steps_of(RenameTensor)}
    for step in plan.steps_of(SetTensor):
        recipe = step.value
        if isinstance(recipe, Scaled) and recipe.source not in seen:
            old, new = before.tensor(recipe.source), after.tensors[names.get(step.name, after.full_name(step.name))]
            seen[recipe.source] = _measure(step.name, old, new, recipe)
    return tuple(seen.values())


def flush_subnormals(plan: PlanKind, ranges: Sequence[WeightRange]) -> PlanKind:
    """Return the plan with products set to zero in those weights where some would be subnormal; itself where none
    are.
    """
    concerned = {weight.name for weight in ranges if weight.subnormal}
    sources = {s.value.source for s in plan.steps_of(SetTensor) if s.name in concerned and isinstance(s.value, Scaled)}
    if not sources:
        return plan
    steps = (
        replace(step, value=replace(step.value, flush=True))
        if isinstance(step, SetTensor) and isinstance(step.value, Scaled) and step.value.source in sources
        else step
        for step in plan.steps
    )
    return replace(plan, steps=tuple(steps))


def count_flushed(ranges: Sequence[WeightRange]) -> tuple[WeightRange, ...]:
    """Return the ranges of a plan once :func:`flush_subnormals` was applied to it."""
    return tuple(replace(weight, subnormal=0, flushed=weight.subnormal) for weight in ranges)


def count_removed(before: StateDict, after: StateDict) -> Removed:
    """Count the elements that the state dict lost; statistics and batch counters are buffers, all else parameters."""
    totals = {True: 0, False: 0}
    for sign, state_dict in ((1, before), (-1, after)):
        for name, tensor in state_dict.tensors.items():
            totals[name.rpartition(".")[2] in BUFFERS] += sign * count_elements(tensor.shape)
    return Removed(parameters=totals[False], buffers=totals[True])


def _measure(name: str, old: Tensor, new: Tensor, recipe: Scaled) -> WeightRange:
    before = (new.take_extremes() if isinstance(new, MeasuredProduct) else None) or _read_extremes(old, recipe)
    if _is_by_output(recipe, old):  # no need to read the products
        factors = np.abs(np.asarray(recipe.factors))
        with np.errstate(invalid="ignore"):  # where all is zero, infinity times zero
            smallest = np.where(factors > 0, before.smallest * factors, np.inf)
        after = _Extremes(before.largest * factors, smallest)
    else:
        after = _read_extremes(new, recipe)
    return WeightRange(
        name,
        before=_describe(before.largest, old.dtype),
        after=_describe(after.largest, old.dtype),
        subnormal_before=_count_subnormal(old, recipe, before.smallest),
        subnormal=_count_subnormal(new, recipe, after.smallest),
    )


def _is_by_row(recipe: Scaled, tensor: Tensor) -> bool:
    """Return whether a row of the weight is an output channel, and has one factor."""
    return bool(tensor.shape) and not _is_transposed(recipe, tensor) and _is_by_output(recipe, tensor)


def _is_transposed(recipe: Scaled, tensor: Tensor) -> bool:
    """Return whether the weight is seen as (groups, in/g, out/g, ...)."""
    return len(recipe.view) > len(tensor.shape)


def _is_by_output(recipe: Scaled, tensor: Tensor) -> bool:
    """Return whether there is one factor for each output channel, and nothing is added."""
    if recipe.places or recipe.others:
        return False
    extents, outputs = recipe.factor_shape, (0, 2) if _is_transposed(recipe, tensor) else (0,)
    return all(
        extent == (recipe.view[axis] if axis in outputs else 1) or recipe.view[axis] == 1
        for axis, extent in enumerate(extents)
    )


def _describe(largest: Array, dtype: DType) -> ChannelRange:
    magnitudes = largest.astype(np.float64)
    code: Literal["d", "f"] = "d" if dtype is FLOAT64 else "f"  # as the file has them
    with np.errstate(all="ignore"):
        channels = array(code, magnitudes.astype(code).tobytes())
    used = magnitudes[magnitudes > 0]
    if not len(used):
        return ChannelRange(0.0, 0.0, 1.0, channels)
    most = used.max()
    return ChannelRange(float(used.min()), float(most), float((used / most).mean()), channels)


def _read_extremes(tensor: Tensor, recipe: Scaled) -> _Extremes:
    outputs = recipe.view[0] * recipe.view[2] if _is_transposed(recipe, tensor) else tensor.shape[0]
    measured = _RowExtremes(outputs, tensor.dtype)
    for block in _rows(tensor, recipe):
        measured.add(block)
    return measured.result()


def _count_subnormal(tensor: Tensor, recipe: Scaled, smallest: Array) -> int:
    bound = tensor.dtype.smallest_normal if tensor.dtype in _SLOW else 0.0
    if not np.any(smallest < bound):
        return 0
    magnitudes = (np.abs(as_numbers(rows.tobytes(), tensor.dtype)) for rows in _rows(tensor, recipe))
    return sum(int(((some != 0) & (some < bound)).sum()) for some in magnitudes)


def _rows(tensor: Tensor, recipe: Scaled) -> Iterator[Array]:
    """Yield the bits of the elements, as blocks of (output channels, elements of each)."""
    if _is_transposed(recipe, tensor):
        groups, rows, columns = recipe.view[:3]
        elements = as_bits(read_bytes(tensor), tensor.dtype).reshape(groups, rows, columns, -1)
        yield elements.transpose(0, 2, 1, 3).reshape(groups * columns, -1)
        return
    columns = count_elements(tensor.shape[1:])
    for data in whole_rows(tensor.chunks(), columns * tensor.dtype.itemsize) if columns else ():
        yield as_bits(data, tensor.dtype).reshape(-1, columns)
