"""Checking that the dtype of a file or of a live buffer can hold new statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from bntool.batchnorm import AFFINE, COUNTER, STATISTICS
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import BY_NAME, DType, decode_numbers, encode_numbers
from bntool.errors import RefusedError
from bntool.plan import AddTensor, Plan, SetTensor, Step, Values
from bntool.representation import format_number

_MEAN, _VARIANCE = STATISTICS
_PROMOTED = "float32"
_WIDE, _LEAST, _MOST = ("float32", "float64"), 1e-30, 1e30  # dtypes that hold every number between to 1e-7
_TOLERANCE = 2.0**-6  # relative error of variance + eps; bfloat16 rounds by 2^-9, subnormal float16 by more than this


def fit_plan(plan: Plan, state_dict: StateDict, *, eps: Mapping[str, float], promote: bool = False) -> Plan:
    """Return the plan for a state dict of a file.

    Statistics that the file lacks are added, with their counters; a counter alone is not, and scalars keep its shape.

    Args:
        plan: of a recalibration.
        state_dict: of the file.
        eps: of each layer.
        promote: give both statistics of a layer the dtype float32 where their own cannot hold the new ones.

    Raises:
        RefusedError: a dtype cannot hold new statistics, and they are not to be promoted.
    """
    losses = {_layer_of(step): (step.name, loss) for step, loss in _find_losses(plan, state_dict, eps)}
    if losses and not promote:
        name, loss = next(iter(losses.values()))
        raise RefusedError(f"{loss}; --promote stores such statistics as {_PROMOTED}", tensor=name)
    missing = set(find_missing(plan, state_dict))
    steps: list[Step] = []
    for step in plan.steps:
        if not isinstance(step, SetTensor) or not isinstance(step.value, Values):
            steps.append(step)
            continue
        layer, role = _layer_of(step), step.name.rpartition(".")[2]
        tensor = state_dict.tensors.get(state_dict.full_name(step.name))
        if tensor is None:
            if layer in missing:
                steps.append(_add(step.name, step.value, layer, role=role, state_dict=state_dict))
            continue
        value = step.value
        if len(value.numbers) == 1:
            value = dataclasses.replace(value, shape=tuple(tensor.shape))
        is_promoted = role in STATISTICS and layer in losses
        steps.append(SetTensor(step.name, value, _PROMOTED if is_promoted else None))
    return dataclasses.replace(plan, state_dict=state_dict.key, steps=tuple(steps))


def find_missing(plan: Plan, state_dict: StateDict) -> list[str]:
    """Return the layers of a plan whose statistics a file lacks."""
    names = [step.name for step in plan.steps if isinstance(step, SetTensor) and step.name.endswith(_MEAN)]
    return [name.rpartition(".")[0] for name in names if state_dict.full_name(name) not in state_dict.tensors]


def _add(name: str, value: Values, layer: str, *, role: str, state_dict: StateDict) -> AddTensor:
    """Add a tensor behind the layer's own, in the order and the dtype that PyTorch has."""
    stem = f"{layer}." if layer else ""
    own = [stem + other for other in AFFINE if state_dict.full_name(stem + other) in state_dict.tensors]
    dtype = state_dict.tensor(own[0]).dtype.name if own else _PROMOTED
    earlier = {_VARIANCE: stem + _MEAN, COUNTER: stem + _VARIANCE}
    last = own[-1] if own else state_dict.strip(list(state_dict.tensors)[-1])
    return AddTensor(
        name,
        value,
        dtype="int64" if role == COUNTER else dtype,
        after=earlier.get(role, last),
        is_parameter=False,
    )


def list_promoted(plan: Plan) -> tuple[str, ...]:
    """Return names of the tensors that a plan gives another dtype."""
    return tuple(step.name for step in plan.steps if isinstance(step, SetTensor) and step.dtype is not None)


def check_holds(variance: Sequence[float], dtype: str, *, eps: float, layer: str) -> None:
    """Check new variances against the dtype of a live buffer, which is named as PyTorch does.

    Raises:
        RefusedError: it cannot hold them.
    """
    loss = _describe_loss(variance, BY_NAME[dtype], role=_VARIANCE, eps=eps)
    if loss is not None:
        raise RefusedError(f"{loss}; give the model a layer in {_PROMOTED}", tensor=f"{layer}.{_VARIANCE}")


def _find_losses(plan: Plan, state_dict: StateDict, eps: Mapping[str, float]) -> Iterator[tuple[SetTensor, str]]:
    """Yield steps whose statistics the dtype in the file cannot hold, and why not."""
    for step in plan.steps:
        if not isinstance(step, SetTensor) or not step.name.endswith(STATISTICS):
            continue
        tensor = state_dict.tensors.get(state_dict.full_name(step.name))
        if tensor is not None and isinstance(step.value, Values):
            layer, _, role = step.name.rpartition(".")
            loss = _describe_loss(step.value.numbers, tensor.dtype, role=role, eps=eps[layer])
            if loss is not None:
                yield step, loss


def _layer_of(step: SetTensor) -> str:
    return step.name.rpartition(".")[0]


def _describe_loss(numbers: Sequence[float], dtype: DType, *, role: str, eps: float) -> str | None:
    """Describe how statistics would change in a dtype that cannot hold them; None where it can.

    A variance counts together with eps: that of a dead channel may well become 0.
    """
    if dtype.name in _WIDE and numbers and min(numbers) > _LEAST and max(numbers) < _MOST:
        return None
    what = "mean" if role == _MEAN else "variance"
    try:
        rounded = decode_numbers(encode_numbers(numbers, dtype), dtype)
    except (OverflowError, ValueError):
        return f"{dtype} cannot hold the new {what} {format_number(max(numbers, key=abs))}"
    if role == _MEAN:
        return None
    for value, held in zip(numbers, rounded, strict=True):
        if abs(held - value) > _TOLERANCE * (abs(value) + eps):
            return f"{dtype} cannot hold the new variance {format_number(value)}: it becomes {format_number(held)}"
    return None
