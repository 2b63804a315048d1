"""BatchNorm to the FrozenBatchNorm2d of torchvision, timm or detectron2, and back, without losing anything."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bntool.batchnorm import AFFINE, COUNTER, BatchNorm, NormKind, takes_magnitude
from bntool.checkpoints.dtypes import decode_numbers, encode_numbers
from bntool.checkpoints.tensors import has_elements, read_bytes, read_number, read_numbers
from bntool.conversion.options import FrozenKind
from bntool.errors import RefusedError, UsageError
from bntool.plan import AddTensor, Operation, RemoveTensor, SetTensor, SetVersion, Skip, SkipReason, Step, Values

_BATCHNORM_VERSION = 2  # with num_batches_tracked


@dataclass(frozen=True)
class KindChange:
    """The steps that turn layers of one kind into another.

    Attributes:
        details: for the record.
        kept: what the record remembers, in words.
        losses: what cannot survive.
    """

    steps: tuple[Step, ...]
    layers: tuple[str, ...]
    skips: tuple[Skip, ...] = ()
    assumptions: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()


def plan_frozen_batchnorm(
    batchnorms: Sequence[BatchNorm],
    *,
    eps: float | None,
    kind: FrozenKind,
    target_eps: float | None,
    history: Sequence[Mapping[str, Any]],
) -> KindChange:
    """Return steps that leave each layer the four tensors of a FrozenBatchNorm2d.

    Where eps of the layer is not that of the target, running_var takes the difference up:
    running_var + eps - target_eps; the record keeps the elements that it had.

    Raises:
        RefusedError: eps of a layer is not known, or running_var cannot take the difference up.
        UsageError: ``eps`` contradicts the file.
    """
    for option, value in (("--eps", eps), ("--target-eps", target_eps)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{option} {value:g} is no finite number of at least 0")
    wanted = kind.default_eps if target_eps is None else target_eps
    steps: list[Step] = []
    skips: list[Skip] = []
    layers: dict[str, dict[str, Any]] = {}
    recorded = _recorded_modules(history)
    absorbed = 0
    for layer in batchnorms:
        absent = [role for role in AFFINE if role not in layer.tensors]
        if layer.kind is NormKind.FROZEN_BATCH_NORM:
            skips.append(Skip(layer.name, SkipReason.FROZEN, "it is a FrozenBatchNorm already"))
            continue
        if absent:
            skips.append(Skip(layer.name, SkipReason.NOT_AFFINE, f"it has no {' and no '.join(absent)}"))
            continue
        module = recorded.get(layer.name, {})
        if takes_magnitude(layer.class_path or str(module.get("class", ""))):
            skips.append(Skip(layer.name, SkipReason.NOT_RECOGNISED, "it takes the magnitude of its weight, plus eps"))
            continue
        own = _eps_of(layer, module, eps)
        facts: dict[str, Any] = {**module, "eps": own, "version": layer.version}
        if COUNTER in layer.tensors:
            facts[COUNTER] = int(read_number(layer.tensors[COUNTER], name=layer.name_of(COUNTER)))
            facts["shape"] = list(layer.tensors[COUNTER].shape)
            steps.append(RemoveTensor(layer.name_of(COUNTER)))
        steps.append(SetVersion(layer.name, kind.version))
        if not math.isclose(own, wanted, rel_tol=1e-9):
            new = _absorb(layer, own - wanted)
            facts["running_var"] = base64.b64encode(read_bytes(layer.tensors["running_var"])).decode()
            steps.append(
                SetTensor(layer.name_of("running_var"), Values(new, tuple(layer.tensors["running_var"].shape)))
            )
            absorbed += 1
        layers[layer.name] = facts
    losses = []
    if absorbed:
        losses.append(
            f"bits of running_var (layers: {absorbed}), which take up the difference between their eps and the "
            f"target's {wanted:g} (outputs agree to rounding; the record keeps the elements for the way back)"
        )
    return KindChange(
        steps=tuple(steps),
        layers=tuple(layers),
        skips=tuple(skips),
        details={"frozen": kind.value, "target_eps": wanted, "modules": layers},
        kept=(f"{COUNTER}, eps and what is known of momentum and class (layers: {len(layers)})",) if layers else (),
        losses=tuple(losses),
    )


def plan_batchnorm(batchnorms: Sequence[BatchNorm], *, history: Sequence[Mapping[str, Any]]) -> KindChange:
    """Return steps that make each layer a full BatchNorm again: num_batches_tracked, and what a record says it was.

    Without a record num_batches_tracked becomes 0, which is taken for granted and said so: only momentum=None uses it.
    """
    recorded = _recorded_modules(history)
    steps: list[Step] = []
    layers: list[str] = []
    unknown: list[str] = []
    for layer in batchnorms:
        module = recorded.get(layer.name, {})
        own: list[Step] = []
        was_frozen = _last_kind(history, layer.name) == "frozen-batchnorm"
        if was_frozen and COUNTER not in module and COUNTER not in layer.tensors:
            version = module.get("version")  # it never had the counter
            own.append(SetVersion(layer.name, version if type(version) is int else 1))
        elif COUNTER not in layer.tensors:
            count = module.get(COUNTER)
            if type(count) is not int:
                count = 0
                unknown.append(layer.name)
            shape = (1,) if module.get("shape") == [1] else ()
            own.append(
                AddTensor(
                    layer.name_of(COUNTER),
                    Values((count,), shape),
                    dtype="int64",
                    after=layer.name_of("running_var"),
                    is_parameter=False,
                )
            )
            own.append(SetVersion(layer.name, _BATCHNORM_VERSION))
        restored = _restore(layer, module, history) if was_frozen else None
        if restored is not None:
            own.append(
                SetTensor(layer.name_of("running_var"), Values(restored, tuple(layer.tensors["running_var"].shape)))
            )
        if own:
            steps += own
            layers.append(layer.name)
    assumptions: tuple[str, ...] = ()
    if unknown:
        assumptions = (f"{COUNTER} is 0 (layers: {len(unknown)}, e.g. {unknown[0]}): no record says what it was",)
    known = ("eps", "momentum", "class")  # what still holds
    details = {"modules": {n: {k: recorded[n][k] for k in known if k in recorded[n]} for n in layers if n in recorded}}
    return KindChange(steps=tuple(steps), layers=tuple(layers), assumptions=assumptions, details=details)


def _recorded_modules(history: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return what earlier conversions recorded of each layer; the latest record counts."""
    found: dict[str, Mapping[str, Any]] = {}
    for record in history:
        modules = record.get("modules")
        if record.get("operation") == Operation.CONVERT.value and isinstance(modules, dict):
            found.update({name: facts for name, facts in modules.items() if isinstance(facts, dict)})
    return found


def _last_kind(history: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """Return the kind that the last conversion gave a layer."""
    for record in reversed(history):
        layers = record.get("layers")
        if record.get("operation") == Operation.CONVERT.value and isinstance(layers, list) and name in layers:
            return str(record.get("to"))
    return None


def _eps_of(layer: BatchNorm, module: Mapping[str, Any], option: float | None) -> float:
    known = layer.eps if layer.eps is not None else module.get("eps")
    if isinstance(known, float):
        if option is not None and not math.isclose(option, known, rel_tol=1e-9):
            raise UsageError(f"--eps {option:g} contradicts the file, which says {known:g}", tensor=layer.name)
        return known
    if option is None:
        raise RefusedError(
            "eps is not in this file, and FrozenBatchNorm2d must have the same; give the model's with --eps "
            "(PyTorch's default is 1e-5, but many models use 1e-3)",
            tensor=layer.name,
        )
    return option


def _absorb(layer: BatchNorm, difference: float) -> tuple[float, ...]:
    tensor = layer.tensors["running_var"]
    values = tuple(value + difference for value in read_numbers(tensor, name=layer.name_of("running_var")))
    if min(values, default=0.0) < 0:
        raise RefusedError(
            "running_var is too small to take up the difference between the two eps; build the target's layers with "
            "the eps of the model and say so with --target-eps",
            tensor=layer.name_of("running_var"),
        )
    return values


def _restore(
    layer: BatchNorm, module: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> tuple[float, ...] | None:
    """Return the running_var that was there before the difference of eps was taken up; None where nothing was.

    The recorded elements are taken if the tensor is still what they were turned into; else the difference is taken off.
    """
    targets = [record.get("target_eps") for record in history if record.get("frozen")]
    tensor = layer.tensors["running_var"]
    text, eps = module.get("running_var"), module.get("eps")
    if not isinstance(text, str) or not targets or not isinstance(targets[-1], float) or not isinstance(eps, float):
        return None
    if not has_elements(tensor):
        return None
    difference = eps - targets[-1]
    try:
        before = tuple(decode_numbers(base64.b64decode(text, validate=True), tensor.dtype))
    except (binascii.Error, ValueError):
        before = ()
    if encode_numbers([value + difference for value in before], tensor.dtype) == read_bytes(tensor):
        return before
    return tuple(max(value - difference, 0.0) for value in read_numbers(tensor))
