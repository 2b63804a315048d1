"""Plans, what bntool intends to do to a model, as data: steps, skips and the reason of each skip.

Freezing, folding and recalibrating each produce a :class:`Plan`. It is applied by
:func:`bntool.checkpoints.application.apply_plan` (to a checkpoint) or
:func:`bntool.modules.application.apply_plan` (to a live module); nothing else changes anything.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias, TypeVar

from bntool.errors import RefusedError
from bntool.representation import html_repr, short_repr

_SHOWN = 3  # layers that a refusal names


class Operation(Enum):
    """The commands that plan changes."""

    RECALIBRATE = "recalibrate"
    FREEZE = "freeze"
    FOLD = "fold"
    CONVERT = "convert"
    AVERAGE = "average"


class SkipReason(Enum):
    """The reason why a layer is left alone. Each is explained, with an example, in docs/skip-reasons.md."""

    NOT_SELECTED = "not selected"
    NOT_A_BATCHNORM = "not a BatchNorm"
    NO_STATISTICS = "no statistics"
    NOT_AFFINE = "no weight and bias"
    NOT_FINITE = "not finite"
    NEGATIVE_VARIANCE = "negative variance"
    NOT_INITIALISED = "not initialised"
    TRAIN_MODE = "normalises by batch statistics"
    NEVER_REACHED = "never reached"
    NOT_RECOGNISED = "not recognised"
    FROZEN = "frozen"
    REUSED = "reused"
    SHARED_OUTPUT = "shared output"
    NOT_ADJACENT = "not adjacent"
    NO_PRODUCER = "no producer"
    AXIS_MISMATCH = "axis mismatch"
    COMPUTED_WEIGHT = "computed weight"
    UNSUPPORTED_DTYPE = "unsupported dtype"
    OVERFLOW = "overflow"
    PADDED_CONSUMER = "padded consumer"
    PARALLEL_BRANCH = "parallel branch"
    DATA_DEPENDENT = "data dependent"
    TOO_FEW_SAMPLES = "too few samples"


@dataclass(frozen=True, slots=True)
class Skip:
    """A layer that is left alone.

    Attributes:
        layer: dotted module path.
        reason: which of the named reasons.
        detail: what exactly was seen, e.g. the reader that shares the output.
    """

    layer: str
    reason: SkipReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Values:
    """New elements, in float64, to be rounded once to the dtype of the tensor.

    Attributes:
        numbers: in C order; packed where there are many, a quarter of the memory of a tuple.
        shape: of the tensor.
    """

    numbers: Sequence[float]
    shape: tuple[int, ...]

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class Scaled:
    """The elements of another tensor times factors, and some of them plus addends, in float64, rounded once.

    Attributes:
        source: name of the tensor to scale.
        view: a shape with as many elements as the source.
        factors: float64 factors.
        factor_shape: shape of the factors, as long as ``view``, 1 in dimensions that are not scaled.
        others: factors of other dimensions, which those are multiplied by first; none, or as ``other_shape`` says.
        other_shape: as ``factor_shape``.
        flush: products that are subnormal numbers of the dtype become zero.
        places: of the elements that something is added to, in C order, ascending.
        addends: what is added to the product there.
    """

    source: str
    view: tuple[int, ...]
    factors: Sequence[float]
    factor_shape: tuple[int, ...]
    others: Sequence[float] = ()
    other_shape: tuple[int, ...] = ()
    flush: bool = False
    places: Sequence[int] = ()
    addends: Sequence[float] = ()

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class Averaged:
    """The elements of the tensors of one name in several state dicts, each times its weight, summed in float64.

    Elements that are equal in all of them stay as they are; the sum is rounded once to the dtype of the first.

    Attributes:
        weights: of the state dict that the plan is for, and of each of the others; they sum to 1.
    """

    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Merged:
    """The sum of kernels of convolutions, each times factors, and of a few addends, in float64, rounded once.

    Smaller kernels lie in the middle of the first one, which has the shape of the sum.

    Attributes:
        sources: names of the weights.
        factors: of each of them one float64 factor for every output channel.
        inputs: of each of them one for every input channel, or none.
        places: of the elements that something is added to, in C order, ascending.
        addends: what is added there.
    """

    sources: tuple[str, ...]
    factors: tuple[Sequence[float], ...]
    inputs: tuple[Sequence[float], ...]
    places: Sequence[int] = ()
    addends: Sequence[float] = ()

    __repr__ = short_repr


Recipe: TypeAlias = Values | Scaled | Averaged | Merged


@dataclass(frozen=True, slots=True)
class SetTensor:
    """Give an existing tensor new elements; its shape stays.

    Attributes:
        dtype: PyTorch's name of a new dtype; None to keep the old one.
    """

    name: str
    value: Recipe
    dtype: str | None = None

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class AddTensor:
    """Add a tensor that was not there.

    Attributes:
        dtype: PyTorch's name.
        after: the tensor that it follows in key order.
        is_parameter: a parameter of the live module, else a buffer.
    """

    name: str
    value: Values | Scaled
    dtype: str
    after: str
    is_parameter: bool = True

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class RemoveTensor:
    """Remove a tensor."""

    name: str


@dataclass(frozen=True, slots=True)
class RenameTensor:
    """Give a tensor another name; several that follow each other are done at once, so that names can be exchanged.

    Attributes:
        name, new_name: whole, with the prefix that all keys may share, unlike those of other steps.
    """

    name: str
    new_name: str


@dataclass(frozen=True, slots=True)
class SetAttribute:
    """Set a plain attribute of a module, e.g. ``training``, or ``requires_grad`` of one of its parameters.

    Attributes:
        module: dotted module path.
        attribute: ``training``, or ``weight.requires_grad``.
    """

    module: str
    attribute: str
    value: bool | int | float | str


@dataclass(frozen=True, slots=True)
class SetVersion:
    """Set the version of a module in ``_metadata``, where the file keeps versions: modules adapt old files by it."""

    module: str
    version: int


@dataclass(frozen=True, slots=True)
class RemoveModule:
    """Replace a module by the identity: its work is done elsewhere.

    Attributes:
        copies: what it gives is a copy, because something writes into it while others still read what it was given.
    """

    module: str
    copies: bool = False


@dataclass(frozen=True, slots=True)
class ChangePadding:
    """Let a convolution of a live model pad with values of its own, one for each channel, instead of with zeros.

    No file can say so, and the unmodified code of a model does not do it. The values are a buffer of the module.
    """

    module: str


@dataclass(frozen=True, slots=True)
class RemoveEntry:
    """Remove an entry beside the state dicts, e.g. optimizer state that no longer fits.

    Attributes:
        path: keys from the root of the file.
    """

    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Leave a note in the file of what bntool did.

    Attributes:
        payload: JSON data.
    """

    payload: Mapping[str, Any]

    __repr__ = short_repr


Step: TypeAlias = (
    SetTensor
    | AddTensor
    | RemoveTensor
    | RenameTensor
    | SetAttribute
    | SetVersion
    | RemoveModule
    | ChangePadding
    | RemoveEntry
    | Record
)


@dataclass(frozen=True)
class Plan:
    """Everything that an operation intends.

    Names in steps are those of the unwrapped model: without a prefix like ``module.`` that all keys of the state dict
    share.

    Attributes:
        operation: which command made it.
        state_dict: key of the state dict in the file that it is for.
        steps: in the order in which they are to be applied.
        skips: the layers left alone.
        layers: the layers that are changed, in execution order where that is known.
        assumptions: what was taken for granted without proof; refused under ``--strict``.
    """

    operation: Operation
    state_dict: str = ""
    steps: tuple[Step, ...] = ()
    skips: tuple[Skip, ...] = ()
    layers: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()

    __repr__ = short_repr
    _repr_html_ = html_repr

    def steps_of(self, kind: type[Any]) -> Iterator[Any]:
        """Yield the steps of one class."""
        return (step for step in self.steps if isinstance(step, kind))

    def with_record(self, payload: Mapping[str, Any]) -> Plan:
        """Return the plan which also leaves a note in the file."""
        return dataclasses.replace(self, steps=(*self.steps, Record(payload)))


AnyPlan = TypeVar("AnyPlan", bound=Plan)


def assume(plan: AnyPlan, *assumptions: str) -> AnyPlan:
    """Return the plan with more that is assumed, also in the note that it leaves in the file."""
    together = (*plan.assumptions, *assumptions)
    steps = (
        Record({**step.payload, "assumptions": list(together)}) if isinstance(step, Record) else step
        for step in plan.steps
    )
    return dataclasses.replace(plan, steps=tuple(steps), assumptions=together)


def check_plan(
    plan: Plan, path: object, *, strict: bool, absence: str = "the state dict has no BatchNorm layer"
) -> None:
    """Check that a plan changes something, and skips nothing under ``strict``.

    Args:
        path: of the file that it is for.
        strict: no layer may be skipped that was asked for, and nothing may be assumed.
        absence: what to say where there is no layer to skip either.

    Raises:
        RefusedError: nothing can be done safely; or, under ``strict``, a layer was skipped or something assumed.
    """
    skips = [skip for skip in plan.skips if skip.reason is not SkipReason.NOT_SELECTED]  # that was asked for
    if not plan.steps:
        why = _list_skips(skips) if skips else absence
        raise RefusedError(f"nothing could be done safely: {why}; nothing was written", path=path)
    if strict and skips:
        first, count = skips[0], f"{len(skips):,} layer{'s' * (len(skips) > 1)}"
        raise RefusedError(
            f"--strict: {count} would be skipped, the first is {first.layer} ({first.reason.value})", path=path
        )
    if strict and plan.assumptions:
        raise RefusedError(f"--strict: this would be assumed: {plan.assumptions[0]}", path=path)


def _list_skips(skips: Sequence[Skip]) -> str:
    """Return the first layers that are left alone with what was seen of each, and how many more there are."""
    shown = [f"{skip.layer}: {skip.reason.value}{f' ({skip.detail})' * bool(skip.detail)}" for skip in skips[:_SHOWN]]
    rest = Counter(skip.reason.value for skip in skips[_SHOWN:])
    more = ", ".join(f"{count:,} more {reason}" for reason, count in rest.items())
    return ", ".join([*shown, *([more] if more else [])])


def describe_step(step: Step) -> dict[str, Any]:
    """Describe one step as JSON data, without the numbers."""
    facts: dict[str, Any] = {"step": type(step).__name__}
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        if isinstance(value, Values):
            facts["shape"] = list(value.shape)
        elif isinstance(value, Scaled):
            facts.update(scaled_from=value.source, shape=list(value.view))
        elif isinstance(value, Averaged):
            facts["weights"] = list(value.weights)
        else:
            facts[field.name] = list(value) if isinstance(value, tuple) else value
    return facts
