"""Whether the dtype of a file or of a live buffer can hold new statistics."""

from __future__ import annotations

import dataclasses

import torch

from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import BY_NAME, DType, decode_numbers, encode_numbers
from bntool.errors import RefusedError
from bntool.plan import Plan, SetTensor, Step, Values

_TOLERANCE = 2.0**-6  # relative error of a variance; bfloat16 rounds by 2^-9, subnormal float16 by more than this


def fit_plan(plan: Plan, state_dict: StateDict) -> Plan:
    """The plan for a state dict of a file.

    Counters that the file lacks are not added, and scalars keep its shape.

    Raises:
        RefusedError: the dtype of a running_var cannot hold the new variances.
    """
    steps: list[Step] = []
    for step in plan.steps:
        if not isinstance(step, SetTensor) or not isinstance(step.value, Values):
            steps.append(step)
            continue
        tensor = state_dict.tensors.get(state_dict.full_name(step.name))
        if tensor is None and step.name.endswith("num_batches_tracked"):
            continue
        value = step.value
        if tensor is not None:
            if step.name.endswith("running_var"):
                _check(value.numbers, tensor.dtype, step.name)
            if len(value.numbers) == 1:
                value = dataclasses.replace(value, shape=tuple(tensor.shape))
        steps.append(SetTensor(step.name, value))
    return dataclasses.replace(plan, state_dict=state_dict.key, steps=tuple(steps))


def check_holds(variance: torch.Tensor, buffer: torch.Tensor | None, *, layer: str) -> None:
    """Hold new variances against the dtype of a live buffer.

    Raises:
        RefusedError: it cannot hold them.
    """
    if buffer is not None:
        _check(variance.tolist(), BY_NAME[str(buffer.dtype).removeprefix("torch.")], f"{layer}.running_var")


def _check(variances: tuple[float, ...] | list[float], dtype: DType, name: str) -> None:
    try:
        rounded = decode_numbers(encode_numbers(variances, dtype), dtype)
    except (OverflowError, ValueError) as error:
        raise RefusedError(
            f"{dtype} cannot hold the new variances: {error}; convert to float32 first", tensor=name
        ) from error
    for value, held in zip(variances, rounded, strict=True):
        if abs(held - value) > _TOLERANCE * abs(value):
            raise RefusedError(
                f"{dtype} cannot hold the new variance {value:.3g}: it becomes {held:.3g}; convert to float32 first",
                tensor=name,
                value=value,
            )
