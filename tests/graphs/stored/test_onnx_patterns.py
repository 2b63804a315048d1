"""Patterns around BatchNormalization in ONNX models, run by onnxruntime before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bntool.folding.planning import FoldPlan
from tests.graphs.stored.folding import fold_file
from tests.graphs.stored.onnx_patterns import EXACT, REFUSED, run

WORDS = {  # what stands in the way
    "behind_relu": "Relu lies between",
    "behind_leaky_relu": "LeakyRelu lies between",
    "behind_prelu": "PRelu lies between",
    "behind_clip": "Clip lies between",
    "behind_max_pool": "negative scale in 2 of 4 channels: max-pool passes positive ones only",
    "behind_an_average_with_padding": "AveragePool lies between",
    "behind_padding_with_zeros": "Pad lies between",
    "behind_a_factor_by_place": "Mul lies between",
    "behind_a_sum_by_place": "Add lies between",
    "behind_a_cast": "Cast lies between",
    "input_of_a_result": "is also read by the model's output",
    "convolution_read_by_a_sigmoid": "is also read by Sigmoid",
    "convolution_read_in_a_branch": "is also read by Sigmoid",
    "shift_into_zero_padding": "convolution (y_Conv), which reads zeros beyond the border, does not let it pass",
    "negative_scales_before_activations": "negative scale in 2 of 4 channels",
    "other_axis": "they lie on different axes",
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
