"""The names of what takes the scale and the shift of a BatchNorm that disappears, for reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from bntool.folding.channels import as_indices, is_whole
from bntool.folding.folds import Fold, Level
from bntool.folding.transforms.operations import Shift
from bntool.folding.transforms.solution import Solution
from bntool.folding.transforms.targets import name_of
from bntool.folding.transforms.transform import Transform
from bntool.graphs.graph import Node, NodeKind


def describe_fold(solution: Solution, layer: str) -> Fold:
    """Return the fold of a BatchNorm with the layers next to it that take its scale, and those that take its shift."""
    takers = _Takers(solution)
    for call in solution.system.graph.batchnorms[layer]:
        takers.look_ahead(call)
        takers.look_back(call)
    into = tuple(dict.fromkeys((*takers.before, *takers.after)))
    return Fold(layer, into, Level.TRANSFORM, False, tuple(takers.scale), tuple(takers.shift))


@dataclass
class _Takers:
    """What was found so far, in order; ``before`` and ``after`` take any of the two."""

    solution: Solution
    scale: dict[str, None] = field(default_factory=dict)
    shift: dict[str, None] = field(default_factory=dict)
    before: dict[str, None] = field(default_factory=dict)
    after: dict[str, None] = field(default_factory=dict)
    seen: set[tuple[int, bool]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.graph, self.roles = self.solution.system.graph, self.solution.roles

    def look_ahead(self, node: Node) -> None:
        """Find those that read what a node gives."""
        if (node.index, True) in self.seen:
            return
        self.seen.add((node.index, True))
        for edge in self.graph.outputs(node):
            reader = self.graph.nodes[edge.target]
            if self.roles.takes(reader):
                read = self.solution.input(reader) if edge.port == 0 and edge.targets is not None else None
                if read is not None:
                    if not is_whole(edge, node):
                        mine = as_indices(edge.targets or ())
                        read = Transform(read.scale[mine], read.shift[mine])
                    self._note(reader, read, self.after)
            elif self.roles.passes(reader, edge.port):
                self.look_ahead(reader)

    def look_back(self, node: Node) -> None:
        """Find those that give what a node reads."""
        if (node.index, False) in self.seen:
            return
        self.seen.add((node.index, False))
        edges = (edge for edge in self.graph.inputs(node) if self.roles.passes(node, edge.port))
        sources = [self.graph.nodes[edge.source] for edge in edges]
        # of a sum the operand that takes the difference, not all that was summed up before
        near = [source for source in sources if self._ends_at(source)]
        alone = [source for source in near if len(self.graph.outputs(source)) == 1]
        for source in alone or near or sources:
            if self.roles.takes(source):
                self._note(source, self.solution.output(source), self.before)
                continue
            rule = self.roles.rule(source)
            if rule is not None and rule.shift is Shift.FREE:
                name = name_of(source)
                self.shift[name] = self.before[name] = None
            self.look_back(source)

    def _ends_at(self, source: Node) -> bool:
        while source.kind is NodeKind.BATCH_NORM and source.layer in self.solution.system.removed:
            edges = self.graph.inputs(source)
            if len(edges) != 1:
                return False
            source = self.graph.nodes[edges[0].source]
        return self.roles.takes(source)

    def _note(self, node: Node, stored: Transform, where: dict[str, None]) -> None:
        name = node.layer or name_of(node)
        if stored.has_scale:
            self.scale[name] = where[name] = None
        if stored.has_shift:
            self.shift[name] = where[name] = None
