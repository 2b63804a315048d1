"""Small ONNX models, each a pattern around BatchNormalization: those whose fold is exact, and those without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.checkpoints.onnx.onnx_models import node, tensor, value


@dataclass
class Pattern:
    """A model in the making; channels are 4 behind a convolution of the input's 3.

    Attributes:
        shape: of the input ``x``.
        outputs: names of the results.
        opset: version of ONNX's operators.
    """

    shape: Sequence[Any] = (2, 3, 8, 8)
    outputs: Sequence[str] = ("y",)
    opset: int = 13
    dtype: str = "f4"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(3))

    def put(self, name: str, *shape: int, low: float | None = None, high: float = 2.0, dtype: str = "") -> str:
        """A random constant: normal, or uniform between two limits."""
        values = self.random.normal(size=shape) if low is None else self.random.uniform(low, high, shape)
        return self.give(name, values, dtype or self.dtype)

    def give(self, name: str, values: Any, dtype: str = "f4") -> str:
        """A constant."""
        self.tensors.append(tensor(name, values, dtype))
        return name

    def add(self, operator: str, inputs: str, outputs: str, **attributes: Any) -> str:
        """A node; the name of its first output."""
        name = attributes.pop("name", f"{outputs.split(maxsplit=1)[0]}_{operator}")
        self.nodes.append(node(operator, inputs, outputs, name=name, **attributes))
        return outputs.split(maxsplit=1)[0]

    def conv(self, read: str, output: str, given: int = 4, taken: int = 3, size: int = 1, **attributes: Any) -> str:
        """A convolution with a weight of its own."""
        weight = self.put(f"{output}.weight", given, taken // attributes.get("group", 1), size, size)
        return self.add("Conv", f"{read} {weight}", output, **attributes)

    def norm(self, read: str, output: str, channels: int = 4, *, positive: bool = True, parameters: str = "") -> str:
        """A BatchNormalization; some of its scales are negative unless all are to be positive."""
        if not parameters:
            weight = self.random.uniform(0.5, 2, channels) * (
                1 if positive else np.where(np.arange(channels) % 2, -1, 1)
            )
            names = [self.give(f"{output}.g", weight, self.dtype), self.put(f"{output}.b", channels)]
            names += [self.put(f"{output}.m", channels), self.put(f"{output}.v", channels, low=0.5)]
            parameters = " ".join(names)
        return self.add("BatchNormalization", f"{read} {parameters}", output, name=f"{output}_bn", epsilon=1e-3)

    def define(self, name: str, inputs: str, outputs: str, inside: Pattern, **more: Any) -> None:
        """A function of these nodes; the constants of a pattern become nodes of it."""
        held = [helper.make_node("Constant", [], [one.name], value=one) for one in inside.tensors]
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("mine", 1)]
        nodes = [*held, *inside.nodes]
        made = helper.make_function("mine", name, inputs.split(), outputs.split(), nodes, opsets, **more)
        self.functions.append(made)

    def call(self, name: str, inputs: str, outputs: str, **attributes: Any) -> None:
        self.add(name, inputs, outputs, domain="mine", **attributes)

    def save(self, path: Path) -> Path:
        """Write it."""
        code = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        results = [value(name, None, code) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "g", [value("x", self.shape, code)], results, self.tensors)
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid("mine", 1)] if self.functions else []
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=self.functions)
        onnx.save(model, path)
        return path


Build = Callable[[], Pattern]
EXACT: dict[str, Build] = {}
REFUSED: dict[str, Build] = {}


def exact(build: Build) -> Build:
    """Every BatchNormalization folds."""
    EXACT[build.__name__] = build
    return build


def refused(build: Build) -> Build:
    """None folds, as far as they are called ``stays``; others may."""
    REFUSED[build.__name__] = build
    return build


def _between(name: str, operator: str, inputs: str = "c", **attributes: Any) -> None:
    """One node between a convolution and a BatchNormalization."""

    opset = attributes.pop("opset", 13)

    def build() -> Pattern:
        one = Pattern(opset=opset)
        one.conv("x", "c")
        one.put("k", 1, 4, 1, 1, low=0.5)
        one.put("v4", 4, 1, 1)
        one.put("s", low=0.5)
        one.give("two", 2)
        one.give("rows", [1, 1, 3, 1], "i8")
        one.give("batch", [2, 4, 1, 1], "i8")
        one.add(operator, inputs, "a", **attributes)
        one.norm("a", "y", positive=False)
        return one

    EXACT[name] = build


for _name, _operator, _inputs, _attributes in (
    ("identity", "Identity", "c", {}),
    ("dropout", "Dropout", "c", {}),
    ("cast_to_the_same_type", "Cast", "c", {"to": TensorProto.FLOAT}),
    ("plus_a_constant_of_each_channel", "Add", "c k", {}),
    ("a_constant_of_each_channel_plus", "Add", "v4 c", {}),
    ("plus_one_number", "Add", "c s", {}),
    ("minus_a_constant", "Sub", "c v4", {}),
    ("a_constant_minus", "Sub", "v4 c", {}),
    ("times_a_constant_of_each_channel", "Mul", "c k", {}),
    ("times_one_number", "Mul", "s c", {}),
    ("divided_by_a_constant", "Div", "c k", {}),
    ("negated", "Neg", "c", {}),
    ("average_pool", "AveragePool", "c", {"kernel_shape": [2, 2]}),
    ("average_pool_that_leaves_padding_out", "AveragePool", "c", {"kernel_shape": [3, 3], "pads": [1] * 4}),
    ("global_average", "GlobalAveragePool", "c", {}),
    ("mean_over_positions", "ReduceMean", "c", {"axes": [2, 3]}),
    ("upsampled", "Upsample", "c", {"scales": [1.0, 1.0, 2.0, 2.0], "opset": 7}),
    ("padded_by_reflection", "Pad", "c", {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "mode": "reflect", "opset": 9}),
    ("sum_of_one", "Sum", "c", {}),
    ("sum_with_constants", "Sum", "v4 c s", {}),
    ("mean_of_one", "Mean", "c", {}),
    ("repeated_along_rows", "Tile", "c rows", {}),
    ("repeated_along_the_batch", "Expand", "c batch", {}),
):
    _between(_name, _operator, _inputs, **_attributes)


@exact
def sum_of_two() -> Pattern:
    one = Pattern()
    one.add("Add", f"{one.conv('x', 'c')} {one.conv('x', 'd')}", "a")
    one.norm("a", "y", positive=False)
    return one


@exact
def sum_of_three() -> Pattern:
    one = Pattern()
    one.add("Sum", f"{one.conv('x', 'c')} {one.conv('x', 'd')} {one.conv('x', 'e')}", "a")
    one.norm("a", "y", positive=False)
    return one


@exact
def difference() -> Pattern:
    one = Pattern()
    one.add("Sub", f"{one.conv('x', 'c')} {one.conv('x', 'd')}", "a")
    one.norm("a", "y", positive=False)
    return one


@exact
def concatenation() -> Pattern:
    one = Pattern()
    one.add("Concat", f"{one.conv('x', 'c', 1)} {one.conv('x', 'd', 3)}", "a", axis=1)
    one.norm("a", "y", positive=False)
    return one


@exact
def parts_of_one_convolution() -> Pattern:
    one = Pattern(outputs=("y", "z"))
    one.conv("x", "c", 6)
    one.give("sizes", [2, 4], "i8")
    one.add("Split", "c sizes", "a b", axis=1)
    one.norm("a", "y", 2, positive=False)
    one.norm("b", "z", 4)
    return one


@exact
def a_slice_beside_another() -> Pattern:
    one = Pattern(outputs=("y", "z"))
    one.conv("x", "c", 6)
    for name, numbers in (("zero", 0), ("two", 2), ("end", 6), ("axis", 1)):
        one.give(name, [numbers], "i8")
    one.add("Slice", "c zero two axis", "a")
    one.add("Slice", "c two end axis", "b")
    one.norm("a", "y", 2)
    one.add("Relu", "b", "z")
    return one


@exact
def shuffled_channels() -> Pattern:
    one = Pattern()
    one.conv("x", "c", 6)
    one.give("apart", [2, 2, 3, 8, 8], "i8")
    one.give("together", [2, 6, 8, 8], "i8")
    one.add("Reshape", "c apart", "r")
    one.add("Transpose", "r", "t", perm=[0, 2, 1, 3, 4])
    one.add("Reshape", "t together", "a")
    one.norm("a", "y", 6, positive=False)
    return one


@exact
def shuffled_channels_of_any_batch() -> Pattern:
    """As torch exports it: the batch is read from the tensor when it runs."""
    one = Pattern(shape=("n", 3, 8, 8))
    one.conv("x", "c", 6)
    one.add("Shape", "c", "shape")
    for name, numbers in (("first", 0), ("axes", [0]), ("rest", [2, 3, 8, 8]), ("whole", [6, 8, 8])):
        one.give(name, numbers, "i8")
    one.add("Gather", "shape first", "n", axis=0)
    one.add("Unsqueeze", "n axes", "batch")
    one.add("Concat", "batch rest", "apart", axis=0)
    one.add("Concat", "batch whole", "together", axis=0)
    one.add("Reshape", "c apart", "r")
    one.add("Transpose", "r", "t", perm=[0, 2, 1, 3, 4])
    one.add("Reshape", "t together", "a")
    one.norm("a", "y", 6, positive=False)
    return one


@exact
def shuffled_channels_of_a_copied_batch() -> Pattern:
    one = Pattern(shape=("n", 3, 8, 8))
    one.conv("x", "c", 6)
    one.give("apart", [0, 2, 3, 8, 8], "i8")
    one.give("together", [0, 6, 8, 8], "i8")
    one.add("Reshape", "c apart", "r")
    one.add("Transpose", "r", "t", perm=[0, 2, 1, 3, 4])
    one.add("Reshape", "t together", "a")
    one.norm("a", "y", 6, positive=False)
    return one


@exact
def plus_ones_of_its_own_shape() -> Pattern:
    """What depends on the shape alone is a constant: it takes no scale, and channels stay told apart behind it."""
    one = Pattern(shape=("n", 3, "h", "w"))
    one.add("Shape", "x", "size")
    one.add("ConstantOfShape", "size", "ones", value=helper.make_tensor("", TensorProto.FLOAT, [1], [1.5]))
    one.add("Add", "ones x", "a")
    one.add("Mul", "a ones", "r")
    one.add("Transpose", "r", "t", perm=[0, 2, 3, 1])
    one.put("w", 3, 4)
    one.add("MatMul", "t w", "m")
    one.add("Transpose", "m", "c", perm=[0, 3, 1, 2])
    one.norm("c", "y", positive=False)
    return one


@exact
def one_channel_becomes_four() -> Pattern:
    """It lies along no axis of its own where there is one channel alone."""
    one = Pattern(shape=(2, 3, 4, 4))
    one.conv("x", "c", given=1)
    one.norm("c", "d", 1, positive=False)
    one.give("flat", [2, 1, 16], "i8")
    one.give("square", [2, 1, 4, 4], "i8")
    one.add("Reshape", "d flat", "e")
    one.put("w", 1, 1)
    one.add("MatMul", "w e", "f")
    one.add("Reshape", "f square", "g")
    one.add("SpaceToDepth", "g", "h", blocksize=2)
    one.add("Sigmoid", "h", "i")
    one.add("Mul", "h i", "y")
    return one


@exact
def behind_a_choice_between_two_tensors() -> Pattern:
    """Nothing passes it, and what lies behind it has its shape; so ``torch.lerp`` is exported."""
    one = Pattern()
    one.conv("x", "e")
    one.conv("x", "f")
    one.give("low", 0.25)
    one.give("high", 0.5)
    one.add("Less", "low high", "choice")
    one.add("Where", "choice e f", "chosen")
    one.add("ReduceMean", "chosen", "mean", axes=[2, 3], keepdims=0)
    one.put("w", 4, 4)
    one.add("MatMul", "mean w", "c")
    one.norm("c", "y", positive=False)
    return one


@exact
def one_tap_that_is_padded_by_itself() -> Pattern:
    one = Pattern(shape=("n", 3, "h", "w"), outputs=("y",))
    one.conv("x", "c")
    one.add("Relu", "c", "r")
    one.norm("r", "b", positive=False)
    one.conv("b", "y", taken=4, strides=[2, 2], auto_pad="SAME_UPPER")
    return one


def add_computed_widths(one: Pattern, *, first: str, rank: int = 4) -> str:
    """Widths as torch writes them where it computes no constants: the last axis first, filled up with zeros, turned."""
    for name, numbers in (("rank", rank), ("two", 2), ("zero", [0]), ("pairs", [-1, 2]), ("flat", [-1])):
        one.give(name, numbers, "i8")
    one.give("lowest", [-(2**63) + 1], "i8")
    one.add("Shape", first, "extents")
    one.add("Gather", "extents zero", "given", axis=0)
    one.add("Mul", "rank two", "whole")
    one.add("Sub", "whole given", "missing")
    one.add("ConstantOfShape", "missing", "zeros", value=onnx.numpy_helper.from_array(np.zeros(1, "i8")))
    one.add("Cast", first, "cast", to=TensorProto.INT64)
    one.add("Concat", "cast zeros", "all", axis=0)
    one.add("Reshape", "all pairs", "rows")
    one.add("Slice", "rows flat lowest zero flat", "turned")
    one.add("Transpose", "turned", "columns", perm=[1, 0])
    one.add("Reshape", "columns flat", "widths")
    return "widths"


@exact
def padded_by_computed_widths() -> Pattern:
    one = Pattern()
    one.conv("x", "c")
    one.give("own", [1, 2, 0, 1], "i8")
    add_computed_widths(one, first="own")
    one.add("Pad", "c widths", "p", mode="reflect")
    one.norm("p", "y", positive=False)
    return one


@exact
def padded_up_to_a_multiple() -> Pattern:
    """By the size of what is padded: 8 and 6 rows and columns become 10."""
    one = Pattern(shape=("n", 3, 8, 6))
    one.conv("x", "c")
    for name, number in (("two_", 2), ("three", 3), ("five", 5)):
        one.give(name, number, "i8")
    one.give("front", [0], "i8")
    one.add("Shape", "c", "sizes")
    for axis, place in (("h", "two_"), ("w", "three")):
        one.add("Gather", f"sizes {place}", axis, axis=0)
        one.add("Neg", axis, f"{axis}_minus")
        one.add("Mod", f"{axis}_minus five", f"{axis}_more")
        one.add("Unsqueeze", f"{axis}_more front", f"{axis}_row")
    one.add("Concat", "front w_row front h_row", "own", axis=0)
    add_computed_widths(one, first="own")
    one.add("Pad", "c widths", "p", mode="edge")
    one.norm("p", "y", positive=False)
    return one


@exact
def halves_with_computed_bounds() -> Pattern:
    """As torch exports a chunk of a tensor whose batch is open."""
    one = Pattern(shape=("n", 3, 8, 8), outputs=("y", "z"))
    one.conv("x", "c", 6)
    for name, number in (("none", 0), ("one", 1), ("two", 2)):
        one.give(name, [number], "i8")
    one.add("Shape", "c", "sizes")
    one.add("Gather", "sizes one", "channels", axis=0)
    one.add("Add", "channels one", "more")
    one.add("Div", "more two", "half")
    one.add("Mul", "half one", "first")
    one.add("Mul", "half two", "second")
    one.add("Slice", "c none first one", "a")
    one.add("Slice", "c first second one", "b")
    one.norm("a", "y", 3, positive=False)
    one.norm("b", "z", 3, positive=False)
    return one


@exact
def last_channels_by_a_quotient_that_is_cut() -> Pattern:
    """-5 / 2 is -2 in ONNX."""
    one = Pattern()
    one.conv("x", "c", 5)
    for name, number in (("one", 1), ("two", 2), ("end", 2**62)):
        one.give(name, [number], "i8")
    one.add("Shape", "c", "channels", start=1, end=2)
    one.add("Neg", "channels", "minus")
    one.add("Div", "minus two", "start")
    one.add("Slice", "c start end one", "a")
    one.norm("a", "y", 2, positive=False)
    one.opset = 15
    return one


@exact
def pixel_shuffle() -> Pattern:
    """Only where the channels that meet have the same scale: behind a BatchNormalization of the convolution."""
    one = Pattern()
    one.conv("x", "c", 8)
    one.norm("c", "b", 8, positive=False)
    one.add("DepthToSpace", "b", "y", blocksize=2)
    return one


@exact
def before_a_pixel_shuffle() -> Pattern:
    one = Pattern()
    one.conv("x", "c", 8)
    one.add("DepthToSpace", "c", "d", blocksize=2)
    one.norm("d", "y", 2, positive=False)
    return one


@exact
def channels_last_and_back() -> Pattern:
    one = Pattern()
    one.add("Transpose", one.conv("x", "c"), "t", perm=[0, 2, 3, 1])
    one.add("Relu", "t", "r")
    one.add("Transpose", "t", "a", perm=[0, 3, 1, 2])
    one.norm("a", "b")
    one.conv("b", "y", taken=4)
    one.nodes.pop(1 + [n.name for n in one.nodes].index("t_Transpose"))  # nothing reads the Relu
    return one


def _matrix(shape: Sequence[Any] = (2, 6)) -> Pattern:
    one = Pattern(shape=shape)
    one.put("w", 6, 4)
    return one


@exact
def product_with_a_matrix() -> Pattern:
    one = _matrix()
    one.add("MatMul", "x w", "c")
    one.norm("c", "y", positive=False)
    return one


@exact
def product_with_a_matrix_and_an_addition() -> Pattern:
    one = _matrix()
    one.put("bias", 4)
    one.add("MatMul", "x w", "c")
    one.add("Add", "bias c", "d")
    one.norm("d", "y", positive=False)
    return one


@exact
def product_with_a_matrix_for_sequences() -> Pattern:
    one = _matrix((2, 5, 6))
    one.add("MatMul", "x w", "c")
    one.add("Transpose", "c", "d", perm=[0, 2, 1])
    one.norm("d", "y", positive=False)
    return one


@exact
def a_matrix_times_positions() -> Pattern:
    one = Pattern(shape=(2, 6, 5))
    one.put("w", 4, 6)
    one.put("bias", 4, 1)
    one.add("MatMul", "w x", "c")
    one.add("Add", "c bias", "d")
    one.norm("d", "y", positive=False)
    return one


@exact
def gemm_with_factors() -> Pattern:
    one = _matrix()
    one.put("bias", 4)
    one.add("Gemm", "x w bias", "c", alpha=0.5, beta=3.0)
    one.norm("c", "y", positive=False)
    return one


@exact
def gemm_with_a_factor_and_no_bias() -> Pattern:
    one = _matrix()
    one.add("Gemm", "x w", "c", alpha=0.5, beta=0.25)
    one.norm("c", "y", positive=False)
    return one


@exact
def gemm_with_a_bias_of_one_row() -> Pattern:
    one = _matrix()
    one.put("bias", 1, 4)
    one.add("Gemm", "x w bias", "c")
    one.norm("c", "y", positive=False)
    return one


@exact
def gemm_with_one_number_as_bias() -> Pattern:
    one = _matrix()
    one.put("bias")
    one.add("Gemm", "x w bias", "c")
    one.norm("c", "y", positive=False)
    return one


@exact
def one_output_with_one_number_as_bias() -> Pattern:
    one = Pattern(shape=(2, 6))
    one.put("w", 6, 1)
    one.put("bias")
    one.add("Gemm", "x w bias", "c")
    one.norm("c", "y", 1, positive=False)
    return one


@exact
def before_a_gemm() -> Pattern:
    one = _matrix()
    one.add("Relu", "x", "r")
    one.norm("r", "d", 6, positive=False)
    one.add("Gemm", "d w", "y", alpha=2.0)
    return one


@exact
def before_flatten_and_gemm() -> Pattern:
    one = Pattern(shape=("n", 3, 2, 2))
    one.norm("x", "d", 3, positive=False)
    one.add("Flatten", "d", "f")
    one.put("w", 12, 4)
    one.add("Gemm", "f w", "y")
    return one


@exact
def before_positions_as_rows() -> Pattern:
    """A transformer behind convolutions: positions become rows, channels the last axis."""
    one = Pattern(shape=(2, 3, 4, 4))
    one.add("Relu", "x", "r")
    one.norm("r", "b", 3, positive=False)
    one.give("rows", [2, 3, 16], "i8")
    one.add("Reshape", "b rows", "f")
    one.add("Transpose", "f", "t", perm=[0, 2, 1])
    one.put("w", 3, 5)
    one.put("bias", 5)
    one.add("MatMul", "t w", "m")
    one.add("Add", "m bias", "y")
    return one


@exact
def weight_through_identity() -> Pattern:
    one = Pattern()
    one.put("w", 4, 3, 1, 1)
    one.add("Identity", "w", "wi")
    one.add("Conv", "x wi", "c")
    one.norm("c", "y", positive=False)
    return one


def _weight(name: str, *steps: tuple[str, str, str], opset: int = 13, **attributes: Any) -> None:
    """Nodes that compute the weight of a convolution from constants; attributes are those of the first one."""

    def build() -> Pattern:
        one = Pattern(shape=(2, 6, 8, 8), opset=opset)
        one.put("w0", 4, 6, 1, 1)
        one.put("w9", 9, 6, 1, 1)
        one.put("length", 4, 1, 1, 1)
        one.put("left", 4, 2)
        one.put("right", 2, 6)
        one.give("from", [1], "i8")
        one.give("to", [5], "i8")
        one.give("first", [0], "i8")
        one.give("sizes", [2, 4, 3], "i8")
        one.give("shape", [4, 6, 1, 1], "i8")
        one.give("half", 0.5)
        one.give("wq", one.random.integers(-127, 127, (4, 6, 1, 1)), "i1")
        one.put("scales", 4, 2, 1, 1, low=0.01, high=0.02)
        one.give("zeros", one.random.integers(-9, 9, (4, 2, 1, 1)), "i1")
        for number, (operator, inputs, outputs) in enumerate(steps):
            one.add(operator, inputs, outputs, **(attributes if not number else {}))
            one.nodes[-1].input[:] = [name.strip("_") for name in inputs.split()]
        one.add("Conv", "x w", "c")
        one.norm("c", "y", positive=False)
        return one

    EXACT[f"weight_{name}"] = build


_weight("of_a_given_length", ("ReduceL2", "w0", "n"), ("Div", "w0 n", "d"), ("Mul", "d length", "w"), axes=[1, 2, 3])
_weight("sliced", ("Slice", "w9 from to first", "w"))
_weight("split", ("Split", "w9 sizes", "a w b"), axis=0)
_weight("of_two_matrices", ("MatMul", "left right", "p"), ("Reshape", "p shape", "w"))
_weight("within_limits", ("Clip", "w0 _ half", "w"))
_weight("in_blocks_of_integers", ("DequantizeLinear", "wq scales zeros", "w"), opset=21, axis=1, block_size=3)


@exact
def bias_of_a_list_of_numbers() -> Pattern:
    """It comes from no tensor of the file."""
    one = Pattern()
    one.put("w", 4, 3, 1, 1)
    one.nodes.append(helper.make_node("Constant", [], ["bias"], value_floats=[1.0, -2.0, 3.0, 0.5]))
    one.add("Conv", "x w bias", "c")
    one.norm("c", "y", positive=False)
    return one


@exact
def constant_of_two_sums() -> Pattern:
    one = Pattern()
    one.put("k", 4, 1, 1)
    for read, output in (("x", "c"), ("cn", "d")):
        one.conv(read, output, taken=3 if read == "x" else 4)
        one.add("Sum", f"k {output}", f"{output}s")
        one.norm(f"{output}s", f"{output}n", positive=False)
    one.add("Add", "cn dn", "y")
    return one


@exact
def mean_of_two() -> Pattern:
    one = Pattern()
    one.add("Mean", f"{one.conv('x', 'c')} {one.conv('x', 'd')}", "a")
    one.norm("a", "y", positive=False)
    return one


@exact
def weight_in_half_precision() -> Pattern:
    one = Pattern()
    one.put("w16", 4, 3, 1, 1, dtype="f2")
    one.add("Cast", "w16", "w", to=TensorProto.FLOAT)
    one.add("Conv", "x w", "c")
    one.norm("c", "y", positive=False)
    return one


@exact
def weight_transposed() -> Pattern:
    one = Pattern(shape=(2, 6))
    one.put("w", 4, 6)
    one.add("Transpose", "w", "wt", perm=[1, 0])
    one.add("MatMul", "x wt", "c")
    one.norm("c", "y", positive=False)
    return one


@exact
def weight_in_integers() -> Pattern:
    one = Pattern()
    one.give("wq", one.random.integers(-127, 127, (4, 3, 3, 3)), "i1")
    one.put("s", 4, low=0.01, high=0.02)
    one.give("z", [0] * 4, "i1")
    one.add("DequantizeLinear", "wq s z", "w", axis=0)
    one.add("Conv", "x w", "c")
    one.norm("c", "y", positive=False)
    return one


@exact
def bias_from_one_number() -> Pattern:
    one = Pattern()
    one.put("w", 4, 3, 1, 1)
    one.give("b0", [0.3])
    one.give("four", [4], "i8")
    one.add("Expand", "b0 four", "bias")
    one.add("Conv", "x w bias", "c")
    one.norm("c", "y", positive=False)
    return one


@exact
def one_head_on_two_levels() -> Pattern:
    one = Pattern()
    one.put("w", 4, 3, 1, 1)
    one.put("cb", 4)
    one.add("Relu", "x", "r")
    for read, conv, output in (("x", "c", "e"), ("r", "d", "f")):
        one.add("Conv", f"{read} w cb", conv)
        parameters = "" if output == "e" else "e.g e.b e.m e.v"
        one.norm(conv, output, positive=False, parameters=parameters)
    one.add("Add", "e f", "y")
    return one


@exact
def one_weight_with_two_norms() -> Pattern:
    one = Pattern()
    one.put("w", 4, 3, 1, 1)
    one.put("cb", 4)
    one.add("Relu", "x", "r")
    for read, conv, output in (("x", "c", "e"), ("r", "d", "f")):
        one.add("Conv", f"{read} w cb", conv)
        one.norm(conv, output, positive=False)
    one.add("Add", "e f", "y")
    return one


@exact
def one_weight_with_and_without_a_norm() -> Pattern:
    one = Pattern()
    one.put("w", 4, 3, 1, 1)
    one.add("Conv", "x w", "c")
    one.norm("c", "e", positive=False)
    one.add("Relu", "x", "r")
    one.add("Conv", "r w", "d")
    one.add("Add", "e d", "y")
    return one


@exact
def one_bias_for_two_convolutions() -> Pattern:
    one = Pattern()
    one.put("cb", 4)
    for name in "cd":
        one.put(f"w{name}", 4, 3, 1, 1)
        one.add("Conv", f"x w{name} cb", name)
        one.norm(name, f"b{name}", positive=False)
    one.add("Add", "bc bd", "y")
    return one


def _body(output: str, read: str, inside: Pattern) -> onnx.GraphProto:
    inside.conv(read, f"{output}c")
    inside.norm(f"{output}c", output, positive=False)
    return helper.make_graph(inside.nodes, output, [], [value(output, None)], inside.tensors)


@exact
def body_of_a_scan() -> Pattern:
    one = Pattern(shape=(5, 3, 8, 8))
    inside = Pattern()
    inside.add("Unsqueeze", f"part {inside.give('first', [0], 'i8')}", "image")
    inside.conv("image", "c")
    inside.norm("c", "b", positive=False)
    inside.add("Squeeze", "b first", "given")
    body = helper.make_graph(inside.nodes, "body", [value("part", None)], [value("given", None)], inside.tensors)
    one.add("Scan", "x", "y", body=body, num_scan_inputs=1)
    return one


@exact
def norm_behind_a_branch_that_only_hands_on() -> Pattern:
    """In nested graphs names of outer values are read as they are."""
    one = Pattern()
    one.give("cond", True, "?")
    inner = {}
    for name, read in (("then_branch", "x"), ("else_branch", "x")):
        inside = Pattern()
        inside.give("deeper", False, "?")
        deep = {b: _body(f"{name}{b}", read, Pattern()) for b in ("then_branch", "else_branch")}
        inside.add("If", "deeper", f"{name}y", **deep)
        results = [value(f"{name}y", None)]
        inner[name] = helper.make_graph(inside.nodes, name, [], results, inside.tensors)
    one.add("If", "cond", "y", **inner)
    return one


@exact
def weight_in_unsigned_integers() -> Pattern:
    one = Pattern()
    one.give("wq", one.random.integers(0, 255, (4, 3, 3, 3)), "u1")
    one.give("s", 0.013)
    one.give("z", 117, "u1")
    one.add("DequantizeLinear", "wq s z", "w")
    one.add("Conv", "x w", "c")
    one.norm("c", "y", positive=False)
    return one


@exact
def transposed_convolution_and_a_bias() -> Pattern:
    one = Pattern()
    one.put("w", 3, 2, 2, 2)
    one.put("k", 2, 1, 1)
    one.add("ConvTranspose", "x w", "c", strides=[2, 2])
    one.add("Add", "c k", "a")
    one.norm("a", "y", 2, positive=False)
    return one


@exact
def shift_into_a_transposed_convolution_of_one_tap() -> Pattern:
    one = Pattern(shape=(2, 4, 8, 8))
    one.add("Sigmoid", "x", "s")
    one.norm("s", "n", positive=False)
    one.put("w", 4, 3, 1, 1)
    one.add("ConvTranspose", "n w", "y")
    return one


@exact
def shift_into_a_transposed_convolution_without_its_border() -> Pattern:
    one = Pattern(shape=(2, 4, 8, 8))
    one.add("Sigmoid", "x", "s")
    one.norm("s", "n", positive=False)
    one.put("w", 4, 3, 3, 2)
    one.add("ConvTranspose", "n w", "y", pads=[4, 1, 5, 2], dilations=[2, 1])
    return one


@exact
def cropped() -> Pattern:
    one = Pattern(opset=9)
    one.conv("x", "c")
    one.add("Pad", "c", "p", pads=[0, 0, -1, 0, 0, 0, -2, 0])
    one.norm("p", "y", positive=False)
    return one


@exact
def one_dimension_without_an_axis() -> Pattern:
    """Squeeze and Unsqueeze between: a 1x1 image becomes a row."""
    one = Pattern(shape=(2, 3, 1, 1))
    one.conv("x", "c")
    one.give("places", [2, 3], "i8")
    one.add("Squeeze", "c places", "s")
    one.norm("s", "n", positive=False)
    one.add("Unsqueeze", "n places", "y")
    return one


@exact
def flattened_before_the_norm() -> Pattern:
    one = Pattern(shape=("n", 3, 8, 8))
    one.add("GlobalAveragePool", one.conv("x", "c"), "p")
    one.add("Flatten", "p", "f")
    one.norm("f", "y", positive=False)
    return one


@exact
def resized_to_a_size() -> Pattern:
    one = Pattern()
    one.conv("x", "c")
    one.give("size", [2, 4, 13, 11], "i8")
    one.add("Resize", "c   size".replace("   ", " none none "), "a", mode="linear")
    one.nodes[-1].input[1] = one.nodes[-1].input[2] = ""
    one.norm("a", "y", positive=False)
    return one


@exact
def padded_by_its_border() -> Pattern:
    one = Pattern()
    one.conv("x", "c")
    one.give("pads", [0, 0, 1, 2, 0, 0, 2, 1], "i8")
    one.add("Pad", "c pads", "a", mode="edge")
    one.norm("a", "b", positive=False)
    one.add("Pad", "b pads", "d", mode="reflect")
    one.conv("d", "y", taken=4, size=3)
    return one


@exact
def before_reflection_and_a_convolution() -> Pattern:
    one = Pattern(shape=(2, 4, 8, 8))
    one.add("Sigmoid", "x", "s")
    one.norm("s", "b", positive=False)
    one.give("pads", [0, 0, 1, 1, 0, 0, 1, 1], "i8")
    one.add("Pad", "b pads", "p", mode="reflect")
    one.conv("p", "y", taken=4, size=3)
    return one


@exact
def before_a_product_with_a_matrix() -> Pattern:
    one = Pattern(shape=(2, 4, 6))
    one.add("Tanh", "x", "t")
    one.norm("t", "b", positive=False)
    one.add("Transpose", "b", "r", perm=[0, 2, 1])
    one.put("w", 4, 5)
    one.add("MatMul", "r w", "y")
    return one


@exact
def sequences_and_volumes() -> Pattern:
    one = Pattern(shape=(2, 3, 9))
    one.put("w", 4, 3, 3)
    one.add("Conv", "x w", "c")
    one.add("Mul", f"c {one.put('k', 4, 1)}", "d")
    one.norm("d", "y", positive=False)
    return one


@exact
def groups_of_a_convolution() -> Pattern:
    one = Pattern(shape=(2, 4, 8, 8))
    one.add("Sigmoid", "x", "s")
    one.norm("s", "b", positive=False)
    one.put("w", 4, 1, 3, 3)
    one.add("Conv", "b w", "c", group=4)
    one.norm("c", "y", positive=False)
    return one


@exact
def unrolled_batch_norm_beside_a_real_one() -> Pattern:
    """A subtraction, a division and an addition of constants by channel, as decomposed layers are exported."""
    one = Pattern()
    one.conv("x", "c")
    for operator, name in (("Sub", "m1"), ("Div", "s1"), ("Mul", "g1"), ("Add", "b1")):
        one.put(name, 1, 4, 1, 1, low=0.5)
        one.add(operator, f"{one.nodes[-1].output[0]} {name}", f"{name}y")
    one.norm("b1y", "y", positive=False)
    return one


@exact
def branches_of_if() -> Pattern:
    one = Pattern()
    one.give("cond", True, "?")
    branches = {"then_branch": _body("p", "x", Pattern()), "else_branch": _body("q", "x", Pattern())}
    one.add("If", "cond", "y", **branches)
    return one


@exact
def branches_with_the_same_names() -> Pattern:
    """Graphs that do not see each other may use a name each for itself."""
    one = Pattern()
    one.give("cond", True, "?")
    branches = {}
    for name, operator in (("then_branch", "Sigmoid"), ("else_branch", "Tanh")):
        inside = Pattern()
        inside.conv("x", "c")
        if operator == "Sigmoid":
            inside.norm("c", "b", positive=False)
        else:
            inside.add("Neg", "c", "b")
        inside.add(operator, "b", "r")
        inside.add("Add", "b r", "s")
        branches[name] = helper.make_graph(inside.nodes, name, [], [value("s", None)], inside.tensors)
    one.add("If", "cond", "y", **branches)
    return one


@exact
def branches_with_the_same_names_the_other_way() -> Pattern:
    """The BatchNormalization reads a convolution outside, so that its readers are given that."""
    one = Pattern()
    one.conv("x", "c")
    one.give("cond", False, "?")
    branches = {}
    for name in ("then_branch", "else_branch"):
        inside = Pattern()
        if name == "then_branch":
            inside.norm("c", "b", positive=False)
        else:
            inside.add("Neg", "x", "b")
        inside.add("Sigmoid", "b", "s")
        branches[name] = helper.make_graph(inside.nodes, name, [], [value("s", None)], inside.tensors)
    one.add("If", "cond", "y", **branches)
    return one


@exact
def body_of_a_loop() -> Pattern:
    one = Pattern(shape=(2, 4, 8, 8))
    one.give("three", 3, "i8")
    one.give("go", True, "?")
    inside = Pattern()
    inside.conv("state", "c", taken=4)
    inside.norm("c", "b", positive=False)
    inside.add("Tanh", "b", "next")
    inside.add("Identity", "on", "still")
    inputs = [value("i", (), TensorProto.INT64), value("on", (), TensorProto.BOOL), value("state", None)]
    results = [value("still", (), TensorProto.BOOL), value("next", None)]
    body = helper.make_graph(inside.nodes, "body", inputs, results, inside.tensors)
    one.add("Loop", "three go x", "y", body=body)
    return one


def _define_block(one: Pattern) -> None:
    """Convolution, BatchNormalization and an activation, called ``Block``."""
    inside = Pattern()
    inside.add("Conv", "x w", "c")
    inside.norm("c", "n", parameters="g b m v")
    inside.add("Relu", "n", "y")
    one.define("Block", "x w g b m v", "y", inside)


def _call_block(one: Pattern, read: str, output: str, taken: int = 3, function: str = "Block") -> None:
    names = [one.put(f"{output}.w", 4, taken, 1, 1), one.put(f"{output}.g", 4), one.put(f"{output}.b", 4)]
    names += [one.put(f"{output}.m", 4), one.put(f"{output}.v", 4, low=0.5)]
    one.call(function, " ".join((read, *names)), output)


@exact
def function_called_twice() -> Pattern:
    one = Pattern()
    _define_block(one)
    _call_block(one, "x", "first")
    _call_block(one, "first", "y", taken=4)
    return one


@exact
def function_called_twice_with_one_weight() -> Pattern:
    one = Pattern(outputs=("y", "z"))
    _define_block(one)
    _call_block(one, "x", "y")
    one.add("Neg", "x", "minus")
    one.call("Block", "minus y.w y.g y.b y.m y.v", "z")
    return one


@exact
def function_within_a_function() -> Pattern:
    one = Pattern()
    _define_block(one)
    inside = Pattern()
    inside.call("Block", "x w g b m v", "c")
    inside.conv("c", "d", taken=4)
    inside.norm("d", "e", positive=False)
    inside.add("Tanh", "e", "y")
    one.define("Outer", "x w g b m v", "y", inside)
    _call_block(one, "x", "p", function="Outer")
    _call_block(one, "p", "y", taken=4, function="Outer")
    return one


@exact
def function_called_in_a_branch() -> Pattern:
    one = Pattern()
    _define_block(one)
    one.give("cond", True, "?")
    then, other = Pattern(), Pattern()
    _call_block(then, "x", "p")
    _call_block(other, "x", "q")
    graphs = (
        helper.make_graph(a.nodes, "g", [], [value(a.nodes[-1].output[0], None)], a.tensors) for a in (then, other)
    )
    one.add("If", "cond", "y", **dict(zip(("then_branch", "else_branch"), graphs, strict=True)))
    return one


@exact
def function_with_a_branch_inside() -> Pattern:
    """The nested graphs read what the function is given, and what lies around them in it."""
    one = Pattern()
    inside = Pattern()
    inside.add("Conv", "x w", "c")
    then = Pattern()
    then.norm("c", "n", positive=False)
    then.add("Sigmoid", "n", "s")
    then.add("Add", "s n", "r")
    graphs = {"then_branch": helper.make_graph(then.nodes, "then", [], [value("r", None)], then.tensors)}
    graphs["else_branch"] = helper.make_graph([node("Neg", "x", "d", name="d")], "e", [], [value("d", None)])
    inside.add("If", "cond", "y", **graphs)
    one.define("Chosen", "x w cond", "y", inside)
    one.give("yes", True, "?")
    one.call("Chosen", f"x {one.put('w1', 4, 3, 1, 1)} yes", "p")
    one.call("Chosen", f"p {one.put('w2', 4, 4, 1, 1)} yes", "y")
    return one


@exact
def function_with_an_argument_for_eps() -> Pattern:
    one = Pattern()
    inside = Pattern()
    inside.add("Conv", "x w", "c")
    inside.add("BatchNormalization", "c g b m v", "y")
    inside.nodes[-1].attribute.add(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT)
    one.define("Eps", "x w g b m v", "y", inside, attribute_protos=[helper.make_attribute("eps", 0.5)])
    _call_block(one, "x", "p", function="Eps")
    _call_block(one, "p", "y", taken=4, function="Eps")
    one.nodes[-1].attribute.append(helper.make_attribute("eps", 0.25))
    return one


@exact
def functions_that_are_residual_blocks() -> Pattern:
    """Scales go through Relu and additions from one call into another."""
    one = Pattern()
    inside = Pattern()
    inside.add("BatchNormalization", "x g b m v", "n", name="n")
    inside.add("Relu", "n", "r")
    inside.add("Conv", "r w", "c")
    inside.add("Add", "x c", "y")
    one.define("Residual", "x w g b m v", "y", inside)
    one.conv("x", "stem")
    for read, output in (("stem", "p"), ("p", "q")):
        names = [one.put(f"{output}.w", 4, 4, 1, 1), one.put(f"{output}.g", 4, low=0.5), one.put(f"{output}.b", 4)]
        names += [one.put(f"{output}.m", 4), one.put(f"{output}.v", 4, low=0.5)]
        one.call("Residual", " ".join((read, *names)), output)
    one.conv("q", "y", taken=4)
    return one


@exact
def function_whose_results_are_not_all_read() -> Pattern:
    one = Pattern(outputs=("y", "z"))
    inside = Pattern()
    inside.add("Conv", "x w", "c")
    inside.norm("c", "n", parameters="g b m v")
    inside.add("Relu", "n", "r")
    inside.add("Neg", "x", "s")
    one.define("Several", "x w g b m v", "r s", inside)
    _call_block(one, "x", "p", function="Several")
    one.nodes[-1].output.append("unread")
    _call_block(one, "p", "y", taken=4, function="Several")
    one.nodes[-1].output.append("z")
    return one


@exact
def convolution_outside_of_a_branch() -> Pattern:
    one = Pattern()
    one.conv("x", "c")
    one.give("cond", True, "?")
    inside = Pattern()
    inside.norm("c", "p", positive=False)
    then = helper.make_graph(inside.nodes, "then", [], [value("p", None)], inside.tensors)
    other = helper.make_graph([node("Relu", "x", "q")], "else", [], [value("q", None)])
    one.add("If", "cond", "y", then_branch=then, else_branch=other)
    return one


@exact
def residual_stream_before_activations() -> Pattern:
    """A pre-activation network: scales go through additions and Relu, shifts back into the stream."""
    one = Pattern()
    stream = one.conv("x", "stem")
    for number in range(2):
        one.norm(stream, f"n{number}")
        one.add("Relu", f"n{number}", f"r{number}")
        one.conv(f"r{number}", f"c{number}", taken=4, size=3, pads=[1] * 4)
        stream = one.add("Add", f"{stream} c{number}", f"s{number}")
    one.norm(stream, "last")
    one.add("Relu", "last", "r")
    one.conv("r", "y", taken=4)
    return one


@exact
def identity_branch() -> Pattern:
    """RepVGG: the middle of the kernel takes the scale of the branch beside it."""
    one = Pattern(shape=(2, 4, 8, 8))
    one.add("Relu", "x", "r")
    one.conv("r", "c", taken=4, size=3, pads=[1] * 4)
    one.norm("c", "cb", positive=False)
    one.norm("r", "ib", positive=False)
    one.add("Add", "cb ib", "y")
    return one


@exact
def before_a_gate() -> Pattern:
    """Squeeze and excitation: the data takes a scale, the gate is needed as it is."""
    one = Pattern()
    one.conv("x", "c")
    one.add("Relu", "x", "r")
    one.conv("r", "g")
    one.add("Sigmoid", "g", "gate")
    one.add("Mul", "gate c", "m")
    one.norm("c", "n")
    one.conv("n", "d", taken=4)
    one.conv("m", "e", taken=4)
    one.add("Add", "d e", "y")
    return one


@exact
def two_readers_of_one_convolution() -> Pattern:
    one = Pattern(outputs=("y", "z"))
    one.conv("x", "c")
    one.norm("c", "a", positive=False)
    one.norm("c", "b", positive=False)
    one.conv("a", "y", taken=4)
    one.conv("b", "z", taken=4)
    return one


@exact
def result_with_another_reader_of_its_input() -> Pattern:
    """The name of a result stays: an Identity takes the place of the BatchNormalization."""
    one = Pattern(outputs=("y", "z"))
    one.conv("x", "c")
    one.norm("c", "y", positive=False)
    one.norm("c", "b", positive=False, parameters="y.g y.b y.m y.v")
    one.add("Relu", "b", "z")
    return one


@exact
def inputs_of_any_shape() -> Pattern:
    one = Pattern(shape=("n", 3, "h", "w"))
    one.add("MaxPool", one.conv("x", "c"), "m", kernel_shape=[2, 2])
    one.norm("m", "y")
    return one


@exact
def double_precision() -> Pattern:
    one = Pattern(shape=(2, 6), dtype="f8")
    one.put("w", 6, 4)
    one.put("k", 4)
    one.add("MatMul", "x w", "c")
    one.add("Add", "c k", "a")
    one.norm("a", "y", positive=False)
    return one


@exact
def two_channels_become_one() -> Pattern:
    one = Pattern()
    one.conv("x", "c", 8)
    one.give("shape", [2, 4, 16, 8], "i8")
    one.add("Reshape", "c shape", "a")
    one.norm("a", "y", positive=False)
    return one


def _stays(name: str, operator: str, inputs: str = "c", *, positive: bool = False, **attributes: Any) -> None:
    opset = attributes.pop("opset", 13)

    def build() -> Pattern:
        one = Pattern(opset=opset)
        one.conv("x", "c")
        one.give("low", 0.0)
        one.give("high", 6.0)
        one.put("places", 1, 1, 8, 8, low=0.5)
        one.put("slope", 4, 1, 1, low=0.1)
        one.put("zero", 4, 1, 1)
        one.add(operator, inputs, "a", **attributes)
        one.norm("a", "stays", positive=positive)
        one.add("Sigmoid", "stays", "y")
        return one

    REFUSED[name] = build


for _name, _operator, _inputs, _attributes in (
    ("behind_relu", "Relu", "c", {}),
    ("behind_leaky_relu", "LeakyRelu", "c", {"alpha": 0.1}),
    ("behind_prelu", "PRelu", "c slope", {}),
    ("behind_clip", "Clip", "c low high", {}),
    ("behind_sigmoid", "Sigmoid", "c", {}),
    ("behind_max_pool", "MaxPool", "c", {"kernel_shape": [2, 2]}),
    ("behind_max_over_positions", "ReduceMax", "c", {"axes": [2, 3]}),
    ("behind_an_average_with_padding", "AveragePool", "c",
     {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}),
    ("behind_padding_with_zeros", "Pad", "c", {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "opset": 9}),
    ("behind_padding_with_zeros_and_a_crop", "Pad", "c", {"pads": [0, 0, -1, 0, 0, 0, 1, 0], "opset": 9}),
    ("behind_padding_with_ones", "Pad", "c", {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 1.0, "opset": 9}),
    ("behind_a_factor_by_place", "Mul", "c places", {}),
    ("behind_a_sum_by_place", "Add", "c places", {}),
    ("behind_its_own_square", "Mul", "c c", {}),
    ("behind_softmax", "Softmax", "c", {"axis": 1}),
    ("behind_its_length", "LpNormalization", "c", {"axis": 1}),
):  # fmt: skip
    _stays(_name, _operator, _inputs, **_attributes)


@refused
def behind_a_cast() -> Pattern:
    one = Pattern()
    one.conv("x", "c")
    one.add("Cast", "c", "d", to=TensorProto.FLOAT16)
    one.add("Cast", "d", "e", to=TensorProto.FLOAT)
    one.norm("e", "stays", positive=False)
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def input_of_a_result() -> Pattern:
    one = Pattern(outputs=("y", "c"))
    one.conv("x", "c")
    one.norm("c", "stays")
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def convolution_read_by_a_sigmoid() -> Pattern:
    one = Pattern(outputs=("y", "z"))
    one.conv("x", "c")
    one.add("Sigmoid", "c", "z")
    one.norm("c", "stays")
    one.add("Tanh", "stays", "y")
    return one


@refused
def convolution_read_in_a_branch() -> Pattern:
    one = Pattern(outputs=("y", "z"))
    one.conv("x", "c")
    one.give("cond", True, "?")
    then = helper.make_graph([node("Sigmoid", "c", "p")], "then", [], [value("p", None)])
    other = helper.make_graph([node("Tanh", "x", "q")], "else", [], [value("q", None)])
    one.add("If", "cond", "z", then_branch=then, else_branch=other)
    one.norm("c", "stays")
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def shift_into_zero_padding() -> Pattern:
    one = Pattern(shape=(2, 4, 8, 8))
    one.add("Sigmoid", "x", "s")
    one.norm("s", "stays")
    one.conv("stays", "y", taken=4, size=3, pads=[1] * 4)
    return one


@refused
def shift_into_padding_by_name() -> Pattern:
    one = Pattern(shape=(2, 4, 8, 8))
    one.add("Sigmoid", "x", "s")
    one.norm("s", "stays")
    one.conv("stays", "y", taken=4, size=3, auto_pad="SAME_UPPER")
    return one


@refused
def shift_into_a_transposed_convolution() -> Pattern:
    one = Pattern(shape=(2, 4, 8, 8))
    one.add("Sigmoid", "x", "s")
    one.norm("s", "stays")
    one.put("w", 4, 3, 3, 3)
    one.add("ConvTranspose", "stays w", "y", pads=[1] * 4)
    return one


for _name, _options in (
    ("whose_taps_take_turns", {"strides": [3, 3]}),
    ("that_adds_a_position", {"pads": [2] * 4, "output_padding": [1, 0], "strides": [2, 1]}),
    ("of_a_given_size", {"output_shape": [8, 8], "pads": [2] * 4}),
    ("with_padding_of_its_own", {"auto_pad": "SAME_UPPER"}),
):

    def _shift_into(options: dict[str, Any] = _options) -> Pattern:
        one = Pattern(shape=(2, 4, 8, 8))
        one.add("Sigmoid", "x", "s")
        one.norm("s", "stays")
        one.put("w", 4, 3, 3, 3)
        one.add("ConvTranspose", "stays w", "y", **options)
        return one

    REFUSED[f"shift_into_a_transposed_convolution_{_name}"] = _shift_into


@refused
def plus_what_depends_on_the_shape() -> Pattern:
    """One channel before, one behind: the convolution alone could not take the scale of the sum."""
    one = Pattern(shape=("n", 3, "h", "w"))
    one.conv("x", "c", given=1)
    one.add("Shape", "c", "size")
    one.add("ConstantOfShape", "size", "ones", value=helper.make_tensor("", TensorProto.FLOAT, [1], [1.5]))
    one.add("Add", "ones c", "d")
    one.norm("d", "stays", 1)
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def negative_scales_before_activations() -> Pattern:
    one = Pattern()
    one.conv("x", "stem")
    one.norm("stem", "stays", positive=False)
    one.add("Relu", "stays", "r")
    one.conv("r", "c", taken=4)
    one.add("Relu", "stem", "other")
    one.add("Add", "other c", "y")
    return one


@refused
def other_axis() -> Pattern:
    """The channels of the product lie last, those of the BatchNormalization second."""
    one = Pattern(shape=(2, 4, 6))
    one.put("w", 6, 4)
    one.add("MatMul", "x w", "c")
    one.norm("c", "stays", 4)
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def channels_that_meet() -> Pattern:
    """Behind a pixel shuffle the channels of two BatchNormalizations meet in one convolution."""
    one = Pattern()
    one.conv("x", "c", 8)
    one.add("Sigmoid", "c", "g")
    one.norm("g", "stays", 8)
    one.add("DepthToSpace", "stays", "d", blocksize=2)
    one.conv("d", "y", taken=2)
    return one


@refused
def padded_with_zeros_by_computed_widths() -> Pattern:
    one = Pattern()
    one.conv("x", "c")
    one.give("own", [1, 2, 0, 1], "i8")
    add_computed_widths(one, first="own")
    one.add("Pad", "c widths", "p")
    one.norm("p", "stays")
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def channels_padded_by_computed_widths() -> Pattern:
    one = Pattern()
    one.conv("x", "c")
    one.give("own", [0, 0, 0, 0, 1, 1], "i8")
    add_computed_widths(one, first="own")
    one.add("Pad", "c widths", "p", mode="edge")
    one.norm("p", "stays", 6)
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def channels_by_the_number_of_rows() -> Pattern:
    """The input has as many rows as the runtime is given; with another number other channels would meet."""
    one = Pattern(shape=(2, 3, "h", 8))
    one.conv("x", "c", 6)
    for name, number in (("none", 0), ("one", 1), ("two", 2)):
        one.give(name, [number], "i8")
    one.add("Shape", "c", "sizes")
    one.add("Gather", "sizes two", "rows", axis=0)
    one.add("Div", "rows two", "half")
    one.add("Slice", "c none half one", "a")
    one.norm("a", "stays", 3)
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def reshaped_across_channels() -> Pattern:
    one = Pattern()
    one.conv("x", "c", 8)
    one.give("shape", [2, 16, 4, 8], "i8")
    one.add("Reshape", "c shape", "a")
    one.norm("a", "stays", 16)
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def reshaped_by_computed_numbers() -> Pattern:
    one = Pattern()
    one.conv("x", "c", 4)
    one.add("Shape", "x", "shape")
    one.give("factors", [1.0, 4 / 3, 1.0, 1.0])
    one.add("Cast", "shape", "numbers", to=TensorProto.FLOAT)
    one.add("Mul", "numbers factors", "wanted")
    one.add("Round", "wanted", "rounded")
    one.add("Cast", "rounded", "new", to=TensorProto.INT64)
    one.add("Reshape", "c new", "a")
    one.norm("a", "stays")
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def activations_in_integers() -> Pattern:
    one = Pattern()
    one.conv("x", "c")
    one.give("s", 0.05)
    one.give("z", 0, "i1")
    one.add("QuantizeLinear", "c s z", "q")
    one.add("DequantizeLinear", "q s z", "d")
    one.norm("d", "stays")
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def weight_in_integers_for_training() -> Pattern:
    """A weight that is rounded to integers when it runs; what rounds it is named."""
    one = Pattern()
    one.put("w", 4, 3, 1, 1)
    one.give("s", 0.02)
    one.give("z", 0, "i1")
    one.add("QuantizeLinear", "w s z", "q")
    one.add("DequantizeLinear", "q s z", "d")
    one.add("Conv", "x d", "c")
    one.norm("c", "stays")
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def weight_from_the_input() -> Pattern:
    one = Pattern(shape=(1, 3, 3, 3))
    one.add("Transpose", "x", "w", perm=[0, 1, 2, 3])
    one.add("Conv", "x w", "c")
    one.norm("c", "stays", 1)
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def gemm_with_a_bias_by_row() -> Pattern:
    one = _matrix()
    one.put("bias", 2, 4)
    one.add("Gemm", "x w bias", "c")
    one.norm("c", "stays", positive=False)
    one.add("Sigmoid", "stays", "y")
    return one


@refused
def scale_of_zero_in_a_stream() -> Pattern:
    one = Pattern()
    one.conv("x", "c")
    one.add("Sigmoid", "c", "other")
    one.give("g", [0.0, 1, 2, 3])
    for name in "bm":
        one.put(name, 4)
    one.put("v", 4, low=0.5)
    one.norm("c", "stays", parameters="g b m v")
    one.add("Add", "stays other", "y")
    return one


@refused
def norm_that_is_a_mask_too() -> Pattern:
    """What is normalised is compared as well."""
    one = Pattern()
    one.conv("x", "c")
    one.put("zero", 1)
    one.add("Greater", "c zero", "mask")
    one.norm("c", "stays")
    one.add("Sigmoid", "stays", "s")
    one.add("Where", "mask s x3", "y")
    one.put("x3", 1)
    return one


@refused
def quantised_by_a_computed_scale() -> Pattern:
    """The scale of a QuantizeLinear is read from the convolution, too."""
    one = Pattern()
    one.conv("x", "c")
    one.add("ReduceMax", "c", "largest", keepdims=0)
    one.add("Sigmoid", "largest", "scale")
    one.give("z", 0, "i1")
    one.add("Relu", "x", "r")
    one.add("QuantizeLinear", "r scale z", "q")
    one.add("DequantizeLinear", "q scale z", "other")
    one.norm("c", "stays")
    one.add("Sigmoid", "stays", "s")
    one.add("ReduceMean", "other", "mean")
    one.add("Mul", "s mean", "y")
    return one


def run(path: Path, *, next_to: bool = False) -> list[np.ndarray]:
    """What onnxruntime computes without optimisations, on random inputs, or on the floats next to them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(7)
    kinds = {"tensor(float)": "f4", "tensor(double)": "f8"}
    feed = {}
    for one in session.get_inputs():
        drawn = random.normal(size=[extent if isinstance(extent, int) else 6 for extent in one.shape])
        values = drawn.astype(kinds[one.type])
        feed[one.name] = np.nextafter(values, np.ones_like(values) * 9) if next_to else values
    return list(session.run(None, feed))
