"""Folding a checkpoint file: opened, folded, proven and written in one call. Imports no torch without a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.batchnorm import NormKind
from bntool.checkpoints.addresses import Address
from bntool.checkpoints.batchnorms import find_norms
from bntool.checkpoints.checkpoint import Checkpoint, Loader, StateDict, check_changeable
from bntool.checkpoints.descriptions import ModelDescription, describe_model
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.outputs import check_outputs_apart
from bntool.checkpoints.records import check_not_folded
from bntool.checkpoints.saving import check_output
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.choices import choose
from bntool.errors import RefusedError, UsageError
from bntool.folding.options import FoldOptions, Layout
from bntool.folding.outputs import check_export, save_fold
from bntool.folding.state_dict import CheckpointFold, fold_state_dict
from bntool.graphs.declared import as_pairs
from bntool.plan import check_plan
from bntool.progress import OnProgress, Progress, tell_notebook
from bntool.verification.missing_statistics import describe_absence

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5  # of outputs, relative to the largest
_BATCHES, _BATCH_SIZE = 3, 16  # of data, to verify on


def fold_checkpoint(  # noqa: PLR0913 as many as the command has options
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | torch.nn.Module | None = None,
    model_arguments: Mapping[str, str] | None = None,
    data: str | Iterable[Any] | None = None,
    input_shape: str | Sequence[int] | None = None,
    pairs: Mapping[str, str] | Sequence[str] = (),
    architecture: str | None = None,
    eps: float | None = None,
    layout: Layout | str = Layout.FOLDED,
    change_padding: bool = False,
    direct_only: bool = False,
    tolerance: float = TOLERANCE,
    export: str | os.PathLike[str] | None = None,
    benchmark: bool = False,
    prototxt: str | os.PathLike[str] | None = None,
    keras_config: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    layers: Sequence[str] = (),
    state_dict: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    strict: bool = False,
    on_progress: OnProgress = tell_notebook,
) -> CheckpointFold:
    """Absorb the BatchNorm layers of a checkpoint into the layers around them; what ``bntool fold`` does.

    Examples:
        >>> bntool.fold_checkpoint("ckpt.pt", "folded.pt", model="net.py:build")

    Args:
        path: the checkpoint; never written to.
        output: the file to write; None to write none.
        model: the live model of the checkpoint, which is copied, or a spec as ``--model`` has it: it is traced, and the
            outputs are compared.
        model_arguments: of the factory of a spec.
        data: to verify on, batches or a spec as ``--data`` has it; else random inputs.
        input_shape: of an input, where there are no data; None to try some.
        pairs: what feeds which BatchNorm, declared instead of traced: ``["conv1=bn1"]`` as ``--pair`` takes it, or a
            mapping from the BatchNorm to its producer.
        architecture: whose forward and eps are assumed without model and pairs, e.g. ``timm:resnet50``; None for the
            one that is recognised by names and shapes.
        eps: of layers that the file, the model or the architecture does not say it of.
        layout: what becomes of the keys.
        change_padding: convolutions of the exported program may pad with other values than zeros, where that lets
            BatchNorms fold; needs ``model`` and no ``output``: no checkpoint of such a model fits its code.
        direct_only: nothing but the convolution or linear right before a BatchNorm takes it.
        tolerance: largest difference of outputs, relative to the largest output.
        export: a file to write the folded model to as a program, ``.pt2`` or ``.onnx``.
        benchmark: measure how much faster the folded model is.
        prototxt: the net that a ``.caffemodel`` is run by.
        keras_config: the JSON of the Keras model that weights alone belong to, or a ``.keras`` or ``.h5`` file of it.
        device: where the model runs.
        layers: globs of BatchNorms to fold; none for all.
        state_dict: its key; None for the one chosen by rule.
        dry_run: write nothing.
        force: replace files that exist.
        strict: refuse if a layer is skipped or something is assumed.
        on_progress: called with what is being done.

    Raises:
        UsageError, FileError, RefusedError, VerificationError, UserCodeError: see :mod:`bntool.errors`; nothing is
            written then.
    """
    layout = choose(Layout, layout, option="layout")
    if not tolerance > 0:
        raise UsageError(f"--tolerance {tolerance} is no positive number")
    if benchmark and model is None:
        raise UsageError("--benchmark runs the model: give --model")
    if change_padding:
        _check_padding(output, has_model=model is not None, has_pairs=bool(pairs), writes=export is not None or dry_run)
    target, program = (None if file is None else Path(file) for file in (output, export))
    writes = target is not None or program is None  # a state dict, not only a program
    check_outputs_apart([target, program], (model, data, prototxt, keras_config))
    with open_checkpoint(path) as opened:
        check_changeable(opened)
        check_output(opened, None if dry_run else target, force=force)
        if target is not None and not dry_run:
            _check_can_run(opened)
        if model is None and keras_config is None:
            _check_has_layers(opened, state_dict)
        kind = None
        if program is not None:
            has_shape = input_shape is not None or data is not None
            kind = check_export(opened, program, has_model=model is not None, has_shape=has_shape, force=force)
        source, description = _describe(
            opened,
            state_dict,
            prototxt=None if prototxt is None else Path(prototxt),
            keras_config=None if keras_config is None else Path(keras_config),
            output=None if dry_run else target,
            force=force,
        )
        chosen = choose_state_dict(source, state_dict)
        if chosen.is_module and layout is not Layout.SAME_KEYS and writes:
            raise RefusedError(
                "the file pickles whole modules, whose code still calls its BatchNorms: use --layout same-keys, or "
                "save model.state_dict() and fold that",
                path=path,
            )
        live, inputs = None, ()
        if model is not None:
            check_not_folded(source.records.get(chosen.key, ()), path)
            on_progress(Progress("loading the model"))
            live, inputs = _load(model, chosen, model_arguments, device=device, data=data, input_shape=input_shape)
        result = fold_state_dict(
            source,
            chosen,
            FoldOptions(layers=layers, layout=layout, eps=eps, change_padding=change_padding, direct_only=direct_only),
            model=live,
            inputs=inputs,
            pairs=as_pairs(pairs),
            architecture=architecture,
            tolerance=tolerance,
            export=kind,
            benchmark=benchmark,
            on_progress=on_progress,
        )
        check_plan(result.plan, path, strict=strict)
        if not dry_run:
            on_progress(Progress("writing"))
            result = save_fold(
                result, target, description=description, export=program, tolerance=tolerance, force=force
            )
        result.read_ranges()
    return result


def _check_padding(output: object, *, has_model: bool, has_pairs: bool, writes: bool) -> None:
    """Find out before any work whether what pads otherwise can go somewhere.

    Raises:
        UsageError: there is no model, or pairs are declared, or nothing is to be exported.
        RefusedError: a checkpoint is to be written.
    """
    if not has_model or has_pairs:
        raise UsageError("--change-padding changes modules of the traced model: give --model, without --pair")
    if output is not None:
        raise RefusedError(
            "--change-padding makes a model that does not fit into the unmodified code, and a checkpoint cannot say "
            "what a convolution pads with: leave out -o and write the program alone, with --export FILE",
            path=Path(str(output)),
        )
    if not writes:
        raise UsageError("--change-padding writes no checkpoint: give --export FILE")


def _check_can_run(checkpoint: Checkpoint) -> None:
    """Refuse a file elsewhere whose fold is run beside it.

    Raises:
        RefusedError
    """
    if checkpoint.format.loader is Loader.ONNX_RUNTIME and isinstance(checkpoint.path, Address):
        message = (
            "the fold is run beside its original by ONNX Runtime, which reads no address: download the model first"
        )
        raise RefusedError(message, path=checkpoint.path)


def _describe(
    opened: Checkpoint,
    key: str | None,
    *,
    prototxt: Path | None,
    keras_config: Path | None,
    output: Path | None,
    force: bool,
) -> tuple[Checkpoint, ModelDescription | None]:
    """Return the checkpoint with what is given beside it; a configuration says which of its layers are BatchNorms.

    Raises:
        RefusedError: there is none.
    """
    source, description = describe_model(
        opened, prototxt=prototxt, keras_config=keras_config, output=output, force=force
    )
    if keras_config is not None:
        _check_has_layers(source, key)
    return source, description


def _check_has_layers(checkpoint: Checkpoint, key: str | None) -> None:
    """Refuse a file in which there is nothing to fold, before anything more is asked for.

    Raises:
        RefusedError: its state dict has no BatchNorm, or nothing that could be read as one.
    """
    chosen = choose_state_dict(checkpoint, key)
    without_types = checkpoint.format.needs_prototxt and checkpoint.content is None  # the .prototxt says what it holds
    foldable = (layer.kind.is_batch_norm or layer.kind is NormKind.QUANTIZED_BATCH_NORM for layer in find_norms(chosen))
    if without_types or any(foldable):
        return
    absence = describe_absence(chosen, checkpoint.not_understood)
    raise RefusedError(f"there is nothing to fold: {absence}", path=checkpoint.path)


def _load(
    model: str | torch.nn.Module,
    state_dict: StateDict,
    arguments: Mapping[str, str] | None,
    *,
    device: str,
    data: str | Iterable[Any] | None,
    input_shape: str | Sequence[int] | None,
) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """Return the model with the state dict, and what to trace and verify it on; nothing where that is to be guessed."""
    from itertools import islice

    from bntool.data.batches import as_batches, find_placement, move
    from bntool.data.loading import load_data
    from bntool.graphs.traced.inputs import make_input, parse_shape
    from bntool.modules.building import build_model

    live = build_model(model, state_dict, arguments=arguments, device=device)
    if data is not None:
        place, dtype = find_placement(live)
        batches = load_data(data, batch_size=_BATCH_SIZE, workers=0) if isinstance(data, str) else as_batches(data)
        return live, tuple(
            move(batch.inputs_for(live), device=place, dtype=dtype) for batch in islice(batches, _BATCHES)
        )
    if input_shape is None:
        return live, ()
    shape = input_shape if isinstance(input_shape, str) else ",".join(map(str, input_shape))
    return live, (make_input(live, parse_shape(shape)),)
