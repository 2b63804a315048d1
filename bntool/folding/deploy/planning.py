"""Deciding what becomes of a state dict in its deploy form: a convolution for each block of parallel branches."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from bntool.batchnorm import COUNTER, VECTORS
from bntool.checkpoints.application import change_state_dict
from bntool.checkpoints.batchnorms import find_norms
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.tensors import LiteralTensor
from bntool.errors import RefusedError
from bntool.folding.absorption import Blocked
from bntool.folding.deploy.forms import NAMED, Block, find_blocks, find_pairs, keeps_batchnorms
from bntool.folding.deploy.merging import Sum, find_inside, merge_branches
from bntool.folding.folds import Fold, Level
from bntool.folding.options import FoldOptions, Layout
from bntool.folding.planning import FoldPlan, assume_fold, plan_fold
from bntool.folding.scale_and_shift import ScaleAndShift, check_eps, choose_eps, read_scale_and_shift
from bntool.graphs.graph import Evidence, ModelGraph, Node, NodeKind
from bntool.plan import (
    AddTensor,
    Merged,
    Operation,
    RemoveTensor,
    RenameTensor,
    SetTensor,
    Skip,
    SkipReason,
    Step,
    Values,
)

_SHOWN = 2  # names that a refusal lists


def plan_deploy(
    state_dict: StateDict, graph: ModelGraph, *, eps: float | None = None, deployed: Collection[str] | None = None
) -> FoldPlan:
    """Plan the deploy form: every block of parallel branches becomes the one convolution of its code.

    BatchNorms beside them fold, or stay where the deploy model has them too. It is all or nothing: what is left as it
    was would not fit the deploy model.

    Args:
        state_dict: what to fold.
        graph: who feeds whom; its names are those of the state dict without prefix.
        eps: of BatchNorms whose eps the graph does not know.
        deployed: names of the tensors of the deploy model, where the model's own code has made it.

    Raises:
        RefusedError: no known code has blocks of these names, a block is not what its names say, or BatchNorms are left
            of which the form is not known; or what comes out is not what the deploy model has.
        UsageError: eps is neither in the graph nor given.
    """
    check_eps(eps)
    if graph.evidence not in (Evidence.TRACED, Evidence.ASSUMED):
        raise RefusedError("what becomes one convolution is seen in a forward: give --model, or a known architecture")
    names = [state_dict.strip(name) for name in state_dict.tensors if not name.endswith(COUNTER)]
    known = None if graph.evidence is Evidence.TRACED else [n for one in graph.architectures for n in one.names]
    blocks = find_blocks(names, known, deployed=deployed)
    pairs = find_pairs(names, known, blocks, deployed=deployed)
    if known is not None and not known:  # the graph is of these blocks alone
        blocks, pairs = [block for block in blocks if block.form is NAMED], {}
    if not blocks and not pairs and deployed is None:
        raise RefusedError(
            "the tensors have the names of no code whose deploy form is known: RepVGG and MobileOne, of timm and of "
            "their authors, YOLOv6, YOLOv7, and timm's FastViT, RepGhost, GhostNetV3, PP-LCNetV2, RepViT, LeViT, "
            "TinyViT, EfficientViT-M, SHViT and iFormer; with --model the model's own code makes it"
        )
    stay: Collection[str] = ()
    if deployed is not None:
        stay = {layer for layer in graph.batchnorms if any(f"{layer}.{role}" in deployed for role in VECTORS)}
    elif keeps_batchnorms(known or ()):
        stay = {layer for layer in graph.batchnorms if not any(block.holds(layer) for block in blocks)}
    plan = _Deploying(state_dict, graph, eps, blocks, pairs, stay, deployed).plan()
    if deployed is not None:
        _check_names(state_dict, plan, deployed)
    return plan


def _check_names(state_dict: StateDict, plan: FoldPlan, deployed: Collection[str]) -> None:
    """Compare the names of the result with those of the deploy model.

    Raises:
        RefusedError: they differ.
    """
    changed = change_state_dict(state_dict, plan.steps)
    names = {state_dict.strip(name) for name in changed.tensors if not name.endswith(COUNTER)}
    wanted = {name for name in deployed if not name.endswith(COUNTER)}
    ours, theirs = sorted(names - wanted), sorted(wanted - names)
    if ours or theirs:
        listed = [f"{len(theirs)} that are not made ({', '.join(theirs[:_SHOWN])})"] * bool(theirs)
        listed += [f"not {len(ours)} that stay ({', '.join(ours[:_SHOWN])})"] * bool(ours)
        raise RefusedError(f"the deploy model that the model's own code makes has tensors {' and '.join(listed)}")


@dataclass
class _Deploying:
    state_dict: StateDict
    graph: ModelGraph
    eps: float | None
    blocks: list[Block]
    pairs: dict[str, str]
    stay: Collection[str]
    deployed: Collection[str] | None
    read: dict[str, ScaleAndShift] = field(default_factory=dict)
    folds: dict[str, Fold] = field(default_factory=dict)

    def plan(self) -> FoldPlan:
        steps: list[Step] = []
        for block in self.blocks:
            try:
                steps += self.merge(block)
            except Blocked as blocked:
                detail = f"its branches cannot become {block.merged}: {blocked.detail}"
                raise RefusedError(detail, tensor=block.module) from blocked
        rest = self.fold_pairs()
        steps += () if rest is None else rest.steps
        steps += self.rename_pairs(steps)
        order = [layer for layer in self.graph.batchnorms if layer in self.folds]
        folds = tuple(self.folds[layer] for layer in order)
        renames = [step for step in steps if isinstance(step, RenameTensor)]
        return FoldPlan(
            operation=Operation.FOLD,
            state_dict=self.state_dict.key,
            steps=(*(step for step in steps if not isinstance(step, RenameTensor)), *renames),
            layers=tuple(order),
            skips=tuple(
                Skip(layer, SkipReason.NOT_SELECTED, "it lies in no block, and stays in the deploy form")
                for layer in self.find_layers()
                if layer not in self.folds
            ),
            assumptions=self.assume(folds) if rest is None else rest.assumptions,
            folds=folds,
            options=FoldOptions(layout=Layout.DEPLOY, eps=self.eps),
            below_zero=(
                *(layer for layer in order if layer in self.read and self.read[layer].is_below_zero),
                *(() if rest is None else rest.below_zero),
            ),
        )

    def find_layers(self) -> Sequence[str]:
        """Return all BatchNorms: where only blocks are known, those of the file."""
        if self.graph.evidence is Evidence.TRACED or self.graph.architectures:
            return list(self.graph.batchnorms)
        return [norm.name for norm in find_norms(self.state_dict) if norm.kind.is_batch_norm]

    def assume(self, folds: Sequence[Fold]) -> tuple[str, ...]:
        if self.graph.evidence is Evidence.TRACED or self.graph.architectures:
            return tuple(assume_fold(self.graph, folds, self.read, eps=self.eps))
        first, count = self.blocks[0].module or "the model", len(self.blocks)
        which = f"{first} is a block" if count == 1 else f"{first} and {count - 1} more are blocks"
        summed = f"which sum up {', '.join(NAMED.branches)}, by names and shapes, which prove nothing"
        given = [f"eps is {self.eps:g} (option)"] * (self.eps is not None)
        return (f"{which} of RepVGG, {summed}", *given)

    def fold_pairs(self) -> FoldPlan | None:
        """Fold the BatchNorms that do not stay into what stands around them; None where there is none.

        Raises:
            RefusedError: nothing tells what becomes of some, or they are not taken by what stands beside them.
        """
        left = [layer for layer in self.graph.batchnorms if layer not in self.folds and layer not in self.stay]
        if not left:
            return None
        beside = {module: producer for producer, module in self.pairs.items()}
        elsewhere = [layer for layer in left if layer.rpartition(".")[0] not in beside]
        if elsewhere and self.deployed is None:
            what = f"{len(elsewhere)} BatchNorms lie in no block whose deploy form is known"
            raise RefusedError(what, tensor=elsewhere[0])
        plan = plan_fold(self.state_dict, self.graph, FoldOptions(layers=left, eps=self.eps))
        skips = [skip for skip in plan.skips if skip.layer in left]
        if skips:
            raise RefusedError(f"it is not folded: {skips[0].reason.value} ({skips[0].detail})", tensor=skips[0].layer)
        for fold in plan.folds:
            place = beside.get(fold.layer.rpartition(".")[0])
            if fold.stays or (place is not None and fold.into != (place,)):
                raise RefusedError(f"it is folded into {', '.join(fold.into)}, not beside it", tensor=fold.layer)
            self.folds[fold.layer] = fold
        return plan

    def rename_pairs(self, steps: Sequence[Step]) -> Iterator[Step]:
        """Let what stood beside a BatchNorm take its parent's place; called when all tensors are there."""
        added = [step.name for step in steps if isinstance(step, AddTensor)]
        for name in (*map(self.state_dict.strip, self.state_dict.tensors), *added):
            path, _, leaf = name.rpartition(".")
            if path in self.pairs:
                prefix = self.state_dict.prefix if name in added else self.find_prefix(name)
                yield RenameTensor(prefix + name, f"{prefix}{self.pairs[path]}.{leaf}")

    def find_prefix(self, name: str) -> str:
        """Find what stands before the name of a tensor in the file."""
        return self.state_dict.full_name(name).removesuffix(name)

    def merge(self, block: Block) -> Iterator[Step]:
        inside = find_inside(self.graph, block.holds, block.module)
        merged = merge_branches(self.graph, inside, self.state_dict, self.read_batchnorm)
        for node in inside.values():
            if node.kind is NodeKind.BATCH_NORM:
                into = (block.merged,)
                self.folds[node.layer] = Fold(node.layer, into, Level.MERGED, False, into, into)
        return self.steps(block, merged)

    def read_batchnorm(self, node: Node) -> ScaleAndShift:
        calls = self.graph.batchnorms[node.layer]
        own = read_scale_and_shift(calls, self.graph, self.state_dict, eps=choose_eps(node, self.eps))
        self.read[node.layer] = own
        return own

    def steps(self, block: Block, merged: Sum) -> Iterator[Step]:
        weight = merged.first.parameters["weight"]
        tensor = self.state_dict.tensor(weight)
        shape = tuple(tensor.shape)
        places = merged.find_places(shape) if np.any(merged.identity) else np.zeros(0, int)
        addends = merged.identity if np.any(merged.identity) else np.zeros(0)
        recipe = Merged(
            tuple(node.parameters["weight"] for node, _ in merged.kernels),
            tuple(array("d", factors.tobytes()) for _, factors in merged.kernels),
            tuple(array("d", () if factors is None else factors.tobytes()) for factors in merged.inputs),
            places=array("q", places.astype("<i8").tobytes()),
            addends=array("d", addends.tobytes()),
        )
        values = Values(array("d", merged.bias.tobytes()), merged.bias.shape)
        try:  # what does not fit shows before anything is written
            LiteralTensor.from_numbers(values.numbers, dtype=tensor.dtype, shape=values.shape)
        except OverflowError as error:
            raise RefusedError(f"its bias would not fit: {error}", tensor=block.merged) from error
        yield SetTensor(weight, recipe)
        yield AddTensor(f"{block.merged}.bias", values, dtype=tensor.dtype.name, after=weight)
        for full in self.state_dict.tensors:
            name = self.state_dict.strip(full)
            if block.holds(name) and name != weight:
                yield RemoveTensor(name)
        prefix = self.find_prefix(weight)
        yield RenameTensor(prefix + weight, f"{prefix}{block.merged}.weight")
