"""The padding values of convolutions where a shift passes their zeros: the value that stands for zero by then."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.tensors import LiteralTensor
from bntool.folding.absorption import Blocked
from bntool.folding.channels import Array
from bntool.graphs.graph import ModelGraph, Node
from bntool.plan import AddTensor, ChangePadding, SkipReason, Step, Values


@dataclass(frozen=True)
class PaddingValues:
    """One value for each input channel: a (0 + b) where what is read is stored as a (x + b).

    Attributes:
        node: a call of the convolution.
        values: of its input channels, in float64.
    """

    node: Node
    values: Array

    @property
    def weight_name(self) -> str:
        return self.node.parameters["weight"]

    def check(self, state_dict: StateDict) -> None:
        """Check that the values lie in the range of the dtype.

        Raises:
            Blocked: one is too large.
        """
        dtype = state_dict.tensor(self.weight_name).dtype
        try:
            LiteralTensor.from_numbers(self.values.tolist(), dtype=dtype, shape=self.values.shape)
        except OverflowError as error:
            raise Blocked(SkipReason.OVERFLOW, f"the padding of {self.node.layer}: {error}") from error

    def steps(self, graph: ModelGraph, state_dict: StateDict) -> Iterator[Step]:
        """Yield the steps that make it so, under every name of the module."""
        dtype = state_dict.tensor(self.weight_name).dtype.name
        values = Values(array("d", self.values.tobytes()), self.values.shape)
        for name in graph.names_of(self.weight_name):
            module = name.rpartition(".")[0]
            buffer = f"{module}.padding_values" if module else "padding_values"
            yield AddTensor(buffer, values, dtype=dtype, after=name, is_parameter=False)
            yield ChangePadding(module)
