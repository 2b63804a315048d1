"""Values that nodes compute from constants alone, where a parameter of a BatchNormalization node is given so.

In plain Python, since listing a model imports no numpy: vectors of channels are short. Each result is rounded once to
its dtype, as a runtime that computes step by step does.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bntool.checkpoints.containers.protobufs.reading import Message
from bntool.checkpoints.dtypes import BY_NAME, DType, decode_numbers, encode_numbers
from bntool.checkpoints.onnx.graph import FLOAT, FLOATS, INT, INTS, TENSOR, OnnxGraph, OnnxNode
from bntool.checkpoints.onnx.tensors import DTYPES, ExternalData, read_tensor
from bntool.checkpoints.tensors import LiteralTensor, StoredTensor, count_elements, read_numbers
from bntool.errors import BntoolError

MAX_ELEMENTS = 1 << 20  # of one result
MAX_STEPS = 64  # one after the other
_FLOAT32, _INT64 = BY_NAME["float32"], BY_NAME["int64"]


@dataclass(frozen=True, slots=True)
class _Value:
    dtype: DType
    shape: tuple[int, ...]
    numbers: Sequence[float]


class NotConstantError(Exception):
    """A value depends on inputs of the model, or on an operation that is not known here."""


class Constants:
    """Computes values by name, each once.

    Args:
        external: the files beside the model.
    """

    def __init__(self, external: ExternalData) -> None:
        self._external = external
        self._known: dict[tuple[int, str], _Value | None] = {}

    def compute(self, graph: OnnxGraph, name: str) -> LiteralTensor | None:
        """Return a value that a node of a graph sees under a name, as a tensor; None where it cannot be computed."""
        value = self._compute(graph, name, 0)
        if value is None:
            return None
        return LiteralTensor.from_numbers(value.numbers, dtype=value.dtype, shape=value.shape)

    def _compute(self, graph: OnnxGraph, name: str, depth: int) -> _Value | None:
        place = graph.place_of(name)
        if place is None or depth > MAX_STEPS:
            return None
        holder, own = place
        key = (id(holder), own)
        if key not in self._known:
            try:
                self._known[key] = self._evaluate(holder, own, depth)
            except (NotConstantError, BntoolError, ValueError, ArithmeticError, IndexError):
                self._known[key] = None
        return self._known[key]

    def _evaluate(self, graph: OnnxGraph, name: str, depth: int) -> _Value:
        message = graph.initializers.get(name)
        if message is not None:
            return self._read(message, name)
        node = graph.producers.get(name)
        if node is None or (node.operator not in _OPERATIONS and node.operator != "Split"):
            raise NotConstantError
        if node.outputs[0] != name and node.operator != "Split":
            raise NotConstantError
        given = [self._compute(graph, one, depth + 1) for one in node.inputs if one]
        values = [one for one in given if one is not None]
        if len(values) != len(given):
            raise NotConstantError
        attribute = node.attributes.get("value")
        filling = attribute.message(TENSOR) if attribute is not None else None
        if filling is not None:
            values.append(self._read(filling, name))
        if node.operator == "Split":
            result = _split(node, values, list(node.outputs).index(name))
        else:
            result = _OPERATIONS[node.operator](node, values)
        _check_size(result.shape)
        if len(result.numbers) != count_elements(result.shape):
            raise NotConstantError
        rounded = decode_numbers(encode_numbers(result.numbers, result.dtype), result.dtype)
        return _Value(result.dtype, result.shape, rounded)

    def _read(self, message: Message, name: str) -> _Value:
        tensor = read_tensor(message, key=name, external=self._external)
        if isinstance(tensor, StoredTensor) and tensor.wrapper:
            raise NotConstantError
        _check_size(tensor.shape)
        return _Value(tensor.dtype, tuple(tensor.shape), read_numbers(tensor))


def _check_size(shape: Sequence[int]) -> None:
    if any(extent < 0 for extent in shape) or count_elements(shape) > MAX_ELEMENTS:
        raise NotConstantError


def read_constant(node: OnnxNode) -> tuple[DType, tuple[int, ...], Sequence[float]]:
    """Return dtype, shape and elements that a Constant node has in an attribute of its own, not as a tensor.

    Raises:
        NotConstantError: it has none, or one that is no number.
    """
    attributes = node.attributes
    if (number := attributes.get("value_float")) is not None:
        return _FLOAT32, (), [number.float32(FLOAT, 0.0)]
    if (number := attributes.get("value_int")) is not None:
        return _INT64, (), [number.integer(INT)]
    if (numbers := attributes.get("value_floats")) is not None:
        floats = numbers.floats(FLOATS)
        return _FLOAT32, (len(floats),), floats
    if (numbers := attributes.get("value_ints")) is not None:
        integers = numbers.integers(INTS)
        return _INT64, (len(integers),), integers
    raise NotConstantError


def read_slices(node: OnnxNode, given: Sequence[Sequence[float]]) -> list[tuple[int, int, int, int]]:
    """Return start, end, axis and step of each axis that a Slice node cuts.

    Args:
        given: the elements of its inputs but the first; before opset 10 attributes hold them.

    Raises:
        NotConstantError: an input is left out.
    """
    if "starts" in node.attributes:
        limits = [list(node.integers(name)) for name in ("starts", "ends", "axes") if name in node.attributes]
    elif "" in node.inputs:
        raise NotConstantError
    else:
        limits = [[int(one) for one in elements] for elements in given]
    starts, ends = limits[:2]
    axes = limits[2] if len(limits) > 2 else list(range(len(starts)))
    steps = limits[3] if len(limits) > 3 else [1] * len(starts)
    return list(zip(starts, ends, axes, steps, strict=True))


def _constant(node: OnnxNode, _: Sequence[_Value]) -> _Value:
    return _Value(*read_constant(node))


def _fill(_: OnnxNode, values: Sequence[_Value]) -> _Value:
    shape = tuple(int(extent) for extent in values[0].numbers)
    _check_size(shape)
    filling = values[1] if len(values) > 1 else _Value(_FLOAT32, (1,), [0.0])
    return _Value(filling.dtype, shape, [filling.numbers[0]] * count_elements(shape))


def _cast(node: OnnxNode, values: Sequence[_Value]) -> _Value:
    dtype = DTYPES.get(node.integer("to", 0))
    if dtype is None or dtype.bits < 8:
        raise NotConstantError
    numbers = values[0].numbers
    return _Value(dtype, values[0].shape, numbers if dtype.is_floating else [math.trunc(one) for one in numbers])


def _same(_: OnnxNode, values: Sequence[_Value]) -> _Value:
    return values[0]


def _reshape(_: OnnxNode, values: Sequence[_Value]) -> _Value:
    old, wanted = values[0].shape, [int(extent) for extent in values[1].numbers]
    extents = [old[i] if extent == 0 else extent for i, extent in enumerate(wanted)]
    if -1 in extents:
        rest = count_elements([extent for extent in extents if extent != -1])
        extents[extents.index(-1)] = count_elements(old) // max(rest, 1)
    return _Value(values[0].dtype, tuple(extents), values[0].numbers)


def _flatten_units(_: OnnxNode, values: Sequence[_Value]) -> _Value:
    """Drop axes of extent 1 around a vector: a parameter can come from nothing else."""
    return _Value(values[0].dtype, tuple(e for e in values[0].shape if e != 1) or (1,), values[0].numbers)


def _unsqueeze(node: OnnxNode, values: Sequence[_Value]) -> _Value:
    axes = [int(one) for one in values[1].numbers] if len(values) > 1 else list(node.integers("axes"))
    shape = list(values[0].shape)
    for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return _Value(values[0].dtype, tuple(shape), values[0].numbers)


def _expand(_: OnnxNode, values: Sequence[_Value]) -> _Value:
    target = _Value(values[0].dtype, tuple(int(one) for one in values[1].numbers), ())
    shape = _joint_shape([values[0], target])
    return _Value(values[0].dtype, shape, _broadcast(values[0], shape))


def _concatenate(node: OnnxNode, values: Sequence[_Value]) -> _Value:
    if node.integer("axis", 0) not in (0, -1) or any(len(one.shape) != 1 for one in values):
        raise NotConstantError
    numbers = list(itertools.chain.from_iterable(one.numbers for one in values))
    return _Value(values[0].dtype, (len(numbers),), numbers)


def _take(value: _Value, axis: int, places: Sequence[int]) -> _Value:
    """Take some places along an axis."""
    axis %= len(value.shape)
    before, extent, after = value.shape[:axis], value.shape[axis], value.shape[axis + 1 :]
    if any(not -extent <= place < extent for place in places):
        raise NotConstantError
    step = count_elements(after)
    starts = [(row * extent + place % extent) * step for row in range(count_elements(before)) for place in places]
    numbers = list(itertools.chain.from_iterable(value.numbers[start : start + step] for start in starts))
    return _Value(value.dtype, (*before, len(places), *after), numbers)


def _gather(node: OnnxNode, values: Sequence[_Value]) -> _Value:
    axis = node.integer("axis", 0) % len(values[0].shape)
    found = _take(values[0], axis, [int(one) for one in values[1].numbers])
    return replace(found, shape=(*found.shape[:axis], *values[1].shape, *found.shape[axis + 1 :]))


def _slice(node: OnnxNode, values: Sequence[_Value]) -> _Value:
    result = values[0]
    for start, end, axis, step in read_slices(node, [value.numbers for value in values[1:]]):
        extent = result.shape[axis]
        stop = None if step < 0 and end < -extent else end
        result = _take(result, axis, range(extent)[start:stop:step])
    return result


def _split(node: OnnxNode, values: Sequence[_Value], part: int) -> _Value:
    """Split; return one part, of given sizes or of as many as there are outputs, the last one perhaps smaller."""
    axis = node.integer("axis", 0)
    extent = values[0].shape[axis]
    sizes = [int(one) for one in values[1].numbers] if len(values) > 1 else list(node.integers("split"))
    size = -(-extent // len(node.outputs))
    start = sum(sizes[:part]) if sizes else part * size
    return _take(values[0], axis, range(extent)[start : start + (sizes[part] if sizes else size)])


def _where(_: OnnxNode, values: Sequence[_Value]) -> _Value:
    if values[1].dtype is not values[2].dtype:
        raise NotConstantError
    shape = _joint_shape(values)
    columns = [_broadcast(one, shape) for one in values]
    return _Value(values[1].dtype, shape, [a if take else b for take, a, b in zip(*columns, strict=True)])


def _clip(node: OnnxNode, values: Sequence[_Value]) -> _Value:
    limits = dict(zip([position for position, name in enumerate(node.inputs) if name], values, strict=True))
    low, high = (limits[position].numbers[0] if position in limits else None for position in (1, 2))
    low = node.number("min", 0.0) if "min" in node.attributes else low
    high = node.number("max", 0.0) if "max" in node.attributes else high
    numbers = [x if low is None or x >= low else low for x in values[0].numbers]
    return replace(values[0], numbers=[x if high is None or x <= high else high for x in numbers])


def _dequantize(_: OnnxNode, values: Sequence[_Value]) -> _Value:
    """Compute (x - zero point) * scale, with one scale or one for each element."""
    shape = values[0].shape
    scale = _broadcast(values[1], shape)
    zero = _broadcast(values[2], shape) if len(values) > 2 else [0.0] * count_elements(shape)
    numbers = [(x - z) * s for x, z, s in zip(values[0].numbers, zero, scale, strict=True)]
    return _Value(values[1].dtype, shape, numbers)


def _elementwise(function: Callable[..., float]) -> Callable[[OnnxNode, Sequence[_Value]], _Value]:
    def apply(_: OnnxNode, values: Sequence[_Value]) -> _Value:
        if not all(one.dtype is values[0].dtype and one.dtype.is_floating for one in values):
            raise NotConstantError
        shape = _joint_shape(values)
        _check_size(shape)
        columns = [_broadcast(one, shape) for one in values]
        return _Value(values[0].dtype, shape, [function(*row) for row in zip(*columns, strict=True)])

    return apply


def _joint_shape(values: Sequence[_Value]) -> tuple[int, ...]:
    reversed_shapes = [one.shape[::-1] for one in values]
    extents = []
    for column in itertools.zip_longest(*reversed_shapes, fillvalue=1):
        others = {extent for extent in column if extent != 1}
        if len(others) > 1:
            raise NotConstantError
        extents.append(others.pop() if others else 1)
    return tuple(extents[::-1])


def _broadcast(value: _Value, shape: tuple[int, ...]) -> Sequence[float]:
    if value.shape == shape:
        return value.numbers
    _check_size(shape)
    own = (1,) * (len(shape) - len(value.shape)) + value.shape
    steps, step = [], 1
    for extent in reversed(own):
        steps.append(0 if extent == 1 else step)
        step *= extent
    steps.reverse()
    return [
        value.numbers[sum(i * s for i, s in zip(index, steps, strict=True))]
        for index in itertools.product(*map(range, shape))
    ]


_OPERATIONS: Mapping[str, Callable[[OnnxNode, Sequence[_Value]], _Value]] = {
    "Constant": _constant,
    "ConstantOfShape": _fill,
    "Cast": _cast,
    "Identity": _same,
    "Reshape": _reshape,
    "Squeeze": _flatten_units,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Concat": _concatenate,
    "Gather": _gather,
    "Slice": _slice,
    "Where": _where,
    "Clip": _clip,
    "DequantizeLinear": _dequantize,
    "Max": _elementwise(max),
    "Min": _elementwise(min),
    "Pow": _elementwise(math.pow),
    "Exp": _elementwise(math.exp),
    "Add": _elementwise(operator.add),
    "Sub": _elementwise(operator.sub),
    "Mul": _elementwise(operator.mul),
    "Div": _elementwise(operator.truediv),
    "Neg": _elementwise(operator.neg),
    "Abs": _elementwise(abs),
    "Sqrt": _elementwise(math.sqrt),
    "Reciprocal": _elementwise(lambda x: 1.0 / x),
}
