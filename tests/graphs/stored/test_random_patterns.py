"""Random ONNX graphs are folded exactly or not at all, as onnxruntime computes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bntool.folding.transforms import operations
from bntool.folding.transforms.operations import Rule, Shift
from bntool.graphs.graph import NodeKind
from tests.graphs.stored.folding import fold_file
from tests.graphs.stored.onnx_patterns import run
from tests.graphs.stored.random_patterns import Drawing

SEEDS = range(24)
LOOSENED = {  # a rule that lets more pass than is exact
    "a sign": (NodeKind.ACTIVATION, Rule(Shift.ZERO)),
    "a shift through an activation": (NodeKind.ACTIVATION, Rule(Shift.SAME, positive=True)),
    "a scale past a constant": (NodeKind.CONSTANT_SUM, Rule(Shift.SAME)),
    "a shift of one operand": (NodeKind.ADD, Rule(Shift.SAME, ports=(0, 1))),
}


def measure(seed: int, folder: Path) -> tuple[int, float, float]:
    """How many layers fold, how far outputs are off, and how far those of the original are for the next float32."""
    source, target = Drawing(seed).draw().save(folder / f"{seed}.onnx"), folder / f"{seed}.folded.onnx"
    plan = fold_file(source, target)
    before, after, beside = run(source), run(target), run(source, next_to=True)
    return len(plan.folds), compare(before, after), compare(before, beside)


def compare(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """The largest difference in relation to the largest element of each."""
    pairs = zip(expected, found, strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(a).max() or 1)) for a, b in pairs)


@pytest.mark.parametrize("first", SEEDS[::8])
def test_folds_are_exact(first: int, tmp_path: Path) -> None:
    folded = 0
    for seed in range(first, first + 8):
        count, error, own = measure(seed, tmp_path)
        assert error <= max(1e-5, 16 * own), seed
        folded += count
    assert folded


@pytest.mark.parametrize("rule", LOOSENED)
def test_they_would_notice_a_rule_that_is_too_loose(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, loose = LOOSENED[rule]
    monkeypatch.setitem(operations.RULES, kind, loose)  # type: ignore[arg-type]
    assert any(error > max(1e-3, 16 * own) for _, error, own in (measure(seed, tmp_path) for seed in SEEDS))
