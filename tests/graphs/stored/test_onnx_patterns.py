"""Patterns around BatchNormalization in ONNX models, run by onnxruntime before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from bntool.cli.main import main
from bntool.folding.planning import FoldPlan
from tests.graphs.stored.folding import fold_file
from tests.graphs.stored.onnx_patterns import EXACT, REFUSED, Pattern, run

WORDS = {  # what stands in the way
    "behind_relu": "Relu lies between",
    "behind_leaky_relu": "LeakyRelu lies between",
    "behind_prelu": "PRelu lies between",
    "behind_clip": "Clip lies between",
    "behind_max_pool": "negative scale in 2 of 4 channels: max-pool passes positive ones only",
    "behind_an_average_with_padding": "AveragePool lies between",
    "behind_padding_with_zeros": "Pad lies between",
    "padded_with_zeros_by_computed_widths": "Pad and Sigmoid do not let it pass",
    "channels_padded_by_computed_widths": "Pad lies between",
    "channels_by_the_number_of_rows": "meets several channels",
    "behind_a_factor_by_place": "Mul lies between",
    "behind_a_sum_by_place": "Add lies between",
    "behind_a_cast": "Cast lies between",
    "plus_what_depends_on_the_shape": "Add lies between",
    "input_of_a_result": "is also read by the model's output",
    "convolution_read_by_a_sigmoid": "is also read by Sigmoid",
    "convolution_read_in_a_branch": "is also read by Sigmoid",
    "shift_into_zero_padding": "convolution (y_Conv), which reads zeros beyond the border, does not let it pass",
    "shift_into_a_transposed_convolution_whose_taps_take_turns": "transposed convolution (y_ConvTranspose), not all of "
    "whose taps meet every position, does not let it pass",
    "negative_scales_before_activations": "negative scale in 2 of 4 channels",
    "other_axis": "meets several channels",
    "activations_in_integers": "DequantizeLinear lies between",
    "weight_in_integers_for_training": "weight of convolution (c_Conv) is computed from what DequantizeLinear puts out",
    "scale_of_zero_in_a_stream": "its scale is zero in 1 of 4 channels",
}


def fold(name: str, tmp_path: Path, layout: str = "folded") -> tuple[FoldPlan, float]:
    """Fold a pattern; the plan, and how far the outputs are off in relation to the largest."""
    build = EXACT.get(name) or REFUSED[name]
    source, target = build().save(tmp_path / "a.onnx"), tmp_path / f"{layout}.onnx"
    plan = fold_file(source, target, layout=layout)
    assert plan.assumptions == ()
    pairs = zip(run(source), run(target), strict=True)
    return plan, max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


@pytest.mark.parametrize("name", EXACT)
def test_what_has_an_exact_fold_is_folded(name: str, tmp_path: Path) -> None:
    plan, error = fold(name, tmp_path)
    assert plan.skips == ()
    assert plan.folds
    assert error <= 1e-5
    assert b"BatchNormalization" not in (tmp_path / "folded.onnx").read_bytes()


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_none_is_left_alone_with_a_reason(name: str, tmp_path: Path) -> None:
    plan, error = fold(name, tmp_path)
    skip = next(skip for skip in plan.skips if skip.layer == "stays_bn")
    assert WORDS.get(name, "") in skip.detail
    assert skip.detail
    assert error <= 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_same_keys_is_exact_too(name: str, tmp_path: Path) -> None:
    _, error = fold(name, tmp_path, "same-keys")
    assert error <= 1e-5


@pytest.mark.parametrize("name", ["one_weight_with_two_norms", "weight_in_half_precision", "branches_of_if"])
def test_tensors_of_one_node_go_beside_external_data(name: str, tmp_path: Path) -> None:
    model = onnx.load(EXACT[name]().save(tmp_path / "whole.onnx"))
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.bin", size_threshold=0)
    assert fold_file(tmp_path / "a.onnx", tmp_path / "b.onnx").skips == ()
    pairs = zip(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"), strict=True)
    assert max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs) <= 1e-5


def test_operands_are_laid_beside_each_other_as_old_versions_do(tmp_path: Path) -> None:
    """Up to version 6 an operand has fewer axes only where that is said, and ``axis`` says where they begin."""
    one = Pattern(shape=(4, 4, 4, 4), opset=6)
    for name in "bfs":
        one.put(name, 4)
    one.conv("x", "c", taken=4)
    one.add("Add", "c b", "d", broadcast=1, axis=1)  # for each channel
    one.norm("d", "e", positive=False)
    one.add("Mul", "e f", "g", broadcast=1, axis=0)  # for each sample
    one.norm("g", "h", positive=False)
    one.add("Transpose", "h", "i", perm=[0, 2, 3, 1])
    one.put("w", 4, 4)
    one.add("MatMul", "i w", "j")
    one.add("Transpose", "j", "k", perm=[0, 3, 1, 2])
    one.norm("k", "l", positive=False)
    one.add("Add", "l s", "m", broadcast=1)  # for each column
    one.norm("m", "y", positive=False)
    for made in one.nodes:
        if made.op_type == "BatchNormalization":
            made.attribute.append(onnx.helper.make_attribute("is_test", 1))
    source, target = one.save(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    plan = fold_file(source, target)
    assert {fold.layer for fold in plan.folds} == {"e_bn", "h_bn", "l_bn"}
    model = onnx.load(target)
    added = next(made for made in model.graph.node if made.op_type == "Add" and "j/product" in made.input)
    assert [(a.name, a.i) for a in added.attribute] == [("broadcast", 1)]
    pairs = zip(run(as_version_8(source)), run(as_version_8(target)), strict=True)
    assert max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs) <= 1e-5


def as_version_8(path: Path) -> Path:
    """A model of version 6 whose constants lie along the last axes; onnxruntime knows no older one."""
    model = onnx.load(path)
    tensors = {one.name: one for one in model.graph.initializer}
    for made in model.graph.node:
        said = {one.name: one.i for one in made.attribute}
        if "broadcast" in said:
            constant = onnx.numpy_helper.to_array(tensors[made.input[1]])
            shape = [1] * 4
            shape[said.get("axis", 3)] = constant.size
            name = f"{made.input[1]} of {made.output[0]}"
            model.graph.initializer.append(onnx.numpy_helper.from_array(constant.reshape(shape), name))
            made.input[1] = name
        for one in [one for one in made.attribute if one.name in ("broadcast", "axis", "is_test")]:
            made.attribute.remove(one)
    model.opset_import[0].version = 8
    onnx.save(model, path.with_suffix(".8.onnx"))
    return path.with_suffix(".8.onnx")


def test_layers_that_share_a_weight_can_be_folded_one_after_the_other(tmp_path: Path) -> None:
    """The first gets a copy of the weight, which the second then has for itself."""
    source = EXACT["one_weight_with_two_norms"]().save(tmp_path / "a.onnx")
    assert main(["fold", str(source), "--layers", "e_bn", "-o", str(tmp_path / "b.onnx")]) == 0
    assert main(["fold", str(tmp_path / "b.onnx"), "--layers", "f_bn", "-o", str(tmp_path / "c.onnx"), "--strict"]) == 0
    names = {one.name for one in onnx.load(tmp_path / "c.onnx").graph.initializer}
    assert names == {"w", "cb", "c_Conv.weight", "c_Conv.bias"}
    pairs = zip(run(source), run(tmp_path / "c.onnx"), strict=True)
    assert max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs) <= 1e-5


def test_that_functions_are_written_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    EXACT["function_called_twice"]().save(source)
    said = "calls of the function 'Block' are read as the nodes inside: a file that is written has these instead"
    assert main(["inspect", str(source)]) == 0
    assert said in capsys.readouterr().out
    assert main(["fold", str(source), "-o", str(output)]) == 0
    assert said in capsys.readouterr().err
    assert not onnx.load(output).functions
    assert main(["inspect", str(output)]) == 0
    assert "calls of the function" not in capsys.readouterr().out
