"""What nodes compute from constants alone, in numpy: weights, and the shapes and axes that operations are told.

:mod:`bntool.checkpoints.onnx.constants` does the same for short vectors without numpy, since a listing needs none. Each
result is rounded to its dtype, as a runtime that computes step by step does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.containers.protobufs.reading import Message
from bntool.checkpoints.dtypes import BFLOAT16, BY_NAME, DType
from bntool.checkpoints.files import CHUNK, Chunk
from bntool.checkpoints.onnx.graph import FLOAT, FLOATS, INT, INTS, TENSOR, OnnxGraph, OnnxNode
from bntool.checkpoints.onnx.tensors import DTYPES, ExternalData, read_tensor
from bntool.checkpoints.tensors import StoredTensor, count_elements
from bntool.errors import BntoolError

Array = NDArray[Any]

_MOST_ELEMENTS = 1 << 28  # of one result
_MOST_STEPS = 64  # one after the other
_SHORT = 4096  # elements


class NotConstantError(Exception):
    """A value depends on inputs of the model, or on an operation that is not known here."""


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
    """Without leading axes of one element that the shape has not."""
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
        """A value that a node of a graph sees under a name; None where it cannot be computed."""
        try:
            return self._compute(graph, name, 0)
        except (NotConstantError, BntoolError, ValueError, ArithmeticError, IndexError, TypeError, OverflowError):
            return None

    def small(self, graph: OnnxGraph, name: str) -> Array | None:
        """The same; what is short is computed once: shapes and axes are asked for more than once."""
        key = (id(graph), name)
        if key in self._small:
            return self._small[key]
        found = self.compute(graph, name) if name else None
        if found is None or found.size <= _SHORT:
            self._small[key] = found
        return found

    def is_known(self, graph: OnnxGraph, names: Sequence[str]) -> bool:
        """Whether what a node puts out can be computed."""
        key = (id(graph), tuple(names))
        if key not in self._known:
            self._known[key] = all(self.small(graph, name) is not None for name in names if name)
        return self._known[key]

    def tensor(self, graph: OnnxGraph, name: str, shape: tuple[int, ...] | None = None) -> ComputedTensor | None:
        """A value as a tensor, if it is one of floating-point numbers.

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
        if node is None or node.outputs[0] != own:
            raise NotConstantError
        if node.operator == "Cast" and node.inputs:  # from bfloat16, which numpy does not know
            values = self._source(holder, node.inputs[0], depth)
            return _cast(node, [values])
        operation = _OPERATIONS.get(node.operator)
        if operation is None:
            raise NotConstantError
        given = [self._compute(holder, one, depth + 1) for one in node.inputs if one]
        filling = node.attributes.get("value")
        tensor = filling.message(TENSOR) if filling is not None else None
        if tensor is not None:
            given.append(self._read(tensor, own, as_float=False))
        with np.errstate(all="ignore"):
            result = np.asarray(operation(node, given))
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
    for name, number, dtype in (("value_float", FLOAT, "f4"), ("value_int", INT, "i8")):
        found = node.attributes.get(name)
        if found is not None:
            return np.asarray(found.float32(FLOAT, 0.0) if number == FLOAT else found.integer(number), dtype)
    floats, integers = node.attributes.get("value_floats"), node.attributes.get("value_ints")
    if floats is not None:
        return np.asarray(floats.floats(FLOATS), "f4")
    if integers is not None:
        return np.asarray(integers.integers(INTS), "i8")
    raise NotConstantError


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


def _dequantize(node: OnnxNode, given: Sequence[Array]) -> Array:
    """(x - zero point) * scale; one scale, or one for each place along an axis."""
    values, scale = given[0], given[1]
    if values.dtype.kind not in "iu" or "block_size" in node.attributes or "output_dtype" in node.attributes:
        raise NotConstantError
    zero = given[2] if len(given) > 2 else np.zeros_like(scale, dtype=values.dtype)
    if scale.ndim > 1 or zero.shape != scale.shape or scale.dtype != np.float32:
        raise NotConstantError
    if scale.ndim == 1 and scale.size > 1:
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


def _divide(_: OnnxNode, given: Sequence[Array]) -> Array:
    if given[0].dtype.kind != "f" or given[1].dtype != given[0].dtype:
        raise NotConstantError  # integers are cut towards zero
    return np.asarray(given[0] / given[1])


_OPERATIONS: Mapping[str, Callable[[OnnxNode, Sequence[Array]], Array]] = {
    "Constant": _constant,
    "ConstantOfShape": _fill,
    "Identity": lambda _, given: given[0],
    "Reshape": _reshape,
    "Squeeze": _squeeze_axes,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Transpose": _transpose,
    "Concat": _concatenate,
    "Gather": _gather,
    "DequantizeLinear": _dequantize,
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _divide,
    "Neg": _elementwise(np.negative),
    "Sqrt": _elementwise(np.sqrt),
}
