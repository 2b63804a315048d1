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
from bntool.folding.channels import Array
from bntool.folding.folds import Fold, Level
from bntool.folding.producers import Addend, Producer
from bntool.folding.scale_and_shift import ScaleAndShift
from bntool.folding.transforms.aliasing import is_private
from bntool.folding.transforms.branches import IdentityBranch, find_branch
from bntool.folding.transforms.channel_transforms import ChannelTransforms, Mark, Stuck
from bntool.folding.transforms.padding_values import PaddingValues
from bntool.folding.transforms.roles import Roles
from bntool.folding.transforms.solution import Solution
from bntool.folding.transforms.takers import describe_fold
from bntool.folding.transforms.targets import Target, Targets, name_of
from bntool.folding.transforms.transform import Transform
from bntool.graphs.graph import ModelGraph, Node, NodeKind, Owner
from bntool.representation import format_number
from bntool.verification.stored_outputs import StoredOutput

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

    def __init__(self, layers: Sequence[str], detail: str) -> None:
        super().__init__(detail)
        self.layers, self.detail = layers, detail


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
    targets: Targets = field(init=False)
    _branches: dict[str, IdentityBranch] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.targets = Targets(
            self.graph, self.state_dict, self.transforms, self.producers, self.removed, self._branches
        )

    def fold(self, layers: Sequence[str]) -> Outcome:
        """Fold what can be of these BatchNorms, in this order."""
        for layer in layers:
            branch = find_branch(self.graph, layer, removed=self.removed, absorbs=self.targets.takes_branch)
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
                self._transform(None if removal is None else self._solve(removal, given_up, outcome), outcome)
            except _GivenUp as problem:
                given_up.update(dict.fromkeys(problem.layers, problem.detail))
                if removal is not None and all(one in removal.tried and self._can_stay(one) for one in problem.layers):
                    removal = removal.without(problem.layers)
                else:
                    removal = None
                for layer in problem.layers:
                    self._branches.pop(layer, None)
            else:
                return outcome

    # equations

    def _begin(self, layers: Sequence[str]) -> _Removal:
        targets = self.targets
        system = ChannelTransforms(
            self.graph,
            frozenset(layers),
            self.removed,
            targets.absorbs,
            targets.takes_shift,
            targets.changes_padding if self.change_padding else None,
            targets.find_factors,
        )
        return _Removal(system, sorted(layers, key=self._order))

    def _solve(self, removal: _Removal, given_up: Collection[str], outcome: Outcome) -> Solution | None:
        """Let BatchNorms disappear one after the other; None where none does."""
        system = removal.system
        for layer in removal.order:
            if layer not in given_up and layer not in removal.tried:
                self._try(removal, layer)
        outcome.reasons.update(removal.stuck)
        if not system.gone:
            return None
        if self.change_padding:
            system.keep_paddings()
        solution = Solution(system)
        for layer in system.gone:
            if noise := self._find_noise(solution, layer):
                raise _GivenUp([layer], noise)
        return solution

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

    def _order(self, layer: str) -> tuple[bool, bool]:
        """Order layers: first those that fold anyway, then those that could not stay as they please."""
        return layer not in self.first, self._can_stay(layer)

    def _can_stay(self, layer: str) -> bool:
        return self.transforms[layer].can_absorb and len(self.graph.batchnorms[layer]) == 1

    def _find_noise(self, solution: Solution, layer: str) -> str:
        """Say where rounding of what is stored matters to those who read it beside this BatchNorm, if anywhere, or
        where shifts that follow from one another could not be computed.
        """
        own = self.transforms[layer]
        for call in self.graph.batchnorms[layer]:
            read = solution.input(call)
            if read is None:
                continue
            if noise := self._describe_noise(solution.roles, call, read.shift):
                return noise
            # one that follows from another in units 10^14 times as large has lost its digits
            terms = solution.output(call).shift, own.shift, -own.scale * read.shift
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
            if shift is not None and (noise := self._describe_noise(system.roles, call, shift)):
                return noise
        return ""

    def _describe_noise(self, roles: Roles, call: Node, shift: Array) -> str:
        if not np.count_nonzero(shift):
            return ""
        name = self.transforms[call.layer].names["running_var"]
        tensor = self.state_dict.tensor(name)
        spread = np.sqrt(to_float64(read_bytes(tensor), tensor.dtype) + self.transforms[call.layer].eps)
        far = np.abs(shift) > _MOST.get(tensor.dtype, _MOST_IN_HALF) * spread
        if not far.any() or self._is_alone(roles, call):
            return ""
        worst = format_number(float((np.abs(shift) / spread).max()), 2)
        where = f"in {int(far.sum())} of {len(far)} channels too much for {tensor.dtype} where others read that, too"
        return f"its shift is up to {worst} times the spread of what it reads, {where}"

    def _is_alone(self, roles: Roles, node: Node) -> bool:
        """Return whether what a node reads is made for it alone, by what is called once: only it notices the
        rounding.
        """
        if not is_private(self.graph, node):
            return False
        for edge in self.graph.inputs(node):
            source = self.graph.nodes[edge.source]
            is_made = source.kind.is_producer and self.targets.is_called_once(source)
            if not is_made and not (roles.passes(source, 0) and self._is_alone(roles, source)):
                return False
        return True

    # what becomes of the tensors

    def _transform(self, solution: Solution | None, outcome: Outcome) -> None:
        if solution is not None:
            for layer in solution.system.gone:
                outcome.folds[layer] = describe_fold(solution, layer)
                if not outcome.folds[layer].into:
                    raise _GivenUp([layer], "nothing that takes it reads its output")
            self._transform_absorbers(solution, outcome)
            self._transform_addends(solution, outcome)
            outcome.stored.update(self._find_stored(solution, outcome))
        for layer, branch in self._branches.items():
            self._merge(branch, solution, outcome)
            name = branch.convolution.layer or name_of(branch.convolution)
            outcome.folds[layer] = Fold(layer, (name,), Level.BRANCH, False, (name,), (name,))
        for target in (*outcome.targets.values(), *outcome.paddings.values()):
            try:
                target.check(self.state_dict)
            except Blocked as blocked:
                name = target.node.layer or name_of(target.node)
                raise _GivenUp(self._find_layers(outcome, name), f"it would not fit: {blocked.detail}") from blocked

    def _find_layers(self, outcome: Outcome, name: str) -> Sequence[str]:
        """Find the layers whose fold is given up because something else does not take it."""
        own = [layer for layer, fold in outcome.folds.items() if name in fold.into]
        return own or [next(reversed(outcome.folds))]

    def _transform_absorbers(self, solution: Solution, outcome: Outcome) -> None:
        for node in solution.absorbers():
            target = self.targets.read(node)
            read, given = solution.input(node), solution.output(node)
            if target is None or node.layer in self._branches or _are_identities(read, given):
                continue
            if isinstance(target, ScaleAndShift):
                outcome.targets[_BATCHNORM + node.layer] = target.transform(read, given)
            elif isinstance(target, Producer):
                outcome.targets[name_of(node)] = target.transform(read, given, self.state_dict)
                if self.change_padding and self.targets.changes_padding(node) and read is not None and read.has_shift:
                    # zero is stored as this
                    outcome.paddings[name_of(node)] = PaddingValues(node, read.scale * read.shift)

    def _transform_addends(self, solution: Solution, outcome: Outcome) -> None:
        for index in solution.system.bases:
            node = self.graph.nodes[index]
            target = self.targets.read(node) if node.kind is NodeKind.BIAS else None
            read = solution.input(node) if isinstance(target, Addend) else None
            if isinstance(target, Addend) and read is not None and not _are_identities(read, solution.output(node)):
                outcome.targets[name_of(node)] = target.transform(read, solution.output(node))

    def _merge(self, branch: IdentityBranch, solution: Solution | None, outcome: Outcome) -> None:
        """Let a convolution take the BatchNorm beside it, whose output becomes what it reads."""
        own, name = self.transforms[branch.call.layer], name_of(branch.convolution)
        scale, shift = own.scale, own.shift
        if solution is not None:
            read, given = solution.input(branch.call), solution.output(branch.call)
            assert read is not None
            shift = given.scale * (shift + given.shift - scale * read.shift)
            scale = given.scale * scale / read.scale
        target = outcome.targets.get(name) or self.targets.read(branch.convolution)
        assert isinstance(target, Producer)
        outcome.targets[name] = target.add_identity(branch.factor * (scale - 1), branch.factor * shift)
        outcome.changed |= {branch.call.layer, branch.convolution.layer, *branch.passed}

    def _find_stored(self, solution: Solution, outcome: Outcome) -> Iterator[tuple[str, StoredOutput]]:
        nodes = (self.graph.nodes[index] for index in solution.system.bases)
        changed = {node.layer for node in nodes if solution.is_changed(node)} - {""}
        by_layer: dict[str, list[tuple[Node, Transform]]] = {}
        for node in self.graph.nodes:  # all calls of each, also those that nothing changes
            if node.layer in changed and (node.kind.is_producer or node.kind is NodeKind.BATCH_NORM):
                by_layer.setdefault(node.layer, []).append((node, solution.output(node)))
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


def _are_identities(read: Transform | None, given: Transform) -> bool:
    return given.is_identity and (read is None or read.is_identity)


def can_be_tried(own: ScaleAndShift) -> bool:
    """Return whether the identity can take the place of a BatchNorm."""
    return own.owner is not Owner.PART
