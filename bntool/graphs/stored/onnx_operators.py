"""ONNX's operators in the graph: which only move elements, and what the others let pass.

An operator is one entry of :data:`OPERATORS`; one that is not there counts as an operation that may do anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bntool.checkpoints.onnx.graph import FLOATS, OnnxNode
from bntool.checkpoints.onnx.tensors import DTYPES
from bntool.graphs.graph import NodeKind
from bntool.graphs.stored.builder import GraphBuilder, broadcast
from bntool.graphs.stored.values import (
    Extent,
    Shape,
    Value,
    concatenate,
    drop,
    fill_in,
    known,
    reshape,
    size_of,
    take,
    transpose,
)

Array = NDArray[Any]
Extents = tuple[Extent, ...]  # of a tensor that holds a shape, or a part of one

_PLAIN_RESIZE = ("nearest", "linear", "cubic")
_LARGEST = 3.4e38
_FIRST_WITHOUT_AXIS = 7  # version of ONNX's operators since which operands broadcast as those of numpy


@dataclass(frozen=True)
class Call:
    """One node, and what it reads.

    Attributes:
        node: what is called.
        opset: version of ONNX's own operators.
        builder: where nodes are added.
        values: of its inputs; None for constants and for inputs that are left out.
        constant: the elements of a constant input by its position, None where it is none or they are not known.
        extents: where an input holds a shape that is known in part, that.
        bias: adds a node that adds a constant input to each channel; see :class:`ConstantSum`.
        reads: names of the constants that it reads.
    """

    node: OnnxNode
    opset: int
    builder: GraphBuilder
    values: tuple[Value | None, ...]
    constant: Callable[[int], Array | None]
    extents: Callable[[int], Extents | None]
    bias: Callable[[int, Value, Array, float], Value]
    reads: tuple[str, ...]

    @property
    def data(self) -> Value:
        value = self.values[0] if self.values else None
        return value if value is not None else Value()

    def is_constant(self, position: int) -> bool:
        """Return whether an input is there, and a constant."""
        inputs = self.node.inputs
        return position < len(inputs) and bool(inputs[position]) and self.values[position] is None

    def given(self, position: int) -> bool:
        return position < len(self.node.inputs) and bool(self.node.inputs[position])

    def integers(self, name: str, position: int) -> list[int] | None:
        """Return what is an attribute in old models and an input in newer ones; None where it is not known or not
        given.
        """
        if name in self.node.attributes:
            return list(self.node.integers(name))
        found = self.constant(position) if self.given(position) else None
        return None if found is None else [int(one) for one in found.reshape(-1)]

    def pass_on(
        self, kind: NodeKind, *, shape: Shape | None = None, value: Value | None = None, **facts: Any
    ) -> list[Value]:
        """Add a node that gives each channel anew."""
        data = self.data if value is None else value
        return [self.builder.add_elementwise(kind, self.node.operator, data, shape=shape, reads=self.reads, **facts)]

    def other(self, shape: Shape | None = None) -> list[Value]:
        """Add a node that may do anything."""
        index = self.builder.add(NodeKind.OTHER, self.node.operator, inputs=self.values, reads=self.reads)
        return [Value((index,), shape) for _ in self.node.outputs]


# elements that only move


def _same(call: Call) -> list[Value]:
    return [call.data]


def _dropout(call: Call) -> list[Value]:
    trains = call.constant(2) if call.given(2) else None
    if call.given(2) and (trains is None or bool(trains.any())):
        return call.other(call.data.shape)
    if call.opset < 7 and not call.node.integer("is_test", 0):
        return call.other(call.data.shape)
    return [call.data, Value((), call.data.shape)]  # the mask depends on nothing


def _cast(call: Call) -> list[Value]:
    dtype = DTYPES.get(call.node.integer("to", 0))
    if dtype is not None and dtype is call.data.dtype:
        return [call.data]
    return [dataclasses.replace(one, dtype=dtype) for one in call.pass_on(NodeKind.OTHER)]


def _transpose(call: Call) -> list[Value]:
    order = call.node.integers("perm") if "perm" in call.node.attributes else None
    return [transpose(call.data, order)]


def _reshape(call: Call) -> list[Value]:
    wanted = tuple(Extent(one) for one in call.node.integers("shape")) if call.opset < 5 else call.extents(1)
    data, shape = call.data, call.data.shape
    if wanted is None or shape is None:
        return [data.without_labels()]
    extents: list[Extent | None] = []
    for axis, one in enumerate(wanted):
        if one == Extent(0) and not call.node.integer("allowzero", 0):
            extents.append(shape[axis] if axis < len(shape) else None)
        else:
            extents.append(None if one == Extent(-1) else one)
    known_extents = [one for one in extents if one is not None and one.is_known]
    if len(known_extents) == len(extents) and data.spread is None:
        data = _with_one(data, size_of(known_extents).number)
    return [reshape(data, fill_in(extents, size_of(data.shape or ()), call.builder.unknown))]


def _with_one(data: Value, count: int) -> Value:
    """Set the unknown extent of a shape to one where the others hold as many elements as there are."""
    shape = data.shape or ()
    whole = size_of(shape)
    if len(whole.unknown) != 1 or whole.number != count:
        return data
    return dataclasses.replace(data, shape=tuple(Extent(one.number) for one in shape))


def _flatten(call: Call) -> list[Value]:
    shape = call.data.shape
    axis = call.node.integer("axis", 1)
    if shape is None or not -len(shape) <= axis <= len(shape):
        return [call.data.without_labels()]
    axis += len(shape) * (axis < 0)
    return [reshape(call.data, (size_of(shape[:axis]), size_of(shape[axis:])))]


def _squeeze(call: Call) -> list[Value]:
    axes, shape = call.integers("axes", 1), call.data.shape
    if shape is None or (axes is None and (call.given(1) or not all(one.is_known for one in shape))):
        return [call.data.without_labels()]
    if axes is None:
        gone = {axis for axis, one in enumerate(shape) if one == Extent(1)}
    else:
        gone = {axis % len(shape) for axis in axes}
    data = call.data
    for axis in sorted(gone, reverse=True):  # an extent that is not known has to be one
        if data.shape is not None and not data.shape[axis].is_known and axis not in data.axes:
            data = dataclasses.replace(data, shape=(*data.shape[:axis], Extent(1), *data.shape[axis + 1 :]))
    extents = data.shape or ()
    return [reshape(data, tuple(one for axis, one in enumerate(extents) if axis not in gone))]


def _unsqueeze(call: Call) -> list[Value]:
    axes, shape = call.integers("axes", 1), call.data.shape
    if axes is None or shape is None:
        return [call.data.without_labels()]
    rank = len(shape) + len(axes)
    extents = list(shape)
    for axis in sorted(axis % rank for axis in axes):
        extents.insert(axis, Extent(1))
    return [reshape(call.data, tuple(extents))]


def _concat(call: Call) -> list[Value]:
    values = []
    for position, value in enumerate(call.values):
        found = call.constant(position) if value is None else None
        if found is not None:
            index = call.builder.add(NodeKind.OTHER, "constant", channels=found.shape[1] if found.ndim > 1 else 1)
            values.append(call.builder.give(index, known(*found.shape), 1 if found.ndim > 1 else None))
        elif value is not None:
            values.append(value)
        else:
            return call.other()
    return [concatenate(values, call.node.integer("axis", 1))] if values else call.other()


def _split(call: Call) -> list[Value]:
    data, axis = call.data, call.node.integer("axis", 0)
    count = len(call.node.outputs)
    if data.shape is None or not -len(data.shape) <= axis < len(data.shape):
        return [data.without_labels() for _ in range(count)]
    whole, sizes = data.shape[axis], call.integers("split", 1)
    if sizes is None and not call.given(1) and whole.is_known:
        size = -(-whole.number // count)
        sizes = [max(min(size, whole.number - number * size), 0) for number in range(count)]
    if sizes is None or len(sizes) != count or not whole.is_known or sum(sizes) != whole.number:
        return [take(data, axis, None, call.builder.unknown()) for _ in range(count)]
    starts = [sum(sizes[:number]) for number in range(count)]
    return [
        take(data, axis, range(start, start + size), Extent(size)) for start, size in zip(starts, sizes, strict=True)
    ]


def _slice(call: Call) -> list[Value]:
    data = call.data
    if data.shape is None:
        return [data.without_labels()]
    starts, ends = call.integers("starts", 1), call.integers("ends", 2)
    axes = call.integers("axes", 3)
    steps = call.integers("steps", 4)
    unclear = (call.given(3) and axes is None) or (call.given(4) and steps is None) if call.opset > 9 else False
    if axes is None and starts is not None:
        axes = list(range(len(starts)))
    if starts is None or ends is None or axes is None or unclear:
        if axes is None or unclear or (call.given(3) and axes is None):
            return [data.without_labels(call.builder.unknowns(len(data.shape)))]
        for axis in axes:  # how much is not known, and where is
            data = take(data, axis, None, call.builder.unknown())
        return [data]
    steps = steps or [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        return [data.without_labels()]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if data.shape is None or not -len(data.shape) <= axis < len(data.shape):
            return [data.without_labels()]
        extent = data.shape[axis]
        if not extent.is_known:
            data = take(data, axis, None, call.builder.unknown())
            continue
        stop = None if step < 0 and end < -extent.number else end
        places = range(extent.number)[start:stop:step]
        data = take(data, axis, places, Extent(len(places)))
    return [data]


def _gather(call: Call) -> list[Value]:
    data, axis = call.data, call.node.integer("axis", 0)
    places = call.constant(1)
    if data.shape is None or call.values[0] is None or not -len(data.shape) <= axis < len(data.shape):
        return call.other()
    axis %= len(data.shape)
    if places is None or places.ndim > 1:
        return call.other()
    if places.ndim == 0:
        return [drop(data, axis, int(places))]
    return [take(data, axis, [int(one) for one in places], Extent(len(places)))]


def _depth_to_space(call: Call) -> list[Value]:
    shape, block = call.data.shape, call.node.integer("blocksize", 0)
    if shape is None or len(shape) != 4 or block < 1 or not shape[1].is_known or shape[1].number % block**2:
        return call.other()
    few, size = Extent(shape[1].number // block**2), Extent(block)
    if call.node.text("mode", "DCR") == "DCR":
        split, order = (shape[0], size, size, few, *shape[2:]), (0, 3, 4, 1, 5, 2)
    else:
        split, order = (shape[0], few, size, size, *shape[2:]), (0, 1, 4, 2, 5, 3)
    return [_merge_positions(transpose(reshape(call.data, split), order), (3, 5))]


def _merge_positions(value: Value, gone: tuple[int, int]) -> Value:
    """Let axes go into those before them; channels that lie along them meet along the others."""
    shape = value.shape or ()
    wanted = [one for axis, one in enumerate(shape) if axis not in gone]
    for axis in gone:
        before = axis - 1 - sum(other < axis for other in gone)
        wanted[before] = size_of((wanted[before], shape[axis]))
    if value.labels is None:
        return value.without_labels(tuple(wanted))
    kept = [number for number, axis in enumerate(value.axes) if axis not in gone]
    labels = np.moveaxis(value.labels, kept, range(len(kept)))
    labels = labels.reshape(*labels.shape[: len(kept)], -1)
    axes = tuple(value.axes[number] - sum(other < value.axes[number] for other in gone) for number in kept)
    return dataclasses.replace(value, shape=tuple(wanted), axes=axes, labels=labels)


def _space_to_depth(call: Call) -> list[Value]:
    shape, block = call.data.shape, call.node.integer("blocksize", 0)
    if shape is None or len(shape) != 4 or block < 1 or not shape[1].is_known or call.data.axes not in ((), (1,)):
        return call.other()
    spaces = tuple(call.builder.unknown() for _ in range(2))
    wanted = (shape[0], Extent(shape[1].number * block**2), *spaces)
    if call.data.labels is None or call.data.spread is not None:
        return [call.data.without_labels(wanted)]
    if not call.data.axes:  # one channel lies everywhere
        return [call.data.with_extents(wanted)]
    return [dataclasses.replace(call.data, shape=wanted, labels=np.tile(call.data.labels, (block**2, 1)))]


# elements that are computed


def _activation(call: Call) -> list[Value]:
    return call.pass_on(NodeKind.ACTIVATION)


def _prelu(call: Call) -> list[Value]:
    slope, rank = call.constant(1), call.data.rank
    plain = slope is not None and rank is not None and slope.ndim <= rank
    return call.pass_on(NodeKind.ACTIVATION if plain else NodeKind.OTHER) if call.is_constant(1) else call.other()


def _clip(call: Call) -> list[Value]:
    limits = []
    for position, name in ((1, "min"), (2, "max")):
        if name in call.node.attributes:
            limits.append(call.node.number(name, 0.0))
        elif call.given(position):
            found = call.constant(position)
            limits.append(math.nan if found is None or found.size != 1 else float(found.reshape(())))
        else:
            limits.append(-math.inf if name == "min" else math.inf)
    if limits[0] == 0 and limits[1] >= _LARGEST:
        return call.pass_on(NodeKind.ACTIVATION)
    return call.pass_on(NodeKind.OTHER)


def _any_shape(call: Call) -> list[Value]:
    """Add an operator that keeps the shape and lets nothing pass."""
    if len(call.node.outputs) != 1:
        return call.other()
    return [dataclasses.replace(one, dtype=None) for one in call.pass_on(NodeKind.OTHER)]


def _by_axis(operation: Callable[[Call], list[Value]]) -> Callable[[Call], list[Value]]:
    """Let an operation see its second operand with as many axes behind as version 6 of ONNX's operators means.

    Up to that version ``axis`` says at which axis of the first operand those of the second begin.
    """

    def apply(call: Call) -> list[Value]:
        node = call.node
        if call.opset >= _FIRST_WITHOUT_AXIS or "axis" not in node.attributes or not node.integer("broadcast", 0):
            return operation(call)
        first, second = (_count_axes(call, position) for position in (0, 1))
        behind = None if first is None or second is None else first - node.integer("axis", 0) - second
        if behind is None or behind < 0:
            return call.other()
        value = call.values[1]
        if value is not None:
            value = reshape(value, (*(value.shape or ()), *known(*[1] * behind)))

        def constant(position: int) -> Array | None:
            found = call.constant(position)
            return found.reshape(*found.shape, *[1] * behind) if found is not None and position == 1 else found

        return operation(dataclasses.replace(call, values=(call.values[0], value), constant=constant))

    return apply


def _count_axes(call: Call, position: int) -> int | None:
    value = call.values[position]
    found = call.constant(position) if value is None else None
    return value.rank if value is not None else None if found is None else found.ndim


def _operands(call: Call) -> tuple[Value | None, Value | None]:
    """Return the two operands; None for one that is a constant, or depends on shapes alone."""
    first, second = ((value if value is not None and value.sources else None) for value in call.values[:2])
    return first, second


def _add(call: Call) -> list[Value]:
    left, right = _operands(call)
    if left is not None and right is not None:
        return [call.builder.add_joint(NodeKind.ADD, call.node.operator, left, right, reads=call.reads)]
    if left is not None:
        return _add_constant(call, 1, left, 1.0)
    return _add_constant(call, 0, right, 1.0) if right is not None else call.other()


def _subtract(call: Call) -> list[Value]:
    left, right = _operands(call)
    if left is not None and right is not None:
        operator = call.node.operator
        return [call.builder.add_joint(NodeKind.ADD, operator, left, right, factors=(1.0, -1.0), reads=call.reads)]
    if left is not None:
        return _add_constant(call, 1, left, -1.0)
    if right is None:
        return call.other()
    turned = call.builder.add_elementwise(NodeKind.CHANNELWISE, call.node.operator, right, factors=(-1.0,))
    return _add_constant(call, 0, turned, 1.0)


def _add_constant(call: Call, position: int, value: Value, factor: float) -> list[Value]:
    constant = call.constant(position)
    if constant is not None and by_channel(constant, value) is not None:
        return [call.bias(position, value, constant, factor)]
    shape = _shape_with(_shape_of(call, position), value)
    return call.pass_on(NodeKind.CONSTANT_SUM, value=value, shape=shape) if shape is not None else call.other()


def _shape_of(call: Call, position: int) -> Shape | None:
    """Return the shape of an operand, also of a constant; None where it is not known."""
    value = call.values[position]
    if value is not None:
        return value.shape
    constant = call.constant(position)
    return None if constant is None else known(*constant.shape)


def _shape_with(constant: Shape | None, value: Value) -> Shape | None:
    """Return the shape of a tensor joined with a constant; None where that gives it more channels, or axes."""
    shape = broadcast(value, Value((), constant))
    if shape is None or value.shape is None or len(shape) != len(value.shape):
        return None
    return shape if all(shape[axis] == value.shape[axis] for axis in value.axes) else None


def by_channel(constant: Array, value: Value) -> Array | None:
    """Return a constant as one finite number for each channel of the tensor that it is broadcast to; else None."""
    shape = value.shape
    if shape is None or value.labels is None or len(value.axes) != 1 or value.spread is not None:
        return None
    if constant.ndim > len(shape) or constant.dtype.kind != "f":
        return None
    (axis,), count = value.axes, value.labels.shape[0]
    extents = (1,) * (len(shape) - constant.ndim) + constant.shape
    if any(extent != 1 for place, extent in enumerate(extents) if place != axis) or extents[axis] not in (1, count):
        return None
    numbers: Array = np.broadcast_to(constant.reshape(-1).astype("f8"), (count,))
    return numbers if np.isfinite(numbers).all() else None


def _multiply(call: Call) -> list[Value]:
    left, right = _operands(call)
    if left is not None and right is not None:
        data, gate = (
            (right, left) if _is_gate(call.builder, left) and not _is_gate(call.builder, right) else (left, right)
        )
        return [call.builder.add_joint(NodeKind.GATE, call.node.operator, data, gate, reads=call.reads)]
    if left is not None:
        return _scale(call, 1, left, inverse=False)
    return _scale(call, 0, right, inverse=False) if right is not None else call.other()


def _is_gate(builder: GraphBuilder, value: Value) -> bool:
    return value.labels is None or any(builder.node(source).kind is NodeKind.OTHER for source in value.sources)


def _divide(call: Call) -> list[Value]:
    left, right = _operands(call)
    if left is None or right is not None:
        return call.other(broadcast(left, right) if left is not None and right is not None else None)
    return _scale(call, 1, left, inverse=True)


def _scale(call: Call, position: int, value: Value, *, inverse: bool) -> list[Value]:
    constant = call.constant(position)
    plain = constant is None or (constant.dtype.kind == "f" and (not inverse or bool(np.all(constant))))
    shape = _shape_with(_shape_of(call, position), value) if plain else None
    if shape is None or (constant is None and inverse):  # nothing tells that it is not divided by zero
        return call.other()
    numbers = by_channel(constant, value) if constant is not None else None
    if numbers is None:
        return call.pass_on(NodeKind.CHANNELWISE, value=value, shape=shape)
    with np.errstate(over="ignore"):
        numbers = 1 / numbers if inverse else numbers
    if not np.isfinite(numbers).all():
        return call.pass_on(NodeKind.CHANNELWISE, value=value, shape=shape)
    factors = tuple(numbers.tolist()) if np.any(numbers != numbers[:1]) else (float(numbers[0]),)
    return call.pass_on(NodeKind.CHANNELWISE, value=value, shape=shape, factors=factors)


def _negate(call: Call) -> list[Value]:
    return call.pass_on(NodeKind.CHANNELWISE, factors=(-1.0,))


def _sum(call: Call) -> list[Value]:
    values = [value for value in call.values if value is not None and value.sources]
    constants = [position for position, value in enumerate(call.values) if value is None or not value.sources]
    if not values or any(call.constant(position) is None for position in constants):
        return call.other()
    total = values[0]
    for value in values[1:]:
        total = call.builder.add_joint(NodeKind.ADD, call.node.operator, total, value)
    for position in constants:
        (total,) = _add_constant(call, position, total, 1.0)
    return [total]


def _mean(call: Call) -> list[Value]:
    if any(value is None or not value.sources for value in call.values):
        return call.other()
    return call.pass_on(NodeKind.CHANNELWISE, value=_sum(call)[0], factors=(1 / len(call.values),))


def _join_unknown(call: Call) -> list[Value]:
    """Add an operator that joins its inputs element by element and lets nothing pass."""
    shape = _shape_of(call, 0)
    for position in range(1, len(call.values)):
        shape = broadcast(Value((), shape), Value((), _shape_of(call, position)))
    return call.other(shape)


def _expand(call: Call) -> list[Value]:
    wanted, data = call.constant(1), call.data
    shape = None if wanted is None else broadcast(data, Value((), known(*[int(one) for one in wanted.reshape(-1)])))
    return _repeat(call, shape)


def _tile(call: Call) -> list[Value]:
    repeats, shape = call.constant(1), call.data.shape
    if repeats is None or shape is None or len(shape) != repeats.size:
        return call.other()
    times = [int(one) for one in repeats.reshape(-1)]
    return _repeat(call, tuple(size_of((one, Extent(time))) for one, time in zip(shape, times, strict=True)))


def _repeat(call: Call, shape: Shape | None) -> list[Value]:
    """Copy each position from another one; no axis of channels grows."""
    data = call.data
    if shape is None or data.shape is None or len(shape) != len(data.shape) or data.spread is not None:
        return call.other()
    if any(shape[axis] != data.shape[axis] for axis in data.axes):
        return call.other()
    return call.pass_on(NodeKind.AVERAGE, shape=shape)


def _pool(kind: NodeKind) -> Callable[[Call], list[Value]]:
    def pool(call: Call) -> list[Value]:
        data, node = call.data, call.node
        if (
            data.shape is None
            or any(axis > 1 for axis in data.axes)
            or any(node.outputs[1:])
            or data.spread is not None
        ):
            return call.other()
        shape = (*data.shape[:2], *_positions(call, data.shape[2:]))
        if kind is NodeKind.AVERAGE:
            padded = any(node.integers("pads")) or node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
            if (padded and node.integer("count_include_pad", 0)) or node.integer("ceil_mode", 0):
                return call.pass_on(NodeKind.CHANNELWISE, shape=shape)  # where zeros are counted only a scale passes
        return call.pass_on(kind, shape=shape)

    return pool


def _positions(call: Call, extents: Shape) -> Shape:
    """Return extents after a pool or convolution with the attributes of a node."""
    return slide(call.node, call.node.integers("kernel_shape"), extents, call.builder)


def slide(node: OnnxNode, kernel: Sequence[int], extents: Shape, builder: GraphBuilder) -> Shape:
    """Slide a kernel over some axes, by the attributes of its node; return the positions."""
    count = len(kernel)
    plain = node.text("auto_pad", "NOTSET") in ("NOTSET", "VALID") and not node.integer("ceil_mode", 0)
    strides = node.integers("strides") or (1,) * count
    dilations = node.integers("dilations") or (1,) * count
    pads = node.integers("pads") or (0,) * (2 * count)
    if node.text("auto_pad", "NOTSET") == "VALID":
        pads = (0,) * (2 * count)
    fits = (
        len(extents) == count == len(strides) == len(dilations)
        and len(pads) == 2 * count
        and min(strides, default=1) > 0
    )
    if not plain or not fits:
        return builder.unknowns(len(extents))
    found = []
    for axis, extent in enumerate(extents):
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        if extent.is_known:
            found.append(Extent((extent.number + pads[axis] + pads[axis + count] - reach) // strides[axis] + 1))
        else:
            found.append(
                extent if strides[axis] == 1 and pads[axis] + pads[axis + count] == reach - 1 else builder.unknown()
            )
    return tuple(found)


def _global_pool(kind: NodeKind) -> Callable[[Call], list[Value]]:
    def pool(call: Call) -> list[Value]:
        data = call.data
        if data.shape is None or any(axis > 1 for axis in data.axes) or data.spread is not None:
            return call.other()
        return call.pass_on(kind, shape=(*data.shape[:2], *known(*[1] * (len(data.shape) - 2))))

    return pool


def _reduce(kind: NodeKind) -> Callable[[Call], list[Value]]:
    def reduce(call: Call) -> list[Value]:
        data, axes = call.data, call.integers("axes", 1)
        if data.shape is None or axes is None or not axes or data.spread is not None:
            return call.other()
        gone = {axis % len(data.shape) for axis in axes}
        if gone & set(data.axes):
            return call.other()
        kept = tuple(Extent(1) if axis in gone else one for axis, one in enumerate(data.shape))
        (given,) = call.pass_on(kind, shape=kept)
        if call.node.integer("keepdims", 1):
            return [given]
        return [reshape(given, tuple(one for axis, one in enumerate(kept) if axis not in gone))]

    return reduce


def _resize(call: Call) -> list[Value]:
    data, node = call.data, call.node
    plain = node.text("mode", "nearest") in _PLAIN_RESIZE
    plain = plain and node.text("coordinate_transformation_mode", "") != "tf_crop_and_resize"
    if data.shape is None or not plain or data.spread is not None:
        return call.other()
    rank = len(data.shape)
    axes = [axis % rank for axis in node.integers("axes")] or list(range(rank))
    scales = list(node.attributes["scales"].floats(FLOATS)) if "scales" in node.attributes else None
    first = 1 if node.operator == "Upsample" or call.opset < 11 else 2
    sizes = None
    if scales is None and call.given(first):
        found = call.constant(first)
        scales = None if found is None else [float(one) for one in found.reshape(-1)]
    if not scales and call.given(3):
        sizes = call.extents(3)
    changed: set[int] = set()
    stretched = node.text("keep_aspect_ratio_policy", "stretch") == "stretch"
    if scales and len(scales) == len(axes):
        changed = {axis for axis, scale in zip(axes, scales, strict=True) if scale != 1}
    elif sizes is not None and len(sizes) == len(axes) and stretched:
        changed = {axis for axis, size in zip(axes, sizes, strict=True) if size != data.shape[axis]}
    elif set(axes) & set(data.axes):
        return call.other()
    else:
        changed = set(axes)
    if changed & set(data.axes):
        return call.other()
    shape = tuple(call.builder.unknown() if axis in changed else one for axis, one in enumerate(data.shape))
    return call.pass_on(NodeKind.AVERAGE, shape=shape)


def _pad(call: Call) -> list[Value]:
    data, node = call.data, call.node
    pads = call.integers("pads", 1) if "paddings" not in node.attributes else list(node.integers("paddings"))
    axes = call.constant(3) if call.given(3) else None
    if data.shape is None or pads is None or (call.given(3) and axes is None) or data.spread is not None:
        return call.other()
    rank = len(data.shape)
    which = [int(axis) % rank for axis in axes.reshape(-1)] if axes is not None else list(range(rank))
    if len(pads) != 2 * len(which):
        return call.other()
    changed = {axis for number, axis in enumerate(which) if pads[number] or pads[number + len(which)]}
    if changed & set(data.axes):
        return call.other()
    shape = tuple(call.builder.unknown() if axis in changed else one for axis, one in enumerate(data.shape))
    if node.text("mode", "constant") == "constant" and max(pads, default=0) <= 0:  # a crop
        return call.pass_on(NodeKind.AVERAGE, shape=shape)
    if node.text("mode", "constant") in ("reflect", "edge", "wrap"):
        negative = min(pads, default=0) < 0
        return call.pass_on(NodeKind.AVERAGE, shape=shape) if not negative else call.other()
    value = call.constant(2) if call.given(2) else np.asarray(node.number("value", 0.0))
    zero = node.text("mode", "constant") == "constant" and value is not None and not np.any(value)
    return call.pass_on(NodeKind.CHANNELWISE if zero else NodeKind.OTHER, shape=shape)


_KEEPS_SHAPE = (
    "Sigmoid", "Tanh", "Elu", "Selu", "Celu", "HardSigmoid", "HardSwish", "Softmax", "LogSoftmax", "Softplus",
    "Softsign", "ThresholdedRelu", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Gelu", "Mish", "Swish", "Sin", "Cos",
    "Floor", "Ceil", "Round", "Sign", "Shrink", "InstanceNormalization", "QuantizeLinear", "DequantizeLinear", "LRN",
    "LpNormalization",
)  # fmt: skip

_JOINS_UNKNOWN = ("Where", "Max", "Min", "Pow")
# those that may read several tensors of the data
JOINING = ("Add", "Sub", "Mul", "Div", "Sum", "Mean", "Concat", *_JOINS_UNKNOWN)
OPERATORS: Mapping[str, Callable[[Call], list[Value]]] = {
    **dict.fromkeys(_KEEPS_SHAPE, _any_shape),
    **dict.fromkeys(_JOINS_UNKNOWN, _join_unknown),
    "Identity": _same,
    "Dropout": _dropout,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Relu": _activation,
    "LeakyRelu": _activation,
    "Abs": _activation,
    "PRelu": _prelu,
    "Clip": _clip,
    "Add": _by_axis(_add),
    "Sub": _by_axis(_subtract),
    "Mul": _by_axis(_multiply),
    "Div": _by_axis(_divide),
    "Neg": _negate,
    "Sum": _sum,
    "Mean": _mean,
    "Expand": _expand,
    "Tile": _tile,
    "MaxPool": _pool(NodeKind.MAX_POOL),
    "AveragePool": _pool(NodeKind.AVERAGE),
    "GlobalMaxPool": _global_pool(NodeKind.MAX_POOL),
    "GlobalAveragePool": _global_pool(NodeKind.AVERAGE),
    "ReduceMean": _reduce(NodeKind.AVERAGE),
    "ReduceMax": _reduce(NodeKind.MAX_POOL),
    "ReduceSum": _reduce(NodeKind.CHANNELWISE),
    "Resize": _resize,
    "Upsample": _resize,
    "Pad": _pad,
}
