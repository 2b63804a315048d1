"""What a convolution or linear becomes that takes scales and shifts, in float64, rounded once when it is written."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from bntool.checkpoints.arrays import to_float64, whole_rows
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from bntool.checkpoints.scaled_tensors import ScaledTensor
from bntool.checkpoints.tensors import LiteralTensor, StoredTensor, Tensor, read_bytes, read_numbers
from bntool.folding.absorption import Absorption, Array, Blocked
from bntool.graphs.graph import ModelGraph, Node, NodeKind
from bntool.plan import AddTensor, Scaled, SetTensor, SkipReason, Step, Values

FOLDABLE = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)
_LARGE = 1e18  # factors beyond may take a float32 weight out of its range
_SMALLEST_LIMIT = 65504.0  # the largest float16: nothing smaller is too large for any dtype


@dataclass(frozen=True)
class Producer:
    """A weight and bias, and what they are multiplied by and become.

    Attributes:
        node: a call of it.
        shape: of the weight.
        outputs: factor of each output channel.
        inputs: factor of each input channel.
        bias: the new bias; None while there is none.
        had_bias: the file has one.
    """

    node: Node
    shape: tuple[int, ...]
    outputs: Array
    inputs: Array
    bias: Array | None
    had_bias: bool

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
        """After taking the scale and shift of a BatchNorm that it feeds: W' = scale * W, b' = scale * b + shift."""
        mine = absorption.channels >= 0
        factors = np.where(mine, scale[absorption.channels], 1.0)
        addends = np.where(mine & absorption.takes_shift, shift[absorption.channels], 0.0)
        bias = self.bias
        if bias is not None or np.any(addends):
            bias = (np.zeros(len(factors)) if bias is None else bias) * factors + addends
        return replace(self, outputs=self.outputs * factors, bias=bias)

    def absorb_input(self, absorption: Absorption, scale: Array, shift: Array, state_dict: StateDict) -> Producer:
        """After taking the scale and shift of a BatchNorm that it reads: W' = W * scale, b' = b + W shift."""
        channels = absorption.channels
        mine = np.full(len(self.inputs), -1)
        mine[: len(channels)] = channels
        factors = np.where(mine >= 0, scale[mine], 1.0)
        addends = np.where(mine >= 0, shift[mine], 0.0)
        bias = self.bias
        if np.any(addends):
            bias = (np.zeros(len(self.outputs)) if bias is None else bias) + self._respond(addends, state_dict)
        return replace(self, inputs=self.inputs * factors, bias=bias)

    def _respond(self, constant: Array, state_dict: StateDict) -> Array:
        """What the scaled weight answers to an input that is constant over positions."""
        tensor = state_dict.tensor(self.weight_name)
        groups, outputs, columns = self.node.groups, len(self.outputs), self.shape[1]
        values = (self.inputs * constant).reshape(groups, columns)
        row = math.prod(self.shape[1:]) * tensor.dtype.itemsize
        answers: list[Array] = []
        first = 0
        for data in whole_rows(tensor.chunks(), row):
            weight = to_float64(data, tensor.dtype).reshape(len(data) // row, columns, -1)
            group = np.arange(first, first + len(weight)) // (outputs // groups)
            answers.append(np.einsum("oi,oi->o", weight.sum(axis=2), values[group]))
            first += len(weight)
        return np.concatenate(answers) * self.outputs

    def _scaled(self) -> Scaled | None:
        """The recipe of the new weight; None where it stays as it is."""
        if np.all(self.outputs == 1) and np.all(self.inputs == 1):
            return None
        groups, trailing = self.node.groups, self.shape[2:]
        rows, columns = self.shape[0] // groups, self.shape[1]
        transposed = self.node.kind is NodeKind.CONV_TRANSPOSE  # (in, out/g, ...), else (out, in/g, ...)
        by_row, by_column = (self.inputs, self.outputs) if transposed else (self.outputs, self.inputs)
        if np.all(by_column == 1):
            factors = by_row.reshape(groups, rows, 1)
        else:
            factors = by_column.reshape(groups, 1, columns)
            if not (np.all(by_row == 1) and (transposed or groups == 1)):
                factors = factors * by_row.reshape(groups, rows, 1)
        view: tuple[int, ...] = (groups, rows, columns)
        extent: tuple[int, ...] = factors.shape
        if not transposed:
            view, extent = (groups * rows, columns), (extent[0] * extent[1], extent[2])
        return Scaled(
            source=self.weight_name,
            view=(*view, *trailing),
            factors=array("d", factors.tobytes()),
            factor_shape=(*extent, *(1 for _ in trailing)),
        )

    def check(self, state_dict: StateDict) -> None:
        """Hold the new elements against the range of the dtype.

        Raises:
            Blocked: one is too large.
        """
        tensor = state_dict.tensor(self.weight_name)
        largest = _largest(self.outputs) * _largest(self.inputs)
        try:
            if tensor.dtype is FLOAT16 or not largest < _LARGE:
                recipe = self._scaled()
                for _ in () if recipe is None else _scale(tensor, recipe).chunks():
                    pass
            if self.bias is not None and not _largest(self.bias) < _SMALLEST_LIMIT:
                LiteralTensor.from_numbers(
                    self.bias.tolist(), dtype=self._bias_dtype(state_dict), shape=self.bias.shape
                )
        except OverflowError as error:
            raise Blocked(SkipReason.OVERFLOW, f"{self.node.layer}: {error}") from error

    def _bias_dtype(self, state_dict: StateDict) -> DType:
        return state_dict.tensor(self.bias_name if self.had_bias else self.weight_name).dtype

    def steps(self, graph: ModelGraph, state_dict: StateDict) -> Iterator[Step]:
        """The steps that make it so, under every name of the module."""
        recipe = self._scaled()
        weight_names = graph.names_of(self.weight_name)
        if recipe is not None:
            for name in weight_names:
                yield SetTensor(name, recipe)
        if self.bias is None:
            return
        values = Values(array("d", self.bias.tobytes()), self.bias.shape)
        if self.had_bias:
            old = state_dict.tensor(self.bias_name)
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


def _scale(tensor: Tensor, recipe: Scaled) -> ScaledTensor:
    return ScaledTensor(tensor, recipe.view, recipe.factors, recipe.factor_shape)


def read_producer(node: Node, state_dict: StateDict) -> Producer:
    """A producer as the state dict holds it.

    Raises:
        Blocked: its tensors are missing or cannot be calculated with.
    """
    name = node.parameters["weight"]
    if state_dict.full_name(name) not in state_dict.tensors:
        raise Blocked(SkipReason.COMPUTED_WEIGHT, f"{name} is not in the state dict")
    weight = state_dict.tensor(name)
    wrapper = weight.wrapper if isinstance(weight, StoredTensor) else None
    if wrapper or weight.dtype not in FOLDABLE:
        raise Blocked(SkipReason.UNSUPPORTED_DTYPE, f"{name} is {wrapper or weight.dtype}")
    shape = tuple(weight.shape)
    transposed = node.kind is NodeKind.CONV_TRANSPOSE
    outputs = shape[1] * node.groups if transposed else shape[0]
    inputs = shape[0] if transposed else shape[1] * node.groups
    bias_name = node.parameters.get("bias")
    bias = None
    if bias_name is not None:
        if state_dict.full_name(bias_name) not in state_dict.tensors:
            raise Blocked(SkipReason.COMPUTED_WEIGHT, f"{bias_name} is not in the state dict")
        tensor = state_dict.tensor(bias_name)
        if tensor.dtype not in FOLDABLE:
            raise Blocked(SkipReason.UNSUPPORTED_DTYPE, f"{bias_name} is {tensor.dtype}")
        bias = to_float64(read_bytes(tensor), tensor.dtype)
    return Producer(node, shape, _ones(outputs), _ones(inputs), bias, bias is not None)


@lru_cache
def _ones(size: int) -> Array:
    """What a producer is multiplied by before it takes anything: most take nothing on one side, and share these."""
    ones = np.ones(size)
    ones.flags.writeable = False
    return ones
