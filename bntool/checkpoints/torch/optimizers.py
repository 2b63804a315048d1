"""Optimizer states in files of torch: where they lie, and how often they stepped."""

from __future__ import annotations

from collections.abc import Iterator

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.pickles.nodes import Node, as_mapping, is_mapping, iterate_pairs
from bntool.checkpoints.tensors import read_numbers
from bntool.checkpoints.torch.state_dicts import TorchContent
from bntool.errors import BntoolError

_LOOKED_AT = 64  # parameters of one optimizer whose count is read


def find_optimizers(checkpoint: Checkpoint) -> Iterator[tuple[str, Node]]:
    """Yield each optimizer state at the top level of a file, and where it lies: ``optimizer`` or
    ``optimizer_states.0``.
    """
    for name, value in checkpoint.entries.items():
        candidates = enumerate(value) if isinstance(value, list) else [("", value)]
        for index, node in candidates:
            if is_mapping(node) and {"state", "param_groups"} <= as_mapping(node).keys():
                yield f"{name}.{index}" if index != "" else name, node


def read_steps(checkpoint: Checkpoint, optimizer: Node) -> int | None:
    """Return how many steps an optimizer made, as it counts for its parameters; None for one that counts none (SGD).

    Parameters that were frozen for a time have fewer: it is the largest number that counts.
    """
    reader = checkpoint.content.reader if isinstance(checkpoint.content, TorchContent) else None
    steps = []
    for number, (_, state) in enumerate(iterate_pairs(as_mapping(optimizer).get("state"))):
        if number == _LOOKED_AT:
            break
        step = as_mapping(state).get("step")
        if step is not None and not isinstance(step, int | float) and reader is not None:
            try:
                tensor = reader.read(step)
                step = read_numbers(tensor)[0] if tensor is not None and tensor.numel == 1 else None
            except (BntoolError, ValueError):  # it tells nothing then
                step = None
        if isinstance(step, int | float) and 0 < step < 2**53 and step == int(step):
            steps.append(int(step))
    return max(steps, default=None)
