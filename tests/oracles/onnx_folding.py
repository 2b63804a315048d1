"""ONNX models folded by bntool, judged by onnxruntime; recorded in tests/fixtures/interop/onnx_folding.

Needs an environment of its own: onnx onnxruntime, and bntool. Without an argument it holds the recorded files against
onnxruntime; with --record it makes models, folds them, and writes both after onnxruntime has agreed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxsim
import onnxslim
from onnx import TensorProto, helper, numpy_helper

from tests.graphs.stored.folding import fold_file
from tests.places import INTEROP

REQUIREMENTS = ["onnx==1.23.2", "onnxruntime==1.31.1", "onnxslim==0.1.98", "onnxsim==0.8.1", "numpy"]
RECORDED = INTEROP / "onnx_folding"
TOLERANCE = {"float32": 1e-5, "float16": 4e-3}  # of the largest output
MODELS: dict[str, Callable[[], onnx.ModelProto]] = {}


def case(build: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    MODELS[build.__name__] = build
    return build


class Net:
    """Collects nodes and initializers."""

    def __init__(self, seed: int = 0, dtype: str = "float32") -> None:
        self.random = np.random.default_rng(seed)
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def constant(
        self, name: str, *shape: int, positive: bool = False, as_node: bool = False, field: str = "raw"
    ) -> str:
        values = self.random.uniform(0.3, 2.0, shape) if positive else self.random.normal(size=shape)
        return self.put(name, values.astype(self.dtype), as_node=as_node, field=field)

    def put(self, name: str, values: np.ndarray, *, as_node: bool = False, field: str = "raw") -> str:
        if field == "raw":
            tensor = numpy_helper.from_array(values, name)
        else:
            code = helper.np_dtype_to_tensor_dtype(values.dtype)
            tensor = helper.make_tensor(name, code, values.shape, values.ravel().tolist())
        if as_node:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def add(self, operator: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name or f"node_{output}", **attributes))
        return output

    def batchnorm(
        self, x: str, output: str, channels: int, *, as_node: bool = False, field: str = "raw", **options: Any
    ) -> str:
        options.setdefault("epsilon", 1e-3)
        names = [
            self.constant(f"{output}_{i}", channels, positive=i in (0, 3), as_node=as_node, field=field)
            for i in range(4)
        ]
        return self.add("BatchNormalization", [x, *names], output, output, **options)

    def finish(
        self, shape: list[int], outputs: list[str], *, opset: int = 17, ir: int = 8, listed: bool = False
    ) -> onnx.ModelProto:
        code = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        inputs = [helper.make_tensor_value_info("x", code, shape)]
        if listed:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.initializers]
        results = [helper.make_tensor_value_info(name, code, [None] * len(shape)) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", inputs, results, self.initializers, doc_string="größe")
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
        helper.set_model_props(model, {"author": "somebody"})
        return model


def _conv_net(
    opset: int, ir: int, *, listed: bool = False, dtype: str = "float32", as_node: bool = False, field: str = "raw"
):
    net = Net(opset, dtype)
    weight = net.constant("w", 4, 3, 3, 3, as_node=as_node, field=field)
    x = net.add("Conv", ["x", weight], "c1", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    x = net.add("Relu", [net.batchnorm(x, "bn1", 4, as_node=as_node, field=field)], "r1")
    x = net.add("Conv", [x, net.constant("w2", 6, 2, 1, 1), net.constant("b2", 6)], "c2", group=2)
    net.batchnorm(x, "y", 6)
    return net.finish([2, 3, 5, 5], ["y"], opset=opset, ir=ir, listed=listed)


@case
def opset9_inputs() -> onnx.ModelProto:
    return _conv_net(9, 3, listed=True)


@case
def opset13() -> onnx.ModelProto:
    return _conv_net(13, 7)


@case
def opset22() -> onnx.ModelProto:
    return _conv_net(22, 10)


@case
def opset24() -> onnx.ModelProto:
    return _conv_net(24, 11)


@case
def half() -> onnx.ModelProto:
    return _conv_net(15, 8, dtype="float16")


@case
def half_in_integers() -> onnx.ModelProto:
    return _conv_net(15, 8, dtype="float16", field="typed")


@case
def constant_nodes() -> onnx.ModelProto:
    return _conv_net(17, 8, as_node=True)


@case
def typed_fields() -> onnx.ModelProto:
    return _conv_net(17, 8, field="typed")


@case
def transposed_groups() -> onnx.ModelProto:
    net = Net(3)
    x = net.add("ConvTranspose", ["x", net.constant("w", 4, 3, 2, 2)], "d1", group=2, strides=[2, 2])
    x = net.add("Relu", [net.batchnorm(x, "bn1", 6)], "r1")
    x = net.add("ConvTranspose", [x, net.constant("w2", 6, 2, 2, 2), net.constant("b2", 6)], "d2", group=3)
    net.batchnorm(x, "y", 6)
    return net.finish([2, 4, 3, 3], ["y"])


@case
def convolutions_of_other_dimensions() -> onnx.ModelProto:
    net = Net(4)
    x = net.add("Conv", ["x", net.constant("w", 4, 3, 3)], "c1")
    net.batchnorm(x, "y", 4)
    return net.finish([2, 3, 7], ["y"])


@case
def gemm() -> onnx.ModelProto:
    net = Net(5)
    x = net.add("Gemm", ["x", net.constant("w", 6, 5), net.constant("b", 6)], "g1", transB=1)
    x = net.add("Relu", [net.batchnorm(x, "bn1", 6)], "r1")
    x = net.add("Gemm", [x, net.constant("w2", 6, 4)], "g2")
    x = net.add("Relu", [net.batchnorm(x, "bn2", 4)], "r2")
    x = net.add("Gemm", [x, net.constant("w3", 4, 4), net.constant("b3", 4)], "g3", alpha=0.5)
    net.batchnorm(x, "y", 4)
    return net.finish([3, 5], ["y"])


@case
def shared_constants() -> onnx.ModelProto:
    """Exporters store equal tensors once: two layers share statistics, and another node reads one of them."""
    net = Net(6)
    zeros, ones = net.put("zeros", np.zeros(4, np.float32)), net.put("ones", np.ones(4, np.float32))
    x = net.add("Conv", ["x", net.constant("w", 4, 4, 1, 1)], "c1")
    x = net.add("BatchNormalization", [x, ones, net.constant("beta", 4), zeros, ones], "bn1", "bn1")
    x = net.add("Relu", [x], "r1")
    x = net.add("Conv", [x, net.constant("w2", 4, 4, 1, 1), zeros], "c2")
    x = net.add("BatchNormalization", [x, ones, zeros, zeros, ones], "bn2", "bn2")
    x = net.add("Relu", [x], "r2")
    net.add("BatchNormalization", [x, ones, zeros, zeros, ones], "y", "bn3")
    return net.finish([2, 4, 3, 3], ["y"])


@case
def copied_constants() -> onnx.ModelProto:
    """As torch's exporter writes equal tensors: once, with Identity nodes for the others."""
    net = Net(11)
    beta, gamma = net.constant("beta", 4), net.constant("gamma", 4, positive=True)
    mean, var = net.constant("mean", 4), net.constant("var", 4, positive=True)
    copies = [net.add("Identity", [name], f"{name}_copy") for name in (beta, gamma)]
    x = net.add("Conv", ["x", net.constant("w", 4, 4, 1, 1)], "c1")
    x = net.add("Relu", [net.add("BatchNormalization", [x, gamma, beta, mean, var], "bn1", "bn1")], "r1")
    x = net.add("Conv", [x, net.constant("w2", 4, 4, 1, 1)], "c2")
    net.add("BatchNormalization", [x, copies[1], copies[0], mean, var], "y", "bn2")
    return net.finish([2, 4, 3, 3], ["y"])


@case
def left_alone() -> onnx.ModelProto:
    """Each with another reason not to fold."""
    net = Net(7)
    a = net.add("Conv", ["x", net.constant("wa", 4, 4, 1, 1)], "a")
    a = net.add("Add", [net.batchnorm(a, "bn_shared", 4), a], "a2")
    b = net.add("Relu", [net.add("Conv", [a, net.constant("wb", 4, 4, 1, 1)], "b")], "b2")
    b = net.add("Relu", [net.batchnorm(b, "bn_relu", 4)], "b3")
    tied = net.constant("wc", 4, 4, 1, 1)
    c = net.batchnorm(net.add("Conv", [b, tied], "c"), "bn_tied", 4)
    c = net.add("Conv", [net.add("Relu", [c], "c1"), tied], "c2")
    d = net.add("Conv", [c, net.constant("wd", 4, 4, 1, 1)], "d")
    d = net.batchnorm(d, "bn_output", 4)
    e = net.add("Conv", [net.add("Relu", [d], "d1"), net.add("Identity", [net.constant("we", 4, 4, 1, 1)], "we2")], "e")
    e = net.batchnorm(e, "bn_computed", 4)
    f = net.add("Conv", [net.add("Relu", [e], "e1"), net.constant("wf", 4, 4, 1, 1)], "f")
    f = net.add(
        "BatchNormalization",
        [
            f,
            *(net.constant(f"part{i}", 4, positive=True) for i in range(3)),
            net.put("variance", np.array([1, -1, 1, 1], np.float32)),
        ],
        "f2",
        "bn_negative",
        epsilon=2.0,
    )
    net.add("Relu", [f], "y")
    return net.finish([2, 4, 3, 3], ["y", "d"])


@case
def forward() -> onnx.ModelProto:
    """Nothing can take it before, but what reads it can: a convolution without padding, and two of them."""
    net = Net(8)
    x = net.batchnorm("x", "bn0", 4)
    x = net.add(
        "Relu", [net.add("Conv", [x, net.constant("w", 4, 2, 3, 3), net.constant("b", 4)], "c1", group=2)], "r1"
    )
    x = net.batchnorm(x, "bn1", 4)
    left = net.add("Conv", [x, net.constant("w2", 4, 4, 1, 1)], "left")
    right = net.add("Conv", [x, net.constant("w3", 4, 4, 1, 1)], "right")
    net.add("Add", [left, right], "y")
    return net.finish([2, 4, 5, 5], ["y"])


@case
def nested_graphs() -> onnx.ModelProto:
    """A branch reads a convolution's output from outside, so that its BatchNorm cannot be folded; another has one."""
    net = Net(9)
    a = net.add("Conv", ["x", net.constant("wa", 4, 4, 1, 1)], "a")
    bn = net.batchnorm(a, "bn_captured", 4)
    inner = Net(10)
    z = inner.add("Conv", ["a", inner.constant("inner_w", 4, 4, 1, 1)], "z")
    inner.batchnorm(z, "then_out", 4)
    out = [helper.make_tensor_value_info("then_out", TensorProto.FLOAT, [None] * 4)]
    then_graph = helper.make_graph(inner.nodes, "then", [], out, inner.initializers)
    other = [helper.make_tensor_value_info("else_out", TensorProto.FLOAT, [None] * 4)]
    else_graph = helper.make_graph([helper.make_node("Relu", ["bn_captured"], ["else_out"])], "else", [], other)
    net.put("flag", np.array(True))
    net.nodes.append(helper.make_node("If", ["flag"], ["i"], name="if", then_branch=then_graph, else_branch=else_graph))
    x = net.add("Conv", [net.add("Add", ["i", bn], "s"), net.constant("wb", 4, 4, 1, 1)], "b")
    net.batchnorm(x, "y", 4)
    return net.finish([2, 4, 3, 3], ["y"])


@case
def taken_names() -> onnx.ModelProto:
    """What the bias would be called is the name of something computed, and the next free name is an initializer's."""
    net = Net(30)
    x = net.add("Conv", ["x", net.constant("conv.weight", 4, 3, 1, 1)], "c1")
    x = net.add("Relu", [net.batchnorm(x, "bn1", 4)], "conv.bias")
    x = net.add("Add", [x, net.constant("conv.bias@2", 4, 1, 1)], "sum")
    x = net.add("Conv", [x, net.constant("conv2.weight", 4, 4, 1, 1)], "c2")
    net.batchnorm(x, "y", 4)
    return net.finish([2, 3, 5, 5], ["y"])


@case
def external() -> onnx.ModelProto:
    return _conv_net(17, 8)


def run(path: Path, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), _options(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return options


def judge(model: Path, folded: Path) -> float:
    """The largest difference of the outputs, relative to the largest output."""
    onnx.checker.check_model(str(folded), full_check=True)
    declared = onnx.load(model, load_external_data=False).graph.input[0].type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(declared.elem_type)
    shape = [dim.dim_value for dim in declared.shape.dim]
    x = np.random.default_rng(1).normal(size=shape).astype(dtype)
    worst = 0.0
    for before, after in zip(run(model, x), run(folded, x), strict=True):
        wide = before.astype("f8")
        worst = max(worst, float(np.abs(wide - after.astype("f8")).max() / np.abs(wide).max()))
    assert worst <= TOLERANCE[dtype.name], (model.name, worst)
    return worst


def judge_by_simplifiers(model: Path, folded: Path) -> dict[str, list[int]]:
    """Two other programs that fold: the BatchNormalization nodes that they and bntool leave, and the same outputs.

    Raises:
        AssertionError: bntool leaves more, or what they make puts out something else than what bntool made.
    """
    counts = {"bntool": _count_batchnorms(onnx.load(folded, load_external_data=False))}
    for name, simplify in (("onnxslim", onnxslim.slim), ("onnxsim", lambda path: onnxsim.simplify(path)[0])):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "simplified.onnx"
            try:
                onnx.save(simplify(str(model)), place)
                judge(place, folded)
            except Exception as error:
                counts[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
                continue
            counts[name] = _count_batchnorms(onnx.load(place))
    return counts


def _count_batchnorms(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "BatchNormalization" for node in model.graph.node)


def main() -> int:
    """Judge the recorded files, or record new ones."""
    if "--record" in sys.argv:
        shutil.rmtree(RECORDED, ignore_errors=True)
        RECORDED.mkdir()
        index = {}
        for name, build in MODELS.items():
            path = RECORDED / f"{name}.onnx"
            if name == "external":
                onnx.save(build(), path, save_as_external_data=True, location=f"{name}.bin", size_threshold=100)
            else:
                onnx.save(build(), path)
            for layout in ("folded", "same-keys"):
                with tempfile.TemporaryDirectory() as folder:
                    target = Path(folder) / f"{name}.{layout}.onnx"
                    plan = fold_file(path, target, layout=layout)
                    error = judge(path, target)
                    for written in Path(folder).iterdir():
                        shutil.copyfile(written, RECORDED / written.name)
                index[f"{name}.{layout}"] = {
                    "folds": {fold.layer: list(fold.into) for fold in plan.folds},
                    "skips": {skip.layer: skip.reason.value for skip in plan.skips},
                    "error": float(f"{error:.2g}"),
                }
        (RECORDED / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    for key, facts in json.loads((RECORDED / "index.json").read_text()).items():
        name = key.rpartition(".")[0]
        error = judge(RECORDED / f"{name}.onnx", RECORDED / f"{key}.onnx")
        print(f"{key}: {error:.1e}", facts["folds"], facts["skips"])
    for name in MODELS:
        counts = judge_by_simplifiers(RECORDED / f"{name}.onnx", RECORDED / f"{name}.folded.onnx")
        print(f"{name}: BatchNormalization nodes left by {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
