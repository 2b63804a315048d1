"""Deciding what becomes of a state dict in its deploy form: a convolution for each block of parallel branches."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.tensors import LiteralTensor
from bntool.errors import RefusedError
from bntool.folding.absorption import Blocked
from bntool.folding.deploy.forms import Block, find_blocks
from bntool.folding.deploy.merging import Sum, find_inside, merge_branches
from bntool.folding.folds import Fold, Level
from bntool.folding.options import Layout
from bntool.folding.planning import FoldPlan, assume_fold
from bntool.folding.scale_and_shift import ScaleAndShift, check_eps, choose_eps, read_scale_and_shift
from bntool.graphs.graph import ModelGraph, Node, NodeKind
from bntool.plan import AddTensor, Merged, Operation, RemoveTensor, RenameTensor, SetTensor, Step, Values

_COUNTER = "num_batches_tracked"


def plan_deploy(state_dict: StateDict, graph: ModelGraph, *, eps: float | None = None) -> FoldPlan:
    """Plan the deploy form: every block of parallel branches becomes the one convolution of its code.

    It is all or nothing: what is left as it was would not fit the deploy model.

    Args:
        state_dict: what to fold.
        graph: who feeds whom; its names are those of the state dict without prefix.
        eps: of BatchNorms whose eps the graph does not know.

    Raises:
        RefusedError: no known code has blocks of these names, a block is not what its names say, or BatchNorms are left
            of which the form is not known.
        UsageError: eps is neither in the graph nor given.
    """
    check_eps(eps)
    names = [state_dict.strip(name) for name in state_dict.tensors]
    blocks = list(find_blocks(names))
    if not blocks:
        raise RefusedError(
            "the tensors have the names of no code whose deploy form is known: RepVGG and MobileOne, of timm and of "
            "their authors"
        )
    return _Deploying(state_dict, graph, eps, blocks).plan()


@dataclass
class _Deploying:
    state_dict: StateDict
    graph: ModelGraph
    eps: float | None
    blocks: list[Block]
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
        left = [layer for layer in self.graph.batchnorms if layer not in self.folds]
        if left:
            raise RefusedError(f"{len(left)} BatchNorms lie in no block whose deploy form is known", tensor=left[0])
        order = [layer for layer in self.graph.batchnorms if layer in self.folds]
        folds = tuple(self.folds[layer] for layer in order)
        renames = [step for step in steps if isinstance(step, RenameTensor)]
        return FoldPlan(
            operation=Operation.FOLD,
            state_dict=self.state_dict.key,
            steps=(*(step for step in steps if not isinstance(step, RenameTensor)), *renames),
            layers=tuple(order),
            assumptions=tuple(assume_fold(self.graph, folds, self.read, eps=self.eps)),
            folds=folds,
            layout=Layout.DEPLOY,
            below_zero=tuple(layer for layer in order if self.read[layer].is_below_zero),
        )

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
        prefix = self.state_dict.full_name(weight).removesuffix(weight)
        yield RenameTensor(prefix + weight, f"{prefix}{block.merged}.weight")
