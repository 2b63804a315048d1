"""Folding BatchNorms that no single neighbour can take: tensors around them are stored as a (x + b).

First the identity branches, which a convolution beside them takes on no condition; then every BatchNorm whose equations
hold together with those before it (:mod:`bntool.folding.transforms.channel_transforms`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bntool.checkpoints.arrays import to_float64
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import FLOAT32, FLOAT64
from bntool.checkpoints.tensors import read_bytes
from bntool.folding.absorption import Blocked
from bntool.folding.folds import Fold, Level
from bntool.folding.producers import Addend, Producer, read_addend, read_parameter, read_producer
from bntool.folding.scale_and_shift import ScaleAndShift
from bntool.folding.transforms.aliasing import is_private
from bntool.folding.transforms.branches import IdentityBranch, find_branch
from bntool.folding.transforms.channel_transforms import (
    ChannelTransforms,
    Mark,
    Stuck,
    Transform,
    as_indices,
    is_whole,
    read_factors,
)
from bntool.folding.transforms.operations import Shift, find_rule
from bntool.folding.transforms.padding_values import PaddingValues
from bntool.folding.transforms.unknowns import Array
from bntool.graphs.graph import ModelGraph, Node, NodeKind, Owner
from bntool.representation import format_number
from bntool.verification.stored_outputs import StoredOutput

Target = Producer | ScaleAndShift | Addend

# how many times the spread of what is stored a shift may be, by the dtype that it is rounded in: in float32 that costs
# at most 2^-13 of the spread, in float64 2^-31
_MOST = {FLOAT64: 2.0**22, FLOAT32: 2.0**11}
_MOST_IN_HALF = 8.0
_SURE = 2.0**-36  # how far shifts may miss what a BatchNorm asks of them, in relation to the terms
_BATCHNORM = "BatchNorm "  # before the name of a target that is one: a weight may have the same


@dataclass
class Outcome:
    """The result of trying what folds if tensors are stored otherwise.

    Attributes:
        folds: one for each BatchNorm that is the identity by now.
        targets: what took something, by the name of its weight, of the BatchNorm or of the addend.
        stored: by layer how its output is stored now, where that is otherwise than before.
        changed: layers whose output is something else by now: a branch beside them went into them.
        reasons: for each BatchNorm that is left what stands in the way.
        paddings: by the names of weights what convolutions pad with instead of zeros.
    """

    folds: dict[str, Fold] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    stored: dict[str, StoredOutput] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    paddings: dict[str, PaddingValues] = field(default_factory=dict)


class _GivenUp(Exception):  # noqa: N818 an answer, not an error of the program
    """A fold that holds in numbers of any size, and not in those of the file."""

    def __init__(self, layers: Sequence[str], detail: str, node: Node | None = None) -> None:
        super().__init__(detail)
        self.layers, self.detail, self.node = layers, detail, node


@dataclass
class _Removal:
    """BatchNorms that are let disappear one after the other, and what was decided of them so far.

    Attributes:
        system: what they have to hold together with.
        order: all of them, as they are tried.
        tried: the state before each that was tried, in that order.
        stuck: those that stay, and why.
    """

    system: ChannelTransforms
    order: Sequence[str]
    tried: dict[str, Mark] = field(default_factory=dict)
    stuck: dict[str, str] = field(default_factory=dict)

    def without(self, layers: Collection[str]) -> _Removal:
        """Return to where the first of some was tried: what was decided before holds without them, too."""
        kept = dict(itertools.takewhile(lambda one: one[0] not in layers, self.tried.items()))
        first = next(layer for layer in self.tried if layer not in kept)
        self.system.return_to(self.tried[first])
        return _Removal(self.system, self.order, kept, {one: why for one, why in self.stuck.items() if one in kept})


@dataclass
class StoringOtherwise:
    """One attempt on a graph.

    Attributes:
        graph, state_dict: what is folded.
        transforms: every BatchNorm that may be changed, as it is by now.
        producers: convolutions and linears that have taken something.
        removed: BatchNorms that are the identity by now.
        first: BatchNorms that are tried before others: they fold without another padding.
        change_padding: convolutions that pad with zeros by themselves may pad with other values.
    """

    graph: ModelGraph
    state_dict: StateDict
    transforms: Mapping[str, ScaleAndShift]
    producers: Mapping[str, Producer]
    removed: frozenset[str]
    first: frozenset[str] = frozenset()
    change_padding: bool = False
    _known: dict[str, Target | None] = field(default_factory=dict, init=False)
    _calls: dict[str, set[int]] = field(default_factory=dict, init=False)
    _branches: dict[str, IdentityBranch] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            if node.kind.is_producer and "weight" in node.parameters:
                self._calls.setdefault(node.parameters["weight"], set()).add(node.index)

    def fold(self, layers: Sequence[str]) -> Outcome:
        """Fold what can be of these BatchNorms, in this order."""
        for layer in layers:
            branch = find_branch(self.graph, layer, removed=self.removed, absorbs=self._takes_a_branch)
            if branch is not None:
                self._branches[layer] = branch
        given_up: dict[str, str] = {}
        removal: _Removal | None = None
        while True:
            outcome = Outcome(reasons=dict(given_up))
            rest = [layer for layer in layers if layer not in self._branches and layer not in given_up]
            try:
                if removal is None and rest:
                    removal = self._begin(rest)
                system = None if removal is None else self._solve(removal, given_up, outcome)
                self._transform(system, outcome)
            except _GivenUp as problem:
                given_up.update(dict.fromkeys(problem.layers, problem.detail))
                if removal is not None and all(layer in removal.tried for layer in problem.layers):
                    simple = all(map(self._can_stay, problem.layers))
                    removal = removal.without(problem.layers) if simple else None
                else:
                    removal = None
                for layer in problem.layers:
                    self._branches.pop(layer, None)
                continue
            return outcome

    # what can take something

    def _read(self, node: Node) -> Target | None:
        """Return a node's parameters with all that they took before; None where something else uses them."""
        if node.kind is NodeKind.BATCH_NORM:
            own = self.transforms.get(node.layer)
            usable = own is not None and (own.can_absorb or node.layer in self._branches)
            return own if usable and node.layer not in self.removed else None
        name = _name_of(node)
        if name not in self._known:
            self._known[name] = self._read_parameters(node)
        return self._known[name]

    def _read_parameters(self, node: Node) -> Producer | Addend | None:
        weight = node.parameters.get("weight")
        calls = {node.index} if node.kind is NodeKind.BIAS else self._calls.get(weight or "", set())
        names = node.parameters.values()
        if node.kind is not NodeKind.BIAS and (weight is None or "bias" in node.computed):
            return None
        if any(name in self.graph.tied or self.graph.uses.get(name, frozenset()) != calls for name in names):
            return None
        end = len(self.graph.nodes) if self.graph.branches_at is None else self.graph.branches_at
        if any(self.graph.nodes[index].parameters != node.parameters or index > end for index in calls):
            return None  # one of them takes other parameters, or other inputs may not come to it
        try:
            if node.kind is NodeKind.BIAS:
                return read_addend(node, self.state_dict)
            return self.producers.get(weight or "") or read_producer(node, self.state_dict)
        except Blocked:
            return None

    def _absorbs(self, node: Node) -> bool:
        return self._read(node) is not None

    def _takes_shift(self, node: Node) -> bool:
        target = self._read(node)
        return not isinstance(target, Producer) or target.can_take_shift

    def _takes_a_branch(self, node: Node) -> bool:
        once = len(self._calls.get(node.parameters.get("weight", ""), ())) == 1
        return once and self._absorbs(node) and self._takes_shift(node)

    def _find_factors(self, node: Node) -> Array | None:
        """Return the factors of a linear map of each channel, also where they are a parameter of the file; None where
        they are not known, or the forward does something else with that parameter, which may change it.
        """
        known = read_factors(node)
        found = [(role, name) for role, name in node.parameters.items() if role in ("factor", "divisor")]
        if known is not None or not found:
            return known
        ((role, name),) = found
        users = (self.graph.nodes[index] for index in self.graph.uses.get(name, frozenset()))
        if name in self.graph.tied or not all(
            name in user.parameters.values() and user.kind is not NodeKind.OTHER for user in users
        ):
            return None
        try:
            numbers = read_parameter(name, self.state_dict)
        except Blocked:
            return None
        if role == "divisor":
            with np.errstate(divide="ignore", over="ignore"):
                numbers = 1 / numbers
        return numbers if np.isfinite(numbers).all() else None

    # equations

    def _begin(self, layers: Sequence[str]) -> _Removal:
        changes = self._changes_padding if self.change_padding else None
        system = ChannelTransforms(
            self.graph, frozenset(layers), self.removed, self._absorbs, self._takes_shift, changes, self._find_factors
        )
        return _Removal(system, sorted(layers, key=self._order))

    def _solve(self, removal: _Removal, given_up: Collection[str], outcome: Outcome) -> ChannelTransforms | None:
        """Let BatchNorms disappear one after the other; None where none does."""
        system = removal.system
        for layer in removal.order:
            if layer not in given_up and layer not in removal.tried:
                self._try(removal, layer)
            if problem := removal.stuck.get(layer):
                outcome.reasons[layer] = problem
            elif layer not in given_up:
                outcome.folds[layer] = Fold(layer, (), Level.TRANSFORM, stays=False)
        if not outcome.folds:
            return None
        system.close()
        if self.change_padding:
            system.keep_paddings()
        for layer in outcome.folds:
            noise = self._find_noise(system, layer)
            if noise:
                raise _GivenUp([layer], noise)
        return system

    def _try(self, removal: _Removal, layer: str) -> None:
        own, system = self.transforms[layer], removal.system
        removal.tried[layer] = system.mark()
        try:
            system.remove(layer, own.scale, own.shift, object_to=partial(self._find_settled_noise, system, layer))
        except Stuck as stuck:
            removal.stuck[layer] = stuck.detail
            try:
                system.keep(layer, absorbs=own.can_absorb)
            except Stuck:
                why = "it stays, and cannot take what others leave"
                raise _GivenUp([*system.gone, layer], why) from stuck

    def _changes_padding(self, node: Node) -> bool:
        """Return whether the module that pads is called as a module, and pads nothing else."""
        return node.pads_itself and node.layer in self.graph.ran

    def _order(self, layer: str) -> tuple[bool, bool]:
        """Order layers: first those that fold anyway, then those that could not stay as they please."""
        return layer not in self.first, self._can_stay(layer)

    def _can_stay(self, layer: str) -> bool:
        return self.transforms[layer].can_absorb and len(self.graph.batchnorms[layer]) == 1

    def _find_noise(self, system: ChannelTransforms, layer: str) -> str:
        """Say where rounding of what is stored matters to those who read it beside this BatchNorm, if anywhere, or
        where shifts that follow from one another could not be computed.
        """
        own = self.transforms[layer]
        for call in self.graph.batchnorms[layer]:
            read = system.input(call)
            if read is None:
                continue
            if noise := self._describe_noise(system, call, read.shift):
                return noise
            # one that follows from another in units 10^14 times as large has lost its digits
            terms = system.output(call).shift, own.shift, -own.scale * read.shift
            far = np.abs(sum(terms)) > _SURE * sum(map(np.abs, terms))
            if far.any():
                where = f"in {int(far.sum())} of {len(far)} channels"
                return f"scales around it are too far apart {where} to compute its shift from others in float64"
        return ""

    def _find_settled_noise(self, system: ChannelTransforms, layer: str) -> str:
        """Say the same while more BatchNorms may be added, of the shifts that none of them can change any more.

        What is refused here need not be solved for again without it.
        """
        for call in self.graph.batchnorms[layer]:
            shift = system.settled_shift(call)
            if shift is not None and (noise := self._describe_noise(system, call, shift)):
                return noise
        return ""

    def _describe_noise(self, system: ChannelTransforms, call: Node, shift: Array) -> str:
        name = self.transforms[call.layer].names["running_var"]
        tensor = self.state_dict.tensor(name)
        spread = np.sqrt(to_float64(read_bytes(tensor), tensor.dtype) + self.transforms[call.layer].eps)
        far = np.abs(shift) > _MOST.get(tensor.dtype, _MOST_IN_HALF) * spread
        if not far.any() or self._is_alone(system, call):
            return ""
        worst = format_number(float((np.abs(shift) / spread).max()), 2)
        where = f"in {int(far.sum())} of {len(far)} channels too much for {tensor.dtype} where others read that, too"
        return f"its shift is up to {worst} times the spread of what it reads, {where}"

    def _is_alone(self, system: ChannelTransforms, node: Node) -> bool:
        """Return whether what a node reads is made for it alone, by what is called once: only it notices the
        rounding.
        """
        if not is_private(self.graph, node):
            return False
        for edge in self.graph.inputs(node):
            source = self.graph.nodes[edge.source]
            once = len(self._calls.get(source.parameters.get("weight", ""), ())) == 1
            if not (source.kind.is_producer and once) and not (
                system.passes(source, 0) and self._is_alone(system, source)
            ):
                return False
        return True

    # what becomes of the tensors

    def _transform(self, system: ChannelTransforms | None, outcome: Outcome) -> None:
        if system is not None:
            for layer, fold in outcome.folds.items():
                outcome.folds[layer] = described = self._describe(system, layer, fold)
                if not described.into:
                    raise _GivenUp([layer], "nothing that takes it reads its output")
            self._transform_absorbers(system, outcome)
            self._transform_addends(system, outcome)
            outcome.stored.update(self._find_stored(system, outcome))
        for layer, branch in self._branches.items():
            self._merge(branch, system, outcome)
            name = branch.convolution.layer or _name_of(branch.convolution)
            outcome.folds[layer] = Fold(layer, (name,), Level.BRANCH, False, (name,), (name,))
        for target in (*outcome.targets.values(), *outcome.paddings.values()):
            try:
                target.check(self.state_dict)
            except Blocked as blocked:
                name = target.node.layer or _name_of(target.node)
                raise _GivenUp(self._find_layers(outcome, name), f"it would not fit: {blocked.detail}") from blocked

    def _find_layers(self, outcome: Outcome, name: str) -> Sequence[str]:
        """Find the layers whose fold is given up because something else does not take it."""
        own = [layer for layer, fold in outcome.folds.items() if name in fold.into]
        return own or [next(reversed(outcome.folds))]

    def _transform_absorbers(self, system: ChannelTransforms, outcome: Outcome) -> None:
        changes = self.change_padding
        for node in system.absorbers():
            if node.kind is NodeKind.BATCH_NORM and node.layer in self._branches:
                continue
            around = (node, *(self.graph.nodes[edge.source] for edge in self.graph.inputs(node)))
            if not any(map(system.is_changed, around)):
                continue
            target = self._read(node)
            read, given = system.input(node), system.output(node)
            if target is None or (given.is_identity and (read is None or read.is_identity)):
                continue
            if isinstance(target, Producer):
                outcome.targets[_name_of(node)] = target.transform(read, given, self.state_dict)
                if (
                    changes and self._changes_padding(node) and read is not None and read.has_shift
                ):  # zero is stored as this
                    outcome.paddings[_name_of(node)] = PaddingValues(node, read.scale * read.shift)
            elif isinstance(target, ScaleAndShift):
                outcome.targets[_BATCHNORM + node.layer] = target.transform(read, given)

    def _transform_addends(self, system: ChannelTransforms, outcome: Outcome) -> None:
        for index in system.bases:
            node = self.graph.nodes[index]
            target = self._read(node) if node.kind is NodeKind.BIAS else None
            read = system.input(node) if isinstance(target, Addend) else None
            if isinstance(target, Addend) and read is not None:
                given = system.output(node)
                if not (read.is_identity and given.is_identity):
                    outcome.targets[_name_of(node)] = target.transform(read, given)

    def _merge(self, branch: IdentityBranch, system: ChannelTransforms | None, outcome: Outcome) -> None:
        """Let a convolution take the BatchNorm beside it, whose output becomes what it reads."""
        own, name = self.transforms[branch.call.layer], _name_of(branch.convolution)
        scale, shift = own.scale, own.shift
        if system is not None:
            read, given = system.input(branch.call), system.output(branch.call)
            assert read is not None
            shift = given.scale * (shift + given.shift - scale * read.shift)
            scale = given.scale * scale / read.scale
        target = outcome.targets.get(name) or self._read(branch.convolution)
        assert isinstance(target, Producer)
        outcome.targets[name] = target.add_identity(branch.factor * (scale - 1), branch.factor * shift)
        outcome.changed |= {branch.call.layer, branch.convolution.layer, *branch.passed}

    def _find_stored(self, system: ChannelTransforms, outcome: Outcome) -> Iterator[tuple[str, StoredOutput]]:
        nodes = (self.graph.nodes[index] for index in system.bases)
        changed = {node.layer for node in nodes if system.is_changed(node)} - {""}
        by_layer: dict[str, list[tuple[Node, Transform]]] = {}
        for node in self.graph.nodes:  # all calls of each, also those that nothing changes
            if node.layer in changed and (node.kind.is_producer or node.kind is NodeKind.BATCH_NORM):
                by_layer.setdefault(node.layer, []).append((node, system.output(node)))
        for layer, found in by_layer.items():
            (node, first), *others = found
            if all(one.is_identity for _, one in found):
                continue
            same = all(
                np.array_equal(one.scale, first.scale) and np.array_equal(one.shift, first.shift) for _, one in others
            )
            axis = -1 if node.kind in (NodeKind.LINEAR, NodeKind.MATMUL) else 1
            if same:
                yield layer, StoredOutput(first.scale, first.shift, axis)
            else:  # which call stores it in which way is not told apart afterwards
                outcome.changed.add(layer)

    # what took it, in words

    def _describe(self, system: ChannelTransforms, layer: str, fold: Fold) -> Fold:
        takers = _Takers(self, system)
        for call in self.graph.batchnorms[layer]:
            takers.look_ahead(call)
            takers.look_back(call)
        scale, shift = tuple(takers.scale), tuple(takers.shift)
        into = tuple(dict.fromkeys((*takers.before, *takers.after)))
        return Fold(layer, into, Level.TRANSFORM, fold.stays, scale, shift)


@dataclass
class _Takers:
    """The layers next to a BatchNorm that take its scale, and those that take its shift."""

    around: StoringOtherwise
    system: ChannelTransforms
    scale: dict[str, None] = field(default_factory=dict)
    shift: dict[str, None] = field(default_factory=dict)
    before: dict[str, None] = field(default_factory=dict)
    after: dict[str, None] = field(default_factory=dict)
    seen: set[tuple[int, bool]] = field(default_factory=set)

    def look_ahead(self, node: Node) -> None:
        if (node.index, True) in self.seen:
            return
        self.seen.add((node.index, True))
        graph = self.around.graph
        for edge in graph.outputs(node):
            reader = graph.nodes[edge.target]
            if self.system.takes(reader):
                read = self.system.input(reader) if edge.port == 0 and edge.targets is not None else None
                if read is not None:
                    if not is_whole(edge, node):
                        mine = as_indices(edge.targets or ())
                        read = Transform(read.scale[mine], read.shift[mine])
                    self._note(reader, read, self.after)
            elif self.system.passes(reader, edge.port):
                self.look_ahead(reader)

    def look_back(self, node: Node) -> None:
        if (node.index, False) in self.seen:
            return
        self.seen.add((node.index, False))
        graph = self.around.graph
        sources = [graph.nodes[edge.source] for edge in graph.inputs(node) if self.system.passes(node, edge.port)]
        # of a sum the operand that takes the difference, not all that was summed up before
        near = [source for source in sources if self._ends_at(source)]
        alone = [source for source in near if len(graph.outputs(source)) == 1]
        near = alone or near
        for source in near or sources:
            if self.system.takes(source):
                self._note(source, self.system.output(source), self.before)
                continue
            rule = find_rule(source)
            if rule is not None and rule.shift is Shift.FREE and self.around._absorbs(source):
                name = _name_of(source)
                self.shift[name] = self.before[name] = None
            self.look_back(source)

    def _ends_at(self, source: Node) -> bool:
        graph = self.around.graph
        while source.kind is NodeKind.BATCH_NORM and source.layer in self.around.removed:
            edges = graph.inputs(source)
            if len(edges) != 1:
                return False
            source = graph.nodes[edges[0].source]
        return self.system.takes(source)

    def _note(self, node: Node, stored: Transform, where: dict[str, None]) -> None:
        name = node.layer or _name_of(node)
        if stored.has_scale:
            self.scale[name] = where[name] = None
        if stored.has_shift:
            self.shift[name] = where[name] = None


def _name_of(node: Node) -> str:
    role = "bias" if node.kind is NodeKind.BIAS else "weight"
    return node.parameters.get(role, "")


def can_be_tried(own: ScaleAndShift) -> bool:
    """Return whether the identity can take the place of a BatchNorm."""
    return own.owner is not Owner.PART
