"""What a convolution or linear becomes that takes scales and shifts, in float64, rounded once when it is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from bntool.checkpoints.arrays import to_float64
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from bntool.checkpoints.tensors import LiteralTensor, ScaledTensor, StoredTensor, read_bytes, read_numbers
from bntool.graphs.graph import ModelGraph, Node, NodeKind
from bntool.operations.absorption import Absorption, Array, Blocked
from bntool.plan import AddTensor, Scaled, SetTensor, SkipReason, Step, Values

FOLDABLE = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)
_LARGE = 1e18  # factors beyond may take a float32 weight out of its range


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
        groups, outputs = self.node.groups, len(self.outputs)
        weight = to_float64(read_bytes(tensor), tensor.dtype)
        per_input = weight.reshape(groups, outputs // groups, self.shape[1], -1).sum(axis=3)
        values = (self.inputs * constant).reshape(groups, self.shape[1])
        answer: Array = np.einsum("goi,gi->go", per_input, values).reshape(outputs) * self.outputs
        return answer

    def _scaled(self) -> Scaled | None:
        """The recipe of the new weight; None where it stays as it is."""
        if np.all(self.outputs == 1) and np.all(self.inputs == 1):
            return None
        groups = self.node.groups
        trailing = self.shape[2:]
        view: tuple[int, ...]
        extent: tuple[int, ...]
        if self.node.kind is NodeKind.CONV_TRANSPOSE:  # (in, out/g, ...)
            rows, columns = self.shape[0] // groups, self.shape[1]
            factors = self.inputs.reshape(groups, rows, 1) * self.outputs.reshape(groups, 1, columns)
            view = extent = (groups, rows, columns)
            if np.all(self.inputs == 1):
                factors, extent = self.outputs, (groups, 1, columns)
        else:  # (out, in/g, ...)
            rows, columns = self.shape[0] // groups, self.shape[1]
            factors = self.outputs.reshape(groups, rows, 1) * self.inputs.reshape(groups, 1, columns)
            view = extent = (groups * rows, columns)
            if np.all(self.inputs == 1):
                factors, extent = self.outputs, (groups * rows, 1)
        return Scaled(
            source=self.weight_name,
            view=(*view, *trailing),
            factors=tuple(factors.ravel().tolist()),
            factor_shape=(*extent, *(1 for _ in trailing)),
        )

    def check(self, state_dict: StateDict) -> None:
        """Hold the new elements against the range of the dtype.

        Raises:
            Blocked: one is too large.
        """
        tensor = state_dict.tensor(self.weight_name)
        recipe = self._scaled()
        try:
            if recipe is not None and (tensor.dtype is FLOAT16 or not np.abs(recipe.factors).max(initial=0) < _LARGE):
                scaled = ScaledTensor(tensor, recipe.view, recipe.factors, recipe.factor_shape)
                for _ in scaled.chunks():
                    pass
            if self.bias is not None:
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
        values = Values(tuple(self.bias.tolist()), self.bias.shape)
        if self.had_bias:
            old = state_dict.tensor(self.bias_name)
            if list(read_numbers(old)) == list(values.numbers):
                return
            for name in graph.names_of(self.bias_name):
                yield SetTensor(name, values)
            return
        dtype = state_dict.tensor(self.weight_name).dtype.name
        for name in weight_names:
            yield AddTensor(name.removesuffix("weight") + "bias", values, dtype=dtype, after=name)


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
        bias = np.asarray(read_numbers(tensor), dtype=np.float64)
    return Producer(node, shape, np.ones(outputs), np.ones(inputs), bias, bias is not None)
