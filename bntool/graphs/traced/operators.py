"""PyTorch's operations in the graph: which only move elements, and which commute with a scale and a shift.

Everything that is not listed here counts as an operation that may do anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bntool.graphs.graph import NodeKind

# they look at shape, dtype or device of their argument, never at its elements
# a number or a truth value of the data reaches Python, where anything may depend on it
VALUE_READS = frozenset(("_local_scalar_dense", "item", "equal", "is_nonzero", "allclose"))

_SIZED_BY_VALUES = frozenset(("nms",))  # of torchvision, whose operations have no tags

SHAPE_ONLY = frozenset(
    (
        "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
        "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "sym_size", "sym_stride", "sym_numel",
        "size", "stride", "is_same_size", "bernoulli_like",
    )
)  # fmt: skip

# every element of the result is an element of an argument
MOVEMENTS = frozenset(
    (
        "view", "_unsafe_view", "_reshape_alias", "view_copy", "t", "transpose", "permute", "squeeze", "unsqueeze",
        "expand", "select", "slice", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "unbind",
        "unsafe_split_with_sizes", "narrow", "cat", "stack", "clone", "contiguous", "detach", "alias", "_to_copy",
        "lift_fresh", "lift_fresh_copy", "flip", "roll", "repeat", "pixel_shuffle", "pixel_unshuffle",
        "channel_shuffle", "native_channel_shuffle", "unfold", "movedim", "diagonal", "positive", "index_select",
        "index", "gather",
    )
)  # fmt: skip

# rows are added to where an index says
SCATTERS = frozenset(("index_add", "scatter_add", "index_put"))

BATCH_NORMS = frozenset(
    (
        "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm",
        "_batch_norm_no_update", "_batch_norm_with_update", "cudnn_batch_norm", "miopen_batch_norm",
    )
)  # fmt: skip

_CONVOLUTIONS = frozenset(("convolution", "_convolution", "convolution_overrideable", "deform_conv2d"))
_MAX_POOLS = frozenset(
    (
        "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
        "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool1d_with_indices",
    )
)  # fmt: skip
_ADAPTIVE_AVERAGES = frozenset(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d"))
_AVERAGE_POOLS = frozenset(("avg_pool1d", "avg_pool2d", "avg_pool3d"))
_LINEARS = frozenset(("mm", "addmm", "bmm", "linear"))
_ACTIVATIONS = frozenset(("relu", "leaky_relu", "_prelu_kernel", "prelu"))
_CONSTANT_PADS = frozenset(("constant_pad_nd",))
_MIRRORED_PADS = tuple(f"{kind}_pad{digit}d" for kind in ("reflection", "replication") for digit in "123")


def name_of(function: Any) -> str:
    """Return the operation's name, of torch's own without the underscore of those that work in place.

    It goes without namespace and overload if it is torch's or torchvision's: what another library calls by the same
    name may compute anything.
    """
    name: str = function.overloadpacket.__name__
    full_name: str = function._schema.name
    if full_name.startswith("aten::"):
        in_place = name.endswith("_") and not name.endswith("__")
        return name.removesuffix("_") if in_place else name
    return name if full_name.startswith("torchvision::") else full_name


def find_sizing(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Tensor]:
    """Return the arguments whose elements decide the shape of a result, as those of ``nonzero`` do."""
    name = name_of(function)
    if name == "index":  # by a mask
        given = argument(function, arguments, keywords, "indices") or ()
        return [one for one in given if isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)]
    if name == "masked_select":
        return [argument(function, arguments, keywords, "mask")]
    if torch.Tag.dynamic_output_shape in function.tags or name in _SIZED_BY_VALUES:
        return [one for one in (*arguments, *keywords.values()) if isinstance(one, Tensor)]
    return []


def gives_a_list(function: Any) -> bool:
    """Return whether an operation gives a list of tensors, whose length Python sees."""
    return any(isinstance(one.type, torch.ListType) for one in function._schema.returns)


class Part(NamedTuple):
    """One of the operations that another consists of."""

    function: Any
    arguments: Sequence[Any]
    keywords: Mapping[str, Any]
    result: Any


def decompose(
    function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], result: Any, *, is_plain: Callable[..., bool]
) -> list[Part]:
    """Return what an operation consists of, where it is one of several: the last of them gives its result.

    ``addcmul`` and ``addcdiv`` are tensor + value * (one * other) and tensor + value * (one / other), ``lerp`` is
    tensor + weight * (end - tensor). What adds rows to a tensor adds them to zeros, and the sums to it.

    Args:
        is_plain: tells of a tensor that it is a constant and comes from no parameter.
    """
    name, aten = name_of(function), torch.ops.aten
    in_place = function.overloadpacket.__name__.endswith("_")
    total = aten.add_.Tensor if in_place else aten.add.Tensor
    if name in SCATTERS and "out" not in keywords and accumulates(function, arguments, keywords):
        scatter = getattr(aten, name).default
        base, rest = arguments[0], arguments[1:]
        zeros = torch.zeros_like(base)
        rows = scatter(zeros, *rest, **keywords)
        if is_plain(base) and torch.equal(rows, result):
            return []
        return [Part(scatter, (zeros, *rest), keywords, rows), Part(total, (base, rows), {}, result)]
    if name not in ("addcmul", "addcdiv", "lerp") or "out" in keywords:
        return []

    def given(key: str) -> Any:
        return argument(function, arguments, keywords, key)

    base = given("self")
    if name == "lerp":
        operation, one, other, factor = aten.sub.Tensor, given("end"), base, given("weight")
    else:
        operation = aten.mul.Tensor if name == "addcmul" else aten.div.Tensor
        one, other, factor = given("tensor1"), given("tensor2"), given("value")
    parts = [Part(operation, (one, other), {}, operation(one, other))]
    if isinstance(factor, Tensor) or factor != 1:
        product = aten.mul.Tensor if isinstance(factor, Tensor) else aten.mul.Scalar
        last = parts[-1].result
        parts.append(Part(product, (last, factor), {}, product(last, factor)))
    return [*parts, Part(total, (base, parts[-1].result), {}, result)]


def accumulates(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Return whether an operation adds to what is there, as ``index_put`` may."""
    return name_of(function) != "index_put" or bool(argument(function, arguments, keywords, "accumulate"))


def find_indices(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Tensor]:
    """Return the arguments that say which elements an operation moves."""
    found = (argument(function, arguments, keywords, name) for name in ("index", "indices"))
    every = [one for some in found for one in (some if isinstance(some, list | tuple) else (some,))]
    return [one for one in every if isinstance(one, Tensor)]


def argument(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], name: str) -> Any:
    """Return an argument by its name in the schema, or its default; None if the schema has no such argument."""
    for position, formal in enumerate(function._schema.arguments):
        if formal.name == name:
            if name in keywords:
                return keywords[name]
            if position < len(arguments):
                return arguments[position]
            return formal.default_value if formal.has_default_value() else None
    return None


def is_movement(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Return whether every element of the result is one of an argument; padding by negative amounts alone is a crop."""
    name = name_of(function)
    if name in _CONSTANT_PADS:
        return all(isinstance(size, int) and size <= 0 for size in argument(function, arguments, keywords, "pad") or ())
    return name in MOVEMENTS


def keeps_places(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Return whether an operation, before it runs, gives strides alone, and every element keeps its place.

    An average over all positions in the memory format of channels last does so to its own result.
    """
    if name_of(function) != "as_strided":
        return False
    data = arguments[0]
    names = ("size", "stride", "storage_offset")
    size, stride, offset = (argument(function, arguments, keywords, key) for key in names)
    axes = zip(size, stride, data.stride(), strict=False)
    same = list(size) == list(data.shape) and offset in (None, data.storage_offset())
    return same and all(new == old for extent, new, old in axes if extent > 1)


def producer_kind(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> NodeKind | None:
    """Return the kind of a convolution, transposed convolution or linear; None for other operations.

    A matrix product is only one of these where the caller finds its second matrix to be a transposed parameter.
    """
    name = name_of(function)
    if name in _CONVOLUTIONS:
        transposed = argument(function, arguments, keywords, "transposed")
        return NodeKind.CONV_TRANSPOSE if transposed else NodeKind.CONVOLUTION
    if name == "addmm":
        one = all(argument(function, arguments, keywords, factor) == 1 for factor in ("alpha", "beta"))
        return NodeKind.LINEAR if one else None
    return NodeKind.LINEAR if name in _LINEARS else None


def passing_kind(  # noqa: PLR0911, C901 a list of cases
    function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], *, channel_axis: int, dim: int
) -> NodeKind | None:
    """Return how a scale and shift per channel pass through an operation on one computed tensor; None if they do not
    pass.

    Args:
        channel_axis: where the channels of its input lie.
        dim: number of dimensions of its input.
    """
    name = name_of(function)

    def given(key: str) -> Any:
        return argument(function, arguments, keywords, key)

    if name in _ACTIVATIONS or (name == "clamp_min" and given("min") == 0):
        return NodeKind.ACTIVATION
    if name == "neg":
        return NodeKind.CHANNELWISE
    if channel_axis >= dim - _count_positions(name, dim, given("pad")):
        return None  # it runs over the channels themselves
    if name in _MAX_POOLS:
        return NodeKind.MAX_POOL
    if name in ("amax", "mean", "sum"):
        axes = given("dim")
        axes = list(range(dim)) if axes is None or axes == [] else [axes] if isinstance(axes, int) else list(axes)
        if channel_axis in [axis % dim for axis in axes] or (name != "amax" and given("dtype") is not None):
            return None
        return {"amax": NodeKind.MAX_POOL, "mean": NodeKind.AVERAGE, "sum": NodeKind.CHANNELWISE}[name]
    if name in _ADAPTIVE_AVERAGES or name in _MIRRORED_PADS:
        return NodeKind.AVERAGE
    if name in _CONSTANT_PADS:
        return NodeKind.CHANNELWISE if given("value") == 0 else None
    if name in _AVERAGE_POOLS:
        padded = any(given("padding") or ()) and given("count_include_pad")
        return NodeKind.AVERAGE if not padded and given("divisor_override") is None else NodeKind.CHANNELWISE
    if name.startswith(("upsample_", "_upsample_")):  # interpolation weights sum to one, at borders too
        return NodeKind.AVERAGE
    return None


def _count_positions(name: str, dim: int, pad: Sequence[int] | None) -> int:
    """Count the trailing axes that a pooling, padding or interpolation works on."""
    if name in ("amax", "mean", "sum"):
        return 0  # by their own argument
    if name in _CONSTANT_PADS:
        return max((position // 2 + 1 for position, size in enumerate(pad or ()) if size), default=0)
    return next((int(digit) for digit in "123" if f"{digit}d" in name), dim)


def written_arguments(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes to, according to its schema."""
    written = []
    for position, formal in enumerate(function._schema.arguments):
        if formal.alias_info is not None and formal.alias_info.is_write:
            value = keywords.get(formal.name, arguments[position] if position < len(arguments) else None)
            written.append(value)
    return written
