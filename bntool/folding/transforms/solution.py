"""How every tensor is stored in the end, once it is decided which BatchNorms disappear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from bntool.folding.channels import Array, Integers
from bntool.folding.transforms.channel_transforms import Channels, ChannelTransforms
from bntool.folding.transforms.roles import Roles
from bntool.folding.transforms.transform import Transform
from bntool.graphs.graph import Node


@dataclass
class Solution:
    """One choice of all scales and shifts.

    Attributes:
        system: what they hold together with.
        roles: BatchNorms that stay take what is left on either side of them.
    """

    system: ChannelTransforms
    roles: Roles = field(init=False)
    _values: tuple[Array, Array] = field(init=False)  # the scales and shifts
    _changes: tuple[Integers, Integers] = field(init=False)  # how many of them before each change something
    _transforms: dict[tuple[int, bool], Transform] = field(default_factory=dict)  # by node: given, or read

    def __post_init__(self) -> None:
        system = self.system
        self.roles = Roles(system.graph, {*system.removed, *system.gone}, system.absorbs)
        scales, shifts = system.scales.choose(), system.shifts.choose()
        self._changes = np.append(0, (scales != 1).cumsum()), np.append(0, (shifts != 0).cumsum())
        self._values = np.append(scales, 1.0), np.append(shifts, 0.0)

    def output(self, node: Node) -> Transform:
        """Return how the output of a node is stored."""
        key = node.index, True
        if key not in self._transforms:
            self._transforms[key] = self._read(self.system.outputs(node))
        return self._transforms[key]

    def input(self, node: Node) -> Transform | None:
        """Return how what a node reads is stored; None where its channels are not told apart, and nothing is
        changed.
        """
        key = node.index, False
        if key not in self._transforms:
            which = self.system.inputs(node, 0)
            if which is None:
                return None
            whole = self.system.find_whole(node, 0)
            source = None if whole < 0 else self.system.graph.nodes[whole]
            self._transforms[key] = self._read(which) if source is None else self.output(source)
        return self._transforms[key]

    def _read(self, which: Channels) -> Transform:
        scales, shifts = self._values
        return Transform(scales[which.scales], shifts[which.shifts])

    def is_changed(self, node: Node) -> bool:
        """Return whether the output of a node is stored otherwise than before."""
        if node.index not in self.system.bases:
            return False
        bases = zip(self._changes, self.system.bases[node.index], strict=True)
        return any(before[base + node.channels] > before[base] for before, base in bases)

    def absorbers(self) -> Iterator[Node]:
        """Yield the first call of everything that has to take something."""
        graph = self.system.graph
        for calls in self.roles.calls.values():
            sources = (graph.nodes[edge.source] for node in calls for edge in graph.inputs(node) if edge.port == 0)
            if any(map(self.is_changed, calls)) or any(map(self.is_changed, sources)):
                yield calls[0]
