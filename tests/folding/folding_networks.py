"""Small networks for tests of folding, with statistics that make every mistake visible."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bntool.folding.options import FoldOptions, Layout
from bntool.folding.planning import FoldPlan, plan_fold
from bntool.graphs.traced.tracing import trace
from bntool.modules.application import apply_plan, read_state
from bntool.modules.finding import find_batchnorm_modules

LAYOUTS = (Layout.FOLDED, Layout.SAME_KEYS)  # that every network can have


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of both signs and some tiny, statistics far from the initial ones; the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for module in find_batchnorm_modules(model).values():
            if getattr(module, "running_mean", None) is None:
                continue
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) * 2 + 0.1)
            if module.weight is not None:
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) + 0.3)
                module.weight.view(-1)[0] = 1e-7
    return model.eval()


def fold(model: nn.Module, inputs, *, layout: Layout = Layout.FOLDED, **options) -> tuple[nn.Module, FoldPlan]:
    """A folded copy, and the plan."""
    plan = plan_fold(read_state(model), trace(model, inputs), FoldOptions(layout=layout, **options))
    folded = copy.deepcopy(model)
    apply_plan(folded, plan)
    return folded, plan


def largest_difference(model: nn.Module, folded: nn.Module, inputs) -> float:
    """Of the outputs, in relation to the largest output; torch in eval mode is the judge."""
    with torch.no_grad():
        a = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        b = folded(*inputs) if isinstance(inputs, tuple) else folded(inputs)
    pairs = zip(flatten(a), flatten(b), strict=True)
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-30)) for x, y in pairs)


def flatten(value) -> list[torch.Tensor]:
    return [item for item in torch.utils._pytree.tree_flatten(value)[0] if isinstance(item, torch.Tensor)]


def reasons(plan: FoldPlan) -> dict[str, str]:
    return {skip.layer: skip.reason.name for skip in plan.skips}


class Functional(nn.Module):
    """A module whose forward is a function of itself and the input."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, *inputs):
        return self._forward(self, *inputs)
