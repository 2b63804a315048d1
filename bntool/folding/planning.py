"""Deciding what can be folded: each BatchNorm into what feeds it, or into what reads it, or not at all and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bntool.batchnorm import STATISTICS, BatchNorm, NormKind, check_globs, selects
from bntool.checkpoints.batchnorms import find_norms
from bntool.checkpoints.checkpoint import StateDict
from bntool.folding.absorption import Absorber, Blocked, find_consumers, find_producers, is_parallel_branch
from bntool.folding.derived_tensors import add_derived, with_derived
from bntool.folding.folds import Fold, Level
from bntool.folding.options import FoldOptions, Layout
from bntool.folding.producers import Addend, Producer, read_producer
from bntool.folding.scale_and_shift import ScaleAndShift, check_eps, choose_eps, read_scale_and_shift
from bntool.folding.transforms.aliasing import has_to_copy
from bntool.folding.transforms.padding_values import PaddingValues
from bntool.folding.transforms.storing_otherwise import Outcome, StoringOtherwise, can_be_tried
from bntool.graphs.graph import Evidence, ModelGraph, Node, NodeKind, Owner
from bntool.plan import Operation, Plan, RemoveModule, RemoveTensor, SetTensor, Skip, SkipReason, Step
from bntool.representation import list_first, short_repr
from bntool.verification.stored_outputs import StoredOutput

# a branch beside others reads what they read, whatever that is
_SHARED_INPUT = (SkipReason.SHARED_OUTPUT, SkipReason.NOT_ADJACENT, SkipReason.NO_PRODUCER)

_SHOWN = 3  # modules that an assumption names
_FURTHER = (Level.THROUGH, Level.FORWARD, Level.BRANCH, Level.TRANSFORM)  # what lies between matters, too


@dataclass(frozen=True)
class FoldPlan(Plan):
    """A plan to fold, and what each fold is.

    Attributes:
        folds: in order of execution.
        options: what was asked for.
        stored: by layer how its output is stored now, where that is otherwise than before.
        changed: layers whose output is something else by now: a branch beside them went into them.
        padding: convolutions that pad with other values than zeros; such a model does not fit into its unmodified code.
        below_zero: folded layers with a running_var that is negative, as rounding can make it, and positive with eps.
    """

    folds: tuple[Fold, ...] = ()
    options: FoldOptions = FoldOptions()
    stored: Mapping[str, StoredOutput] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    padding: tuple[str, ...] = ()
    below_zero: tuple[str, ...] = ()

    __repr__ = short_repr

    @property
    def layout(self) -> Layout:
        """What becomes of the keys."""
        return self.options.layout


def plan_fold(state_dict: StateDict, graph: ModelGraph, options: FoldOptions = FoldOptions()) -> FoldPlan:
    """Plan to fold every BatchNorm whose fold is exact; every other one is skipped with its reason.

    Scale and shift (Ioffe and Szegedy 2015, algorithm 2) are taken in float64 and rounded once to the tensor's dtype.

    Args:
        state_dict: what to fold.
        graph: who feeds whom; its names are those of the state dict without prefix.
        options: which layers, and how; its eps is for BatchNorms whose eps the graph does not know.

    Raises:
        UsageError: a glob selects nothing; eps is neither in the graph nor given, contradicts the graph, or is none.
    """
    check_eps(options.eps)
    return _Folder(with_derived(state_dict, graph), graph, options).plan()


@dataclass
class _Folder:
    state_dict: StateDict
    graph: ModelGraph
    options: FoldOptions
    producers: dict[str, Producer] = field(default_factory=dict)
    transforms: dict[str, ScaleAndShift] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    rewritten: set[str] = field(default_factory=set)  # BatchNorms that stay with other tensors
    done: dict[str, Fold] = field(default_factory=dict)
    skips: dict[str, Skip] = field(default_factory=dict)
    # of a layer that no neighbour takes: what is in the way backwards, forwards, and to storing tensors otherwise
    obstacles: dict[str, tuple[Blocked, Blocked]] = field(default_factory=dict)
    stuck: Mapping[str, str] = field(default_factory=dict)
    addends: dict[str, Addend] = field(default_factory=dict)
    paddings: Mapping[str, PaddingValues] = field(default_factory=dict)
    stored: dict[str, StoredOutput] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def plan(self) -> FoldPlan:
        candidates = list(self.choose())
        while True:  # a fold can clear the way for an earlier one
            before = len(self.done)
            for layer in candidates:
                if layer not in self.done:
                    self.try_fold(layer)
            if len(self.done) == before:
                break
        self.fold_rest()
        for layer in self.obstacles:
            self.explain(layer)
        order = [layer for layer in self.graph.batchnorms if layer in self.done]
        folds = tuple(self.done[layer] for layer in order)
        steps = tuple(add_derived(self.steps(), self.graph, self.state_dict))
        return FoldPlan(
            operation=Operation.FOLD,
            state_dict=self.state_dict.key,
            steps=steps,
            skips=tuple(self.skips[layer] for layer in sorted(self.skips, key=self.position)),
            layers=tuple(order),
            assumptions=(
                *self.name_unseen(folds),
                *assume_fold(self.graph, folds, self.transforms, eps=self.options.eps),
                *self.name_axes(),
                *self.name_overridable(steps),
            ),
            folds=folds,
            options=self.options,
            stored=self.stored,
            changed=frozenset(self.changed),
            padding=tuple(padding.node.layer for padding in self.paddings.values()),
            below_zero=tuple(layer for layer in order if self.transforms[layer].is_below_zero),
        )

    def position(self, layer: str) -> int:
        return [*self.graph.batchnorms, *self.skips].index(layer)

    def skip(self, layer: str, reason: SkipReason, detail: str = "") -> None:
        self.skips[layer] = Skip(layer, reason, detail)

    def choose(self) -> Iterator[str]:
        """Yield the BatchNorms that could be folded by themselves; all others are skipped here."""
        norms = find_norms(self.state_dict)
        stored = [norm.name for norm in norms if norm.kind.is_batch_norm]
        check_globs(self.options.layers, list(dict.fromkeys([*self.graph.batchnorms, *stored])))
        self.skip_unseen(norms)
        for layer, calls in self.graph.batchnorms.items():
            if not selects(self.options.layers, layer):
                self.skip(layer, SkipReason.NOT_SELECTED)
                continue
            if self.graph.branches_at is not None and calls[-1].index > self.graph.branches_at:
                place = f" ({self.graph.branches_in})" if self.graph.branches_in else ""
                detail = f"the forward looks at values of its data before this layer{place}: other inputs may take "
                detail += "another path"
                self.skip(layer, SkipReason.DATA_DEPENDENT, detail)
                continue
            try:
                self.transforms[layer] = read_scale_and_shift(
                    calls, self.graph, self.state_dict, eps=choose_eps(calls[0], self.options.eps)
                )
            except Blocked as blocked:
                self.skip(layer, blocked.reason, blocked.detail)
            else:
                yield layer

    def skip_unseen(self, norms: Sequence[BatchNorm]) -> None:
        """Skip layers that are not in the graph.

        Args:
            norms: all of the state dict.
        """
        known = {n.rpartition(".")[0] for calls in self.graph.batchnorms.values() for n in self.all_names(calls[0])}
        known |= self.graph.batchnorms.keys()
        for norm in norms:
            quantised = norm.kind is NormKind.QUANTIZED_BATCH_NORM
            if norm.name in known or not (norm.kind.is_batch_norm or quantised):
                continue
            if norm.name in self.graph.other_norms and not quantised:
                continue
            if selects(self.options.layers, norm.name):
                self.skip(norm.name, *self.explain_unseen(norm))
            else:
                self.skip(norm.name, SkipReason.NOT_SELECTED)

    def explain_unseen(self, norm: BatchNorm) -> tuple[SkipReason, str]:
        """Why a layer is not in the graph."""
        layer, graph = norm.name, self.graph
        reason, detail = SkipReason.NOT_RECOGNISED, ""
        if norm.kind is NormKind.QUANTIZED_BATCH_NORM:
            reason, detail = SkipReason.UNSUPPORTED_DTYPE, "it is quantised: fold before quantising"
        elif graph.evidence is Evidence.STORED:
            what = norm.class_path.rpartition(".layers.")[2] or norm.kind.value
            reason = SkipReason.NOT_A_BATCHNORM
            detail = f"it is a {what}, which the graph of the file does not run as a BatchNorm"
        elif graph.complete and self.is_read(layer) and layer not in graph.ran:
            detail = "it did not run: other code of the forward reads its tensors"
        elif layer in graph.ran and graph.branches_at is not None:
            place = f" ({graph.branches_in})" if graph.branches_in else ""
            detail = f"it ran, and what feeds it is not seen: the forward hands values of its data to Python{place}, "
            detail += "and what is computed from those cannot be followed"
        elif layer in graph.ran:
            detail = "it ran, and what it computes is not seen to be what its tensors would give with its eps"
        elif graph.modules and layer not in graph.modules:
            detail = "the state dict calls it so, and the model has no module of that name: fold before wrapping"
        elif graph.complete:
            reason, detail = SkipReason.NEVER_REACHED, "it did not run in the forward that was observed"
        else:
            tell = "give --model" if graph.architectures else "name it with --pair"
            reason, detail = SkipReason.NO_PRODUCER, f"nothing says what feeds it; {tell}"
        return reason, detail

    def is_read(self, layer: str) -> bool:
        """Return whether something in the graph reads the statistics of a layer."""
        return any(self.graph.uses.get(f"{layer}.{role}" if layer else role) for role in STATISTICS)

    def all_names(self, node: Node) -> Iterator[str]:
        for name in node.parameters.values():
            yield from self.graph.names_of(name)

    def try_fold(self, layer: str) -> None:
        own = self.transforms[layer]
        try:
            absorbers = find_producers(self.graph, layer, scale=own.scale, removed=self.removed)
            self.fold_back(layer, own, absorbers)
        except Blocked as back:
            try:
                if self.options.direct_only or self.options.layout is Layout.SAME_KEYS or own.owner is Owner.PART:
                    raise back  # noqa: TRY201 the inner handler tells the two apart
                consumers = find_consumers(self.graph, layer, scale=own.scale, shift=own.shift, removed=self.removed)
                self.fold_forward(layer, own, consumers)
            except Blocked as forward:
                self.obstacles[layer] = back, forward
                return
        self.obstacles.pop(layer, None)

    def explain(self, layer: str) -> None:
        """Skip a layer, with the obstacle on the way back as the reason, unless only a change of modules would help on
        the way forward.
        """
        back, forward = self.obstacles[layer]
        detail = back.detail
        if forward is not back:
            detail += f"; forward: {forward.detail}"
        if layer in self.stuck:
            detail += f"; stored otherwise: {self.stuck[layer]}"
        if forward.reason is SkipReason.PADDED_CONSUMER:
            self.skip(layer, forward.reason, detail)
        elif back.reason in _SHARED_INPUT and is_parallel_branch(self.graph, layer):
            self.skip(layer, SkipReason.PARALLEL_BRANCH, detail)
        else:
            self.skip(layer, back.reason, detail)

    def fold_back(self, layer: str, own: ScaleAndShift, absorbers: Sequence[Absorber]) -> None:
        targets = {a.name: self.target(a) for a in absorbers}
        stays = (
            self.options.layout is Layout.SAME_KEYS
            or own.owner is Owner.PART
            or any(not t.can_take_shift for t in targets.values())
        )
        scale, shift = own.scale, own.shift
        if stays:
            if any(isinstance(target, ScaleAndShift) for target in targets.values()):
                raise Blocked(SkipReason.NOT_ADJACENT, "another BatchNorm lies between")
            kept = own.keep_shift()
            scale, shift = scale / kept.unit, np.zeros_like(shift)
        first = absorbers[0].absorption
        direct = len(absorbers) == 1 and first.direct and np.all(first.channels >= 0)
        onto_batchnorm = any(isinstance(target, ScaleAndShift) for target in targets.values())
        level = Level.BATCHNORM if onto_batchnorm else Level.DIRECT if direct else Level.THROUGH
        if self.options.direct_only and level is not Level.DIRECT:
            what = f"{' and '.join(_layers(absorbers))} could take it, and only direct folds are asked for"
            raise Blocked(SkipReason.NOT_SELECTED, what)
        changed: dict[str, Producer | ScaleAndShift] = {}
        for absorber in absorbers:
            target = targets[absorber.name].absorb(absorber.absorption, scale, shift)
            target.check(self.state_dict)
            changed[absorber.name] = target
        self.commit(changed)
        if stays:
            kept.check(self.state_dict)
            self.transforms[layer] = kept
            self.rewritten.add(layer)
        else:
            self.remove(layer)
        takes_shift = [a for a in absorbers if not stays and np.any(a.absorption.takes_shift)]
        into = _layers(absorbers)
        self.done[layer] = Fold(layer, into, level, stays, into, _layers(takes_shift), _any_pooled(absorbers))

    def fold_forward(self, layer: str, own: ScaleAndShift, consumers: Sequence[Absorber]) -> None:
        changed: dict[str, Producer | ScaleAndShift] = {}
        for consumer in consumers:
            target = self.target(consumer)
            assert isinstance(target, Producer)
            taken = target.absorb_input(consumer.absorption, own.scale, own.shift, self.state_dict)
            if taken.bias is not None and not taken.can_take_shift:
                raise Blocked(SkipReason.COMPUTED_WEIGHT, f"{target.node.describe()} has no place for a bias")
            taken.check(self.state_dict)
            changed[consumer.name] = taken
        self.commit(changed)
        self.remove(layer)
        into = _layers(consumers)
        self.done[layer] = Fold(layer, into, Level.FORWARD, False, into, into, _any_pooled(consumers))

    def fold_rest(self) -> None:
        """Fold what no single neighbour takes, where it is known who reads what and keys may go."""
        layers = [layer for layer in self.transforms if layer in self.obstacles]
        layers = [layer for layer in layers if can_be_tried(self.transforms[layer])]
        if (
            not layers
            or self.options.direct_only
            or self.options.layout is Layout.SAME_KEYS
            or not self.graph.readers_known
        ):
            return
        outcome = self.store_otherwise(layers)
        for target in outcome.targets.values():
            if isinstance(target, ScaleAndShift):
                self.transforms[target.node.layer] = target
                self.rewritten.add(target.node.layer)
            elif isinstance(target, Addend):
                self.addends[target.name] = target
            else:
                self.producers[target.weight_name] = target
        for layer, fold in outcome.folds.items():
            self.remove(layer)
            self.obstacles.pop(layer)
            self.done[layer] = fold
        self.stored, self.changed, self.stuck = outcome.stored, outcome.changed, outcome.reasons
        self.paddings = outcome.paddings

    def store_otherwise(self, layers: Sequence[str]) -> Outcome:
        """Find what else folds if tensors are stored otherwise, and with another padding where that is allowed and
        gains something.
        """
        around = StoringOtherwise(self.graph, self.state_dict, self.transforms, self.producers, frozenset(self.removed))
        outcome = around.fold(layers)
        if not self.options.change_padding or len(outcome.folds) == len(layers):
            return outcome
        wider = dataclasses.replace(around, first=frozenset(outcome.folds), change_padding=True).fold(layers)
        return wider if outcome.folds.keys() < wider.folds.keys() else outcome

    def target(self, absorber: Absorber) -> Producer | ScaleAndShift:
        """Return what takes the scale and shift, with all that it took before."""
        node = absorber.absorption.node
        if node.kind is not NodeKind.BATCH_NORM:
            return self.producers.get(absorber.name) or read_producer(node, self.state_dict)
        own = self.transforms.get(absorber.name)
        if own is None or not own.can_absorb or self.options.layout is Layout.SAME_KEYS:
            raise Blocked(SkipReason.NOT_ADJACENT, f"{node.describe()} lies between")
        return own

    def commit(self, changed: Mapping[str, Producer | ScaleAndShift]) -> None:
        for name, target in changed.items():
            if isinstance(target, ScaleAndShift):
                self.transforms[name] = target
                self.rewritten.add(name)
            else:
                self.producers[name] = target

    def remove(self, layer: str) -> None:
        """Note that a layer is the identity now, and drop what was kept to compute it."""
        self.removed.add(layer)
        self.transforms[layer] = self.transforms[layer].without_vectors()

    def steps(self) -> Iterator[Step]:
        """Yield the steps, once: what is handed out here is not kept twice."""
        for name in sorted(self.producers, key=lambda name: self.producers[name].node.index):
            yield from self.producers.pop(name).steps(self.graph, self.state_dict)
        for addend in self.addends.values():
            yield from addend.steps(self.graph, self.state_dict)
        for padding in self.paddings.values():
            yield from padding.steps(self.graph, self.state_dict)
        for layer in self.graph.batchnorms:
            own = self.transforms.get(layer)
            if own is None:
                continue
            if layer in self.removed:
                yield from self.removal_steps(own)
            elif layer in self.rewritten:
                yield from own.steps(self.graph, self.state_dict)

    def removal_steps(self, own: ScaleAndShift) -> Iterator[Step]:
        names = [name for parameter in own.names.values() for name in self.graph.names_of(parameter)]
        modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
        others = ("num_batches_tracked", "eps")  # the latter where a class of one's own keeps it in a buffer
        names += [f"{module}.{leaf}" if module else leaf for module in modules for leaf in others]
        for name in names:
            if self.state_dict.full_name(name) in self.state_dict.tensors:
                yield RemoveTensor(name)
        copies = has_to_copy(self.graph, own.node.layer, gone=self.removed)
        for module in modules:
            yield RemoveModule(module, copies=copies)

    def name_axes(self) -> Iterator[str]:
        """Yield declared weights of three or more dimensions that could have their output channels first or last."""
        declared = self.graph.nodes if self.graph.evidence is Evidence.DECLARED else ()
        for node in declared:
            if node.kind is NodeKind.CONVOLUTION and not node.class_name:
                shape = tuple(self.state_dict.tensor(node.parameters["weight"]).shape)
                if len(shape) > 2 and shape[0] == shape[-1]:
                    yield f"{node.layer} has its output channels first: its weight is {list(shape)}"

    def name_unseen(self, folds: Sequence[Fold]) -> Iterator[str]:
        """Yield what did not run, as far as it matters."""
        unseen = self.find_unseen(folds) if self.graph.evidence is Evidence.TRACED else []
        if unseen:
            shown = ", ".join(unseen[:_SHOWN]) + (f" and {len(unseen) - _SHOWN:,} more" if unseen[_SHOWN:] else "")
            yield f"{shown}, not run in the forward that was observed, reads nothing that a fold changed"

    def name_overridable(self, steps: Sequence[Step]) -> Iterator[str]:
        """Yield that a caller gives no others for the parameters that are folded, where one could."""
        changed = {step.name for step in steps if isinstance(step, SetTensor | RemoveTensor)}
        names = [name for name in self.state_dict.tensors if name in changed and name in self.graph.overridable]
        if names:
            listed = list_first(names, _SHOWN)
            yield f"nobody runs the model with other values for {listed}, which are inputs of it with a default"

    def find_unseen(self, folds: Sequence[Fold]) -> list[str]:
        """Return modules that did not run and could read a tensor that a fold changed, by its channels.

        BatchNorms are none of them: those stop the fold.
        """
        channels = {self.transforms[fold.layer].node.channels for fold in folds}
        return [path for path, sizes in self.graph.idle.items() if channels & sizes]


def assume_fold(
    graph: ModelGraph, folds: Sequence[Fold], read: Mapping[str, ScaleAndShift], *, eps: float | None
) -> Iterator[str]:
    """Yield what no trace has proven.

    Args:
        read: the BatchNorms.
        eps: that was given.
    """
    if graph.evidence in (Evidence.TRACED, Evidence.STORED) or not folds:
        return
    for architecture in graph.architectures:
        yield f"the forward is that of {architecture.title}, by names and shapes, which prove nothing"
        further = [f.layer for f in folds if f.layer in architecture.layers and f.level in _FURTHER]
        if further:
            yield (
                f"so are the activations, paths and paddings that {len(further)} of the folds go past "
                f"({list_first(further, _SHOWN)}): a variant with others has the same names and shapes, and "
                "--direct-only leaves these layers alone"
            )
        used = {read[f.layer].eps for f in folds if architecture.eps.get(f.layer) == read[f.layer].eps}
        values = sorted(used)
        if eps is None and values:
            yield f"eps is {' and '.join(f'{eps:g}' for eps in values)}, as in {architecture.title}"
    for fold in folds if not graph.architectures else ():
        yield f"{fold.layer} reads {', '.join(fold.into)} and nothing else does ({graph.evidence.value})"
    if eps is not None:
        yield f"eps is {eps:g} (option)"


def _layers(absorbers: Sequence[Absorber]) -> tuple[str, ...]:
    return tuple(absorber.absorption.node.layer or absorber.name for absorber in absorbers)


def _any_pooled(absorbers: Sequence[Absorber]) -> bool:
    return any(absorber.absorption.pooled for absorber in absorbers)
