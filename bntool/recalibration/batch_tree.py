"""The moments of batches, merged along one binary tree over their positions, whoever measured them and in any order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bntool.data.policies import LeftOut
from bntool.recalibration.moments import Tally
from bntool.representation import short_repr

Place = tuple[int, int]  # level and index: the positions from index * 2^level on, 2^level of them


@dataclass(frozen=True)
class Measured:
    """The moments and counts that some batches gave.

    Attributes:
        tally: of all layers side by side; None where no batch came through.
        order: indices of the layers that were called, in the order in which they first were.
        samples: how many went through.
        batches: how many.
        left_out: what was not used, and why.
    """

    tally: Tally | None = None
    order: tuple[int, ...] = ()
    samples: int = 0
    batches: int = 0
    left_out: tuple[LeftOut, ...] = ()

    __repr__ = short_repr

    def and_(self, later: Measured) -> Measured:
        """Return the two merged; the batches of the other come later in the list."""
        if self.tally is None or later.tally is None:
            tally = later.tally if self.tally is None else self.tally
        else:
            tally = self.tally.and_(later.tally)
        return Measured(
            tally,
            tuple(dict.fromkeys((*self.order, *later.order))),
            self.samples + later.samples,
            self.batches + later.batches,
            (*self.left_out, *later.left_out),
        )


@dataclass
class BatchTree:
    """Merges what batches gave as soon as neighbours are there: n in a row are kept as O(log n) complete nodes.

    Sums of floating-point numbers depend on the order of adding. Here only the two halves of a node are ever merged,
    the earlier with the later, so the result has the same bits whatever came first, and wherever it was measured.

    Attributes:
        nodes: the largest complete ones, by place.
    """

    nodes: dict[Place, Measured] = field(default_factory=dict)

    def add(self, position: int, measured: Measured) -> None:
        """Add what the batch at a position gave."""
        self.put((0, position), measured)

    def put(self, place: Place, measured: Measured) -> None:
        """Add a complete node, of which no part is there yet."""
        level, index = place
        while (level, index ^ 1) in self.nodes:
            neighbour = self.nodes.pop((level, index ^ 1))
            measured = neighbour.and_(measured) if index & 1 else measured.and_(neighbour)
            level, index = level + 1, index >> 1
        self.nodes[level, index] = measured

    def update(self, nodes: Mapping[Place, Measured]) -> None:
        """Add the nodes of another tree over the same list."""
        for place, measured in nodes.items():
            self.put(place, measured)

    def finish(self) -> Measured:
        """Finish the list; what is not there gave nothing."""
        nodes = dict(self.nodes)
        while len(nodes) > 1 or any(index for _, index in nodes):
            lowest = min(level for level, _ in nodes)
            tree = BatchTree()
            for (level, index), measured in nodes.items():
                beside_nothing = level == lowest
                tree.put((level + 1, index >> 1) if beside_nothing else (level, index), measured)
            nodes = tree.nodes
        return next(iter(nodes.values()), Measured())


def find_runs(places: Iterable[Place]) -> list[range]:
    """Return the positions that nodes hold, as runs of neighbours in ascending order.

    A position that two of them hold ends a run and begins another one.
    """
    runs: list[range] = []
    for first, end in sorted((index << level, (index + 1) << level) for level, index in places):
        if runs and runs[-1].stop == first:
            runs[-1] = range(runs[-1].start, end)
        else:
            runs.append(range(first, end))
    return runs
