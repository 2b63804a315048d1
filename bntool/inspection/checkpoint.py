"""Inspecting the normalisation layers of a checkpoint: what they hold, and what is wrong with them."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bntool.batchnorm import COUNTER, ROLES, BatchNorm, NormKind, check_globs, selects
from bntool.checkpoints.batchnorms import find_flat_averages, find_norms
from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.dtypes import NumberKind
from bntool.checkpoints.state_dicts import choose_state_dict, find_not_understood, may_hold_average
from bntool.checkpoints.tensors import StoredTensor, Tensor, announce, has_elements, read_numbers
from bntool.errors import BntoolError
from bntool.graphs.architectures.recognition import describe_application, give_eps, recognise
from bntool.inspection.affine_findings import report_affine
from bntool.inspection.file_findings import find_in_file, find_in_state_dict
from bntool.inspection.findings import Finding, FindingCode, IgnoredFinding, Severity
from bntool.inspection.judging import add_configured, judge
from bntool.inspection.layer_differences import compare_layers
from bntool.inspection.layer_findings import compare_shapes, find_in_layer
from bntool.inspection.module_findings import (
    Expected,
    find_expected,
    find_in_module,
    is_batch_norm_without_statistics,
)
from bntool.inspection.results import (
    Inspection,
    LayerInspection,
    StateDictInspection,
    Summary,
    TensorInspection,
)
from bntool.inspection.safety import find_dangers, judge_safety
from bntool.inspection.statistics_findings import report_missing_statistics
from bntool.inspection.thresholds import ThresholdRule, Thresholds, ThresholdsOf, combine
from bntool.modules.opening import Source, open_source
from bntool.progress import OnProgress, Progress, count, ignore

if TYPE_CHECKING:
    from bntool.inspection.configuration import Configuration

MAX_CHANNELS = 1 << 22  # elements of one tensor read for its statistics unless --stats asks for all
_COUNTS = ("global_step", "iteration", "iter", "meta")  # entries that say how many steps were made


def inspect(  # noqa: PLR0913 as many as the command has options
    source: Source,
    *,
    state_dict: str | None = None,
    layers: Sequence[str] = (),
    every_tensor: bool = False,
    statistics: bool = False,
    verify_checksums: bool = False,
    prototxt: str | os.PathLike[str] | None = None,
    keras_config: str | os.PathLike[str] | None = None,
    configuration: Configuration | None = None,
    on_progress: OnProgress = ignore,
) -> Inspection:
    """Look at every state dict of a checkpoint, or at one; what ``bntool inspect`` does.

    Examples:
        >>> bntool.inspect("ckpt.pt").state_dicts[0].layers[0].running_var

    Args:
        source: a path, an open checkpoint, a state dict, or a live model.
        state_dict: key of the only one to look at.
        layers: globs; only BatchNorm layers whose name matches one are listed and judged.
        every_tensor: list all tensors, not only those of BatchNorm layers.
        statistics: and the numbers of each of them.
        verify_checksums: hold all bytes of the file against its checksums.
        prototxt: the net that a ``.caffemodel`` is run by; its eps wins.
        keras_config: the JSON of the Keras model that weights alone belong to, or a ``.keras`` or ``.h5`` file of it.
        configuration: what it ignores is not judged, and its thresholds count; see
            :func:`bntool.inspection.configuration.read_configuration`.
        on_progress: called with how many tensors were read for ``statistics``, and while checksums are computed.

    Raises:
        UsageError: there is no such state dict, or a glob selects no layer.
        FileError: the file cannot be read.
        CorruptFileError: a tensor that must be read cannot be, or a checksum differs.
    """
    with open_source(source) as checkpoint:
        if prototxt is not None or keras_config is not None or checkpoint.format.takes_keras_config:
            from bntool.checkpoints.descriptions import describe_model

            checkpoint, _ = describe_model(  # noqa: PLW2901
                checkpoint,
                prototxt=None if prototxt is None else Path(prototxt),
                keras_config=None if keras_config is None else Path(keras_config),
                output=None,
                force=False,
            )
        return _inspect(
            checkpoint,
            state_dict=state_dict,
            layers=layers,
            every_tensor=every_tensor,
            statistics=statistics,
            verify_checksums=verify_checksums,
            configuration=configuration,
            on_progress=on_progress,
        )


def _inspect(
    checkpoint: Checkpoint,
    *,
    state_dict: str | None,
    layers: Sequence[str],
    every_tensor: bool,
    statistics: bool,
    verify_checksums: bool,
    configuration: Configuration | None,
    on_progress: OnProgress,
) -> Inspection:
    if verify_checksums:
        on_progress(Progress("computing checksums"))
    checked = checkpoint.format.verify_checksums(checkpoint) if verify_checksums else None
    if state_dict is not None:
        wanted: tuple[StateDict, ...] = (checkpoint.state_dict(state_dict),)
    else:
        wanted = checkpoint.state_dicts
    chosen = choose_state_dict(checkpoint, state_dict) if wanted else None
    rules: tuple[ThresholdRule, ...] = ()
    if configuration is not None:
        rules = configuration.find_thresholds(checkpoint.path)
    thresholds_of = combine(rules)
    inspections = [
        _inspect_state_dict(
            checkpoint,
            one,
            layers=layers,
            every_tensor=every_tensor or statistics,
            statistics=statistics,
            chosen=one is chosen,
            thresholds_of=thresholds_of,
            on_progress=on_progress,
        )
        for one in wanted
    ]
    check_globs(layers, list(dict.fromkeys(name for one in inspections for name in one.names)))
    if any(isinstance(name, str) and ("opt" in name.lower() or name in _COUNTS) for name in checkpoint.entries):
        from bntool.inspection.training_findings import compare_with_steps  # most files count no steps

        inspections = compare_with_steps(checkpoint, inspections, thresholds_of(""))
    if any(map(may_hold_average, wanted)) or (len(wanted) > 1 and any(map(_lacks_statistics, inspections))):
        from bntool.inspection.copies import compare_copies  # nor an average

        several = [*inspections, *_inspect_others(checkpoint, wanted, layers=layers, thresholds_of=thresholds_of)]
        recalibrated = [_recalibrated_layers(checkpoint, one.state_dict) for one in several]
        compared = compare_copies(several, recalibrated=recalibrated, thresholds=thresholds_of(""))
        inspections = compared[: len(wanted)]
    safety = judge_safety(checkpoint)
    findings = (*find_dangers(safety), *find_in_file(checkpoint, inspections))
    ignored: tuple[IgnoredFinding, ...] = ()
    idle: tuple[str, ...] = ()
    if configuration is not None:
        inspections, findings, ignored = configuration.ignore(checkpoint.path, inspections, findings)
        idle = configuration.find_idle_globs(checkpoint.path, inspections)
    verdict = add_configured(judge(checkpoint, inspections, findings), ignored=len(ignored), thresholds=len(rules))
    used = None if configuration is None else configuration.path
    return Inspection(checkpoint, tuple(inspections), findings, safety, verdict, checked, used, ignored, rules, idle)


def _lacks_statistics(inspection: StateDictInspection) -> bool:
    return any(finding.code is FindingCode.STATISTICS_MISSING for finding in inspection.findings)


def _inspect_others(
    checkpoint: Checkpoint, wanted: Sequence[StateDict], *, layers: Sequence[str], thresholds_of: ThresholdsOf
) -> list[StateDictInspection]:
    """Return the state dicts that were not asked for, and tell something of an averaged copy that was.

    One that cannot be read tells nothing.
    """
    inspected: list[StateDictInspection] = []
    keys = {state_dict.key for state_dict in wanted}
    for state_dict in checkpoint.state_dicts:
        if state_dict.key not in keys:
            with contextlib.suppress(BntoolError):
                inspected.append(
                    _inspect_state_dict(
                        checkpoint,
                        state_dict,
                        layers=layers,
                        every_tensor=False,
                        statistics=False,
                        chosen=False,
                        thresholds_of=thresholds_of,
                    )
                )
    return inspected


def _inspect_state_dict(
    checkpoint: Checkpoint,
    state_dict: StateDict,
    *,
    layers: Sequence[str],
    every_tensor: bool,
    statistics: bool,
    chosen: bool,
    thresholds_of: ThresholdsOf,
    on_progress: OnProgress = ignore,
) -> StateDictInspection:
    recalibrated, momentum = _recalibrated_layers(checkpoint, state_dict), _recorded_momentum(checkpoint, state_dict)
    norms = find_norms(state_dict)
    architectures = recognise(state_dict)
    norms = give_eps(norms, architectures)
    application = checkpoint.format.application
    own = [norm for norm in norms if norm.kind.is_batch_norm or is_batch_norm_without_statistics(norm)]
    own += find_flat_averages(state_dict, own).values()
    expected = find_expected(architectures, own)
    if application:
        architectures = (describe_application(application, state_dict),)
    announce(
        t for norm in own if selects(layers, norm.name) for t in norm.tensors.values() if _count(t) <= MAX_CHANNELS
    )
    inspected = tuple(
        _inspect_layer(
            norm,
            momentum=momentum.get(norm.name),
            recalibrated=norm.name in recalibrated,
            expected=expected.get(norm.name, Expected()),
            thresholds=thresholds_of(norm.name),
        )
        for norm in own
        if selects(layers, norm.name)
    )
    names = {norm.name for norm in own}
    others = Counter(norm.kind for norm in norms if norm.name not in names)
    roles = {name: _role(state_dict, name, tensor) for name, tensor in state_dict.tensors.items()}
    sizes = {name: _count(tensor) for name, tensor in state_dict.tensors.items()}
    shown = {
        name: tensor.dtype.byte_count(sizes[name]) if statistics else 0
        for name, tensor in state_dict.tensors.items()
        if every_tensor and selects(layers, state_dict.strip(name).rpartition(".")[0])
    }
    phase = f"reading the tensors of {state_dict.key}" if state_dict.key else "reading the tensors"
    tensors = tuple(
        TensorInspection(state_dict.strip(name), roles[name], tensor, _summarize(name, tensor) if statistics else None)
        for name in count(shown, phase, on_progress)
        for tensor in (state_dict.tensors[name],)
    )
    return StateDictInspection(
        state_dict=state_dict,
        parameters=sum(size for name, size in sizes.items() if roles[name] == "parameter"),
        buffers=sum(size for name, size in sizes.items() if roles[name] == "buffer"),
        layers=compare_layers(inspected, state_dict, thresholds_of),
        other_norms=dict(others),
        findings=(
            *find_in_state_dict(norms),
            *report_missing_statistics(state_dict, norms, not_understood=_names_not_understood(checkpoint, state_dict)),
            *report_affine(state_dict, own),
        ),
        tensors=tensors,
        chosen=chosen,
        names=tuple(norm.name for norm in own),
        architectures=architectures,
    )


def _names_not_understood(checkpoint: Checkpoint, state_dict: StateDict) -> frozenset[str]:
    found = find_not_understood(checkpoint, state_dict)
    return frozenset(one.name.removeprefix(f"{state_dict.key}.") for one in found)


def _role(state_dict: StateDict, name: str, tensor: Tensor) -> str:
    if state_dict.is_module and isinstance(tensor, StoredTensor):
        return "parameter" if tensor.is_parameter else "buffer"
    leaf = name.rpartition(".")[2]
    is_buffer = leaf.startswith("running_") or leaf in ROLES[2:] or not tensor.dtype.is_floating
    return "buffer" if is_buffer and tensor.dtype.kind is not NumberKind.COMPLEX else "parameter"


def _count(tensor: Tensor) -> int:
    total = 1
    for extent in tensor.shape:
        total *= extent
    return total


def _recalibrated_layers(checkpoint: Checkpoint, state_dict: StateDict) -> frozenset[str]:
    """Return the layers whose statistics bntool recomputed, as the file records."""
    history = checkpoint.records.get(state_dict.key, ())
    if not history:
        return frozenset()
    from bntool.plan import Operation  # not needed to inspect a file that bntool never wrote

    names: set[str] = set()
    for entry in history:
        listed = entry.get("layers")
        if entry.get("operation") == Operation.RECALIBRATE.value and isinstance(listed, list):
            names.update(name for name in listed if isinstance(name, str))
    return frozenset(names)


def _recorded_momentum(checkpoint: Checkpoint, state_dict: StateDict) -> Mapping[str, float]:
    """Return the momentum of layers that a state dict cannot hold, as the file records."""
    history = checkpoint.records.get(state_dict.key, ())
    if not history:
        return {}
    from bntool.checkpoints.records import find_recorded_momentum  # as above

    return find_recorded_momentum(history)


def _inspect_layer(
    layer: BatchNorm,
    *,
    momentum: float | None,
    recalibrated: bool,
    expected: Expected,
    thresholds: Thresholds,
) -> LayerInspection:
    summaries: dict[str, Summary] = {}
    unread: list[str] = []
    for role in ROLES:
        if role in layer.tensors:
            summary = _summarize(f"{layer.name}.{role}", layer.tensors[role])
            if summary is not None:
                summaries[role] = summary
            else:
                unread.append(role)
    momentum = momentum if layer.momentum is None else layer.momentum
    findings = find_in_layer(
        summaries,
        eps=layer.eps,
        momentum=momentum,
        averages_all=layer.attributes.get("momentum", momentum) is None and "momentum" in layer.attributes,
        recalibrated=recalibrated,
        is_weight_unknown="weight" in layer.computed or "weight" in unread,
        thresholds=thresholds,
    )
    if unread:
        message = (
            f"{', '.join(unread)}: the file holds no plain elements (uninitialised, meta, or too large to be read)"
        )
        advice = "run one forward before saving, and save from the device"
        findings.append(Finding(FindingCode.NOT_INITIALISED, Severity.WARNING, "no elements", message, advice=advice))
    findings += compare_shapes({role: tuple(layer.tensors[role].shape) for role in summaries})
    findings += find_in_module(layer, expected, thresholds)
    of_torch = not layer.class_path or layer.class_path.startswith("torch.")  # others have no such counter
    has_counter = layer.kind is not NormKind.FROZEN_BATCH_NORM and layer.has_statistics
    if of_torch and has_counter and COUNTER not in layer.tensors:
        message = (
            "num_batches_tracked is missing: saved before torch 0.4.1, or by another framework; harmless in eval mode"
        )
        advice = (
            "nothing is to be done, unless strict loading asks for it, as it does where the file has module versions"
        )
        findings.append(Finding(FindingCode.COUNTER_MISSING, Severity.NOTICE, "no counter", message, advice=advice))
    return LayerInspection(layer, summaries, tuple(findings))


def _summarize(name: str, tensor: Tensor) -> Summary | None:
    """Return the numbers of a tensor; None where it has no plain elements."""
    if not has_elements(tensor):
        return None
    if tensor.dtype.kind in (NumberKind.OPAQUE, NumberKind.COMPLEX) or _count(tensor) > MAX_CHANNELS:
        return None
    values = read_numbers(tensor, name=name)
    return Summary(values, dtype=tensor.dtype.name, shape=tuple(tensor.shape))
