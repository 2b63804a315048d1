"""BatchNormalization nodes of ONNX models, wherever their parameters come from: ONNX Runtime judges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_numbers
from bntool.cli.main import main
from tests.checkpoints.onnx.onnx_models import node, save_model, tensor, value
from tests.graphs.stored.folding import fold_file

pytestmark = pytest.mark.usefixtures("forked_onnxruntime")
RNG = np.random.default_rng(0)
ROLES = ("weight", "bias", "running_mean", "running_var")
EPS = 1e-3


def norm(data: str, output: str, name: str = "bn", *, parameters: str = "g b m v") -> onnx.NodeProto:
    return node("BatchNormalization", f"{data} {parameters}", output, name=name, epsilon=EPS)


VECTORS = {"g": RNG.uniform(0.5, 2, 4), "b": RNG.normal(size=4), "m": RNG.normal(size=4), "v": RNG.uniform(0.5, 2, 4)}
BN = [tensor(name, values) for name, values in VECTORS.items()]
W, W2 = tensor("w", RNG.normal(size=(4, 3, 3, 3))), tensor("w2", RNG.normal(size=(4, 3, 3, 3)))
X, Y = value("x", (1, 3, 8, 8)), value("y", [None] * 4)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    tensors: Sequence[onnx.TensorProto],
    *,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> Path:
    return save_model(path, nodes, tensors, inputs=[X, *inputs], outputs=[Y], functions=functions)


def run(path: Path) -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype("f4")
    (found,) = session.run(None, {"x": x})
    return found


CONV = node("Conv", "x w", "c")
FILLED = [node("ConstantOfShape", "s", k, value=tensor("", [2.0])) for k in "gbmv"]
HALF = [tensor(f"{name}16", values, "f2") for name, values in VECTORS.items()]
ALL = np.stack(list(VECTORS.values()))
COMPUTED = {  # nodes that give g, b, m and v, and the tensors that they read
    "filled": (FILLED, [tensor("s", [4], "i8")]),
    "filled with zeros but for the variance": (
        [
            *(node("ConstantOfShape", "s", k) for k in "gbm"),
            node("ConstantOfShape", "s", "v", value=tensor("", [0.5])),
        ],
        [tensor("s", [4], "i8")],
    ),
    "cast": ([node("Cast", f"{k}16", k, to=TensorProto.FLOAT) for k in "gbmv"], HALF),
    "lists of floats": (
        [helper.make_node("Constant", [], [k], value_floats=values.tolist()) for k, values in VECTORS.items()],
        [],
    ),
    "tensors of Constant nodes": ([helper.make_node("Constant", [], [t.name], value=t) for t in BN], []),
    "expanded": (
        [node("Expand", f"{k}1 s", k) for k in "gbmv"],
        [*(tensor(f"{k}1", [0.7]) for k in "gbmv"), tensor("s", [4], "i8")],
    ),
    "reshaped": (
        [node("Reshape", f"{k}0 s", k) for k in "gbmv"],
        [*(tensor(f"{k}0", v.reshape(1, 4, 1)) for k, v in VECTORS.items()), tensor("s", [-1], "i8")],
    ),
    "squeezed": (
        [node("Squeeze", f"{k}0 a", k) for k in "gbmv"],
        [*(tensor(f"{k}0", v.reshape(1, 4)) for k, v in VECTORS.items()), tensor("a", [0], "i8")],
    ),
    "arithmetic": (
        [
            node("Mul", "g0 two", "g"), node("Sub", "b0 two", "b"), node("Div", "m0 two", "m"),
            node("Add", "v0 two", "v1"), node("Sqrt", "v1", "v2"), node("Reciprocal", "v2", "v"),
        ],
        [*(tensor(f"{k}0", v) for k, v in VECTORS.items()), tensor("two", 2.0)],
    ),
    "dequantized": (
        [node("DequantizeLinear", f"{k}q s z", k) for k in "gbmv"],
        [*(tensor(f"{k}q", [9, 20, 30, 40], "i1") for k in "gbmv"), tensor("s", 0.1), tensor("z", 3, "i1")],
    ),
    "joined": (
        [node("Concat", f"{k}0 {k}1", k, axis=0) for k in "gbmv"],
        [tensor(f"{k}{half}", [half + 1, half + 2]) for k in "gbmv" for half in (0, 1)],
    ),
    "gathered": (
        [node("Gather", f"all {k}i", k, axis=0) for k in "gbmv"],
        [tensor("all", ALL), *(tensor(f"{k}i", i - 4, "i8") for i, k in enumerate("gbmv"))],
    ),
    "split and turned round": (
        [node("Split", "all sizes", "p q", axis=0), node("Split", "p", "g1 b1", axis=0)]
        + [node("Split", "q", "m1 v1", axis=-2)]
        + [node("Slice", f"{k}1 last start axis step", f"{k}2") for k in "gbmv"]
        + [node("Reshape", f"{k}2 four", k) for k in "gbmv"],
        [tensor("all", ALL), tensor("sizes", [2, 2], "i8"), tensor("four", [4], "i8")]
        + [tensor(name, [one], "i8") for name, one in {"last": -1, "start": -9, "axis": 1, "step": -1}.items()],
    ),
    "within limits": (
        [
            node("Max", "g0 low", "g"), node("Clip", "b0 low high", "b"), node("Min", "m0 high low", "m"),
            node("Where", "those v0 high", "v1"), node("Pow", "v1 two", "v"),
        ],
        [*(tensor(f"{k}0", v) for k, v in VECTORS.items()), tensor("those", [1, 0, 0, 1], "?")]
        + [tensor(name, one) for name, one in {"low": 0.25, "high": 0.75, "two": 2.0}.items()],
    ),
    "copied": ([node("Identity", f"{k}0", k) for k in "gbmv"], [tensor(f"{k}0", v) for k, v in VECTORS.items()]),
    "negated and made positive": (
        [node("Neg", f"{k}0", f"{k}1") for k in "gbmv"] + [node("Abs", f"{k}1", k) for k in "gbmv"],
        [tensor(f"{k}0", v) for k, v in VECTORS.items()],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPUTED)
def test_computed_parameters_are_what_onnx_computes(case: str, tmp_path: Path) -> None:
    nodes, tensors = COMPUTED[case]
    path = save(tmp_path / "a.onnx", [*nodes, CONV, norm("c", "y")], [W, *tensors])
    model = onnx.load(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.not_understood == ()
        (layer,) = find_batchnorms(checkpoint.state_dict(""))
        found = {role: list(read_numbers(layer.tensors[role])) for role in ROLES}
    assert layer.eps == pytest.approx(EPS)
    outputs = [value(k, None) for k in "gbmv"]
    graph = helper.make_graph(nodes, "g", [], outputs, tensors)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=8)
    session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {})
    for role, values in zip(ROLES, expected, strict=True):
        assert found[role] == values.tolist(), role


@pytest.mark.parametrize("case", COMPUTED)
@pytest.mark.parametrize("command", [["fold"], ["freeze", "--as", "constant"]])
def test_models_with_computed_parameters_compute_the_same(case: str, command: list[str], tmp_path: Path) -> None:
    nodes, tensors = COMPUTED[case]
    source = save(tmp_path / "a.onnx", [*nodes, CONV, norm("c", "y")], [W, *tensors])
    assert main([*command, str(source), "--dry-run", "--quiet"]) == 0
    assert main([*command, str(source), "-o", str(tmp_path / "b.onnx"), "--quiet"]) == 0
    onnx.checker.check_model(onnx.load(tmp_path / "b.onnx"), full_check=True)
    expected, found = run(source), run(tmp_path / "b.onnx")
    assert np.abs(expected - found).max() <= 1e-5 * np.abs(expected).max()
    operators = [one.op_type for one in onnx.load(tmp_path / "b.onnx").graph.node]
    assert operators.count("BatchNormalization") == (command != ["fold"])


UNKNOWN = {
    "inputs of the model": ([], [], [value(k, (4,)) for k in "gbmv"]),
    "an input of the model": ([], BN[:3], [value("v", (4,))]),
    "computed from the data": ([node("ReduceMax", "c", "v", axes=[0, 2, 3], keepdims=0)], BN[:3], []),
    "computed by what is not known": ([node("Softmax", "v0", "v")], [*BN[:3], tensor("v0", VECTORS["v"])], []),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_computed_is_listed_and_said(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes, tensors, inputs = UNKNOWN[case]
    path = save(tmp_path / "a.onnx", [CONV, *nodes, norm("c", "y")], [W, *tensors], inputs=inputs)
    assert main(["inspect", str(path), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["files"]
    (layer,) = facts["state_dicts"][0]["layers"]
    assert (layer["name"], layer["eps"]) == ("bn", pytest.approx(EPS))
    assert [finding["code"] for finding in facts["findings"]] == ["not-understood"]
    assert (facts["verdict"]["suspicious"], facts["state_dicts"][0]["findings"]) == (0, [])  # nothing is missing
    assert main(["inspect", str(path), "--fail-on", "error"]) == 1
    assert "no BatchNorm layer was found" not in capsys.readouterr().out
    for command in (["fold"], ["freeze", "--as", "constant"]):
        for rest in (["--dry-run"], ["-o", str(tmp_path / "b.onnx")]):
            assert main([*command, str(path), *rest]) == 4
    assert not (tmp_path / "b.onnx").exists()


OTHERS = {
    "of another domain": helper.make_node("BatchNormalization", ["c", *"gbmv"], ["y"], name="n", domain="mine"),
    "of Caffe2": helper.make_node("SpatialBN", ["c", *"gbmv"], ["y"], name="n"),
    "of training": helper.make_node("BatchNormInternal", ["c", *"gbmv"], ["y"], name="n", domain="com.microsoft"),
    "with four inputs": helper.make_node("BatchNormalization", ["c", *"gbm"], ["y"], name="n"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_nodes_that_are_called_so_are_not_passed_over(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "a.onnx", [CONV, OTHERS[case]], [W, *BN])
    assert main(["inspect", str(path), "--fail-on", "error"]) == 1
    out = capsys.readouterr().out
    assert "'n': a node of" in out
    assert "no BatchNorm layer was found" not in out


def function(name: str, nodes: list[onnx.NodeProto], inputs: str = "x w g b m v", **more: Any) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("mine", 1)]
    return helper.make_function("mine", name, inputs.split(), ["y"], nodes, opsets, **more)


def call(name: str, inputs: str, output: str, label: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(name, inputs.split(), [output], name=label, domain="mine", **attributes)


BLOCK = function("Block", [CONV, norm("c", "y", "inner")])
OTHER_EPS = helper.make_node("BatchNormalization", ["c", *"gbmv"], ["y"], name="inner")
OTHER_EPS.attribute.add(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT)
FUNCTIONS: dict[str, Any] = {
    "once": ([call("Block", "x w g b m v", "y", "one")], [BLOCK], {"one/inner": EPS}),
    "twice": (
        [call("Block", "x w g b m v", "p", "one"), call("Block", "x w2 g b m v", "q", "two"), node("Add", "p q", "y")],
        [BLOCK],
        {"one/inner": EPS, "two/inner": EPS},
    ),
    "within another": (
        [call("Outer", "x w g b m v", "y", "one")],
        [function("Outer", [call("Block", "x w g b m v", "y", "nested")]), BLOCK],
        {"one/inner": EPS},
    ),
    "with constants of its own": (
        [call("Own", "x w", "y", "one")],
        [function("Own", [*COMPUTED["tensors of Constant nodes"][0], CONV, norm("c", "y", "inner")], "x w")],
        {"one/inner": EPS},
    ),
    "with eps as an argument": (
        [
            call("Eps", "x w g b m v", "p", "one", eps=0.25),
            call("Eps", "x w2 g b m v", "q", "two"),
            node("Add", "p q", "y"),
        ],
        [function("Eps", [CONV, OTHER_EPS], attribute_protos=[helper.make_attribute("eps", 0.5)])],
        {"one/inner": 0.25, "two/inner": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FUNCTIONS)
def test_layers_in_functions_are_listed_for_each_call(case: str, tmp_path: Path) -> None:
    nodes, functions, eps = FUNCTIONS[case]
    path = save(tmp_path / "a.onnx", nodes, [W, W2, *BN], functions=functions)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.not_understood == ()
        layers = find_batchnorms(checkpoint.state_dict(""))
        assert {layer.name: layer.eps for layer in layers} == pytest.approx(eps)
        for layer in layers:
            for role, name in zip(ROLES, "gbmv", strict=True):
                assert list(read_numbers(layer.tensors[role])) == VECTORS[name].astype("f4").tolist()
    assert main(["fold", str(path), "-o", str(tmp_path / "b.onnx"), "--strict"]) == 0
    assert main(["freeze", "--as", "constant", str(path), "-o", str(tmp_path / "c.onnx")]) == 0
    for written in ("b.onnx", "c.onnx"):
        model = onnx.load(tmp_path / written)
        onnx.checker.check_model(model)
        assert not model.functions
        np.testing.assert_allclose(run(tmp_path / written), run(path), rtol=1e-4, atol=1e-5)


def test_functions_for_another_version_of_the_operators_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their nodes may mean something else in the model."""
    block = function("Block", [CONV, norm("c", "y", "inner")])
    block.opset_import[0].version = 14
    path = save(tmp_path / "a.onnx", [call("Block", "x w g b m v", "y", "one")], [W, *BN], functions=[block])
    for command in (["fold"], ["freeze", "--as", "constant"]):
        assert main([*command, str(path), "--dry-run"]) == main([*command, str(path), "-o", str(tmp_path / "b.onnx")])
    assert not (tmp_path / "b.onnx").exists()
    err = capsys.readouterr().err
    assert "mine.Block, a function for another version of ONNX's operators than the model, is called with" in err


def test_functions_that_call_themselves_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = [call("Block", "x w g b m v", "d", "again"), norm("d", "y", "inner")]
    path = save(
        tmp_path / "a.onnx", [call("Block", "x w g b m v", "y", "one")], [W, *BN], functions=[function("Block", body)]
    )
    assert main(["inspect", str(path)]) == 3
    assert "without measure" in capsys.readouterr().err


COPIES = [node("Identity", k, f"{k}2") for k in "gbmv"]
NAMES = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
OWN = [tensor(name, values) for name, values in zip(NAMES, VECTORS.values(), strict=True)]
MODULE, COPIED, PLAIN = " ".join(NAMES), "g2 b2 m2 v2", "g b m v"


def branch(data: str, name: str, parameters: str, *, weight: str, stays: bool, output: str) -> list[onnx.NodeProto]:
    """A convolution and a BatchNormalization, which a Relu between them and one behind keep from folding."""
    if not stays:
        return [node("Conv", f"{data} {weight}", f"{output}c"), norm(f"{output}c", output, name, parameters=parameters)]
    return [
        node("Conv", f"{data} {weight}", f"{output}c"),
        node("Relu", f"{output}c", f"{output}r"),
        norm(f"{output}r", f"{output}n", name, parameters=parameters),
        node("Relu", f"{output}n", output),
    ]


def branches(
    first: str, second: str, *, stay: str = "", names: tuple[str, str] = ("bn", "bn2")
) -> list[onnx.NodeProto]:
    """Two of them, added.

    Args:
        first, second: names of the parameters of each.
        stay: which of them, ``1`` or ``2``.
        names: of their nodes.
    """
    left = branch("x", names[0], first, weight="w", stays="1" in stay, output="e")
    right = branch("x", names[1], second, weight="w2", stays="2" in stay, output="f")
    copies = COPIES if COPIED in (first, second) else []
    return [*copies, *left, *right, node("Add", "e f", "y")]


def biased(bias: str, parameters: str) -> list[onnx.NodeProto]:
    return [node("Conv", f"x w {bias}", "c"), norm("c", "y", parameters=parameters)]


SHARED: dict[str, Any] = {  # nodes, tensors, and the layers that stay
    "Identity copies, both fold": (branches(PLAIN, COPIED), BN, []),
    "Identity copies, the copy stays": (branches(PLAIN, COPIED, stay="2"), BN, ["bn2"]),
    "Identity copies, the original stays": (branches(PLAIN, COPIED, stay="1"), BN, ["bn"]),
    "Identity copies, both stay": (branches(PLAIN, COPIED, stay="12"), BN, ["bn", "bn2"]),
    "the same tensors of a module, one stays": (branches(MODULE, MODULE, stay="2"), OWN, ["bn@2"]),
    "the same tensors of a module, the first stays": (branches(MODULE, MODULE, stay="1"), OWN, ["bn"]),
    "the same tensors, both fold": (branches(PLAIN, PLAIN), BN, []),
    "no names": (branches(PLAIN, PLAIN, stay="2", names=("", "")), BN, ["fn"]),
    "a bias that is a statistic": (biased("m", PLAIN), BN, []),
    "a bias that is a copy of a statistic": ([*COPIES, *biased("m2", PLAIN)], BN, []),
    "a bias that is that of the layer": (biased("bn.bias", MODULE), OWN, []),
    "a bias that is a statistic of the layer": (biased("bn.running_mean", MODULE), OWN, []),
    "a bias that is a statistic of a layer that stays": (
        [biased("m", PLAIN)[0], norm("c", "e"), *branches(PLAIN, PLAIN, stay="2")[2:]],
        BN,
        ["bn2"],
    ),
    "one vector for all": ([CONV, norm("c", "y", parameters="v v v v")], BN[3:], []),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("command", [["fold"], ["fold", "--layout", "same-keys"], ["freeze", "--as", "constant"]])
def test_shared_tensors_end_as_the_dry_run_says(
    case: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes, tensors, stay = SHARED[case]
    source, target = save(tmp_path / "a.onnx", nodes, [W, W2, *tensors]), tmp_path / "b.onnx"
    promised = main([*command, str(source), "--dry-run", "--json"])
    dry = json.loads(capsys.readouterr().out)["files"][0] if promised == 0 else {}
    assert main([*command, str(source), "-o", str(target), "--json"]) == promised
    if promised != 0:
        assert promised == 4
        return
    done = json.loads(capsys.readouterr().out)["files"][0]
    assert {key: dry[key] for key in ("folds", "skips", "layers") if key in dry} == {
        key: done[key] for key in ("folds", "skips", "layers") if key in done
    }
    onnx.checker.check_model(onnx.load(target), full_check=True)
    expected, found = run(source), run(target)
    assert np.abs(expected - found).max() <= 1e-5 * np.abs(expected).max()
    with open_checkpoint(target) as checkpoint:
        left = [layer.name for layer in find_batchnorms(checkpoint.state_dict(""))]
    if command == ["fold"]:
        assert set(left) == set(stay) | {skip["layer"] for skip in done["skips"]}


@pytest.mark.parametrize(
    ("opset", "mode", "more", "training"),
    [
        (15, {"training_mode": 0}, [], 0),
        (15, {"training_mode": 1}, ["mean", "variance"], 1),
        (9, {}, [], 0),
        (9, {}, ["mean", "variance", "saved_mean", "saved_variance"], 1),
        (6, {"is_test": 1}, [], 0),
        (6, {}, [], 1),
    ],
)
def test_a_node_in_training_mode_is_not_called_healthy(
    opset: int,
    mode: dict[str, int],
    more: list[str],
    training: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bn = helper.make_node("BatchNormalization", ["x", "g", "b", "m", "v"], ["y", *more], name="bn", **mode)
    rng = np.random.default_rng(0)
    constants = [tensor(name, rng.uniform(0.5, 2, 4)) for name in "gbmv"]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 3, 3])]
    taken = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([bn], "graph", given, taken, constants)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    assert main(["inspect", str(path), "--fail-on", "warning", "--json"]) == training
    found = json.loads(capsys.readouterr().out)["files"][0]["state_dicts"][0]["layers"][0]["findings"]
    assert [one["code"] for one in found if one["severity"] == "warning"] == ["batch-statistics"] * training


def test_a_node_that_goes_into_training_mode_is_not_frozen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constants = [tensor(name, np.full(4, 0.5)) for name in "gbmv"]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 3, 3])]
    taken = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    for name, training in (("a", 0), ("b", 1)):
        bn = helper.make_node("BatchNormalization", ["x", *"gbmv"], ["y"], name="bn", training_mode=training)
        graph = helper.make_graph([bn], "graph", given, taken, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        onnx.save(model, tmp_path / f"{name}.onnx")
    assert main(["diff", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx"), "--expect", "frozen"]) == 1
    assert "bn: training_mode differs (False and True)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("node", "opset", "reason"),
    [
        (
            helper.make_node("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"], name="bn", spatial=0),
            8,
            "a node of BatchNormalization, with statistics of each position (spatial=0)",
        ),
        (
            helper.make_node("ATen", ["x", "g"], ["y"], name="bn", domain="org.pytorch.aten", operator="batch_norm"),
            13,
            "a node of org.pytorch.aten.ATen (batch_norm), with no operator of ONNX",
        ),
        (
            helper.make_node("PythonOp", ["x"], ["y"], name="bn", domain="com.microsoft", func_name="InPlaceABN"),
            13,
            "a node of com.microsoft.PythonOp (InPlaceABN), with no operator of ONNX",
        ),
    ],
)
def test_a_normalisation_that_is_none_of_channels_or_of_onnx_is_said(
    node: onnx.NodeProto, opset: int, reason: str, tmp_path: Path
) -> None:
    constants = [tensor(name, np.full((4, 3, 3), 0.5)) for name in "gbmv"]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 3, 3])]
    taken = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "graph", given, taken, constants)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    with open_checkpoint(path) as checkpoint:
        assert [(one.name, one.reason) for one in checkpoint.not_understood] == [("bn", reason)]
    assert main(["inspect", str(path), "--fail-on", "error"]) == 1


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ("g b m s", "its running_var is stored as a sparse tensor, which is not read"),
        ("g b m ", "its running_var is left out"),
        ("g b nothing v", "its running_mean is nowhere in the file ('nothing')"),
        ("g b given v", "its running_mean is an input of the model"),
        ("g b r v", "its running_mean is computed by RandomNormal"),
    ],
)
def test_where_a_parameter_comes_from_is_said_as_it_is(inputs: str, reason: str, tmp_path: Path) -> None:
    constants = [tensor(name, np.full(4, 0.5)) for name in "gbmv"]
    sparse = helper.make_sparse_tensor(tensor("s", [1.0, 2.0]), tensor("i", [0, 2], "i8"), [4])
    nodes = [
        helper.make_node("RandomNormal", [], ["r"], shape=[4]),
        helper.make_node("BatchNormalization", ["x", *inputs.split(" ")], ["y"], name="bn"),
    ]
    given = [value("x", [2, 4, 3, 3]), value("given", [4])]
    graph = helper.make_graph(nodes, "graph", given, [value("y", None)], constants, sparse_initializer=[sparse])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    with open_checkpoint(path) as checkpoint:
        assert [(one.name, one.reason) for one in checkpoint.not_understood] == [("bn", reason)]


@pytest.mark.parametrize("ir_version", [3, 8])
def test_a_fold_of_parameters_that_a_caller_may_give_is_assumed(ir_version: int, tmp_path: Path) -> None:
    constants = [tensor("w", np.full((4, 4, 1, 1), 0.5)), *(tensor(name, np.full(4, 0.5)) for name in "gbmv")]
    shapes = {"x": [2, 4, 3, 3], **{one.name: list(one.dims) for one in constants}}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    taken = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *"gbmv"], ["y"], name="bn"),
    ]
    graph = helper.make_graph(nodes, "graph", given, taken, constants)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=ir_version), path)
    given_before = ir_version >= 4  # older versions list every constant among the inputs
    assumptions = fold_file(path, tmp_path / "folded.onnx").assumptions
    assert [one.startswith("nobody runs the model with other values for ") for one in assumptions] == (
        [True] * given_before
    )
