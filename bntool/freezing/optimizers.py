"""Finding the entries of an optimizer's state that belong to frozen parameters, where that can be known.

An optimizer numbers its parameters and keeps no names. The entries are never edited: a wrong guess would move the
momentum of one parameter to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bntool.batchnorm import STATISTICS
from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.containers.pickles.nodes import Node, as_mapping, is_mapping, iterate_pairs
from bntool.checkpoints.tensors import StoredTensor
from bntool.checkpoints.torch.optimizers import find_optimizers
from bntool.checkpoints.torch.state_dicts import TorchContent

_MOMENTA = ("exp_avg", "momentum_buffer", "exp_avg_sq", "square_avg")


@dataclass(frozen=True)
class OptimizerEntries:
    """One optimizer state of a file.

    Attributes:
        path: where it lies.
        count: how many parameters it numbers.
        frozen: the numbers of those that are frozen, by name; None where they cannot be known.
        reason: how that is known, or why not.
    """

    path: str
    count: int
    frozen: dict[str, int] | None
    reason: str


def find_optimizer_entries(
    checkpoint: Checkpoint, state_dict: StateDict, frozen: Sequence[str]
) -> tuple[OptimizerEntries, ...]:
    """Relate each optimizer state of a file to the frozen parameters of a state dict, by position and shape.

    It is known where the optimizer has one group of as many parameters as the state dict has, and every momentum has
    the shape of the parameter at its place.

    Args:
        frozen: names of parameters, without prefix.
    """
    parameters = [(state_dict.strip(name), t) for name, t in state_dict.tensors.items() if _is_parameter(name, t)]
    return tuple(
        _relate(path, node, parameters, set(frozen), checkpoint=checkpoint)
        for path, node in find_optimizers(checkpoint)
    )


def _is_parameter(name: str, tensor: object) -> bool:
    leaf = name.rpartition(".")[2]
    floating = isinstance(tensor, StoredTensor) and tensor.dtype.is_floating
    return floating and leaf not in STATISTICS


def _relate(
    path: str,
    node: Node,
    parameters: Sequence[tuple[str, object]],
    frozen: set[str],
    *,
    checkpoint: Checkpoint,
) -> OptimizerEntries:
    entries = as_mapping(node)
    groups = entries["param_groups"]
    numbers = [_numbers(group) for group in groups] if isinstance(groups, list) else []
    count = sum(map(len, numbers))
    if len(numbers) != 1:
        return OptimizerEntries(path, count, None, "it has several parameter groups, whose order is not recorded")
    if count != len(parameters):
        reason = f"it numbers {count} parameters, the state dict has {len(parameters)}"
        return OptimizerEntries(path, count, None, reason)
    states = {key: value for key, value in iterate_pairs(entries["state"]) if type(key) is int}
    reader = checkpoint.content.reader if isinstance(checkpoint.content, TorchContent) else None
    checked = 0
    for number, (name, tensor) in zip(numbers[0], parameters, strict=True):
        state = as_mapping(states.get(number))
        momentum = next((state[key] for key in _MOMENTA if key in state), None)
        stored = reader.read(momentum) if reader is not None and momentum is not None else None
        if stored is None:
            continue
        if not isinstance(tensor, StoredTensor) or stored.shape != tensor.shape:
            return OptimizerEntries(path, count, None, f"its order is not that of the state dict (at {name})")
        checked += 1
    if not checked:
        return OptimizerEntries(path, count, None, "it holds no momentum whose shape could tell")
    found = {name: number for number, (name, _) in zip(numbers[0], parameters, strict=True) if name in frozen}
    return OptimizerEntries(path, count, found, "by position; all shapes agree")


def _numbers(group: Node) -> list[int]:
    values = as_mapping(group).get("params") if is_mapping(group) else None
    return [value for value in values if type(value) is int] if isinstance(values, list) else []
