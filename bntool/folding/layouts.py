"""A fold in each layout: what is planned, and how a live model takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bntool.checkpoints.application import change_state_dict
from bntool.checkpoints.checkpoint import StateDict
from bntool.errors import UsageError
from bntool.folding.deploy.planning import plan_deploy
from bntool.folding.options import FoldOptions, Layout
from bntool.folding.planning import FoldPlan, plan_fold
from bntool.graphs.graph import ModelGraph

if TYPE_CHECKING:
    from torch import nn


def plan_layout(
    state_dict: StateDict, graph: ModelGraph, options: FoldOptions, *, model: nn.Module | None = None
) -> FoldPlan:
    """Plan the fold of a state dict in a layout; see :func:`~bntool.folding.planning.plan_fold`.

    Args:
        options: which layers, and how.
        model: the live model, where there is one: its own code says what its deploy form is.

    Raises:
        UserCodeError: its code raised.
        UsageError: as there; or layers are chosen, and the layout takes all of them; or the padding may change, and
            the layout fits the code of the model as it is; or only direct folds are asked for, and one of both.
        RefusedError: the layout is the deploy form, and the model has none that is known.
    """
    layout = options.layout
    if options.direct_only and (options.change_padding or layout is Layout.DEPLOY):
        other = "another padding" if options.change_padding else f"the layout {layout.value}"
        raise UsageError(f"only direct folds are asked for, and {other} changes other layers")
    if options.change_padding and layout is not Layout.FOLDED:
        raise UsageError(f"the layout {layout.value} fits code that pads with zeros: no padding can change")
    if layout is not Layout.DEPLOY:
        return plan_fold(state_dict, graph, options)
    if options.layers:
        raise UsageError("the layout deploy takes all layers: a file with some of them would fit no model")
    if model is None:
        return plan_deploy(state_dict, graph, eps=options.eps)
    from bntool.folding.deploy.live import find_deployed_names

    return plan_deploy(state_dict, graph, eps=options.eps, deployed=find_deployed_names(model, graph.batchnorms))


def apply_fold(model: nn.Module, plan: FoldPlan, state_dict: StateDict) -> None:
    """Let a live model become the folded one, in place.

    Args:
        state_dict: of the model, before the fold.

    Raises:
        UserCodeError, RefusedError: see :func:`~bntool.folding.deploy.live.load_deploy_form`.
    """
    if plan.layout is Layout.DEPLOY:
        from bntool.folding.deploy.live import load_deploy_form

        load_deploy_form(model, change_state_dict(state_dict, plan.steps))
    else:
        from bntool.modules.application import apply_plan

        apply_plan(model, plan, state_dict)
