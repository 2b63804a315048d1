"""Every channel of every tensor may be stored as a (x + b): which a and b hold together in a graph.

A BatchNorm y = s x + t disappears where a_in = s a_out and b_in = (b_out + t) / s can be added without contradiction to
what the operations around it let pass (see :mod:`bntool.folding.transforms.operations`). Convolutions and linears take
what is left on either side: W' = a_out W / a_in, bias' = a_out (bias + b_out - W b_in). So do BatchNorms that stay.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bntool.folding.channels import Array, Integers, as_indices, is_whole, order_runs, overlap
from bntool.folding.transforms.operations import Rule, Shift
from bntool.folding.transforms.roles import Roles
from bntool.folding.transforms.scales import Scales
from bntool.folding.transforms.shifts import Shifts
from bntool.folding.transforms.unknowns import Contradiction, Equations
from bntool.graphs.graph import ModelGraph, Node, NodeKind


def read_factors(node: Node) -> Array | None:
    """Return the factors that the graph knows of a linear map of each channel."""
    return np.asarray(node.factors) if node.factors else None


class Channels(NamedTuple):
    """The unknowns of some channels.

    Attributes:
        scales: numbers of what they are multiplied by.
        shifts: numbers of what is added to them.
    """

    scales: Integers
    shifts: Integers


class Mark(NamedTuple):
    """A state that can be returned to.

    Attributes:
        scales, shifts: marks of the unknowns.
        gone: the layers that disappear.
    """

    scales: int
    shifts: int
    gone: tuple[str, ...]


class Stuck(Exception):  # noqa: N818 an answer, not an error of the program
    """A BatchNorm does not disappear.

    Attributes:
        detail: what stands in the way.
    """

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


@dataclass
class ChannelTransforms:
    """The unknown transforms around some BatchNorms, and the equations between them.

    Attributes:
        graph: who feeds whom.
        layers: the BatchNorms that may disappear; those that do are added one by one.
        removed: BatchNorms that are the identity by now.
        absorbs: whether a convolution, linear, BatchNorm or bias can take what is left on either side of it.
        takes_shift: whether it can take a shift, too.
        changes_padding: whether a convolution that pads with zeros can pad with other values; None for none.
        find_factors: of a linear map of each channel, one for all or one for each; None where they are not known.
    """

    graph: ModelGraph
    layers: Collection[str]
    removed: Collection[str]
    absorbs: Callable[[Node], bool]
    takes_shift: Callable[[Node], bool]
    changes_padding: Callable[[Node], bool] | None = None
    find_factors: Callable[[Node], Array | None] = read_factors
    gone: tuple[str, ...] = ()  # the layers that disappear, in the order in which they were removed
    roles: Roles = field(init=False)
    scales: Scales = field(init=False)
    shifts: Shifts = field(init=False)
    bases: dict[int, tuple[int, int]] = field(init=False)  # first scale and shift of unknown outputs, by node
    _wholes: dict[tuple[int, int], int] = field(default_factory=dict)
    _outputs: dict[tuple[int, int, int], Channels] = field(default_factory=dict)
    _inputs: dict[tuple[int, int], Channels | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.roles = Roles(self.graph, {*self.removed, *self.layers}, self.absorbs)
        region = sorted(self._find_region())
        scale_bases, scale_weights = self._number(region, shifts=False)
        shift_bases, shift_weights = self._number(region, shifts=True)
        self.bases = {index: (scale_bases[index], shift_bases[index]) for index in region}
        self.scales, self.shifts = Scales(len(scale_weights)), Shifts(len(shift_weights))
        self.scales.weights, self.shifts.weights = scale_weights, shift_weights
        for index in region:
            self._add_output(self.graph.nodes[index])
        for reader in self._find_readers(region):
            self._add_input(reader)
        self.scales.add_noted()
        self.shifts.add_noted()
        try:
            self.shifts.simplify()
        except Contradiction:  # sums that are not seen to hold together but where nothing changes
            self.shifts.fix_open()
            self.shifts.simplify()

    # unknowns

    def _number(self, region: Sequence[int], *, shifts: bool) -> tuple[dict[int, int], Integers]:
        """Assign numbers to the scales or the shifts: return the first of each node, and how many nodes share each one.

        Nodes that hand on what they read, channel for channel, have the same ones.
        """
        leader = {index: index for index in region}

        def find(index: int) -> int:
            while leader[index] != index:
                index = leader[index]
            return index

        for node in map(self.graph.nodes.__getitem__, region):
            for port in self._hands_on(node, shifts=shifts):
                source = self.find_whole(node, port)
                if source in leader:
                    first, second = sorted((find(node.index), find(source)))
                    leader[second] = first
        sharing = Counter(map(find, region))
        lengths = [self.graph.nodes[first].channels for first in sharing]
        starts = dict(zip(sharing, itertools.accumulate(lengths, initial=0), strict=False))
        return {index: starts[find(index)] for index in region}, np.repeat([*sharing.values()], lengths)

    def find_whole(self, node: Node, port: int) -> int:
        """Return the node whose output another reads on an input, all of it, as it is and alone; -1 where there is
        none.
        """
        key = node.index, port
        if key not in self._wholes:
            edges = [edge for edge in self.graph.inputs(node) if edge.port == port]
            source = self.graph.nodes[edges[0].source] if len(edges) == 1 else None
            is_so = source is not None and source.channels == node.channels and is_whole(edges[0], source)
            self._wholes[key] = edges[0].source if is_so else -1
        return self._wholes[key]

    def _hands_on(self, node: Node, *, shifts: bool) -> tuple[int, ...]:
        """Return the inputs of a node whose scales or shifts are those of its output."""
        if self.roles.is_identity(node):
            return (0,) if node.layer in self.removed else ()
        rule = None if self.roles.takes(node) else self.roles.rule(node)
        passes = rule is not None and (not shifts or rule.shift in (Shift.SAME, Shift.ZERO))
        return rule.ports if rule is not None and passes else ()

    # what belongs together

    def _find_region(self) -> set[int]:
        """Return the nodes whose outputs may be stored otherwise because of the layers."""
        pending = [call for layer in self.layers for call in self.graph.batchnorms[layer]]
        region = {call.index for call in pending}
        while pending:
            for node in self._find_related(pending.pop()):
                if node.index not in region and self.roles.can_store_otherwise(node):
                    region.add(node.index)
                    pending.append(node)
        return region

    def _find_related(self, node: Node) -> Iterator[Node]:
        """Yield the nodes whose outputs may have to be stored otherwise where that of a node is."""
        graph = self.graph
        for edge in graph.outputs(node):
            reader = graph.nodes[edge.target]
            if self.roles.passes(reader, edge.port):
                yield reader
            for call in self._other_calls(reader):
                yield from (graph.nodes[other.source] for other in graph.inputs(call))
        if self.roles.takes(node):
            yield from self._other_calls(node)
        else:
            read = (edge for edge in graph.inputs(node) if self.roles.passes(node, edge.port))
            yield from (graph.nodes[edge.source] for edge in read)

    def _other_calls(self, node: Node) -> Sequence[Node]:
        calls = self.roles.calls_with(node)
        return calls if len(calls) > 1 else ()

    def _find_readers(self, region: Collection[int]) -> Iterator[Node]:
        """Yield all that read the outputs of some nodes, and these nodes, in order."""
        found = {edge.target for index in region for edge in self.graph.outputs(self.graph.nodes[index])} | set(region)
        # further calls of a weight read with it, whatever they read
        found |= {call.index for index in found for call in self._other_calls(self.graph.nodes[index])}
        return (self.graph.nodes[index] for index in sorted(found))

    # equations

    def outputs(self, node: Node) -> Channels:
        """Return the unknowns of a node's output; those that share them give the same arrays."""
        key = (*self.bases.get(node.index, (-1, -1)), node.channels)
        found = self._outputs.get(key)
        if found is None:
            scale, shift, size = key
            if scale < 0:
                found = Channels(np.full(size, self.scales.constant), np.full(size, self.shifts.constant))
            else:
                found = Channels(np.arange(scale, scale + size), np.arange(shift, shift + size))
            self._outputs[key] = found
        return found

    def _some_outputs(self, index: int, channels: Sequence[int]) -> Channels:
        """Return the unknowns of some channels of a node's output."""
        if index not in self.bases:  # its output may have more channels than is known
            size = len(channels)
            return Channels(np.full(size, self.scales.constant), np.full(size, self.shifts.constant))
        whole = self.outputs(self.graph.nodes[index])
        if isinstance(channels, range) and channels.step == 1:
            if len(channels) == len(whole.scales):
                return whole
            part = slice(channels.start, channels.stop)
            return Channels(whole.scales[part], whole.shifts[part])
        which = as_indices(channels)
        return Channels(whole.scales[which], whole.shifts[which])

    def inputs(self, node: Node, port: int) -> Channels | None:
        """Return the unknowns of what a node reads on an input, by its channels; None where channels are not told
        apart.

        Where several tensors meet on one channel they are made equal.
        """
        key = node.index, port
        if key not in self._inputs:
            self._inputs[key] = self._join_sources(node, port)
        return self._inputs[key]

    def _join_sources(self, node: Node, port: int) -> Channels | None:
        edges = [edge for edge in self.graph.inputs(node) if edge.port == port]
        if not edges or any(edge.targets is None for edge in edges):
            return None
        if len(edges) == 1 and is_whole(edges[0], self.graph.nodes[edges[0].source]):
            return self.outputs(self.graph.nodes[edges[0].source])
        ordered = order_runs(edges)
        parts = [self._some_outputs(edge.source, edge.sources) for edge in ordered or edges]
        if ordered:
            scales, shifts = zip(*parts, strict=True)
            return Channels(np.concatenate(scales), np.concatenate(shifts))
        targets = np.concatenate([as_indices(edge.targets or ()) for edge in edges])
        order = np.argsort(targets, kind="stable")
        targets = targets[order]
        first = np.append(True, targets[1:] != targets[:-1])
        found = []
        for unknowns, which in ((self.scales, 0), (self.shifts, 1)):
            sources = np.concatenate([part[which] for part in parts])[order]
            joined = np.full(int(targets[-1]) + 1 if targets.size else 0, unknowns.constant)
            joined[targets[first]] = sources[first]
            again = ~first & (sources != joined[targets])
            if again.any():
                unknowns.equate(sources[again], joined[targets[again]], node.index)
            found.append(joined)
        return Channels(found[0], found[1])

    def _equate(self, one: Channels, other: Channels, origin: int) -> None:
        self.scales.equate(one.scales, other.scales, origin)
        self.shifts.equate(one.shifts, other.shifts, origin)

    def _fix(self, which: Channels, origin: int) -> None:
        self.scales.fix(which.scales, origin)
        self.shifts.fix(which.shifts, origin)

    def _add_output(self, node: Node) -> None:
        """Add what a layer that takes asks of its output: calls of one weight give it stored alike."""
        if not self.roles.takes(node):
            return
        mine = self.outputs(node)
        if not self.takes_shift(node):
            self.shifts.fix(mine.shifts, node.index)
        first, *others = self.roles.calls_with(node)
        for other in others if first is node else ():
            self._equate(self.outputs(other), mine, node.index)

    def _add_input(self, node: Node) -> None:
        """Add what a node asks of all that it reads, by its role."""
        ports = {edge.port for edge in self.graph.inputs(node)}
        if self.roles.is_identity(node):
            read = self.inputs(node, 0)
            if read is None or len(read.scales) != node.channels:
                self._pin_all(node, (0,))
            elif node.layer in self.removed:
                self._equate(read, self.outputs(node), node.index)
        elif self.roles.takes(node):
            self._add_absorber(node)
        else:
            rule = self.roles.rule(node)
            if rule is None:
                for port in ports:
                    self._pin(node, port)
                return
            self._add_rule(node, rule)
            ports -= set(rule.ports)
        for port in ports - {0}:
            self._pin(node, port)

    def _pin(self, node: Node, port: int) -> None:
        """Require what a node reads at a port as it is."""
        for edge in self.graph.inputs(node):
            if edge.port == port and edge.source in self.bases:
                self._fix(self._some_outputs(edge.source, edge.sources), node.index)

    def _pin_all(self, node: Node, ports: Collection[int]) -> None:
        """Require what a node reads and what it gives as they are."""
        for port in ports:
            self._pin(node, port)
        self._fix(self.outputs(node), node.index)

    def _add_absorber(self, node: Node) -> None:
        """Add what a layer that takes asks of its input: no shift into zeros, and calls of one weight read it alike."""
        read = self.inputs(node, 0)
        if read is None or (node.kind is NodeKind.BATCH_NORM and len(read.scales) != node.channels):
            self._pin(node, 0)
            return
        if self._needs_zeros(node) or not self.takes_shift(node):
            self.shifts.fix(read.shifts, node.index)
        first = self.roles.calls_with(node)[0]
        if first is not node:
            same = self.inputs(first, 0)
            if same is None or len(same.scales) != len(read.scales):
                self._pin(node, 0)
                self._pin(first, 0)
                return
            self._equate(read, same, node.index)

    def _needs_zeros(self, node: Node) -> bool:
        return node.padded and (self.changes_padding is None or not self.changes_padding(node))

    def _add_rule(self, node: Node, rule: Rule) -> None:
        """Add what an operation asks of its inputs and its output."""
        given = self.outputs(node)
        read = [self.inputs(node, port) for port in rule.ports]
        known = [one for one in read if one is not None and len(one.scales) == len(given.scales)]
        if len(known) < len(read):
            self._pin_all(node, rule.ports)
            return
        for one in known:
            self.scales.equate(one.scales, given.scales, node.index)
            if rule.shift is Shift.SAME:
                self.shifts.equate(one.shifts, given.shifts, node.index)
        if rule.positive:
            self.scales.require_positive(given.scales, node.index)
        if rule.unscaled:
            self.scales.fix(given.scales, node.index)
        if rule.shift is Shift.SUM:
            self._add_sum(node, given.shifts, (known[0].shifts, known[1].shifts))
        elif rule.shift is Shift.SCALED and (factors := self._find_usable_factors(node)) is not None:
            self._scale_shifts(given.shifts, known[0].shifts, np.broadcast_to(factors, len(given.shifts)), node.index)
        elif rule.shift in (Shift.ZERO, Shift.SCALED):
            self.shifts.fix(given.shifts, node.index)
            self.shifts.fix(known[0].shifts, node.index)

    def _add_sum(self, node: Node, total: Integers, parts: tuple[Integers, Integers]) -> None:
        """Add that shifts are summed up; an operand that is made for the sum alone makes up for what is left."""
        weights = node.factors or (1.0, 1.0)
        ports = sorted((0, 1), key=lambda port: self.find_whole(node, port) < 0)  # parts of a tensor last
        own = next((port for port in ports if weights[port] and self._is_made_for(node, port)), None)
        if own is None:
            self.shifts.add_sums(total, parts, (weights[0], weights[1]), node.index)
        else:
            other = 1 - own
            self.shifts.hold_sums(total, (parts[own], parts[other]), (weights[own], weights[other]))

    def _find_usable_factors(self, node: Node) -> Array | None:
        """Return the factors with which a shift passes; None where they are not known."""
        factors = self.find_factors(node)
        return factors if factors is not None and len(factors) in (1, node.channels) else None

    def _scale_shifts(self, given: Integers, read: Integers, factors: Array, origin: int) -> None:
        """Add given = factor * read; where the factor is zero, what is read may have any."""
        passes = factors != 0
        self.shifts.fix(given[~passes], origin)
        factor, offset = factors[passes], np.zeros(int(passes.sum()))
        self.shifts.link(given[passes], read[passes], factor=factor, offset=offset, origin=origin)

    def _is_made_for(self, reader: Node, port: int) -> bool:
        """Return whether a layer that can take any shift gives what a node reads, to that node alone."""
        edges = [edge for edge in self.graph.inputs(reader) if edge.port == port]
        if len(edges) != 1 or edges[0].targets != range(reader.channels):
            return False
        (edge,), node = edges, self.graph.nodes[edges[0].source]
        if any(other is not edge and overlap(other.sources, edge.sources) for other in self.graph.outputs(node)):
            return False
        while node.layer in self.removed and node.kind is NodeKind.BATCH_NORM:
            index = self.find_whole(node, 0)
            node = self.graph.nodes[index]
            if index < 0 or len(self.graph.outputs(node)) != 1:
                return False
        return node.index in self.bases and len(self.roles.calls_with(node)) == 1 and self.takes_shift(node)

    def _join(self, call: Node, scale: Array, shift: Array) -> None:
        """Add the equations of a BatchNorm that disappears."""
        read = self.inputs(call, 0)
        given = self.outputs(call)
        if read is None or len(read.scales) != len(given.scales):
            raise Stuck(f"one channel of what it reads meets several channels of {call.describe()}")
        origins = np.full(len(scale), call.index)
        scales = Equations(read.scales, given.scales, scale, np.zeros(len(scale)), origins)
        shifts = Equations(read.shifts, given.shifts, 1 / scale, shift / scale, origins)
        sides = self.scales.look_at(scales)
        try:
            known = self.shifts.look_at(shifts)
        except Contradiction:
            if not self.scales.are_apart(sides):  # they may not hold either, which is said first
                self.scales.add(scales, sides)
            raise
        self.scales.add(scales, sides)
        self.shifts.add(shifts, known)

    # what disappears and what stays

    def remove(self, layer: str, scale: Array, shift: Array, *, object_to: Callable[[], str] = str) -> None:
        """Let a BatchNorm disappear, or leave everything as it was.

        Args:
            object_to: called once the equations hold; what it says is against it, if anything.

        Raises:
            Stuck: that holds for no transform, or is objected to.
        """
        zero = scale == 0
        if zero.any():
            raise Stuck(f"its scale is zero in {_count(zero)}")
        before = self.mark()
        try:
            for call in self.graph.batchnorms[layer]:
                self._join(call, scale, shift)
            self.shifts.simplify()
            if objection := object_to():
                raise Stuck(objection)
        except (Contradiction, Stuck) as problem:
            self.return_to(before)
            if isinstance(problem, Stuck):
                raise
            raise Stuck(self._explain(problem, layer, scale)) from problem
        self.gone = (*self.gone, layer)

    def mark(self) -> Mark:
        """Return the state of now."""
        return Mark(self.scales.mark(), self.shifts.mark(), self.gone)

    def return_to(self, mark: Mark) -> None:
        """Take back what was removed and kept since."""
        self.scales.return_to(mark.scales)
        self.shifts.return_to(mark.shifts)
        self.gone = mark.gone

    def settled_shift(self, node: Node) -> Array | None:
        """Return the shifts of what a node reads where the equations so far settle them, and zero elsewhere."""
        read = self.inputs(node, 0)
        return None if read is None else self.shifts.settled(read.shifts)

    def keep(self, layer: str, *, absorbs: bool) -> None:
        """Let a BatchNorm stay.

        Args:
            absorbs: it takes what is left on either side, the same in each of its calls.

        Raises:
            Stuck: something that was removed needs it to take something, and it cannot.
        """
        first, *others = self.graph.batchnorms[layer]
        if absorbs and not others:
            return
        before = self.mark()
        try:
            for call in others if absorbs else (first, *others):
                if not absorbs:
                    self._pin_all(call, (0,))
                    continue
                pairs = ((self.outputs(call), self.outputs(first)), (self.inputs(call, 0), self.inputs(first, 0)))
                for mine, theirs in pairs:
                    if mine is not None and theirs is not None:
                        self._equate(mine, theirs, call.index)
            self.shifts.simplify()
        except Contradiction as problem:
            self.return_to(before)
            raise Stuck(self._explain(problem, layer, np.ones(1))) from problem

    def keep_paddings(self) -> None:
        """Let each padding that could change, and need not, stay what it is: called when all is decided."""
        for node in itertools.chain.from_iterable(self.roles.calls.values()):
            read = self.inputs(node, 0) if node.padded and not self._needs_zeros(node) else None
            if read is None:
                continue
            before = self.shifts.mark()
            try:
                self.shifts.fix(read.shifts, node.index)
                self.shifts.simplify()
            except Contradiction:
                self.shifts.return_to(before)

    def _explain(self, problem: Contradiction, layer: str, scale: Array) -> str:
        own = {call.index for call in self.graph.batchnorms[layer]}
        nodes = [self.graph.nodes[index] for index in sorted(problem.origins - own)]
        if problem.is_sign:
            nodes = [node for node in nodes if (rule := self.roles.rule(node)) and rule.positive] or nodes
        found = dict.fromkeys(self._name(node) for node in nodes)
        found = found or dict.fromkeys(map(self._name, self._find_other_readers(layer)))
        names, several = " and ".join(found) or "what lies around it", len(found) > 1
        if problem.is_sign:
            negative = scale < 0
            if negative.any():
                passes = "pass" if several else "passes"
                return f"negative scale in {_count(negative)}: {names} {passes} positive ones only"
            return f"{names} {'need' if several else 'needs'} scales of one sign"
        channels = problem.channels
        is_told = channels is not None and len(channels) == len(scale) and not channels.all()
        some = f" in {_count(channels)}" if channels is not None and is_told else ""
        return f"{names} {'do' if several else 'does'} not let it pass{some}"

    def _find_other_readers(self, layer: str) -> Iterator[Node]:
        """Yield the other readers of what a BatchNorm reads."""
        calls = self.graph.batchnorms[layer]
        sources = {edge.source for call in calls for edge in self.graph.inputs(call)}
        own = {call.index for call in calls}
        for source in sorted(sources):
            for edge in self.graph.outputs(self.graph.nodes[source]):
                if edge.target not in own:
                    yield self.graph.nodes[edge.target]

    def _name(self, node: Node) -> str:
        if node.kind is NodeKind.CONV_TRANSPOSE and node.padded:
            return f"{node.describe()}, not all of whose taps meet every position,"
        if node.kind.is_producer and node.padded:
            return f"{node.describe()}, which reads zeros beyond the border,"
        return node.describe()


def _count(channels: Array | np.ndarray) -> str:
    return f"{int(np.sum(channels))} of {len(channels)} channels"
