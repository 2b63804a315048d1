"""The result of `freeze`, for people and as JSON data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bntool.freezing.checkpoint import Carrier, CheckpointFreeze, FreezePlan
from bntool.freezing.options import FreezeForm
from bntool.freezing.policy import FreezePolicy
from bntool.plan import Record, SetAttribute, SetTensor, Skip, describe_step
from bntool.reports.blocks import Block, Cell, Line, Style, line, verbatim
from bntool.reports.loading import show_loading_code
from bntool.reports.text import plural
from bntool.representation import list_first
from bntool.shells import join_words

_SHOWN = 6


def describe_freeze(result: CheckpointFreeze) -> dict[str, Any]:
    """Return the facts as JSON data."""
    freeze, output = result.freeze, result.output
    plan = freeze.plan
    return {
        "format": result.source.format.name,
        "state_dict": plan.state_dict,
        "form": freeze.form.value,
        "policy": freeze.policy.to_record(),
        "layers": list(plan.layers),
        "frozen_parameters": list(freeze.frozen_parameters),
        "recorded": any(plan.steps_of(Record)),
        "sets_flags": freeze.carrier in (Carrier.MODULES, Carrier.LAYERS, Carrier.NET),
        "steps": [describe_step(step) for step in plan.steps if not isinstance(step, Record)],
        "skips": [describe_skip(skip) for skip in plan.skips],
        "assumptions": list(plan.assumptions),
        "optimizers": [
            {"path": o.path, "parameters": o.count, "frozen": o.frozen, "reason": o.reason} for o in freeze.optimizers
        ],
        "apply": apply_line(output) if output is not None and any(plan.steps_of(Record)) else None,
        "emitted": result.code,
        "output": output,
    }


def describe_skip(skip: Skip) -> dict[str, str]:
    """Return a skipped layer as JSON data."""
    return {"layer": skip.layer, "reason": skip.reason.value, "detail": skip.detail}


def apply_line(output: str) -> str:
    """Return the line of Python that applies the policy of a file to a live model."""
    return f"bntool.apply_freeze(model, {output!r})"


def show_freeze(result: CheckpointFreeze) -> list[Block]:
    """Return lines for people: the result, what needs attention, which layers, and the code that loads what was
    written.
    """
    freeze, output, emitted = result.freeze, result.output, result.code
    blocks: list[Block] = [*_policy(freeze), *_changes(freeze)]
    blocks += (
        [line("nothing was written", Style.MUTED)] if output is None else verbatim([f"wrote {output}"], Style.GOOD)
    )
    assumed = [Line((Cell("assumed ", Style.WARNING), Cell(text)), indent=2) for text in freeze.plan.assumptions]
    for part in ([*assumed, *_skips(freeze.plan.skips)], [*_list_layers(freeze), *_optimizers(freeze)]):
        blocks += [line(), *part] if part else []
    if emitted is not None:
        blocks += [line(), *verbatim(emitted.rstrip("\n").split("\n"))]
    if output is not None:
        state_dict = result.checkpoint.state_dict(freeze.plan.state_dict)
        loading = show_loading_code(result.checkpoint, state_dict, output)
        blocks += [line(), *_how_to_load(freeze, output, loading)]
    return blocks


def _policy(freeze: FreezePlan) -> list[Block]:
    policy = freeze.policy
    blocks: list[Block] = [line(f"freeze {plural(len(freeze.plan.layers), 'BatchNorm layer')}", Style.HEADING)]
    if policy.layers and freeze.carrier is not Carrier.CONSTANTS:
        # what the two switches say of the layers selected
        statistics = "stay (norm_eval)" if policy.norm_eval else "move"
        blocks.append(line(f"running_mean, running_var, num_batches_tracked: {statistics}", indent=2))
        affine = {None: "train, as the model has it", True: "train", False: "stay (requires_grad=False)"}
        blocks.append(line(f"weight, bias: {affine[policy.requires_grad]}", indent=2))
    return blocks


def _list_layers(freeze: FreezePlan) -> list[Block]:
    policy = freeze.policy
    shown = policy.layers and freeze.carrier is not Carrier.CONSTANTS
    return [
        *([line(f"layers: {list_first(policy.layers, _SHOWN)}", Style.MUTED, indent=2)] if shown else []),
        *_stages(policy),
    ]


def _stages(policy: FreezePolicy) -> list[Block]:
    stages = policy.stages
    if stages is None:
        return []
    where = f" at {stages.root}" if stages.root else ""
    text = f"frozen_stages={stages.frozen_stages} of the {stages.family.value}{where}: "
    if not stages.without_gradient:
        return [line(text + "no stage", indent=2)]
    blocks: list[Block] = [line(text + f"{list_first(stages.without_gradient, _SHOWN)} get no gradient", indent=2)]
    if stages.in_eval:
        blocks.append(line(f"{list_first(stages.in_eval, _SHOWN)} stay in eval mode", indent=4))
    return blocks


def _changes(freeze: FreezePlan) -> list[Block]:
    plan = freeze.plan
    blocks: list[Block] = []
    if freeze.form is FreezeForm.CONSTANT:
        layers = len({step.name.rpartition(".")[0] for step in plan.steps_of(SetTensor)})
        blocks.append(
            line(
                f"{plural(layers, 'layer')}: statistics folded into weight and bias (mean 0, variance 1 - eps)",
                indent=2,
            )
        )
    flags = list(plan.steps_of(SetAttribute))
    modes = sum(step.attribute == "training" for step in flags)
    if freeze.carrier is Carrier.MODULES:
        changed = (("training=False", modes), ("requires_grad", len(flags) - modes))
        said = ", ".join(f"{name} {plural(count, 'time')}" for name, count in changed if count)
        blocks.append(line(f"in the pickled modules: {said}", indent=2))
    elif freeze.carrier is Carrier.LAYERS:
        blocks.append(line(f"in the configuration of {plural(len(flags), 'layer')}: trainable false", indent=2))
    elif freeze.carrier is Carrier.NET:
        affine = len({step.module for step in flags if step.attribute != "training"})
        parts = (
            f"use_global_stats in {plural(modes, 'layer')}, whose statistics do not learn (lr_mult 0)" if modes else "",
            f"weight and bias of {plural(affine, 'layer')} do not learn (lr_mult 0)" if affine else "",
        )
        blocks.append(line(f"in the .prototxt: {'; '.join(filter(None, parts))}", indent=2))
    return blocks


def _skips(skips: Iterable[Skip]) -> list[Block]:
    return [
        Line((Cell("left alone ", Style.WARNING), Cell(f"{s.layer}: {s.reason.value}{_detail(s)}")), indent=2)
        for s in skips
    ]


def _detail(skip: Skip) -> str:
    return f" ({skip.detail})" if skip.detail else ""


def _optimizers(freeze: FreezePlan) -> list[Block]:
    blocks: list[Block] = []
    for optimizer in freeze.optimizers:
        if not freeze.frozen_parameters:
            text = "is left alone; no parameter is frozen"
        elif optimizer.frozen is None:
            text = f"is left alone; which of its entries are of frozen parameters cannot be known: {optimizer.reason}"
        else:
            numbers = list_first([str(number) for number in optimizer.frozen.values()], _SHOWN)
            text = (
                f"is left alone; {len(optimizer.frozen)} of its {optimizer.count} entries are of frozen parameters "
                f"({numbers}; {optimizer.reason})"
            )
        blocks.append(line(f"optimizer state {optimizer.path!r} {text}", Style.MUTED, indent=2))
    return blocks


def _how_to_load(freeze: FreezePlan, output: str, loading: Sequence[str]) -> list[Block]:
    if freeze.carrier in (Carrier.NET, Carrier.CONSTANTS):
        kept = [line("Caffe itself keeps these layers so when it trains by the .prototxt beside it.")]
        return [
            *(kept if freeze.carrier is Carrier.NET else []),
            line("It runs as before:", Style.MUTED),
            *verbatim(loading, Style.MUTED, indent=4),
        ]
    recorded = any(freeze.plan.steps_of(Record))
    blocks: list[Block] = []
    if freeze.carrier is Carrier.LAYERS:
        return [
            line(
                "Load it; training leaves these layers alone, their statistics too, as long as they are not trainable:"
            ),
            *verbatim(loading, indent=4),
        ]
    if freeze.carrier is Carrier.MODULES:
        warning = "The file freezes until model.train() is called: that switches eval mode off again."
    else:
        warning = "The file alone freezes nothing: a state dict holds neither modes nor requires_grad."
    blocks.append(line(warning, Style.WARNING))
    if recorded:
        blocks += [
            line("After loading it into the model, and before the optimizer is made and DDP wraps it:"),
            *verbatim(["import bntool", apply_line(output)], indent=4),
        ]
        if freeze.policy.norm_eval:
            expected = "frozen" if freeze.policy.requires_grad is False else "norm-eval"
            command = join_words(["bntool", "diff", output, "TRAINED", "--expect", expected])
            blocks += [line("After training, this proves that it held:"), *verbatim([command], indent=4)]
    blocks.append(
        line("Without bntool: --emit python prints the same in plain torch. It loads as before:", Style.MUTED)
    )
    blocks += verbatim(loading, Style.MUTED, indent=4)
    return blocks
