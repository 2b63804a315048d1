"""Writing down a freeze as code or configuration of the framework that trains the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bntool.errors import RefusedError
from bntool.freezing.options import EmitTarget
from bntool.freezing.policy import FreezePolicy
from bntool.freezing.stages import Family


def emit_freeze(policy: FreezePolicy, target: EmitTarget, *, batchnorms: Sequence[str]) -> str:
    """Write code or configuration that freezes the same layers as a policy.

    Args:
        policy: what is to be frozen.
        target: for whom.
        batchnorms: all BatchNorm layers of the model, to tell whether the policy means all of them.

    Raises:
        RefusedError: the framework's own means cannot express the policy.
    """
    return _EMITTERS[target](policy, tuple(batchnorms))


def _python(policy: FreezePolicy, _batchnorms: tuple[str, ...]) -> str:
    stages = policy.stages
    lines = [
        "from torch import nn",
        "",
        *_list("NORM_EVAL", policy.layers if policy.norm_eval else ()),
        *_list("NO_GRADIENT", policy.layers if policy.requires_grad is False else ()),
        *_list("STAGES_IN_EVAL", stages.in_eval if stages is not None else ()),
        *_list("STAGES_WITHOUT_GRADIENT", stages.without_gradient if stages is not None else ()),
        "",
        "",
        "def freeze(model: nn.Module) -> None:",
        '    """Call this before the optimizer is made, and again after every model.train()."""',
        "    for name in [*NORM_EVAL, *STAGES_IN_EVAL]:",
        "        model.get_submodule(name).eval()",
        "    for name in [*NO_GRADIENT, *STAGES_WITHOUT_GRADIENT]:",
        "        for parameter in model.get_submodule(name).parameters():",
        "            parameter.requires_grad_(False)",
        "            parameter.grad = None",
    ]
    return "\n".join(lines) + "\n"


def _list(name: str, values: Sequence[str]) -> list[str]:
    if not values:
        return [f"{name}: list[str] = []"]
    return [f"{name} = [", *(f"    {value!r}," for value in values), "]"]


def _mmdet(policy: FreezePolicy, batchnorms: tuple[str, ...]) -> str:
    stages = policy.stages
    root = (
        stages.root if stages is not None else "backbone" if any(n.startswith("backbone.") for n in batchnorms) else ""
    )
    if root not in ("", "backbone"):
        raise RefusedError(f"mmdet's own options are those of its backbone, not of {root}; use --emit mmengine")
    inside = tuple(name for name in batchnorms if not root or name.startswith(root + "."))
    if policy.layers and policy.layers != inside:
        advice = "select it with --layers 'backbone.*', or use --emit mmengine" if root else "use --emit mmengine"
        raise RefusedError(f"mmdet's own options freeze exactly the BatchNorm layers of the backbone; {advice}")
    options = [f"norm_eval={policy.norm_eval}"]
    if stages is not None:
        options.append(f"frozen_stages={stages.frozen_stages}")
    if policy.requires_grad is not None:
        options.append(f"norm_cfg=dict(type='BN', requires_grad={policy.requires_grad})")
    comment = "# into your config; keep the type of norm_cfg that it has, e.g. 'SyncBN'\n" if len(options) > 1 else ""
    if not root:
        comment = f"# if what the file holds is the backbone: no name in it begins with backbone.\n{comment}"
    return f"{comment}model = dict(backbone=dict({', '.join(options)}))\n"


def _mmengine(policy: FreezePolicy, batchnorms: tuple[str, ...]) -> str:
    return (
        "# into your config; the environment that trains needs bntool\n"
        "custom_imports = dict(imports=['bntool.integrations.mmengine'], allow_failed_imports=False)\n"
        f"custom_hooks = [dict(type='FreezeBatchNormHook', {_arguments(policy, batchnorms)})]\n"
    )


def _lightning(policy: FreezePolicy, batchnorms: tuple[str, ...]) -> str:
    return (
        "# the environment that trains needs bntool\n"
        "import lightning\n"
        "from bntool.integrations.lightning import FreezeBatchNorm\n\n"
        f"trainer = lightning.Trainer(callbacks=[FreezeBatchNorm({_arguments(policy, batchnorms)})])\n"
    )


def _accelerate(policy: FreezePolicy, batchnorms: tuple[str, ...]) -> str:
    return (
        "# the environment that trains needs bntool\n"
        "import bntool\n\n"
        f"bntool.freeze(model, {_arguments(policy, batchnorms)})  # before accelerator.prepare\n"
        "model, optimizer = accelerator.prepare(model, optimizer)\n"
    )


def _timm(policy: FreezePolicy, _batchnorms: tuple[str, ...]) -> str:
    stages = policy.stages
    if policy.layers and (not policy.norm_eval or policy.requires_grad is not False):
        raise RefusedError(
            "timm's freeze keeps statistics, weight and bias together (it swaps in FrozenBatchNorm2d); "
            "add --no-requires-grad, or use --emit python"
        )
    if stages is not None and stages.family is Family.MOBILENET_V2:
        raise RefusedError("timm's freeze cannot leave statistics of the stem moving; use --emit python")
    names = [*(stages.without_gradient if stages is not None else ()), *policy.layers]
    return (
        "# 2d and SyncBatchNorm only; saves and loads keys of FrozenBatchNorm2d from then on\n"
        "from timm.utils import freeze\n\n"
        + "\n".join(_list("NAMES", names))
        + "\n\nfreeze(model, NAMES, include_bn_running_stats=True)\n"
    )


def _arguments(policy: FreezePolicy, batchnorms: tuple[str, ...]) -> str:
    arguments = [f"norm_eval={policy.norm_eval}"]
    if policy.requires_grad is not None:
        arguments.append(f"requires_grad={policy.requires_grad}")
    if policy.layers and policy.layers != batchnorms:
        arguments.append(f"layers={list(policy.layers)!r}")
    if policy.stages is not None:
        arguments.append(f"frozen_stages={policy.stages.frozen_stages}")
    return ", ".join(arguments)


_EMITTERS: dict[EmitTarget, Callable[[FreezePolicy, tuple[str, ...]], str]] = {
    EmitTarget.PYTHON: _python,
    EmitTarget.MMDET: _mmdet,
    EmitTarget.MMENGINE: _mmengine,
    EmitTarget.LIGHTNING: _lightning,
    EmitTarget.TIMM: _timm,
    EmitTarget.ACCELERATE: _accelerate,
}
