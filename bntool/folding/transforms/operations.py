"""The rules of operations where tensors are stored as a (x + b): what each kind of node lets pass.

To add an operation: let the source of the graph (``graphs/traced/operators.py`` or a reader in ``graphs/stored/``) say
which kind of node it is. If none fits, add a kind to :class:`~bntool.graphs.graph.NodeKind` and a rule here: which of
its inputs carry data, whether the scale has to be positive or one, and what becomes of the shift. That is all; a kind
without a rule lets nothing pass. Convolutions, linears and BatchNorms are not here: they absorb, on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from bntool.graphs.graph import Node, NodeKind


class Shift(Enum):
    """The effect of an operation on b, where all of its data inputs and its output have the same a."""

    SAME = "the same before and after"
    SUM = "the sum of those of its inputs, each times its factor"
    SCALED = "times its factor; zero where that is not known"
    ZERO = "zero before and after"
    FREE = "any: a parameter of its own takes the difference"


@dataclass(frozen=True)
class Rule:
    """The rule of an operation: a equal on its data inputs and its output, channel by channel.

    Attributes:
        shift: what becomes of b.
        ports: its data inputs; all others are needed as they are.
        positive: a has to be positive.
        unscaled: a has to be one.
    """

    shift: Shift
    ports: tuple[int, ...] = (0,)
    positive: bool = False
    unscaled: bool = False


RULES: Mapping[NodeKind, Rule] = {
    NodeKind.ACTIVATION: Rule(Shift.ZERO, positive=True),
    NodeKind.MAX_POOL: Rule(Shift.SAME, positive=True),
    NodeKind.AVERAGE: Rule(Shift.SAME),
    NodeKind.ADD: Rule(Shift.SUM, ports=(0, 1)),
    NodeKind.CHANNELWISE: Rule(Shift.SCALED),
    NodeKind.GATE: Rule(Shift.ZERO),
    NodeKind.BIAS: Rule(Shift.FREE),
    NodeKind.CONSTANT_SUM: Rule(Shift.SAME, unscaled=True),
}


def find_rule(node: Node) -> Rule | None:
    """Return the rule of a node; None where nothing passes, or where it absorbs."""
    return RULES.get(node.kind) if node.ran else None
