"""Folding the statistics of a BatchNorm into its own weight and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bntool.batchnorm import AFFINE, VECTORS, BatchNorm, scale_and_shift, takes_magnitude
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import decode_numbers, encode_numbers
from bntool.checkpoints.tensors import Tensor, has_elements, read_numbers
from bntool.checkpoints.ties import find_first_names
from bntool.errors import CorruptFileError, RefusedError, UsageError
from bntool.plan import SetTensor, Skip, SkipReason, Step, Values


def plan_constant(layers: Sequence[BatchNorm], *, eps: float | None) -> tuple[list[Step], list[Skip]]:
    """Plan steps that give each layer running_mean 0 and running_var 1 - eps, and its scale and shift as weight and
    bias.

    In eval mode the layer does what it did: sqrt(running_var + eps) is then 1.

    Args:
        eps: of the layers for which the file does not say it.

    Raises:
        RefusedError: eps of a layer is not known.
        UsageError: ``eps`` is given and the file says otherwise, or it is not in (0, 1).
    """
    if eps is not None and not 0 < eps < 1:
        raise UsageError(f"--eps must lie between 0 and 1, not {eps:g}")
    steps: list[Step] = []
    skips: list[Skip] = []
    for layer in layers:
        if "fixed" in layer.attributes:
            skips.append(Skip(layer.name, SkipReason.COMPUTED_WEIGHT, str(layer.attributes["fixed"])))
            continue
        if takes_magnitude(layer.class_path):
            skips.append(Skip(layer.name, SkipReason.NOT_RECOGNISED, "it takes the magnitude of its weight, plus eps"))
            continue
        own = _eps_of(layer, eps)
        outcome = _fold(layer, own)
        if isinstance(outcome, Skip):
            skips.append(outcome)
        else:
            steps += outcome
    return steps, skips


def leave_tied(steps: Sequence[Step], state_dict: StateDict) -> tuple[list[Step], list[Skip]]:
    """Return the steps without those of layers that share a tensor with something that would get other elements: a
    model loads both names into one parameter, and the last counts.
    """
    first = find_first_names(state_dict.tensors)
    shared: dict[str, list[str]] = {}
    for name, other in first.items():
        shared.setdefault(other, [other]).append(name)
    left = [step for step in steps if isinstance(step, SetTensor)]
    skips: list[Skip] = []
    while True:
        new = {state_dict.full_name(step.name): step.value for step in left}
        torn = [names for names in shared.values() if any(new.get(name) != new.get(names[0]) for name in names)]
        layers = {state_dict.strip(name).rpartition(".")[0] for names in torn for name in names if name in new}
        if not layers:
            return list(left), skips
        skips += [
            Skip(layer, SkipReason.REUSED, "a tensor of it belongs to several modules") for layer in sorted(layers)
        ]
        left = [step for step in left if step.name.rpartition(".")[0] not in layers]


def _eps_of(layer: BatchNorm, option: float | None) -> float:
    if layer.eps is not None:
        if option is not None and not math.isclose(option, layer.eps, rel_tol=1e-9):
            raise UsageError(f"--eps {option:g} contradicts the file, which says {layer.eps:g}", tensor=layer.name)
        return layer.eps
    if option is None:
        raise RefusedError(
            "eps is not in this file, and folding the statistics needs it; give the model's with --eps "
            "(PyTorch's default is 1e-5, but many models use 1e-3)",
            tensor=layer.name,
        )
    return option


def _fold(layer: BatchNorm, eps: float) -> list[Step] | Skip:
    absent = [role for role in VECTORS if role not in layer.tensors]
    if absent:
        return Skip(layer.name, SkipReason.NOT_AFFINE, f"it has no {' and no '.join(absent)} to hold the result")
    tensors: dict[str, Tensor] = {role: layer.tensors[role] for role in VECTORS}
    if not all(map(has_elements, tensors.values())):
        return Skip(layer.name, SkipReason.NOT_INITIALISED, "the file holds no plain elements for it")
    numbers = {role: read_numbers(tensor, name=f"{layer.name}.{role}") for role, tensor in tensors.items()}
    sizes = sorted({len(values) for values in numbers.values()})
    if len(sizes) > 1:
        raise CorruptFileError(f"its vectors have {' and '.join(map(str, sizes))} elements", tensor=layer.name)
    if not all(math.isfinite(value) for values in numbers.values() for value in values):
        return Skip(layer.name, SkipReason.NOT_FINITE, "")
    if min(numbers["running_var"], default=0.0) < 0:
        return Skip(layer.name, SkipReason.NEGATIVE_VARIANCE, "")
    scale, shift = scale_and_shift(eps=eps, **numbers)
    channels = len(scale)
    new = {"weight": scale, "bias": shift, "running_mean": [0.0] * channels, "running_var": [1.0 - eps] * channels}
    for role in AFFINE:
        problem = _rounding_problem(new[role], tensors[role])
        if problem:
            return Skip(layer.name, SkipReason.OVERFLOW, f"{role} {problem}")
    return [
        SetTensor(layer.name_of(role), Values(tuple(values), tuple(tensors[role].shape)))
        for role, values in new.items()
    ]


def _rounding_problem(values: Sequence[float], tensor: Tensor) -> str:
    """Explain why the dtype of a tensor cannot hold new values with its usual precision; "" if it can."""
    try:
        rounded = decode_numbers(encode_numbers(values, tensor.dtype), tensor.dtype)
    except (OverflowError, ValueError) as error:
        return f"cannot be {tensor.dtype}: {error}"
    relative = {64: 2.0**-52, 32: 2.0**-23, 16: 2.0**-7}.get(tensor.dtype.bits, 1.0)
    largest = max(map(abs, values), default=0.0)
    if any(
        abs(new - old) > relative * max(abs(old), largest * relative) for new, old in zip(rounded, values, strict=True)
    ):
        return f"underflows in {tensor.dtype}"
    return ""
