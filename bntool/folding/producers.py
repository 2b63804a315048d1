"""Convolutions and linears that take scales and shifts: computed in float64, rounded once when they are written."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bntool.checkpoints.arrays import are_bounded, to_float64, whole_rows
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from bntool.checkpoints.scaled_tensors import scale
from bntool.checkpoints.tensors import LiteralTensor, StoredTensor, Tensor, has_elements, read_bytes, read_numbers
from bntool.folding.absorption import Absorption, Blocked
from bntool.folding.channels import Array
from bntool.folding.transforms.transform import Transform
from bntool.graphs.graph import ModelGraph, Node, NodeKind
from bntool.plan import AddTensor, Scaled, SetTensor, SkipReason, Step, Values

FOLDABLE = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)
_LARGE = 1e18  # factors beyond may take a float32 weight out of its range
SMALLEST_LIMIT = 65504.0  # the largest float16: nothing smaller is too large for any dtype


@dataclass(frozen=True)
class Producer:
    """A weight and bias, and what they are multiplied by and become.

    Attributes:
        node: a call of it.
        shape: of the weight.
        outputs: factor of each output channel.
        inputs: factor of each input channel.
        bias: the new bias, as it is added; None while there is none.
        had_bias: the file has one.
        taps: what is added to the middle of the kernel between each channel and itself; None for nothing.
    """

    node: Node
    shape: tuple[int, ...]
    outputs: Array
    inputs: Array
    bias: Array | None
    had_bias: bool
    taps: Array | None = None

    @property
    def weight_name(self) -> str:
        return self.node.parameters["weight"]

    @property
    def bias_name(self) -> str:
        return self.node.parameters.get("bias") or self.weight_name.removesuffix("weight") + "bias"

    @property
    def can_take_shift(self) -> bool:
        """Whether there is a bias, or a module that reads one."""
        return self.had_bias or self.node.has_bias_slot

    def absorb(self, absorption: Absorption, scale: Array, shift: Array) -> Producer:
        """Return the producer after it took the scale and shift of a BatchNorm that it feeds: W' = scale * W, b' =
        scale * b + shift.
        """
        mine = absorption.channels >= 0
        factors = np.where(mine, scale[absorption.channels], 1.0)
        addends = np.where(mine & absorption.takes_shift, shift[absorption.channels], 0.0)
        bias = self.bias
        if bias is not None or np.any(addends):
            bias = (np.zeros(len(factors)) if bias is None else bias) * factors + addends
        return replace(self, outputs=self.outputs * factors, bias=bias)

    def absorb_input(self, absorption: Absorption, scale: Array, shift: Array, state_dict: StateDict) -> Producer:
        """Return the producer after it took the scale and shift of a BatchNorm that it reads: W' = W * scale, b' = b +
        W shift.
        """
        channels = absorption.channels
        mine = np.full(len(self.inputs), -1)
        mine[: len(channels)] = channels
        factors = np.where(mine >= 0, scale[mine], 1.0)
        addends = np.where(mine >= 0, shift[mine], 0.0)
        bias = self.bias
        if np.any(addends):
            bias = (np.zeros(len(self.outputs)) if bias is None else bias) + self._respond(addends, state_dict)
        return replace(self, inputs=self.inputs * factors, bias=bias)

    def transform(self, read: Transform | None, given: Transform, state_dict: StateDict) -> Producer:
        """Return the producer with what it reads and gives stored as a (x + b): W' = a_out W / a_in, b' = a_out (b +
        b_out - W b_in).

        Args:
            read: of its first input channels; None where it reads nothing otherwise than before.
            given: of its output.
        """
        size = len(self.outputs)
        scale, shift = np.ones(len(self.inputs)), np.zeros(len(self.inputs))
        if read is not None:
            scale[: len(read.scale)], shift[: len(read.shift)] = read.scale, read.shift
        bias = self.bias
        if np.any(given.shift) or np.any(shift):
            bias = (np.zeros(size) if bias is None else bias) + given.shift
            if np.any(shift):
                bias = bias - self._respond(shift, state_dict)
        if bias is not None:
            bias = bias * given.scale
        return replace(self, outputs=self.outputs * given.scale, inputs=self.inputs / scale, bias=bias)

    def add_identity(self, scale: Array, shift: Array) -> Producer:
        """Return the producer after it took scale * x + shift of each channel x that it reads, from a branch beside
        it.
        """
        bias = (np.zeros(len(self.outputs)) if self.bias is None else self.bias) + shift
        return replace(self, taps=scale if self.taps is None else self.taps + scale, bias=bias)

    def _respond(self, constant: Array, state_dict: StateDict) -> Array:
        """Compute what the scaled weight answers to an input that is constant over positions."""
        tensor = state_dict.tensor(self.weight_name)
        if self.node.factors:
            constant = constant * self.node.factors[0]
        if self._is_input_major:
            return self._respond_across(constant, to_float64(read_bytes(tensor), tensor.dtype))
        groups, outputs, columns = self.node.groups, len(self.outputs), self.shape[1]
        values = (self.inputs * constant).reshape(groups, columns)
        row = math.prod(self.shape[1:]) * tensor.dtype.itemsize
        answers: list[Array] = []
        first = 0
        for data in whole_rows(tensor.chunks(), row):
            weight = to_float64(data, tensor.dtype).reshape(len(data) // row, columns, -1)
            sums = weight[:, :, 0] if weight.shape[2] == 1 else weight.sum(axis=2)
            if groups == 1:
                answers.append(np.einsum("oi,i->o", sums, values[0]))
            else:
                mine = values[np.arange(first, first + len(weight)) // (outputs // groups)]
                answers.append(np.einsum("oi,oi->o", sums, mine))
            first += len(weight)
        return np.concatenate(answers) * self.outputs

    def _respond_across(self, constant: Array, weight: Array) -> Array:
        values = self.inputs * constant
        if self.node.kind is NodeKind.MATMUL:  # (..., in, out)
            answer: Array = values @ weight.reshape(-1, *self.shape[-2:]).sum(axis=0)
        else:  # (in, out/g, ...)
            groups = self.node.groups
            rows = weight.reshape(groups, self.shape[0] // groups, self.shape[1], -1).sum(axis=3)
            answer = np.einsum("gio,gi->go", rows, values.reshape(groups, -1)).reshape(-1)
        return answer * self.outputs

    @property
    def _is_input_major(self) -> bool:
        return self.node.kind in (NodeKind.CONV_TRANSPOSE, NodeKind.MATMUL)

    def _scaled(self) -> Scaled | None:
        """Return the recipe of the new weight; None where it stays as it is."""
        if np.all(self.outputs == 1) and np.all(self.inputs == 1) and self.taps is None:
            return None
        groups, trailing = self.node.groups, self.shape[2:]
        rows, columns = self.shape[0] // groups, self.shape[1]
        by_row, by_column = (self.inputs, self.outputs) if self._is_input_major else (self.outputs, self.inputs)
        if self.node.kind is NodeKind.MATMUL:  # as of a transposed convolution, whatever lies before (in, out)
            groups, trailing, columns = 1, (1,) * (len(self.shape) - 2), self.shape[-1]
            rows = math.prod(self.shape[:-1])
            by_row = np.tile(self.inputs, rows // len(self.inputs))
        one, other = by_column.reshape(groups, 1, columns), by_row.reshape(groups, rows, 1)
        across: Array | None = None
        if np.all(by_column == 1):
            one = other
        elif not (np.all(by_row == 1) and (self._is_input_major or groups == 1)):
            if groups == 1 and min(rows, columns) > 1:
                across = other
            else:
                one = one * other
        view: tuple[int, ...] = (groups, rows, columns)
        extents = [one.shape, () if across is None else across.shape]
        if not self._is_input_major:
            view = (groups * rows, columns)
            extents = [(extent[0] * extent[1], extent[2]) if extent else () for extent in extents]
        factor_shape, other_shape = ((*extent, *(1 for _ in trailing)) if extent else () for extent in extents)
        return Scaled(
            source=self.weight_name,
            view=(*view, *trailing),
            factors=array("d", one.tobytes()),
            factor_shape=factor_shape,
            others=() if across is None else array("d", across.tobytes()),
            other_shape=other_shape,
            places=() if self.taps is None else array("q", self._find_centre().tobytes()),
            addends=() if self.taps is None else array("d", self.taps.tobytes()),
        )

    def _find_centre(self) -> NDArray[np.int64]:
        """Find the element in the middle of the kernel that weighs each channel itself."""
        channel, taps = np.arange(self.shape[0]), math.prod(self.shape[2:])
        return (channel * self.shape[1] + channel % self.shape[1]) * taps + taps // 2

    def check(self, state_dict: StateDict) -> None:
        """Check that the new elements lie in the range of the dtype.

        Raises:
            Blocked: one is too large.
        """
        tensor = state_dict.tensor(self.weight_name)
        largest = _largest(self.outputs) * _largest(self.inputs)
        try:
            is_small = largest < _LARGE and _largest_of(self.taps) < SMALLEST_LIMIT
            if is_small and tensor.dtype is FLOAT16:
                is_small = self.taps is None and all(are_bounded(data, FLOAT16, largest) for data in tensor.chunks())
            if not is_small:
                recipe = self._scaled()
                for _ in () if recipe is None else scale(tensor, recipe).chunks():
                    pass
            stored = self._stored_bias()
            if stored is not None and not _largest(stored) < SMALLEST_LIMIT:
                LiteralTensor.from_numbers(stored.tolist(), dtype=self._bias_dtype(state_dict), shape=stored.shape)
        except OverflowError as error:
            raise Blocked(SkipReason.OVERFLOW, f"{self.node.layer}: {error}") from error

    def _stored_bias(self) -> Array | None:
        """Return the new bias as the file holds it: a Gemm of ONNX adds it times a factor."""
        return self.bias / self.node.factors[1] if self.bias is not None and self.node.factors else self.bias

    def _bias_dtype(self, state_dict: StateDict) -> DType:
        return state_dict.tensor(self.bias_name if self.had_bias else self.weight_name).dtype

    def steps(self, graph: ModelGraph, state_dict: StateDict) -> Iterator[Step]:
        """Yield the steps that make it so, under every name of the module."""
        recipe = self._scaled()
        weight_names = graph.names_of(self.weight_name)
        if recipe is not None:
            for name in weight_names:
                yield SetTensor(name, recipe)
        bias = self._stored_bias()
        if bias is None:
            return
        values = Values(array("d", bias.tobytes()), bias.shape)
        if self.had_bias:
            old = state_dict.tensor(self.bias_name)
            values = Values(values.numbers, tuple(old.shape))
            if list(read_numbers(old)) == list(values.numbers):
                return
            for name in graph.names_of(self.bias_name):
                yield SetTensor(name, values)
            return
        dtype = state_dict.tensor(self.weight_name).dtype.name
        for name in weight_names:
            yield AddTensor(self.node.new_bias or name.removesuffix("weight") + "bias", values, dtype=dtype, after=name)


def _largest(values: Array) -> float:
    return float(np.abs(values).max(initial=0))


def _largest_of(values: Array | None) -> float:
    return 0.0 if values is None else _largest(values)


def count_channels(node: Node, shape: tuple[int, ...]) -> tuple[int, int]:
    """Count the output and input channels of a weight of that shape."""
    if node.kind is NodeKind.MATMUL:
        return shape[-1], shape[-2]
    if node.kind is NodeKind.CONV_TRANSPOSE:
        return shape[1] * node.groups, shape[0]
    return shape[0], shape[1] * node.groups


def find_parameter(name: str, state_dict: StateDict, *, absent: SkipReason = SkipReason.COMPUTED_WEIGHT) -> Tensor:
    """Return a tensor that can be calculated with.

    Args:
        absent: the reason where the state dict does not hold it.

    Raises:
        Blocked: it is missing, has no elements, or they are no plain floating-point numbers.
    """
    if state_dict.full_name(name) not in state_dict.tensors:
        raise Blocked(absent, f"{name} is not in the state dict")
    tensor = state_dict.tensor(name)
    wrapper = tensor.wrapper if isinstance(tensor, StoredTensor) else None
    if wrapper or tensor.dtype not in FOLDABLE:
        raise Blocked(SkipReason.UNSUPPORTED_DTYPE, f"{name} is {wrapper or tensor.dtype}")
    if not has_elements(tensor):
        raise Blocked(SkipReason.NOT_INITIALISED, f"the file holds no elements for {name}")
    return tensor


def read_parameter(name: str, state_dict: StateDict, *, absent: SkipReason = SkipReason.COMPUTED_WEIGHT) -> Array:
    """Return the elements of such a tensor in float64, in C order.

    Raises:
        Blocked: as above.
    """
    tensor = find_parameter(name, state_dict, absent=absent)
    return to_float64(read_bytes(tensor), tensor.dtype)


def read_producer(node: Node, state_dict: StateDict) -> Producer:
    """Return a producer as the state dict holds it.

    Raises:
        Blocked: its tensors are missing or cannot be calculated with.
    """
    weight = find_parameter(node.parameters["weight"], state_dict)
    shape = tuple(weight.shape)
    outputs, inputs = count_channels(node, shape)
    bias_name = node.parameters.get("bias")
    bias = None if bias_name is None else read_parameter(bias_name, state_dict)
    if bias is not None and node.factors:
        bias = bias * node.factors[1]
    return Producer(node, shape, _ones(outputs), _ones(inputs), bias, bias is not None)


@dataclass(frozen=True)
class Addend:
    """A parameter that is added to a tensor, one element for each channel.

    Attributes:
        node: the addition.
        values: what it is by now.
    """

    node: Node
    values: Array

    @property
    def name(self) -> str:
        return self.node.parameters["bias"]

    def transform(self, read: Transform, given: Transform) -> Addend:
        """Return the addend with what is read and given stored as a (x + b), the a of both equal: c' = a (c + (b_out -
        b_in) / f).

        f is the factor that it is added with: -1 where it is subtracted.
        """
        factor = self.node.factors[0] if self.node.factors else 1.0
        return replace(self, values=given.scale * (self.values + (given.shift - read.shift) / factor))

    def check(self, state_dict: StateDict) -> None:
        """Check that the new elements lie in the range of the dtype.

        Raises:
            Blocked: one is too large.
        """
        tensor = state_dict.tensor(self.name)
        try:
            LiteralTensor.from_numbers(self.values.tolist(), dtype=tensor.dtype, shape=tuple(tensor.shape))
        except OverflowError as error:
            raise Blocked(SkipReason.OVERFLOW, f"{self.name}: {error}") from error

    def steps(self, graph: ModelGraph, state_dict: StateDict) -> Iterator[Step]:
        """Yield the steps that make it so, under every name of the parameter."""
        shape = tuple(state_dict.tensor(self.name).shape)
        for name in graph.names_of(self.name):
            yield SetTensor(name, Values(array("d", self.values.tobytes()), shape))


def read_addend(node: Node, state_dict: StateDict) -> Addend:
    """Return an addend as the state dict holds it.

    Raises:
        Blocked: its tensor is missing or cannot be calculated with.
    """
    return Addend(node, read_parameter(node.parameters["bias"], state_dict))


@lru_cache
def _ones(size: int) -> Array:
    """Return ones, the factors of a producer before it takes anything; most stay so on one side, and share one
    array.
    """
    ones = np.ones(size)
    ones.flags.writeable = False
    return ones
