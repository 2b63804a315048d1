"""Reading one call of an operation: what it is, and which parameters it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bntool.batchnorm import AFFINE, VECTORS
from bntool.graphs.graph import NodeKind, Owner
from bntool.graphs.traced import operators
from bntool.graphs.traced.labels import varying_axis
from bntool.graphs.traced.parameters import Ones, Parameter, ParameterIndex
from bntool.graphs.transposed_convolutions import Axis, meets_all_taps
from bntool.modules.finding import read_eps
from bntool.modules.padding import find_amounts
from bntool.names import join_name

_CLOSE = 1e-4  # relative; a frozen BatchNorm computes its scale in the dtype of its buffers
_ROUNDINGS = 8  # at most, in that dtype


@dataclass(frozen=True)
class CallFacts:
    """The facts that are known of one call of an operation.

    Attributes:
        inputs: its data inputs, by port.
        axis: where their channels lie; None where it has none.
        output_axis: where the channels of its output lie.
        elementwise: each element of the result comes from those at its place; smaller inputs are broadcast.
        details: fields of :class:`~bntool.graphs.graph.Node`.
        place: of a BatchNorm of which a call uses some channels alone the first of these, and how many it has in all.
    """

    kind: NodeKind
    inputs: tuple[Tensor, ...] = ()
    axis: int | None = None
    output_axis: int = 1
    elementwise: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    place: tuple[int, int] | None = None

    def node_facts(self) -> dict[str, Any]:
        return dict(self.details)


NamesOf = Callable[[Tensor], frozenset[str]]
Labels = Mapping[int, Tensor | None]


def call_facts(
    function: Any, arguments: Any, keywords: Any, *, index: ParameterIndex, labels: Labels, names_of: NamesOf
) -> CallFacts:
    """Find out what a call is; ``OTHER`` if no scale and shift can pass through it.

    Args:
        labels: of each tensor that the call was given, by identity; None for constants.
        names_of: the parameters that a constant comes from.
    """

    def given(name: str) -> Any:
        return operators.argument(function, arguments, keywords, name)

    def is_computed(tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and labels.get(id(tensor)) is not None

    roles = _Roles(index=index, labels=labels, names_of=names_of)
    name = operators.name_of(function)
    if name in operators.BATCH_NORMS and is_computed(given("input")):
        return _batch_norm(given, roles)
    producer = operators.producer_kind(function, arguments, keywords)
    if producer is NodeKind.LINEAR:
        found = _linear(name, given, roles)
        if found is not None and is_computed(found.inputs[0]):
            return found
    elif producer is not None and is_computed(given("input")):
        return _convolution(name, producer, given, roles)
    found = _arithmetic(name, given, roles) if name in _ARITHMETIC else None
    if name in operators.SCATTERS and operators.accumulates(function, arguments, keywords):
        found = _scatter(name, given, roles)
    first = given("self") if given("input") is None else given("input")
    if found is None and is_computed(first) and name not in _ARITHMETIC:
        found = _passing(function, arguments, keywords, data=first, roles=roles)
    return CallFacts(NodeKind.OTHER) if found is None else found


_ARITHMETIC = ("add", "sub", "mul", "div")


def _passing(function: Any, arguments: Any, keywords: Any, *, data: Tensor, roles: _Roles) -> CallFacts | None:
    """Return facts of an operation on a single computed tensor."""
    name = operators.name_of(function)
    its_labels = roles.labels[id(data)]
    assert its_labels is not None
    axis = varying_axis(its_labels, default=1)
    kind = operators.passing_kind(function, arguments, keywords, channel_axis=axis, dim=data.dim())
    if kind is None:
        return None

    def given(key: str) -> Any:
        return operators.argument(function, arguments, keywords, key)

    removed = _removed_before(given, axis, data.dim()) if name in ("amax", "mean", "sum") else 0
    details = {"factors": (-1.0,)} if name == "neg" else {}
    return CallFacts(kind, (data,), axis=axis, output_axis=axis - removed, details=details)


def _scatter(name: str, given: Callable[[str], Any], roles: _Roles) -> CallFacts | None:
    """Return facts of an operation that adds rows of a computed tensor to zeros, where an index says."""
    data = given({"index_add": "source", "scatter_add": "src", "index_put": "values"}[name])
    its_labels, base = roles.labels.get(id(data)), given("self")
    if its_labels is None or roles.labels.get(id(base)) is not None or data.dim() != base.dim():
        return None
    axis = varying_axis(its_labels, default=1)
    if data.shape[axis] != base.shape[axis]:
        return None
    if name == "index_put":
        indices = given("indices")
        if axis == 0 or len(indices) != 1 or indices[0] is None or indices[0].dim() != 1:
            return None
    elif given("dim") % data.dim() == axis:
        return None
    index = given("index") if name == "scatter_add" else None
    if index is not None and (index.shape[axis] != data.shape[axis] or bool((index != index.narrow(axis, 0, 1)).any())):
        return None  # each channel goes elsewhere
    return CallFacts(NodeKind.CHANNELWISE, (data,), axis=axis, output_axis=axis)


def _arithmetic(name: str, given: Callable[[str], Any], roles: _Roles) -> CallFacts | None:
    """Return facts of a sum, difference, product or quotient of two operands."""
    first, other = given("self"), given("other")
    computed = [item for item in (first, other) if isinstance(item, Tensor) and roles.labels.get(id(item)) is not None]
    if not computed or (name == "div" and given("rounding_mode") is not None):
        return None
    if len(computed) == 2:
        return _combine(name, first, other, given, roles)
    (data,) = computed
    constant = other if data is first else first
    dim = max(data.dim(), constant.dim() if isinstance(constant, Tensor) else 0)
    axis = _axis_of(data, dim, roles)
    value = _number(constant, roles)
    if name in ("mul", "div"):
        if name == "div" and (data is not first or value == 0):
            return None
        factors = () if value is None else (value if name == "mul" else 1 / value,)
        if not all(map(math.isfinite, factors)):
            return None
        details: dict[str, Any] = {"factors": factors}
        if value is None:
            parameter = _find_factor(constant, axis, data=data, dim=dim, roles=roles)
            role = "factor" if name == "mul" else "divisor"
            details["parameters"] = {} if parameter is None else {role: parameter.name}
        kind = NodeKind.CHANNELWISE
    elif data is not first and (name == "sub" or given("alpha") != 1):
        return None
    elif value == 0:
        kind, details = NodeKind.CHANNELWISE, {"factors": (1.0,)}
    else:
        parameter = _find_along(constant, axis, data=data, dim=dim, roles=roles) if given("alpha") == 1 else None
        kind = NodeKind.CONSTANT_SUM if parameter is None else NodeKind.BIAS
        details = {}
        if parameter is not None:
            owner = type(parameter.owner).__name__
            details = {"parameters": {"bias": parameter.name}, "layer": parameter.module, "class_name": owner}
            details["factors"] = (-1.0,) if name == "sub" else ()
    return CallFacts(kind, (data,), axis=axis, output_axis=axis, elementwise=True, details=details)


def _combine(name: str, first: Tensor, other: Tensor, given: Callable[[str], Any], roles: _Roles) -> CallFacts | None:
    """Return facts of a sum, difference or product of two computed tensors."""
    if name == "div":
        return None
    dim = max(first.dim(), other.dim())
    details: dict[str, Any] = {}
    data = first
    if name == "mul":
        kind, inputs = NodeKind.GATE, (first, other)
        if first.numel() < other.numel():
            data, inputs = other, (other, first)
        if first is other:
            return None
    else:
        kind, inputs = NodeKind.ADD, (first, other)
        alpha = given("alpha")
        factor = float(alpha) if name == "add" else -float(alpha)
        if not math.isfinite(factor):
            return None
        details = {"factors": () if factor == 1 else (1.0, factor)}
    axis = _axis_of(data, dim, roles)
    return CallFacts(kind, inputs, axis=axis, output_axis=axis, elementwise=True, details=details)


def _axis_of(data: Tensor, dim: int, roles: _Roles) -> int:
    """Return the axis at which an operand's channels lie in a result of so many dimensions, after broadcasting."""
    its_labels = roles.labels[id(data)]
    assert its_labels is not None
    if not data.dim():  # a single number has no axis
        return min(1, max(dim - 1, 0))
    return varying_axis(its_labels, default=1) + dim - data.dim()


def _number(constant: Any, roles: _Roles) -> float | None:
    """Return the value of a constant that is one number written in the code; None for anything else."""
    if isinstance(constant, int | float):
        return float(constant)
    if not isinstance(constant, Tensor) or constant.numel() != 1 or constant.is_meta or roles.names_of(constant):
        return None
    return float(constant) if constant.is_floating_point() or constant.dtype in _INTEGERS else None


_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def _find_along(constant: Any, axis: int, *, data: Tensor, dim: int, roles: _Roles) -> Parameter | None:
    """Return the parameter that a constant is, with one element per channel of the result and the same along other
    axes.
    """
    parameter = roles.index.find(constant, ones=Ones.ANYWHERE) if isinstance(constant, Tensor) else None
    if parameter is None:
        return None
    shape = (*(1 for _ in range(dim - constant.dim())), *constant.shape)
    extent = data.shape[axis - (dim - data.dim())] if axis >= dim - data.dim() else 0
    return parameter if shape[axis] == extent == constant.numel() else None


def _find_factor(constant: Any, axis: int, *, data: Tensor, dim: int, roles: _Roles) -> Parameter | None:
    """Return the parameter of floating-point numbers that a constant is, with one element per channel of the result,
    or one for all.
    """
    if not isinstance(constant, Tensor) or not constant.is_floating_point():
        return None
    if constant.numel() == 1 and constant.dim() <= data.dim():
        return roles.index.find(constant, ones=Ones.ANYWHERE)
    return _find_along(constant, axis, data=data, dim=dim, roles=roles)


def _removed_before(given: Callable[[str], Any], axis: int, dim: int) -> int:
    """Count the axes in front of the channel axis that a reduction removes."""
    if given("keepdim"):
        return 0
    axes = given("dim")
    axes = [axes] if isinstance(axes, int) else list(axes or range(dim))
    return sum(1 for other in axes if other % dim < axis)


@dataclass(frozen=True)
class _Roles:
    """Sorts the tensors of a call into parameters that are used unchanged, and tensors that were computed."""

    index: ParameterIndex
    labels: Labels
    names_of: NamesOf
    found: dict[str, Parameter] = field(default_factory=dict)
    computed: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def sort(
        self, role: str, tensor: Tensor | None, *, transposed: bool = False, ones: Ones = Ones.AS_THEY_ARE
    ) -> None:
        if tensor is None:
            return
        known = self.labels.get(id(tensor)) is None
        parameter = self.index.find(tensor, transposed=transposed, ones=ones) if known else None
        if parameter is not None:
            self.found[role] = parameter
        else:
            self.computed[role] = tuple(sorted(self.names_of(tensor)))

    def is_computed_constant(self, tensor: Tensor) -> bool:
        """Return whether a tensor was computed from parameters and is not simply one of them in another layout."""
        return (
            self.labels.get(id(tensor)) is None
            and bool(self.names_of(tensor))
            and not any(
                self.index.find(tensor, transposed=transposed, ones=ones)
                for transposed in (False, True)
                for ones in (Ones.IN_FRONT, Ones.BEHIND)
            )
        )

    def details(self, *, anchor: str) -> dict[str, Any]:
        """Return fields of the node; ``anchor`` is the role whose owner names the layer."""
        parameter = self.found.get(anchor) or next(iter(self.found.values()), None)
        if parameter is None:  # all computed: the module that they come from
            names = [name for names in self.computed.values() for name in names]
            parameter = self.index.by_name[names[0]] if names else None
        details: dict[str, Any] = {
            "parameters": {role: found.name for role, found in self.found.items()},
            "computed": self.computed,
        }
        if parameter is not None:
            details.update(layer=parameter.module, class_name=type(parameter.owner).__name__)
            details["has_bias_slot"] = self.index.take_bias_slot(parameter)
        return details


def _batch_norm(given: Callable[[str], Any], roles: _Roles) -> CallFacts:
    vectors = {role: given(role) for role in VECTORS if given(role) is not None}
    slices = _find_slices(vectors, roles.index)
    for role, vector in vectors.items() if slices is None else ():
        roles.sort(role, vector)
    if slices is not None:
        roles.found.update(slices[0])
    training = given("training")
    if training is None:
        training = given("train") or False
    details = roles.details(anchor="running_mean")
    eps = given("eps") if given("epsilon") is None else given("epsilon")
    details.update(eps=float(eps), training=bool(training), owner=Owner.PART)  # judged when its module is left
    place = None if slices is None else slices[1]
    return CallFacts(NodeKind.BATCH_NORM, (given("input"),), axis=1, details=details, place=place)


def _find_slices(
    vectors: Mapping[str, Tensor], index: ParameterIndex
) -> tuple[dict[str, Parameter], tuple[int, int] | None] | None:
    """Find the BatchNorm that a call is given a part of: the same channels of each tensor, and not all of them.

    Statistics may be longer than weight and bias, as those that ghost batch normalisation has for each part of a batch,
    of which eval mode takes the first.

    Returns:
        Its tensors by role; the first of the channels, and how many it has, None for all of them. None where it is no
        such call.
    """
    found: dict[str, Parameter] = {}
    places: set[tuple[int, int, int]] = set()
    for role, vector in vectors.items():
        part = index.find_slice(vector)
        if part is None:
            return None
        found[role] = part[0]
        places.add((part[1], len(vector), len(index.tensor(part[0]))))
    if len({parameter.module for parameter in found.values()}) > 1:
        return None
    affine = {len(index.tensor(found[role])) for role in AFFINE if role in found}
    if affine == {taken for _, taken, _ in places} and {first for first, _, _ in places} == {0} and len(places) > 1:
        return found, None
    if len(places) != 1:
        return None
    ((first, taken, count),) = places
    return (found, (first, count)) if taken < count else None


def _convolution(name: str, kind: NodeKind, given: Callable[[str], Any], roles: _Roles) -> CallFacts:
    roles.sort("weight", given("weight"), ones=Ones.BEHIND)
    bias = given("bias")
    if name == "deform_conv2d" and bias is not None and not roles.names_of(bias) and not bool(bias.any()):
        bias = None  # torchvision gives zeros where there is none
    roles.sort("bias", bias)
    if bias is None and kind is NodeKind.CONVOLUTION and _is_fixed_filter(given, roles):
        return CallFacts(NodeKind.CHANNELWISE, (given("input"),), axis=1)
    # the shift of an input cannot be taken out where windows reach over the border
    padded = name == "deform_conv2d" or any(given("padding"))
    if kind is NodeKind.CONV_TRANSPOSE:
        padded = not meets_all_taps(_read_axes(given))
    plain = name != "deform_conv2d" and kind is NodeKind.CONVOLUTION
    strides = _find_strides(given) if plain and _has_middle(given) else ()
    centred = bool(strides) and all(step == 1 for step in strides)
    if strides and any(size > 1 and dilation > 1 for size, dilation in _spread_dilations(given)):
        strides = ()
    groups = {"groups": int(given("groups")), "padded": padded, "centred": centred, "strides": strides}
    groups["pads_itself"] = plain and padded and _pads_itself(given, roles)
    return CallFacts(kind, (given("input"),), axis=1, details={**roles.details(anchor="weight"), **groups})


def _read_axes(given: Callable[[str], Any]) -> Iterator[Axis]:
    """Yield the axes of a transposed convolution."""
    spreads = _spread_dilations(given)
    amounts = (_spread(given(name), len(spreads)) for name in ("stride", "padding", "output_padding"))
    for (size, dilation), stride, padding, more in zip(spreads, *amounts, strict=True):
        yield Axis(size, stride=stride, dilation=dilation, before=padding, after=padding, more=more)


def _pads_itself(given: Callable[[str], Any], roles: _Roles) -> bool:
    """Return whether a plain module of torch runs a convolution, with the padding that it has itself."""
    weight = roles.found.get("weight")
    module = None if weight is None else weight.owner
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or "forward" in vars(module):
        return False
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    amounts = find_amounts(module)
    wanted = [size for size in _spread(given("padding"), len(module.kernel_size)) for _ in range(2)]
    return module.padding_mode == "zeros" and list(reversed(amounts)) == wanted


def _has_middle(given: Callable[[str], Any]) -> bool:
    """Return whether a tap in the middle of the kernel meets the first position, and every one where the stride is
    one.
    """
    sizes = given("weight").shape[2:]
    paddings = _spread(given("padding"), len(sizes))
    return all(
        size % 2 and 2 * padding == dilation * (size - 1)
        for (size, dilation), padding in zip(_spread_dilations(given), paddings, strict=True)
    )


def _spread_dilations(given: Callable[[str], Any]) -> list[tuple[int, int]]:
    """Return the extent of the kernel and the dilation of each axis."""
    sizes = given("weight").shape[2:]
    return list(zip(sizes, _spread(given("dilation"), len(sizes)), strict=True))


def _find_strides(given: Callable[[str], Any]) -> tuple[int, ...]:
    return tuple(int(step) for step in _spread(given("stride"), len(given("weight").shape) - 2))


def _spread(values: Sequence[int], count: int) -> list[int]:
    """Repeat a single number for every dimension."""
    return list(values) * count if len(values) == 1 else list(values)


def _is_fixed_filter(given: Callable[[str], Any], roles: _Roles) -> bool:
    """Return whether every channel is filtered by a constant that is not a parameter, separately from all other
    channels.
    """
    weight = given("weight")
    depthwise = int(given("groups")) == weight.shape[0] and weight.shape[1] == 1
    same = weight.shape[0] == given("input").shape[1]
    return depthwise and same and "weight" in roles.computed and roles.labels.get(id(weight)) is None


def _linear(name: str, given: Callable[[str], Any], roles: _Roles) -> CallFacts | None:
    if name == "linear":
        data, weight, bias = given("input"), given("weight"), given("bias")
    else:
        data, weight = (given("mat1"), given("mat2")) if name == "addmm" else (given("self"), given("mat2"))
        bias = given("self") if name == "addmm" else None
    is_constant = roles.labels.get(id(weight)) is None
    if name == "bmm" and not is_constant:
        return None
    if name == "bmm" and weight.shape[0] == 1:  # as torch.einsum makes it
        names, weight = roles.names_of(weight), weight[0]
        roles = replace(roles, names_of=lambda _tensor: names)
    last = data.dim() - 1
    several = roles.index.find_matrices(weight) if name in ("mm", "bmm") and is_constant else None
    if several is not None:
        roles.found["weight"] = several
        # the answers to a shift differ, and a bias would be added several times
        details = {**roles.details(anchor="weight"), "padded": True, "has_bias_slot": False}
        return CallFacts(NodeKind.MATMUL, (data,), axis=last, output_axis=last, details=details)
    if weight.dim() > 2:
        return None
    kind = NodeKind.LINEAR
    if name != "linear" and is_constant and roles.index.find(weight, ones=Ones.IN_FRONT) is not None:
        kind = NodeKind.MATMUL
    transposed = name != "linear" and kind is NodeKind.LINEAR
    ones = Ones.IN_FRONT if kind is NodeKind.MATMUL else Ones.BEHIND
    roles.sort("weight", weight, transposed=transposed, ones=ones)
    if "weight" not in roles.found and name != "linear" and not roles.is_computed_constant(weight):
        return None  # any product of two matrices
    if bias is not None and bias.dim() != 1:
        return None
    roles.sort("bias", bias)
    return CallFacts(kind, (data,), axis=last, output_axis=last, details=roles.details(anchor="weight"))


@dataclass(frozen=True)
class Affine:
    """Products and sums, one after the other, with constants that were computed from one module's BatchNorm tensors.

    Attributes:
        owner: dotted path of the module.
        scale, shift: what they come to, x * scale + shift, flat, in float64.
        source: labels of the computed operand of the last of them.
        result: labels of the result.
        nodes: that compute it, in order.
        eps: what the numbers say that it is, where the module does not.
    """

    owner: str
    scale: Tensor
    shift: Tensor
    source: Tensor
    result: Tensor
    nodes: tuple[int, ...]
    eps: float | None = None

    def after(self, other: Affine) -> Affine | None:
        """Apply this after another; None where channels do not agree."""
        if len({part.numel() for part in (self.scale, self.shift, other.scale, other.shift)} - {1}) > 1:
            return None
        shift = other.shift * self.scale + self.shift
        return replace(self, scale=other.scale * self.scale, shift=shift, nodes=(*other.nodes, *self.nodes))

    def node_facts(self, index: ParameterIndex) -> dict[str, Any]:
        """Return fields of the node of the BatchNorm that the sum completes."""
        found = _batchnorm_tensors(index, self.owner)
        assert found is not None
        module = next(iter(found.values())).owner
        return {
            "kind": NodeKind.BATCH_NORM,
            "layer": self.owner,
            "parameters": {role: parameter.name for role, parameter in found.items()},
            "eps": self.eps if self.eps is not None else read_eps(module),
            "owner": Owner.PART,
            "class_name": type(module).__name__,
        }


def describe_affine(
    function: Any,
    given: Callable[[str], Any],
    labels: Labels,
    *,
    node: int,
    names_of: NamesOf,
    index: ParameterIndex,
    out: Tensor,
) -> Affine | None:
    """Describe a call that multiplies by, or adds, constants of one BatchNorm's tensors; None for others.

    Args:
        given: its arguments, by name.
        node: its index.
    """
    name = operators.name_of(function)
    roles = ("self", "other")
    operands = [given(role) for role in roles]
    if name not in _ARITHMETIC or not all(isinstance(one, Tensor) for one in operands):
        return None
    computed = [place for place, one in enumerate(operands) if labels.get(id(one)) is not None]
    factor = given("alpha") if name in ("add", "sub") else None
    if len(computed) != 1 or factor not in (None, 1) or (name == "div" and given("rounding_mode") is not None):
        return None
    (place,) = computed
    constants = [one for one in operands if one is not operands[place]]
    owners = {index.by_name[n].module for one in constants for n in names_of(one)}
    backwards = place == 1 and name in ("sub", "div")
    if backwards or len(owners) != 1 or _batchnorm_tensors(index, next(iter(owners))) is None:
        return None
    source = labels[id(operands[place])]
    assert source is not None
    if not all(_lies_along(one, varying_axis(source, default=1) - source.dim()) for one in constants):
        return None
    values = [one.detach().double().flatten().cpu() for one in constants]
    one, zero = values[0].new_ones(1), values[0].new_zeros(1)
    if name in ("mul", "div"):
        scale, shift = values[0] if name == "mul" else 1 / values[0], zero
    else:
        scale, shift = one, values[0] if name == "add" else -values[0]
    return Affine(next(iter(owners)), scale, shift, source, out, (node,))


def _lies_along(constant: Tensor, axis: int) -> bool:
    """Return whether a constant varies along one axis alone, counted from the last."""
    return constant.numel() == 1 or (constant.dim() >= -axis and constant.shape[axis] == constant.numel())


def find_frozen_eps(affine: Affine, index: ParameterIndex) -> float | None:
    """Find the eps with which ``x * scale + shift`` equals BatchNorm with the tensors of this module.

    It is the module's, or else the one that the numbers give, if that is a round one: an eps may be a local variable
    of a forward. None where the constants are no such thing.
    """
    found = _batchnorm_tensors(index, affine.owner)
    if found is None:
        return None
    stored = [index.tensor(found[role]).detach() for role in VECTORS]
    weight, bias, mean, variance = (tensor.double().cpu() for tensor in stored)

    def scale_with(eps: float) -> Tensor:
        return weight / torch.sqrt(variance + eps)

    eps = read_eps(next(iter(found.values())).owner)
    rounding = _ROUNDINGS * max(torch.finfo(tensor.dtype).eps for tensor in stored)
    if eps is None or not _is_close(affine.scale, scale_with(eps), tolerance=rounding):
        solved = _solve_eps(affine.scale, weight, variance)  # an attribute that the forward does not read tells nothing
        eps = eps if solved is None else solved
    if eps is None:
        return None
    scale = scale_with(eps)
    agrees = _is_close(affine.scale, scale) and _is_close(affine.shift, bias - mean * scale)
    return eps if agrees else None


def _solve_eps(scale: Tensor, weight: Tensor, variance: Tensor) -> float | None:
    """Solve scale = weight / sqrt(variance + eps) for eps in the most sensitive channel, to one significant digit."""
    if scale.shape != weight.shape:
        return None
    estimates = (weight / scale).square() - variance
    usable = torch.isfinite(estimates) & (weight != 0)
    if not usable.any():
        return None
    best = int(torch.where(usable, variance.abs(), torch.inf).argmin())
    estimate = float(estimates[best])
    rounded = float(f"{estimate:.0e}")
    # rounding of the scale to float32 moves the estimate by some 2^-23 of the sum
    noise = 2.0**-21 * abs(float(variance[best]) + estimate)
    if abs(estimate) <= noise:
        return 0.0  # as FrozenBatchNorm2d was written first, in maskrcnn-benchmark
    return rounded if rounded > 0 and abs(estimate - rounded) <= max(noise, 1e-3 * rounded) else None


def _is_close(found: Tensor, wanted: Tensor, *, tolerance: float = _CLOSE) -> bool:
    return found.shape == wanted.shape and torch.allclose(
        found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
    )


def _batchnorm_tensors(index: ParameterIndex, path: str) -> dict[str, Parameter] | None:
    names = {role: join_name(path, role) for role in VECTORS}
    if not all(name in index.by_name for name in names.values()):
        return None
    if len({tuple(index.tensor(index.by_name[name]).shape) for name in names.values()}) > 1:
        return None  # of another normalisation, e.g. one whose means are those of scalars alone
    return {role: index.by_name[name] for role, name in names.items()}


def late_bias(
    function: Any, given: Mapping[int, Tensor], labels: Labels, *, index: ParameterIndex
) -> tuple[Tensor, Parameter] | None:
    """Return labels and bias of a call that adds a bias to a matrix product, which linear does on strided inputs."""
    constants = [tensor for identity, tensor in given.items() if labels[identity] is None]
    computed = [labels[identity] for identity in given if labels[identity] is not None]
    if operators.name_of(function) != "add" or len(constants) != 1 or len(computed) != 1:
        return None
    parameter = index.find(constants[0]) if constants[0].dim() == 1 else None
    source = computed[0]
    if parameter is None or parameter.role != "bias" or source is None or source.shape[-1:] != constants[0].shape:
        return None
    return source, parameter
