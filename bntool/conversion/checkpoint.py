"""Converting a checkpoint: to another format, or between BatchNorm and FrozenBatchNorm2d, saying what that loses."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bntool.batchnorm import check_globs, selects
from bntool.checkpoints.application import apply_plan, skip_not_understood
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.checkpoint import Checkpoint, StateDict, check_changeable
from bntool.checkpoints.creation import NewFile, NewFormat, create_file, find_unwritable
from bntool.checkpoints.files import quote
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.records import make_record
from bntool.checkpoints.saving import check_output, find_misnamed, save_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict, find_not_understood
from bntool.checkpoints.tensors import StoredTensor
from bntool.checkpoints.ties import find_first_names
from bntool.choices import choose
from bntool.conversion.frozen_batchnorm import plan_batchnorm, plan_frozen_batchnorm
from bntool.conversion.options import ConversionTarget, FrozenKind
from bntool.conversion.renaming import describe_left, plan_renames
from bntool.errors import BntoolError, RefusedError, UsageError
from bntool.graphs.architectures.recognition import assume_eps
from bntool.plan import Operation, Plan, RenameTensor, check_plan
from bntool.progress import OnWarning, ignore
from bntool.representation import html_repr, list_first, repr_of_change
from bntool.verification.missing_statistics import describe_absence

_SHOWN = 4
# where the file does not keep its own format
_NEW_FORMATS = {ConversionTarget.SAFETENSORS: NewFormat.SAFETENSORS, ConversionTarget.TORCH: NewFormat.TORCH}
_TARGETS_BY_NAME = {target.value: target for target in _NEW_FORMATS}


@dataclass(frozen=True)
class Conversion:
    """A conversion that was planned.

    Attributes:
        target: what to; None where only names change.
        source: the checkpoint before.
        plan: what changes; its layers are those that change their kind.
        new: what the new file holds, where the format changes; else the plan is applied to the file.
        new_format: its format.
        renames: the tensors that have other names.
        kept: what the new file remembers though the format has no place for it.
        losses: what cannot survive, one sentence each.
        output: the file that was written; None where nothing was.
        written: what it holds.
    """

    target: ConversionTarget | None
    source: Checkpoint
    plan: Plan
    new: NewFile | None
    new_format: NewFormat | None
    kept: tuple[str, ...]
    losses: tuple[str, ...]
    renames: tuple[RenameTensor, ...] = ()
    output: str | None = None
    written: Checkpoint | None = None

    def __repr__(self) -> str:
        to = [] if self.target is None else [f"to {self.target.value}"]
        to += [f"{len(self.renames)} tensors renamed"] if self.renames else []
        to += [f"{len(self.losses)} lost"] if self.losses else []
        layers, left = len(self.plan.layers), len(self.plan.skips)
        return repr_of_change(
            self, self.source.path, changed=layers, left_alone=left, more=", ".join(to), output=self.output
        )

    _repr_html_ = html_repr


def convert(  # noqa: PLR0913 as many as the command has options
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    to: ConversionTarget | str | None = None,
    strip_prefix: str = "",
    add_prefix: str = "",
    renames: Mapping[str, str] | None = None,
    eps: float | None = None,
    frozen_kind: FrozenKind | str = FrozenKind.TORCHVISION,
    target_eps: float | None = None,
    layers: Sequence[str] = (),
    state_dict: str | None = None,
    force: bool = False,
    strict: bool = False,
    on_warning: OnWarning = ignore,
) -> Conversion:
    """Convert a checkpoint between file formats or kinds of BatchNorm; what ``bntool convert`` does.

    Examples:
        >>> bntool.convert("ckpt.pt", "ckpt.safetensors", to="safetensors", strip_prefix="module.")

    Args:
        path: the checkpoint; never written to.
        output: the file to write; None to write none.
        to: what to; None for the format that the name of the output says, or where only names change.
        strip_prefix: what all or some names begin with, such as ``module.``; whole parts of names.
        add_prefix: what is put before all names.
        renames: from the path of a module, or the name of a tensor, to another.
        eps: of the BatchNorm layers where the file does not say it, for FrozenBatchNorm; None for that of a recognised
            architecture.
        frozen_kind: whose FrozenBatchNorm2d.
        target_eps: eps that its layers will be built with; None for its default.
        layers: globs, for the two kinds of BatchNorm; none for all.
        state_dict: its key; None for the one chosen by rule.
        force: replace a file that exists.
        strict: refuse if something would be lost, a layer is skipped or something is assumed.
        on_warning: called with each thing that will be lost, before anything is written.

    Raises:
        UsageError, FileError, RefusedError, VerificationError: see :mod:`bntool.errors`; nothing is written then.
    """
    target = None if output is None else Path(output)
    with open_checkpoint(path) as source:
        goal = _find_format(source, target) if to is None else choose(ConversionTarget, to, option="to")
        check_output(source, target, force=force, keeps_format=goal not in _NEW_FORMATS)
        renaming = _rename(
            source,
            state_dict,
            strip_prefix=strip_prefix,
            add_prefix=add_prefix,
            renames=renames,
            rest_stays=goal not in _NEW_FORMATS,
        )
        if layers and (goal is None or goal in _NEW_FORMATS):
            raise UsageError("--layers selects what becomes another kind of BatchNorm; a whole state dict is converted")
        renamed = source if renaming is None else apply_plan(source, renaming.plan)
        if goal is not None:
            conversion = plan_conversion(
                renamed,
                goal,
                state_dict=state_dict,
                layers=layers,
                eps=eps,
                frozen_kind=choose(FrozenKind, frozen_kind, option="frozen_kind"),
                target_eps=target_eps,
            )
        elif renaming is not None:
            conversion = renaming
        else:
            raise UsageError(
                "nothing is to be done: give --to, --strip-prefix, --add-prefix or --rename, or an output whose name "
                "says another format, .safetensors or .pt"
            )
        if goal is not None and renaming is not None:
            losses = dict.fromkeys((*renaming.losses, *conversion.losses))
            renames_of = tuple(renaming.plan.steps_of(RenameTensor))
            conversion = dataclasses.replace(conversion, source=source, losses=tuple(losses), renames=renames_of)
        if conversion.new is None:
            absence = describe_absence(choose_state_dict(renamed, state_dict), renamed.not_understood)
            check_plan(conversion.plan, path, strict=strict, absence=absence)
        if strict:
            _check_certain(conversion, path)
        for loss in conversion.losses:
            on_warning(f"this will be lost: {loss}")
        written = None
        if target is not None:
            if conversion.new is not None and conversion.new_format is not None:
                create_file(conversion.new, conversion.new_format, target, source=source, force=force)
            else:
                save_checkpoint(renamed if goal is None else apply_plan(renamed, conversion.plan), target, force=force)
            with open_checkpoint(target) as written:
                pass
    return dataclasses.replace(conversion, output=None if target is None else str(target), written=written)


def _find_format(source: Checkpoint, output: Path | None) -> ConversionTarget | None:
    """Return the format that the name of the output says, where it is another one than the source's."""
    if output is None or str(source.path).endswith(output.suffix or "/"):
        return None
    return _TARGETS_BY_NAME.get(find_misnamed(source.format.name, output) or "")


def _rename(
    checkpoint: Checkpoint,
    key: str | None,
    *,
    strip_prefix: str,
    add_prefix: str,
    renames: Mapping[str, str] | None,
    rest_stays: bool,
) -> Conversion | None:
    """Plan new names without changing anything else; None if no new names are asked for.

    Args:
        rest_stays: what else the file holds is written, too.

    Raises:
        RefusedError: the format is only read, or its names are those of a program.
    """
    if not (strip_prefix or add_prefix or renames):
        return None
    source = choose_state_dict(checkpoint, key)
    if checkpoint.format.holds_code or source.is_module or not checkpoint.format.is_pytorch:
        what = "of pickled modules" if source.is_module else f"in a {checkpoint.format.title} file"
        raise RefusedError(
            f"the names {what} are those of its code or graph, which would not find its tensors again; take a state "
            "dict out first with bntool convert CKPT --to torch, where that is possible",
            path=checkpoint.path,
        )
    try:
        steps = plan_renames(source, strip_prefix=strip_prefix, renames=renames, add_prefix=add_prefix)
    except BntoolError as error:
        raise error.about(checkpoint.path) from None
    plan = Plan(Operation.CONVERT, state_dict=source.key, steps=steps)
    if steps and checkpoint.format.can_record(checkpoint, source):
        options = {"strip_prefix": strip_prefix, "add_prefix": add_prefix, "renames": dict(renames or {})}
        plan = plan.with_record(make_record(plan, to=None, **{name: value for name, value in options.items() if value}))
    left = describe_left(checkpoint, source, strip_prefix=strip_prefix, rest_stays=rest_stays)
    return Conversion(None, checkpoint, plan, None, None, kept=(), losses=tuple(left), renames=steps)


def plan_conversion(
    checkpoint: Checkpoint,
    target: ConversionTarget,
    *,
    state_dict: str | None = None,
    layers: Sequence[str] = (),
    eps: float | None = None,
    frozen_kind: FrozenKind = FrozenKind.TORCHVISION,
    target_eps: float | None = None,
) -> Conversion:
    """Plan to convert a checkpoint.

    Args:
        state_dict: its key; None for the one chosen by rule.
        layers: globs, for the two kinds of BatchNorm.
        eps: of the BatchNorm layers where the file does not say it, for FROZEN_BATCHNORM; None for that of a
            recognised architecture.
        frozen_kind: whose FrozenBatchNorm2d.
        target_eps: eps that its layers will be built with; None for its default.

    Raises:
        UsageError: there is no such state dict, or ``eps`` contradicts the file.
        RefusedError: a tensor or a layer cannot be converted, or eps is not known.
    """
    if not checkpoint.format.is_pytorch:
        check_changeable(checkpoint)
        raise RefusedError(
            f"{checkpoint.format.title} models are no state dicts: names and layout of weights are those of another "
            "framework, and no PyTorch model would load them; copy them into a PyTorch model and save that",
            path=checkpoint.path,
        )
    source = choose_state_dict(checkpoint, state_dict)
    new_format = _NEW_FORMATS.get(target)
    if new_format is not None:
        return _plan_format(checkpoint, source, target, new_format)
    check_changeable(checkpoint)
    if source.is_module:
        raise RefusedError(
            "the file pickles whole modules, whose classes cannot be exchanged in it; take its tensors out first "
            "with bntool convert CKPT --to torch, which records eps, momentum and class of the layers",
            path=checkpoint.path,
        )
    if checkpoint.format.trains_whole_layers:
        raise RefusedError(
            f"FrozenBatchNorm2d is a class of PyTorch, a {checkpoint.format.title} file has layers of its own: freeze "
            "them with bntool freeze, or take the tensors out with bntool convert CKPT --to torch",
            path=checkpoint.path,
        )
    found = find_batchnorms(source)
    check_globs(layers, [layer.name for layer in found])
    batchnorms = [layer for layer in found if selects(layers, layer.name)]
    history = checkpoint.records.get(source.key, ())
    assumptions: tuple[str, ...] = ()
    if target is ConversionTarget.FROZEN_BATCHNORM:
        if eps is None and not history:  # what a record says is better known
            known, assumptions = assume_eps(source, batchnorms)
            batchnorms = list(known)
        outcome = plan_frozen_batchnorm(batchnorms, eps=eps, kind=frozen_kind, target_eps=target_eps, history=history)
    else:
        outcome = plan_batchnorm(batchnorms, history=history)
    plan = Plan(
        Operation.CONVERT,
        state_dict=source.key,
        steps=outcome.steps,
        skips=outcome.skips,
        layers=outcome.layers,
        assumptions=(*outcome.assumptions, *assumptions),
    )
    plan = skip_not_understood(plan, checkpoint, source, layers=layers)
    losses = list(outcome.losses)
    if plan.steps and checkpoint.format.can_record(checkpoint, source):
        plan = plan.with_record(make_record(plan, to=target.value, **outcome.details))
    elif plan.steps:
        losses.append("the file has no place for a record: what the layers were cannot be looked up on the way back")
    if plan.steps and target is ConversionTarget.FROZEN_BATCHNORM:
        losses += _optimizer_losses(checkpoint)
    return Conversion(target, checkpoint, plan, None, None, kept=outcome.kept, losses=tuple(losses))


def _check_certain(conversion: Conversion, path: object) -> None:
    """Refuse to lose or to assume anything, with --strict."""
    if conversion.losses:
        raise RefusedError(f"--strict: this would be lost: {conversion.losses[0]}", path=path)
    if conversion.plan.assumptions:
        raise RefusedError(f"--strict: this would be assumed: {conversion.plan.assumptions[0]}", path=path)


def _check_understood(checkpoint: Checkpoint, source: StateDict) -> None:
    """Refuse to leave out an entry that stands among tensors and that bntool cannot read."""
    lost = [one for one in find_not_understood(checkpoint, source) if one.left_out]
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise RefusedError(
            f"{quote(lost[0].name)} could not be read ({lost[0].reason}){more}: the new file would lack it",
            path=checkpoint.path,
        )


def _plan_format(
    checkpoint: Checkpoint, source: StateDict, target: ConversionTarget, new_format: NewFormat
) -> Conversion:
    if not source.tensors:
        raise RefusedError("the state dict holds no tensors; there is nothing to convert", path=checkpoint.path)
    _check_understood(checkpoint, source)
    unwritable = find_unwritable(source.tensors, new_format)
    if unwritable:
        name, reason = next(iter(unwritable.items()))
        raise RefusedError(
            f"{len(unwritable)} of {len(source.tensors)} tensors cannot be converted to {target.value}: {reason}",
            path=checkpoint.path,
            tensor=name,
        )
    details: dict[str, Any] = {"from": checkpoint.format.name}
    kept: list[str] = []
    earlier = _last_conversion(checkpoint, source)
    versions, metadata = source.versions, _texts(checkpoint)
    if new_format is NewFormat.SAFETENSORS:
        if versions is not None:
            details["versions"] = dict(versions)
            kept.append(f"versions of {len(versions)} modules, for the way back")
        metadata = {**earlier.get("metadata", {}), **metadata}
    else:
        if versions is None and isinstance(earlier.get("versions"), dict):
            versions = earlier["versions"]
            kept.append(f"versions of {len(versions)} modules, as recorded on the way here")
        if metadata:
            details["metadata"] = metadata
            texts = "1 text" if len(metadata) == 1 else f"{len(metadata)} texts"
            kept.append(f"{texts} of the safetensors header, for the way back")
        metadata = {}
    modules = _describe_modules(source)
    if modules:
        details["modules"] = modules
        kept.append(f"eps, momentum and class of {len(modules)} BatchNorm layers")
    assumptions = tuple(checkpoint.format.describe_assumptions(source))
    plan = Plan(Operation.CONVERT, state_dict=source.key, assumptions=assumptions)
    record = {**make_record(plan, to=target.value, **details), "state_dict": "", "was": source.key}
    new = NewFile(
        tensors=source.tensors,
        versions=versions,
        metadata=metadata,
        history=(*checkpoint.records.get(source.key, ()), record),
        mode=checkpoint.file.mode,
    )
    losses = _format_losses(checkpoint, source, new_format)
    return Conversion(target, checkpoint, plan, new, new_format, kept=tuple(kept), losses=tuple(losses))


def _texts(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the texts in the header of a safetensors file."""
    if not checkpoint.format.entries_are_texts:
        return {}
    return {name: text for name, text in checkpoint.entries.items() if isinstance(text, str)}


def _last_conversion(checkpoint: Checkpoint, source: StateDict) -> Mapping[str, Any]:
    history = checkpoint.records.get(source.key, ())
    return next((r for r in reversed(history) if r.get("operation") == Operation.CONVERT.value), {})


def _describe_modules(source: StateDict) -> dict[str, dict[str, Any]]:
    """Return facts of BatchNorm layers that a pickled module or a graph states and a state dict cannot hold."""
    if not source.modules:
        return {}
    return {
        layer.name: {"eps": layer.eps, "momentum": layer.momentum, "class": layer.class_path}
        for layer in find_batchnorms(source)
    }


def _format_losses(checkpoint: Checkpoint, source: StateDict, new_format: NewFormat) -> list[str]:
    losses = list(checkpoint.format.describe_losses(checkpoint))
    others = [s.key or "(root)" for s in checkpoint.state_dicts if s is not source]
    if others:
        losses.append(f"other state dicts: {list_first(others, _SHOWN)}")
    if checkpoint.format.holds_code and not source.is_module:
        losses.append("the program: its graph and what it holds beside the state dict; only tensors are taken out")
    elif source.is_module:
        losses.append("the modules themselves: their classes, code and attributes; only tensors are taken out")
    inside = {s.key.split(".")[0] for s in checkpoint.state_dicts}
    beside = [] if checkpoint.format.entries_are_texts else [n for n in checkpoint.entries if n not in inside]
    names = {name.split(".")[0] for name in source.tensors} | set(source.tensors) if not source.key else set()
    beside = [name for name in beside if name not in names]
    if beside and checkpoint.format.single_file and not source.is_module and not checkpoint.format.holds_code:
        losses.append(f"other entries: {list_first(beside, _SHOWN)}")
    if not checkpoint.format.single_file:
        losses.append("the division into several files")
    stored = {name: t for name, t in source.tensors.items() if isinstance(t, StoredTensor)}
    frozen = [name for name, t in stored.items() if t.is_parameter and t.requires_grad is False]
    if frozen:
        losses.append(f"requires_grad=False of {list_first(frozen, _SHOWN)}")
    if new_format is NewFormat.SAFETENSORS:
        losses += _safetensors_losses(stored)
    devices = {t.storage.device for t in stored.values() if t.storage is not None} - {"cpu"}
    if devices:
        losses.append(f"the device that tensors were saved from: {list_first(sorted(devices), _SHOWN)}")
    return losses


def _safetensors_losses(stored: Mapping[str, StoredTensor]) -> list[str]:
    losses = []
    tied = [f"{name} = {first}" for name, first in find_first_names(stored).items()]
    if tied:
        losses.append(f"ties, as the tensors become copies: {list_first(tied, _SHOWN)}")
    strided = [name for name, tensor in stored.items() if not tensor.is_contiguous]
    if strided:
        losses.append(f"the memory order (strides) of {list_first(strided, _SHOWN)}")
    return losses


def _optimizer_losses(checkpoint: Checkpoint) -> list[str]:
    names = [name for name in checkpoint.entries if "optim" in name.lower()]
    if not names:
        return []
    loss = (
        f"the fit of {list_first(names, _SHOWN)}: FrozenBatchNorm2d keeps weight and bias as buffers, an optimizer of "
        "the new model numbers its parameters differently (the entry itself is left alone)"
    )
    return [loss]
