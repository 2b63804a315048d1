"""Tensors that one node reads and that a file does not hold by themselves: a fold that changes them adds them."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Iterator

from bntool.checkpoints.arrays import to_float64
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.scaled_tensors import scale
from bntool.checkpoints.tensors import Tensor, read_bytes
from bntool.graphs.graph import ModelGraph
from bntool.plan import AddTensor, RemoveTensor, Scaled, SetTensor, Step, Values


def with_derived(state_dict: StateDict, graph: ModelGraph) -> StateDict:
    """Return the state dict with the tensors that nodes derive from it, so that a fold sees one as any other."""
    if not graph.derived:
        return state_dict
    derived = {name: one.tensor for name, one in graph.derived.items()}
    return dataclasses.replace(state_dict, tensors={**state_dict.tensors, **derived})


def add_derived(steps: Iterable[Step], graph: ModelGraph, state_dict: StateDict) -> Iterator[Step]:
    """Yield the steps for the file alone: what is changed is added, and what is not needed any more is removed.

    Args:
        state_dict: as :func:`with_derived` gives it.
    """
    if not graph.derived:
        yield from steps
        return
    added: set[str] = set()
    for step in steps:
        if isinstance(step, SetTensor) and step.name in graph.derived:
            added.add(step.name)
            yield _add(step.name, step.value if isinstance(step.value, Values | Scaled) else None, graph, state_dict)
            continue
        if isinstance(step, AddTensor) and step.after in graph.derived and step.after not in added:
            added.add(step.after)
            yield _add(step.after, None, graph, state_dict)
        yield step
    for name, derived in graph.needed_for.items():
        if derived <= added:
            yield RemoveTensor(name)


def _add(name: str, value: Values | Scaled | None, graph: ModelGraph, state_dict: StateDict) -> AddTensor:
    derived, tensor = graph.derived[name], state_dict.tensor(name)
    if value is None:
        ones = (1,) * len(tensor.shape)
        value = Scaled(source=name, view=tuple(tensor.shape), factors=array("d", [1.0]), factor_shape=ones)
    if isinstance(value, Scaled):
        value = dataclasses.replace(value, source=derived.after) if derived.is_copy else _compute(value, tensor)
    return AddTensor(name, value, dtype=tensor.dtype.name, after=derived.after)


def _compute(recipe: Scaled, tensor: Tensor) -> Values:
    product = scale(tensor, recipe)
    numbers = to_float64(read_bytes(product), product.dtype)
    return Values(array("d", numbers.tobytes()), tuple(tensor.shape))
