"""Values that nodes compute from constants alone, in numpy: weights, and the shapes and axes that operations are told.

:mod:`bntool.checkpoints.onnx.constants` does the same for short vectors without numpy, since a listing needs none. Each
result is rounded to its dtype, as a runtime that computes step by step does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.containers.protobufs.reading import Message
from bntool.checkpoints.dtypes import BFLOAT16, BY_NAME, DType
from bntool.checkpoints.files import CHUNK, Chunk
from bntool.checkpoints.onnx.constants import NotConstantError, read_constant, read_slices
from bntool.checkpoints.onnx.graph import TENSOR, OnnxGraph, OnnxNode
from bntool.checkpoints.onnx.tensors import DTYPES, ExternalData, read_tensor
from bntool.checkpoints.tensors import StoredTensor, count_elements
from bntool.errors import BntoolError

Array = NDArray[Any]

_MOST_ELEMENTS = 1 << 28  # of one result
_MOST_STEPS = 64  # one after the other
_SHORT = 4096  # elements
_FAILURES = (NotConstantError, BntoolError, ValueError, ArithmeticError, IndexError, TypeError, OverflowError)


@dataclass(frozen=True)
class ComputedTensor(AsArray):
    """A tensor that nodes compute from constants, computed anew whenever it is read.

    Attributes:
        constants: what computes it.
        graph, name: under which name nodes of which graph see it.
    """

    constants: ComputedTensors
    graph: OnnxGraph
    name: str
    dtype: DType
    shape: tuple[int, ...]

    def chunks(self) -> Any:
        """See :class:`~bntool.checkpoints.tensors.Tensor`."""
        values = self.constants.compute(self.graph, self.name)
        assert values is not None
        data = np.ascontiguousarray(np.broadcast_to(_squeeze(values, self.shape), self.shape)).view("u1").reshape(-1)
        for position in range(0, len(data), CHUNK):
            chunk: Chunk = data[position : position + CHUNK].tobytes()
            yield chunk


def _squeeze(values: Array, shape: tuple[int, ...]) -> Array:
    """Drop leading axes of one element that the shape does not have."""
    while values.ndim > len(shape) and values.shape[0] == 1:
        values = values[0]
    return values


class ComputedTensors:
    """Computes values by name.

    Args:
        external: the files beside the model.
    """

    def __init__(self, external: ExternalData) -> None:
        self._external = external
        self._small: dict[tuple[int, str], Array | None] = {}
        self._known: dict[tuple[int, tuple[str, ...]], bool] = {}

    def compute(self, graph: OnnxGraph, name: str) -> Array | None:
        """Return a value that a node of a graph sees under a name; None where it cannot be computed."""
        try:
            return self._compute(graph, name, 0)
        except _FAILURES:
            return None

    def small(self, graph: OnnxGraph, name: str) -> Array | None:
        """Compute a value that is short, once: shapes and axes are asked for more than once."""
        key = (id(graph), name)
        if key in self._small:
            return self._small[key]
        found = self.compute(graph, name) if name else None
        if found is None or found.size <= _SHORT:
            self._small[key] = found
        return found

    def is_known(self, graph: OnnxGraph, names: Sequence[str]) -> bool:
        """Return whether what a node puts out can be computed."""
        key = (id(graph), tuple(names))
        if key not in self._known:
            self._known[key] = all(self.small(graph, name) is not None for name in names if name)
        return self._known[key]

    def tensor(self, graph: OnnxGraph, name: str, shape: tuple[int, ...] | None = None) -> ComputedTensor | None:
        """Return a value as a tensor, if it is one of floating-point numbers.

        Args:
            shape: to repeat it to; None for its own.
        """
        values = self.compute(graph, name)
        if values is None or values.dtype.name not in ("float16", "float32", "float64"):
            return None
        return ComputedTensor(self, graph, name, BY_NAME[values.dtype.name], values.shape if shape is None else shape)

    def _compute(self, graph: OnnxGraph, name: str, depth: int) -> Array:
        place = graph.place_of(name)
        if place is None or depth > _MOST_STEPS:
            raise NotConstantError
        holder, own = place
        message = holder.initializers.get(own)
        if message is not None:
            return self._read(message, own, as_float=False)
        node = holder.producers.get(own)
        if node is None or (node.outputs[0] != own and node.operator != "Split"):
            raise NotConstantError
        if node.operator == "Cast" and node.inputs:  # from bfloat16, which numpy does not know
            given = [self._source(holder, node.inputs[0], depth)]
        elif node.operator in _OPERATIONS:
            given = [self._compute(holder, one, depth + 1) for one in node.inputs if one]
        else:
            raise NotConstantError
        return self._run(node, own, given)

    def run(self, node: OnnxNode, given: Sequence[Array]) -> Array | None:
        """Return what a node of one output gives for what it reads; None where it cannot be computed.

        Args:
            given: the elements of each of its inputs, but for those that are left out.
        """
        try:
            return self._run(node, node.outputs[0], given) if len(node.outputs) == 1 else None
        except _FAILURES:
            return None

    def _run(self, node: OnnxNode, own: str, inputs: Sequence[Array]) -> Array:
        operation = _OPERATIONS.get(node.operator)
        if operation is None:
            raise NotConstantError
        given = list(inputs)
        filling = node.attributes.get("value")
        tensor = filling.message(TENSOR) if filling is not None else None
        if tensor is not None:
            given.append(self._read(tensor, own, as_float=False))
        with np.errstate(all="ignore"):
            parts = operation(node, given)
            result = parts[list(node.outputs).index(own)] if isinstance(parts, list) else np.asarray(parts)
        if result.size > _MOST_ELEMENTS:
            raise NotConstantError
        return result

    def _source(self, graph: OnnxGraph, name: str, depth: int) -> Array:
        found = graph.find(name)
        if found is not None:
            return self._read(found[0].initializers[found[1]], found[1], as_float=True)
        return self._compute(graph, name, depth + 1)

    def _read(self, message: Message, name: str, *, as_float: bool) -> Array:
        tensor = read_tensor(message, key=name, external=self._external)
        if isinstance(tensor, StoredTensor) and tensor.wrapper:
            raise NotConstantError
        if count_elements(tensor.shape) > _MOST_ELEMENTS or (tensor.dtype is BFLOAT16 and not as_float):
            raise NotConstantError
        values: Array = tensor.numpy()
        return values


def _constant(node: OnnxNode, given: Sequence[Array]) -> Array:
    if given:
        return given[0]
    dtype, shape, numbers = read_constant(node)
    return np.asarray(numbers, dtype.name).reshape(shape)


def _fill(_: OnnxNode, given: Sequence[Array]) -> Array:
    shape = [int(extent) for extent in given[0]]
    if min(shape, default=0) < 0 or count_elements(shape) > _MOST_ELEMENTS:
        raise NotConstantError
    return np.full(
        shape, given[1].reshape(-1)[0] if len(given) > 1 else np.float32(0), given[1].dtype if len(given) > 1 else "f4"
    )


def _cast(node: OnnxNode, given: Sequence[Array]) -> Array:
    dtype = DTYPES.get(node.integer("to", 0))
    if dtype is None or dtype.name not in _NUMPY:
        raise NotConstantError
    with np.errstate(all="ignore"):
        return given[0].astype(dtype.name)


_NUMPY = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)


def _reshape(node: OnnxNode, given: Sequence[Array]) -> Array:
    wanted = [int(extent) for extent in given[1].reshape(-1)]
    if not node.integer("allowzero", 0):
        wanted = [given[0].shape[i] if extent == 0 else extent for i, extent in enumerate(wanted)]
    return given[0].reshape(wanted)


def _axes(node: OnnxNode, given: Sequence[Array]) -> list[int] | None:
    if len(given) > 1:
        return [int(one) for one in given[1].reshape(-1)]
    return list(node.integers("axes")) if "axes" in node.attributes else None


def _squeeze_axes(node: OnnxNode, given: Sequence[Array]) -> Array:
    axes = _axes(node, given)
    return np.squeeze(given[0], None if axes is None else tuple(axes))


def _unsqueeze(node: OnnxNode, given: Sequence[Array]) -> Array:
    return np.expand_dims(given[0], tuple(_axes(node, given) or ()))


def _expand(_: OnnxNode, given: Sequence[Array]) -> Array:
    wanted = tuple(int(one) for one in given[1].reshape(-1))
    if count_elements(wanted) > _MOST_ELEMENTS:
        raise NotConstantError
    return np.broadcast_to(given[0], np.broadcast_shapes(given[0].shape, wanted))


def _transpose(node: OnnxNode, given: Sequence[Array]) -> Array:
    return np.transpose(given[0], node.integers("perm") if "perm" in node.attributes else None)


def _concatenate(node: OnnxNode, given: Sequence[Array]) -> Array:
    if "axis" not in node.attributes:
        raise NotConstantError
    return np.concatenate(given, axis=node.integer("axis", 0))


def _gather(node: OnnxNode, given: Sequence[Array]) -> Array:
    return np.take(given[0], given[1], axis=node.integer("axis", 0))


def _slice(node: OnnxNode, given: Sequence[Array]) -> Array:
    result = given[0]
    for start, end, axis, step in read_slices(node, [part.reshape(-1).tolist() for part in given[1:]]):
        stop = None if step < 0 and end < -result.shape[axis] else end
        places: list[slice] = [slice(None)] * result.ndim
        places[axis] = slice(start, stop, step)
        result = result[tuple(places)]
    return result


def _split(node: OnnxNode, given: Sequence[Array]) -> list[Array]:
    """Split into parts of given sizes, or into as many of one size as there are outputs, the last one perhaps
    smaller.
    """
    axis, count = node.integer("axis", 0), len(node.outputs)
    sizes = [int(one) for one in given[1].reshape(-1)] if len(given) > 1 else list(node.integers("split"))
    size = -(-given[0].shape[axis] // count)
    ends = np.cumsum(sizes)[:-1] if sizes else np.arange(1, count) * size
    parts = np.split(given[0], ends, axis=axis)
    if len(parts) != count:
        raise NotConstantError
    return parts


def _flatten(node: OnnxNode, given: Sequence[Array]) -> Array:
    axis = node.integer("axis", 1)
    return given[0].reshape(count_elements(given[0].shape[: axis if axis >= 0 else given[0].ndim + axis]), -1)


def _tile(_: OnnxNode, given: Sequence[Array]) -> Array:
    repeats = [int(one) for one in given[1].reshape(-1)]
    if count_elements(repeats) * given[0].size > _MOST_ELEMENTS:
        raise NotConstantError
    return np.tile(given[0], repeats)


def _where(_: OnnxNode, given: Sequence[Array]) -> Array:
    if given[1].dtype != given[2].dtype:
        raise NotConstantError
    return np.where(*given)


def _clip(node: OnnxNode, given: Sequence[Array]) -> Array:
    limits = dict(zip([position for position, name in enumerate(node.inputs) if name], given, strict=True))
    low, high = (limits.get(position) for position in (1, 2))
    if "min" in node.attributes:
        low = np.asarray(node.number("min", 0.0), "f4")
    if "max" in node.attributes:
        high = np.asarray(node.number("max", 0.0), "f4")
    result = given[0] if low is None else np.maximum(given[0], low)
    return np.asarray(result if high is None else np.minimum(result, high), given[0].dtype)


def _reduce(function: Callable[..., Array]) -> Callable[[OnnxNode, Sequence[Array]], Array]:
    def apply(node: OnnxNode, given: Sequence[Array]) -> Array:
        axes = _axes(node, given)
        if given[0].dtype.kind != "f" or (not axes and node.integer("noop_with_empty_axes", 0)):
            raise NotConstantError
        kept = bool(node.integer("keepdims", 1))
        return np.asarray(function(given[0], axis=tuple(axes) if axes else None, keepdims=kept), given[0].dtype)

    return apply


def _of_all(function: Callable[..., Array]) -> Callable[[OnnxNode, Sequence[Array]], Array]:
    """Make an operator that joins any number of inputs, element by element."""
    return _elementwise(lambda *given: functools.reduce(function, given))


def _of_floats(function: Callable[..., Array]) -> Callable[[OnnxNode, Sequence[Array]], Array]:
    def apply(node: OnnxNode, given: Sequence[Array]) -> Array:
        if any(one.dtype.kind != "f" for one in given):
            raise NotConstantError
        return _elementwise(function)(node, given)

    return apply


def _dequantize(node: OnnxNode, given: Sequence[Array]) -> Array:
    """Compute (x - zero point) * scale, with one scale, one for each place along an axis, or one for each block."""
    values, scale = given[0], given[1]
    if values.dtype.kind not in "iu" or "output_dtype" in node.attributes:
        raise NotConstantError
    zero, block = (
        given[2] if len(given) > 2 else np.zeros_like(scale, dtype=values.dtype),
        node.integer("block_size", 0),
    )
    if zero.shape != scale.shape or scale.dtype != np.float32 or (scale.ndim > 1) != bool(block):
        raise NotConstantError
    if block:
        axis = node.integer("axis", 1)
        scale, zero = (np.repeat(one, block, axis).take(range(values.shape[axis]), axis) for one in (scale, zero))
    elif scale.ndim == 1 and scale.size > 1:
        shape = [1] * values.ndim
        shape[node.integer("axis", 1)] = scale.size
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    elif scale.ndim == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    result: Array = (values.astype("i4") - zero.astype("i4")).astype("f4") * scale
    return result


def _elementwise(function: Callable[..., Array]) -> Callable[[OnnxNode, Sequence[Array]], Array]:
    def apply(_: OnnxNode, given: Sequence[Array]) -> Array:
        if any(one.dtype != given[0].dtype for one in given):
            raise NotConstantError
        return np.asarray(function(*given), given[0].dtype)

    return apply


def _compare(function: Callable[..., Array]) -> Callable[[OnnxNode, Sequence[Array]], Array]:
    def apply(_: OnnxNode, given: Sequence[Array]) -> Array:
        first, second = given
        if first.dtype != second.dtype:
            raise NotConstantError
        return np.asarray(function(first, second), bool)

    return apply


def _divide(_: OnnxNode, given: Sequence[Array]) -> Array:
    first, second = given
    if second.dtype != first.dtype or (first.dtype.kind != "f" and not np.all(second)):
        raise NotConstantError
    if first.dtype.kind == "f":
        return np.asarray(first / second)
    down, left = np.divmod(first, second)
    cut = down + ((left != 0) & (down < 0))  # towards zero, where numpy rounds down
    return np.asarray(cut, first.dtype)


def _remainder(node: OnnxNode, given: Sequence[Array]) -> Array:
    """Compute a remainder of integers; it has the sign of the divisor, as that of numpy does."""
    first, second = given
    if first.dtype.kind not in "iu" or second.dtype != first.dtype or node.integer("fmod", 0) or not np.all(second):
        raise NotConstantError
    return np.asarray(np.mod(first, second))


def _shape(node: OnnxNode, given: Sequence[Array]) -> Array:
    end = node.integer("end", 0) if "end" in node.attributes else None
    return np.asarray(given[0].shape[node.integer("start", 0) : end], "i8")


_OPERATIONS: Mapping[str, Callable[[OnnxNode, Sequence[Array]], Array | list[Array]]] = {
    "Constant": _constant,
    "Cast": _cast,
    "Shape": _shape,
    "Size": lambda _, given: np.asarray(given[0].size, "i8"),
    "ConstantOfShape": _fill,
    "Identity": lambda _, given: given[0],
    "Reshape": _reshape,
    "Squeeze": _squeeze_axes,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Transpose": _transpose,
    "Concat": _concatenate,
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
    "Flatten": _flatten,
    "Tile": _tile,
    "Where": _where,
    "Clip": _clip,
    "DequantizeLinear": _dequantize,
    "ReduceSum": _reduce(np.sum),
    "ReduceMean": _reduce(np.mean),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceL1": _reduce(lambda x, **places: np.abs(x).sum(**places)),
    "ReduceL2": _reduce(lambda x, **places: np.sqrt(np.square(x).sum(**places))),
    "ReduceSumSquare": _reduce(lambda x, **places: np.square(x).sum(**places)),
    "Sum": _of_all(np.add),
    "Max": _of_all(np.maximum),
    "Min": _of_all(np.minimum),
    "MatMul": _of_floats(np.matmul),
    "Pow": _of_floats(np.power),
    "Exp": _of_floats(np.exp),
    "Reciprocal": _of_floats(lambda x: 1 / x),
    "Equal": _compare(np.equal),
    "Less": _compare(np.less),
    "Greater": _compare(np.greater),
    "Abs": _elementwise(np.abs),
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _divide,
    "Mod": _remainder,
    "Neg": _elementwise(np.negative),
    "Sqrt": _elementwise(np.sqrt),
}
