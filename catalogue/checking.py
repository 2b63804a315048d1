"""Whether what the catalogue holds decides as a trace does, and is recognised."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from bntool.checkpoints.checkpoint import StateDict
from bntool.errors import BntoolError, RefusedError
from bntool.folding.deploy.planning import plan_deploy
from bntool.folding.planning import FoldPlan, plan_fold
from bntool.graphs.architectures.catalogue import Catalogue
from bntool.graphs.architectures.recognition import Architecture, recognise_in
from bntool.graphs.architectures.structure import assume, read_structure
from bntool.graphs.graph import Evidence, ModelGraph
from bntool.plan import Step
from tests.graphs.architectures.drawn_tensors import draw_state_dict

Shapes = Mapping[str, tuple[int, ...]]


def decisions(plan: FoldPlan) -> set[tuple[object, ...]]:
    """What is folded into what and how, and what is skipped and why."""
    folded = {(fold.layer, fold.into, fold.level, fold.stays) for fold in plan.folds}
    return folded | {(skip.layer, skip.reason) for skip in plan.skips}


@dataclass(frozen=True)
class Verdict:
    """How the plan from a structure compares with the plan from the trace.

    Attributes:
        folded, skipped: BatchNorms, by the trace.
        other_details: skips with the same reason and another text.
        problem: what differs; "" where nothing does.
    """

    folded: int
    skipped: int
    other_details: int
    problem: str


def compare(graph: ModelGraph, text: str, shapes: Shapes, eps: Mapping[str, float], *, name: str) -> Verdict:
    """Hold a structure against the traced graph that it was made from, with scales of both signs and of one."""
    structure = read_structure(text, shapes, eps=eps)
    known = Architecture("", (name,), True, eps, tuple(eps))
    for positive in (True, False):
        state_dict = draw_state_dict(shapes, positive=positive)
        traced, stored = plan_fold(state_dict, graph), plan_fold(state_dict, structure)
        differences = decisions(traced) ^ decisions(stored)
        problem = ""
        if differences:
            problem = f"{len(differences)} decisions differ: {sorted(map(str, differences))[:2]}"
        elif traced.steps != stored.steps:
            problem = "the same decisions with other numbers"
        elif _deploy(state_dict, graph, known) != _deploy(state_dict, structure, known):
            problem = "another deploy form"
        if problem:
            break
    details = {(skip.layer, skip.detail) for skip in traced.skips} - {
        (skip.layer, skip.detail) for skip in stored.skips
    }
    return Verdict(len(traced.folds), len(traced.skips), len(details), problem)


def _deploy(state_dict: StateDict, graph: ModelGraph, known: Architecture) -> tuple[Step, ...]:
    """The steps to the deploy form of an architecture; none where there is none."""
    graph = dataclasses.replace(graph, evidence=Evidence.ASSUMED, architectures=(known,))
    try:
        return plan_deploy(state_dict, graph).steps
    except RefusedError:
        return ()


def fold_alike(one: str, other: str, *, shapes: Shapes, eps: Mapping[str, float], name: str = "") -> bool:
    """Whether two structures plan the same for an architecture, alone and as a part of something else."""
    if one == other:
        return True
    for whole, positive in itertools.product((True, False), repeat=2):
        state_dict = draw_state_dict(shapes, positive=positive)
        architecture = Architecture("", (name,), whole, eps, tuple(eps))
        plans, deployed = [], []
        for structure in (one, other):
            graph = assume(state_dict, (architecture,), catalogue=_OneStructure(structure))
            plans.append(plan_fold(state_dict, graph))
            deployed.append(_deploy(state_dict, graph, architecture))
        if decisions(plans[0]) != decisions(plans[1]) or plans[0].steps != plans[1].steps:
            return False
        if deployed[0] != deployed[1]:
            return False
    return True


class _OneStructure(Catalogue):
    def __init__(self, text: str) -> None:
        self._text = text

    def structure(self, number: int) -> str:  # noqa: ARG002 (the catalogue's own signature)
        return self._text


def check_recognition(name: str, shapes: Shapes, catalogue: Catalogue) -> str:
    """What is wrong with how an architecture is recognised in its own tensors, whole and as a part; "" for nothing."""
    try:
        (whole,) = recognise_in(catalogue, draw_state_dict(shapes), name=name)
        (part,) = recognise_in(catalogue, draw_state_dict({**shapes, "zz.weight": (1,)}, root="part."), name=name)
        (first, *_) = recognise_in(catalogue, draw_state_dict(shapes), name=None)
    except (ValueError, BntoolError) as error:
        return f"not recognised in its own tensors: {error}"
    if not whole.whole or whole.root or part.whole or part.root != "part.":
        return f"recognised as something else: {whole.title}, {part.title}"
    return "" if name in first.names else f"taken for {first.title}"
