"""A BatchNorm that is to be folded: its scale and shift, and what stays where it cannot be taken out."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from bntool.batchnorm import STATISTICS, VECTORS, takes_magnitude
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import FLOAT32
from bntool.checkpoints.tensors import LiteralTensor, read_numbers
from bntool.errors import UsageError
from bntool.folding.absorption import Absorption, Blocked
from bntool.folding.channels import Array, as_indices
from bntool.folding.producers import SMALLEST_LIMIT, read_parameter
from bntool.folding.transforms.transform import Transform
from bntool.graphs.graph import Evidence, ModelGraph, Node, Owner
from bntool.plan import SetTensor, SkipReason, Step, Values
from bntool.representation import format_number

_SLIGHTLY = 1e-3  # a variance may have become negative by rounding; eps makes it positive, in every framework


@dataclass(frozen=True)
class ScaleAndShift:
    """A BatchNorm in eval mode: y = scale * x + shift per channel, in float64.

    Attributes:
        node: a call of it.
        names: of its tensors in the state dict, by role, also of those that eval mode does not use.
        scale, shift: what it does by now.
        variance: what running_var becomes if the layer stays: the value nearest to 1 - eps in its dtype.
        eps: of the layer.
        is_below_zero: some of its running_var is negative, and positive with eps.
        used: the channels that calls use; None for all.
        originals: its elements by role, where calls do not use all.
        rest: by role the elements behind those that a call uses, where there are more than channels.
    """

    node: Node
    names: Mapping[str, str]
    scale: Array
    shift: Array
    variance: float
    eps: float
    is_below_zero: bool = False
    used: NDArray[np.bool_] | None = None
    originals: Mapping[str, Array] = field(default_factory=dict)
    rest: Mapping[str, Array] = field(default_factory=dict)

    @property
    def owner(self) -> Owner:
        return self.node.owner

    @property
    def unit(self) -> float:
        """The factor that remains of the normalisation if running_var is ``variance`` and weight 1: 1 up to
        rounding.
        """
        return float(1 / np.sqrt(self.variance + self.eps))

    @property
    def can_absorb(self) -> bool:
        return "weight" in self.names and "bias" in self.names and self.used is None

    can_take_shift = True

    def keep_shift(self) -> ScaleAndShift:
        """Return the layer after its scale is gone."""
        return replace(self, scale=np.full_like(self.scale, self.unit))

    def without_vectors(self) -> ScaleAndShift:
        """Return what is still needed of a layer that is gone."""
        return replace(self, scale=np.zeros(0), shift=np.zeros(0))

    def absorb(self, absorption: Absorption, scale: Array, shift: Array) -> ScaleAndShift:
        """Return the BatchNorm after it took the scale and shift of one that follows."""
        mine = absorption.channels >= 0
        factors = np.where(mine, scale[absorption.channels], 1.0)
        addends = np.where(mine & absorption.takes_shift, shift[absorption.channels], 0.0)
        return replace(self, scale=self.scale * factors, shift=self.shift * factors + addends)

    def transform(self, read: Transform | None, given: Transform) -> ScaleAndShift:
        """Return the BatchNorm with what it reads and gives stored as a (x + b)."""
        if read is None:
            read = Transform(np.ones_like(self.scale), np.zeros_like(self.shift))
        shift = given.scale * (self.shift + given.shift - self.scale * read.shift)
        return replace(self, scale=self.scale * given.scale / read.scale, shift=shift)

    def _tensors(self) -> dict[str, Array]:
        """Compute the new elements: mean 0, variance 1 - eps, and weight and bias do the rest; without a bias the mean
        does.
        """
        size = len(self.scale)
        new = {"running_mean": np.zeros(size), "running_var": np.full(size, self.variance)}
        weight = self.scale / self.unit
        if "weight" in self.names:
            new["weight"] = weight
        if "bias" in self.names:
            new["bias"] = self.shift
        else:
            new["running_mean"] = -self.shift / self.scale
        if self.used is not None:
            new = {role: np.where(self.used, values, self.originals[role]) for role, values in new.items()}
        return {role: np.concatenate((values, self.rest.get(role, values[:0]))) for role, values in new.items()}

    def check(self, state_dict: StateDict) -> None:
        """Check that the new elements lie in the range of the dtypes.

        Raises:
            Blocked: one is too large.
        """
        for role, values in self._tensors().items():
            if np.abs(values).max(initial=0.0) < SMALLEST_LIMIT:
                continue
            tensor = state_dict.tensor(self.names[role])
            try:
                LiteralTensor.from_numbers(values.tolist(), dtype=tensor.dtype, shape=tuple(tensor.shape))
            except OverflowError as error:
                raise Blocked(SkipReason.OVERFLOW, f"{self.node.layer}.{role}: {error}") from error

    def steps(self, graph: ModelGraph, state_dict: StateDict) -> Iterator[Step]:
        """Yield the steps that make it so, under every name of the module."""
        for role, values in self._tensors().items():
            shape = tuple(state_dict.tensor(self.names[role]).shape)
            for name in graph.names_of(self.names[role]):
                yield SetTensor(name, Values(array("d", values.tobytes()), shape))


def check_eps(eps: float | None) -> None:
    """Check that the eps that a user gives can be one.

    Raises:
        UsageError: it is NaN, infinite or negative.
    """
    if eps is not None and not 0 <= eps < np.inf:
        raise UsageError(f"--eps {eps:g} is no finite number of at least 0")


def choose_eps(node: Node, eps: float | None) -> float:
    """Return the eps of a BatchNorm: its own, or the one given.

    Raises:
        UsageError: there is none, or they contradict each other.
    """
    if node.eps is None and eps is None:
        raise UsageError(
            "eps is not known: no state dict holds it. PyTorch's default is 1e-5, many TensorFlow-born and "
            "detection models use 1e-3; give --eps, or --model",
            tensor=node.layer,
        )
    if node.eps is not None and eps is not None and node.eps != eps:
        raise UsageError(
            f"--eps {eps:g} contradicts the model or record, which says {node.eps:g}",
            tensor=node.layer,
        )
    return float(node.eps if node.eps is not None else eps)  # type: ignore[arg-type]


def read_scale_and_shift(
    calls: Sequence[Node], graph: ModelGraph, state_dict: StateDict, *, eps: float
) -> ScaleAndShift:
    """Return a BatchNorm as the state dict holds it.

    Raises:
        Blocked: it cannot be folded, whatever feeds it.
    """
    node = calls[0]
    if "Instance" in node.class_name:
        raise Blocked(SkipReason.NOT_A_BATCHNORM, f"{node.class_name} normalises each sample by itself")
    for role in STATISTICS:
        if role not in node.parameters and role not in node.computed:
            raise Blocked(SkipReason.NO_STATISTICS, "it has no running statistics")
    if any(call.training for call in calls):
        raise Blocked(SkipReason.TRAIN_MODE, "it normalises by batch statistics in eval mode too")
    _check_computed(node, graph)
    _check_uses(calls, graph)
    values = {role: read_parameter(name, state_dict) for role, name in node.parameters.items() if role in VECTORS}
    numbers = {role: numbers for role, numbers in values.items() if numbers is not None}
    for role, vector in numbers.items():
        if not np.isfinite(vector).all():
            raise Blocked(SkipReason.NOT_FINITE, f"{role} holds NaN or infinity")
    traced = graph.evidence is Evidence.TRACED
    rest = {role: vector[node.channels :] for role, vector in numbers.items() if traced and role in STATISTICS}
    numbers |= {role: numbers[role][: node.channels] for role in rest}
    dtype = state_dict.tensor(node.parameters["running_var"]).dtype
    lowest = float(numbers["running_var"].min(initial=np.inf))
    added = _check_variance(lowest, eps, rounds=dtype is FLOAT32 and graph.evidence is Evidence.STORED)
    # as in bntool.batchnorm.scale_and_shift, for all channels at once
    scale = numbers.get("weight", np.ones(1)) / np.sqrt(numbers["running_var"] + added)
    shift = numbers.get("bias", np.zeros(1)) - numbers["running_mean"] * scale
    stored = LiteralTensor.from_numbers([1 - eps], dtype=dtype, shape=(1,))
    (variance,) = read_numbers(stored)
    own = ScaleAndShift(node, dict(node.parameters), scale, shift, variance, eps, is_below_zero=lowest < 0, rest=rest)
    return _note_slices(own, calls, graph, numbers)


def _check_computed(node: Node, graph: ModelGraph) -> None:
    """Check that a BatchNorm takes the tensors of the file, and nothing else that is known.

    Raises:
        Blocked: one is computed, or more belongs to the module.
    """
    for role, sources in node.computed.items():
        origin = f" from {', '.join(sources)}" if sources else ""
        what = f"its {role} is computed{origin}"
        if graph.evidence is Evidence.TRACED and not sources:
            what = f"its {role} is no parameter or buffer that the model has before this forward"
        elif not sources:
            what = f"its {role} is no tensor of the file that could be read"
        raise Blocked(SkipReason.COMPUTED_WEIGHT, what)
    if takes_magnitude(node.class_name):
        raise Blocked(SkipReason.NOT_RECOGNISED, f"{node.class_name} takes the magnitude of its weight, plus eps")
    if node.unexplained:
        raise Blocked(SkipReason.COMPUTED_WEIGHT, node.describe_unexplained())


def _note_slices(
    own: ScaleAndShift, calls: Sequence[Node], graph: ModelGraph, numbers: Mapping[str, Array]
) -> ScaleAndShift:
    """Note which channels of a BatchNorm are used where calls are given slices of its tensors: it stays, and so do
    the others.
    """
    covered = [_find_channels(call, graph) for call in calls]
    sliced = next((call for call, used in zip(calls, covered, strict=True) if not used.all()), None)
    if sliced is None:
        return own
    return replace(own, node=sliced, used=np.any(covered, axis=0), originals=numbers)


def _find_channels(call: Node, graph: ModelGraph) -> NDArray[np.bool_]:
    """Find the channels of a BatchNorm that a call uses: all, but where it is given slices of the tensors."""
    edges = [edge for edge in graph.inputs(call) if edge.port == 0]
    if not edges or any(edge.targets is None for edge in edges):
        return np.ones(call.channels, bool)
    used = np.zeros(call.channels, bool)
    for edge in edges:
        inside = as_indices(edge.targets or ())
        used[inside[inside < call.channels]] = True
    return used


def _check_variance(lowest: float, eps: float, *, rounds: bool) -> float:
    """Check the variances; return what is added to them.

    Args:
        lowest: of them.
        rounds: a runtime of float32 adds it.

    Raises:
        Blocked: one is negative, or zero, with it.
    """
    if lowest < -_SLIGHTLY or (lowest < 0 and lowest + eps <= 0):
        raise Blocked(SkipReason.NEGATIVE_VARIANCE, f"running_var is as low as {format_number(lowest)}")
    # where it cancels a variance, its rounding is what is left
    added = float(np.float32(eps)) if lowest < 0 and rounds else eps
    if lowest + added <= 0:
        raise Blocked(SkipReason.NEGATIVE_VARIANCE, f"running_var + eps is {format_number(lowest + added)}")
    return added


def _check_uses(calls: Sequence[Node], graph: ModelGraph) -> None:
    mine = {call.index for call in calls}
    for role, name in calls[0].parameters.items():
        if name in graph.tied:
            raise Blocked(SkipReason.REUSED, f"its {role} belongs to several modules")
        others = graph.uses.get(name, frozenset()) - mine
        if others:
            raise Blocked(SkipReason.REUSED, f"its {role} is also used by {graph.nodes[min(others)].describe()}")
    shown = {tuple(sorted(call.parameters.items())) for call in calls}
    if len(shown) > 1:
        raise Blocked(SkipReason.REUSED, "its calls take different parameters")
    eps = sorted({call.eps for call in calls if call.eps is not None})
    if len(eps) > 1:
        values = " and ".join(f"{value:g}" for value in eps)
        raise Blocked(SkipReason.REUSED, f"its calls normalise with different eps: {values}")
