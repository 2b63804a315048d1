"""Freezing BatchNorm layers in a checkpoint file: what that means, and writing it.

A state dict holds numbers only: neither modes nor requires_grad. So the plan records a policy that
:func:`bntool.freezing.live.apply_freeze` carries out on the live model; in a pickled module it also sets the flags
themselves.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from bntool.batchnorm import AFFINE, BUFFERS, BatchNorm, NormKind, check_globs, selects
from bntool.checkpoints.application import apply_plan, skip_not_understood
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.checkpoint import Checkpoint, StateDict, check_changeable
from bntool.checkpoints.descriptions import describe_model, save_with_description
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.records import check_not_folded, find_recorded_classes, find_recorded_eps, make_record
from bntool.checkpoints.saving import check_output
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.checkpoints.tensors import StoredTensor
from bntool.choices import choose
from bntool.errors import RefusedError, UsageError
from bntool.freezing.constants import leave_tied, plan_constant
from bntool.freezing.emission import emit_freeze
from bntool.freezing.optimizers import OptimizerEntries, find_optimizer_entries
from bntool.freezing.options import EmitTarget, FreezeForm
from bntool.freezing.policy import FreezePolicy
from bntool.freezing.stages import find_frozen_stages, is_within
from bntool.freezing.trainable_layers import check_whole_layers, find_trainable
from bntool.graphs.architectures.recognition import assume_eps
from bntool.plan import Operation, Plan, SetAttribute, Skip, SkipReason, Step, check_plan
from bntool.representation import html_repr, repr_of_change, short_repr
from bntool.verification.missing_statistics import describe_absence


class Carrier(Enum):
    """The place where a written file says that its layers are frozen."""

    RECORD = "record"  # nothing yet: the policy that is recorded, once it is applied to the live model
    MODULES = "modules"  # flags of pickled modules, and the record
    LAYERS = "layers"  # what a Keras file says of its layers
    NET = "net"  # the .prototxt that a Caffe model is trained by
    CONSTANTS = "constants"  # the format is a program for inference: there is nothing to keep


@dataclass(frozen=True)
class FreezePlan:
    """A plan, and what it means for the layers.

    Attributes:
        plan: ends with the record of the policy, where the file has a place for it.
        policy: what the record says.
        form: what becomes of the tensors.
        batchnorms: all layers of the state dict, selected or not.
        frozen_parameters: names of the parameters that the policy keeps from training.
        carrier: what the freeze lies in.
        optimizers: which entries of optimizer states belong to frozen parameters.
    """

    plan: Plan
    policy: FreezePolicy
    form: FreezeForm
    batchnorms: tuple[str, ...]
    frozen_parameters: tuple[str, ...]
    carrier: Carrier
    optimizers: tuple[OptimizerEntries, ...]

    __repr__ = short_repr
    _repr_html_ = html_repr


@dataclass(frozen=True)
class CheckpointFreeze:
    """A freeze of a checkpoint file.

    Attributes:
        source: the checkpoint before.
        checkpoint: with its edits.
        freeze: the plan and what it means.
        code: that freezes the same layers elsewhere, where that was asked for.
        output: the file that was written; None where nothing was.
    """

    source: Checkpoint
    checkpoint: Checkpoint
    freeze: FreezePlan
    code: str | None = None
    output: str | None = None

    def __repr__(self) -> str:
        layers, left = len(self.freeze.policy.layers), len(self.freeze.plan.skips)
        return repr_of_change(self, self.source.path, changed=layers, left_alone=left, output=self.output)

    _repr_html_ = html_repr


def freeze_checkpoint(  # noqa: PLR0913 as many as the command has options
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    norm_eval: bool = True,
    requires_grad: bool | None = None,
    layers: Sequence[str] = (),
    frozen_stages: int | None = None,
    form: FreezeForm | str = FreezeForm.POLICY,
    eps: float | None = None,
    emit: EmitTarget | str | None = None,
    prototxt: str | os.PathLike[str] | None = None,
    keras_config: str | os.PathLike[str] | None = None,
    state_dict: str | None = None,
    force: bool = False,
    strict: bool = False,
) -> CheckpointFreeze:
    """Keep BatchNorm layers of a checkpoint from changing while the model trains on; what ``bntool freeze`` does.

    A state dict freezes nothing by itself: :func:`bntool.apply_freeze` applies to the model what is recorded here.

    Examples:
        >>> bntool.freeze_checkpoint("ckpt.pt", "frozen.pt", requires_grad=False)

    Args:
        path: the checkpoint; never written to.
        output: the file to write; None to write none.
        norm_eval: the statistics are to stay.
        requires_grad: False: weight and bias are to stay; True: they are to train; None: as the model has it.
        layers: globs of layer names; none for all.
        frozen_stages: freeze the first stages of the backbone as a whole.
        form: with CONSTANT, statistics become constants and weight and bias scale and shift.
        eps: of layers that do not say it themselves, for CONSTANT; None for that of a recognised architecture.
        emit: write code or configuration that freezes the same layers there.
        prototxt: the net that a ``.caffemodel`` is run by.
        keras_config: the JSON of the Keras model that weights alone belong to, or a ``.keras`` or ``.h5`` file of it.
        state_dict: its key; None for the one chosen by rule.
        force: replace a file that exists.
        strict: refuse if a layer is skipped or something is assumed.

    Raises:
        UsageError, FileError, RefusedError: see :mod:`bntool.errors`; nothing is written then.
    """
    form = choose(FreezeForm, form, option="form")
    emit = None if emit is None else choose(EmitTarget, emit, option="emit")
    target = None if output is None else Path(output)
    with open_checkpoint(path) as opened:
        if emit is not None and not opened.format.is_pytorch:
            raise RefusedError(f"--emit writes code for PyTorch models, not for {opened.format.title}", path=path)
        check_changeable(opened)
        check_output(opened, target, force=force)
        source, description = describe_model(
            opened,
            prototxt=None if prototxt is None else Path(prototxt),
            keras_config=None if keras_config is None else Path(keras_config),
            output=target,
            force=force,
        )
        freeze = plan_freeze(
            source,
            state_dict=state_dict,
            norm_eval=norm_eval,
            requires_grad=requires_grad,
            layers=layers,
            frozen_stages=frozen_stages,
            form=form,
            eps=eps,
            for_file=emit is None or (target is not None and not opened.format.trains_whole_layers),
        )
        if not freeze.plan.steps and not freeze.plan.skips:
            check_not_folded(source.records.get(freeze.plan.state_dict, ()), path)
        has_steps = bool(freeze.plan.steps)
        absence = "" if has_steps else describe_absence(choose_state_dict(source, state_dict), source.not_understood)
        check_plan(freeze.plan, path, strict=strict, absence=absence)
        code = None if emit is None else emit_freeze(freeze.policy, emit, batchnorms=freeze.batchnorms)
        edited = apply_plan(source, freeze.plan)
        if target is not None:
            save_with_description(edited, target, description, force=force)
    return CheckpointFreeze(source, edited, freeze, code, None if target is None else str(target))


def plan_freeze(  # noqa: PLR0913 each is an option of the command
    checkpoint: Checkpoint,
    *,
    state_dict: str | None = None,
    norm_eval: bool = True,
    requires_grad: bool | None = None,
    layers: Sequence[str] = (),
    frozen_stages: int | None = None,
    form: FreezeForm = FreezeForm.POLICY,
    eps: float | None = None,
    for_file: bool = True,
) -> FreezePlan:
    """Plan to freeze BatchNorm layers; the switches are those of :func:`bntool.freezing.live.freeze`.

    Args:
        state_dict: its key; None for the one chosen by rule.
        norm_eval: the statistics are to stay.
        requires_grad: False: weight and bias are to stay; True: they are to train; None: as the model has it.
        layers: globs of layer names; none for all.
        frozen_stages: freeze the first stages of the backbone as a whole.
        form: with CONSTANT, statistics become constants and weight and bias scale and shift.
        eps: of layers that do not say it themselves, for CONSTANT; None for that of a recognised architecture.
        for_file: the plan is for a file; else only for code that freezes, and it does not matter whether the file has
            a place for the record.

    Raises:
        UsageError: the switches freeze nothing, the state dict or the stages are not known, or ``eps`` contradicts
            the file.
        RefusedError: CONSTANT without eps, or a policy that the file has no place for.
    """
    check_changeable(checkpoint)
    if not norm_eval and requires_grad is not False and frozen_stages in (None, -1):
        raise UsageError("with --no-norm-eval and without --no-requires-grad or --frozen-stages nothing is frozen")
    carrier = _find_carrier(checkpoint, form=form, for_file=for_file)
    if carrier is Carrier.LAYERS:
        check_whole_layers(
            checkpoint,
            norm_eval=norm_eval,
            requires_grad=requires_grad,
            frozen_stages=frozen_stages,
            for_file=for_file,
        )
        requires_grad = False
    source = choose_state_dict(checkpoint, state_dict)
    if source.is_module:
        carrier = Carrier.MODULES
    batchnorms = find_batchnorms(source)
    check_globs(layers, [layer.name for layer in batchnorms])
    selected = [layer for layer in batchnorms if selects(layers, layer.name)]
    skips = [
        Skip(layer.name, SkipReason.FROZEN, "a FrozenBatchNorm has nothing that could move")
        for layer in selected
        if layer.kind is NormKind.FROZEN_BATCH_NORM
    ]
    chosen = [layer for layer in selected if layer.kind is not NormKind.FROZEN_BATCH_NORM]
    stages = None
    if frozen_stages is not None:
        stages = find_frozen_stages(_modules(source), frozen_stages)
    policy = FreezePolicy(
        norm_eval=norm_eval,
        requires_grad=requires_grad,
        layers=tuple(layer.name for layer in chosen) if norm_eval or requires_grad is not None else (),
        stages=stages,
    )
    concerned = [layer for layer in batchnorms if layer.name in policy.layer_names or _in_stages(policy, layer.name)]
    steps: list[Step] = []
    assumptions: tuple[str, ...] = ()
    if form is FreezeForm.CONSTANT:
        concerned = _add_recorded(concerned, checkpoint.records.get(source.key, ()))
        if eps is None:
            known, assumptions = assume_eps(source, concerned)
            concerned = list(known)
        constant_steps, constant_skips = plan_constant(concerned, eps=eps)
        if checkpoint.format.is_pytorch:  # nodes of other formats get tensors of their own
            constant_steps, tied_skips = leave_tied(constant_steps, source)
            constant_skips += tied_skips
        steps += constant_steps
        skips += constant_skips
        unchanged = {skip.layer for skip in constant_skips}
        concerned = [layer for layer in concerned if layer.name not in unchanged]
    switches, unknown = _switch(checkpoint, source, carrier, concerned, policy)
    steps += switches
    skips += unknown
    unchanged = {skip.layer for skip in unknown}
    concerned = [layer for layer in concerned if layer.name not in unchanged]
    frozen_parameters = tuple(_frozen_parameters(source, policy))
    plan = Plan(
        Operation.FREEZE,
        state_dict=source.key,
        steps=tuple(steps),
        skips=tuple(skips),
        layers=tuple(layer.name for layer in concerned),
        assumptions=assumptions,
    )
    plan = skip_not_understood(plan, checkpoint, source, layers=layers)
    keeps_policy = carrier in (Carrier.RECORD, Carrier.MODULES) and (concerned or frozen_parameters)
    if keeps_policy or (carrier is Carrier.LAYERS and steps):
        own_eps = {"eps": eps} if form is FreezeForm.CONSTANT and eps is not None else {}
        record = make_record(plan, form=form.value, policy=policy.to_record(), **own_eps)
        if not for_file or _has_place(checkpoint, source, plan):
            plan = plan.with_record(record)
    return FreezePlan(
        plan=plan,
        policy=policy,
        form=form,
        batchnorms=tuple(layer.name for layer in batchnorms),
        frozen_parameters=frozen_parameters,
        carrier=carrier,
        optimizers=find_optimizer_entries(checkpoint, source, frozen_parameters),
    )


def _find_carrier(checkpoint: Checkpoint, *, form: FreezeForm, for_file: bool) -> Carrier:
    if checkpoint.format.is_for_inference:
        if form is FreezeForm.POLICY or not for_file:
            raise RefusedError(
                "an ONNX model is a program for inference: nothing in it trains, so there is nothing to freeze; freeze "
                "the model that it was exported from",
                path=checkpoint.path,
            )
        return Carrier.CONSTANTS
    if checkpoint.format.needs_prototxt:
        if not for_file:
            raise RefusedError("--emit writes code for PyTorch; a Caffe net is frozen by its .prototxt: --prototxt NET")
        from bntool.checkpoints.caffe.blobs import CaffeContent  # only Caffe's files need it

        if not isinstance(checkpoint.content, CaffeContent) or checkpoint.content.deployed is None:
            raise RefusedError(
                "what of a Caffe net trains is said by its .prototxt: give it with --prototxt NET", path=checkpoint.path
            )
        return Carrier.NET
    return Carrier.LAYERS if checkpoint.format.trains_whole_layers else Carrier.RECORD


def _add_recorded(layers: Sequence[BatchNorm], history: Sequence[Mapping[str, Any]]) -> list[BatchNorm]:
    """Return the layers with the eps that their tensors belong to, and their class, where bntool recorded these."""
    eps, classes = find_recorded_eps(history), find_recorded_classes(history)
    return [
        dataclasses.replace(
            layer,
            eps=eps.get(layer.name) if layer.eps is None else layer.eps,
            class_path=layer.class_path or classes.get(layer.name, ""),
        )
        for layer in layers
    ]


def _switch(
    checkpoint: Checkpoint,
    source: StateDict,
    carrier: Carrier,
    layers: Sequence[BatchNorm],
    policy: FreezePolicy,
) -> tuple[Sequence[Step], Sequence[Skip]]:
    """Plan what the file itself can say of a policy, and skip the layers of which it cannot."""
    if carrier is Carrier.MODULES:
        return _flags(source, policy), []
    if carrier is Carrier.LAYERS:
        found = list(find_trainable(checkpoint, source, layers))
        return [f for f in found if isinstance(f, SetAttribute)], [f for f in found if isinstance(f, Skip)]
    return _switch_net(layers, policy) if carrier is Carrier.NET else ([], [])


def _switch_net(layers: Sequence[BatchNorm], policy: FreezePolicy) -> tuple[list[Step], list[Skip]]:
    """Write the policy into a Caffe net, as use_global_stats, lr_mult and decay_mult."""
    if policy.stages is not None:
        raise UsageError("--frozen-stages knows backbones of PyTorch; name the layers of a Caffe net with --layers")
    steps: list[Step] = []
    skips: list[Skip] = []
    for layer in layers:
        if layer.class_path != "caffe.BatchNorm":
            kind = layer.class_path.rpartition(".")[2]
            skips.append(Skip(layer.name, SkipReason.NOT_A_BATCHNORM, f"type {kind} is of a fork of Caffe"))
            continue
        if policy.norm_eval:
            steps.append(SetAttribute(layer.name, "training", value=False))
        if policy.requires_grad is False:
            roles = (role for role in AFFINE if role in layer.tensors)
            steps += (SetAttribute(layer.name, f"{role}.requires_grad", value=False) for role in roles)
    return steps, skips


def _modules(state_dict: StateDict) -> list[str]:
    owners = {state_dict.strip(name).rpartition(".")[0]: None for name in state_dict.tensors}
    return [*owners, *(state_dict.strip(name) for name in state_dict.modules)]


def _in_stages(policy: FreezePolicy, name: str) -> bool:
    stages = policy.stages
    return stages is not None and is_within(name, (*stages.in_eval, *stages.without_gradient))


def _has_place(checkpoint: Checkpoint, source: StateDict, plan: Plan) -> bool:
    """Return whether the file can keep the policy; where not, its tensors or flags must carry what they can by
    themselves.
    """
    if checkpoint.format.can_record(checkpoint, source):
        return True
    if plan.steps:
        return False
    raise RefusedError(
        f"a {checkpoint.format.title} file has no place for a freeze policy here, and its tensors cannot say it; "
        "convert it first (bntool convert CKPT --to torch -o NEW), or print code that freezes with --emit python",
        path=checkpoint.path,
    )


def _flags(state_dict: StateDict, policy: FreezePolicy) -> list[Step]:
    """Return the flags of a pickled module that differ from what the policy asks for."""
    stages = policy.stages
    in_eval = stages.in_eval if stages is not None else ()
    held = policy.layer_names if policy.norm_eval else frozenset()
    steps: list[Step] = []
    for path, module in state_dict.modules.items():
        name = state_dict.strip(path)
        if (name in held or (in_eval and is_within(name, in_eval))) and module.attributes.get("training") is not False:
            steps.append(SetAttribute(name, "training", value=False))
    for full, tensor in state_dict.tensors.items():
        if not isinstance(tensor, StoredTensor) or not tensor.is_parameter or tensor.requires_grad is None:
            continue
        name = state_dict.strip(full)
        wanted = _wanted_gradient(policy, name)
        if wanted is not None and wanted != tensor.requires_grad:
            owner, _, leaf = name.rpartition(".")
            steps.append(SetAttribute(owner, f"{leaf}.requires_grad", value=wanted))
    return steps


def _wanted_gradient(policy: FreezePolicy, name: str) -> bool | None:
    """Return the requires_grad that the policy asks for, for one parameter; None if it asks for none."""
    if policy.stages is not None and is_within(name, policy.stages.without_gradient):
        return False
    owner, _, leaf = name.rpartition(".")
    return policy.requires_grad if owner in policy.layer_names and leaf in AFFINE else None


def _frozen_parameters(state_dict: StateDict, policy: FreezePolicy) -> list[str]:
    names = [state_dict.strip(name) for name in state_dict.tensors]
    return [
        name for name in names if _wanted_gradient(policy, name) is False and name.rpartition(".")[2] not in BUFFERS
    ]
