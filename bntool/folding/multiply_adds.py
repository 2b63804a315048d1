"""The cost of a forward in multiply-adds, and how many of them folding removes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bntool.errors import UserCodeError
from bntool.graphs.graph import ModelGraph
from bntool.modules.borrowing import borrow
from bntool.modules.calling import call, tensors_in


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one forward.

    Attributes:
        shapes: of the inputs.
        before: of convolutions, linears and other matrix products, and one for each element that a BatchNorm gives.
        removed: of the BatchNorms that are gone. Biases that were added are not counted, as in all such counts.
    """

    shapes: tuple[tuple[int, ...], ...]
    before: int
    removed: int


def count_cost(model: nn.Module, inputs: Any, graph: ModelGraph, *, gone: Collection[str]) -> Cost | None:
    """Count the multiply-adds of a forward, as :class:`torch.utils.flop_counter.FlopCounterMode` does.

    Args:
        model: the original; given back as it was.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        graph: traced with them.
        gone: the BatchNorms that folding takes out.

    Returns:
        None where torch cannot count them.
    """
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with borrow(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()
            call(model, inputs)
    except UserCodeError:  # it runs, but not while being counted
        return None
    elements = {layer: sum(node.elements for node in calls) for layer, calls in graph.batchnorms.items()}
    return Cost(
        shapes=tuple(tuple(tensor.shape) for tensor in tensors_in(inputs)),
        before=counter.get_total_flops() // 2 + sum(elements.values()),
        removed=sum(elements[layer] for layer in gone),
    )
