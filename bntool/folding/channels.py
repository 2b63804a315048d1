"""The channels that edges hand on: as arrays, whole or in part, beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bntool.graphs.graph import Edge, Node

Array = NDArray[np.float64]
Integers = NDArray[np.int64]


def as_indices(channels: Sequence[int]) -> Integers:
    """Convert channels to an array."""
    if isinstance(channels, range):  # which numpy would walk through one by one
        return np.arange(channels.start, channels.stop, channels.step)
    return np.asarray(channels, dtype=int)


def is_whole(edge: Edge, source: Node) -> bool:
    """Return whether an edge hands on all channels of a node, as they are."""
    if edge.targets is None or len(edge.sources) != source.channels:
        return False
    everything = range(source.channels)
    for channels in (edge.sources, edge.targets):
        if channels != everything and (isinstance(channels, range) or tuple(channels) != tuple(everything)):
            return False
    return True


def overlap(one: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether two sets of channels have any in common."""
    if isinstance(one, range) and isinstance(other, range):
        return max(one.start, other.start) < min(one.stop, other.stop)
    return not set(one).isdisjoint(other)


def order_runs(edges: Sequence[Edge]) -> Sequence[Edge] | None:
    """Order edges so that what they hand on lies one after the other, from the first channel on; None where it does
    not.
    """
    runs = [(edge.targets, edge) for edge in edges if isinstance(edge.targets, range) and edge.targets.step == 1]
    runs.sort(key=lambda run: run[0].start)
    start = 0
    for targets, _ in runs:
        if targets.start != start:
            return None
        start = targets.stop
    return [edge for _, edge in runs] if len(runs) == len(edges) else None
