"""Running a folded ONNX file and its original in ONNX Runtime, before the folded one appears."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bntool.errors import VerificationError
from bntool.folding.onnxruntime_process import OnnxRuntime, RuntimeFailure
from bntool.representation import format_number

_INPUTS = 3
_BATCH = 2
_EXTENTS = (32, 8, 64, 224, 1)  # tried for dimensions that the model leaves open
_KINDS = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}
_WHOLE = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(uint8)": "uint8", "tensor(bool)": "bool"}
_ROUNDINGS = 8  # of the stored dtype that the two may differ by, where that is more than the tolerance
_NOISE = 16  # times what the original differs from itself, likewise
_CHAOS = 1e-2  # however much a model amplifies rounding, an error beyond is wrong


@dataclass(frozen=True)
class RuntimeAgreement:
    """The answer of a runtime to both files.

    Attributes:
        runtime: its name and version; "" where none ran.
        inputs: how many random ones were compared.
        error: largest difference of the outputs, relative to the largest output; None where none ran.
        noise: the same between the original and itself with the optimisations of the runtime; None where it was not
            asked, or does not run so.
        reason: why none ran; "" where one did.
    """

    runtime: str
    inputs: int
    error: float | None
    noise: float | None
    reason: str


def compare_in_onnxruntime(original: Path, folded: Path, *, tolerance: float, unit: float) -> RuntimeAgreement:
    """Run two ONNX models on random inputs, without the optimisations that would fold the original as well.

    Where the two differ by more than the tolerance, the original is run once more with those optimisations: what it
    then differs from itself is rounding that its own arithmetic amplifies, and is allowed to both.

    Args:
        tolerance: largest difference of outputs, relative to the largest output.
        unit: relative spacing of numbers in the coarsest dtype of the tensors.

    Raises:
        VerificationError: the folded model does not run, or puts out something else.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return _not_run("onnxruntime is not installed")
    with ExitStack() as stack:
        try:
            before = stack.enter_context(OnnxRuntime(original))
            extent, first = _find_extent(before)
            given = [_make_inputs(before, extent, seed) for seed in range(_INPUTS)]
            wanted = [first, *(before.run(one) for one in given[1:])]
        except RuntimeFailure as failure:
            return _not_run(f"onnxruntime cannot run the original: {failure}")
        try:
            after = stack.enter_context(OnnxRuntime(folded))
            worst = _largest(wanted, [after.run(one) for one in given])
        except RuntimeFailure as failure:
            raise VerificationError(f"onnxruntime does not run the folded model: {failure}") from failure
        bound, noise = max(tolerance, _ROUNDINGS * unit), None
        if not worst <= bound:
            noise = _measure_noise(original, given, wanted)
            bound = max(bound, min(_NOISE * (noise or 0.0), _CHAOS))
    if not worst <= bound:
        raise VerificationError(
            f"onnxruntime puts out something else for the folded model: off by "
            f"{format_number(worst, 2)} of the largest output, {format_number(bound, 2)} is allowed; nothing "
            "was written"
        )
    return RuntimeAgreement(f"onnxruntime {before.version}", _INPUTS, worst, noise, "")


def _not_run(reason: str) -> RuntimeAgreement:
    return RuntimeAgreement("", 0, None, None, reason)


def _measure_noise(original: Path, given: Sequence[Mapping[str, Any]], wanted: Sequence[Sequence[Any]]) -> float | None:
    """Measure how far a model differs from itself with the optimisations of the runtime; None where it does not run
    so.
    """
    try:
        with OnnxRuntime(original, optimised=True) as same:
            noise = _largest(wanted, [same.run(one) for one in given])
    except RuntimeFailure:
        return None
    return noise if np.isfinite(noise) else None


def _find_extent(model: OnnxRuntime) -> tuple[int, list[Any]]:
    """Return an extent for open dimensions that the model takes, and its outputs for the first input.

    Raises:
        RuntimeFailure: it takes none.
    """
    failure = RuntimeFailure("it has no inputs")
    for number, extent in enumerate(_EXTENTS):
        try:
            return extent, model.run(_make_inputs(model, extent, 0))
        except RuntimeFailure as error:
            failure = error if number == 0 else failure
    raise failure


def _make_inputs(model: OnnxRuntime, extent: int, seed: int) -> Mapping[str, Any]:
    random = np.random.default_rng(seed)
    given = {}
    for formal in model.inputs:
        sizes = [d if isinstance(d, int) else extent if i else _BATCH for i, d in enumerate(formal.shape)]
        if formal.kind in _KINDS:
            given[formal.name] = random.standard_normal(sizes).astype(_KINDS[formal.kind])
        elif formal.kind in _WHOLE:
            given[formal.name] = random.integers(0, 2, sizes).astype(_WHOLE[formal.kind])
        else:
            raise RuntimeFailure(f"an input of type {formal.kind}")
    return given


def _largest(wanted: Sequence[Sequence[Any]], found: Sequence[Sequence[Any]]) -> float:
    """Return the largest relative difference over several inputs; NaN counts as infinite."""
    differences = [d for one, other in zip(wanted, found, strict=True) for d in _differences(one, other)]
    return max((float("inf") if np.isnan(d) else d for d in differences), default=0.0)


def _differences(wanted: Sequence[Any], found: Sequence[Any]) -> Iterator[float]:
    """Yield the difference of each floating output; whole numbers may be ranks of equals, and are left out."""
    for one, other in zip(wanted, found, strict=True):
        if not isinstance(one, np.ndarray) or one.dtype.kind != "f" or one.size == 0:
            continue
        if one.shape != other.shape or not np.array_equal(np.isfinite(one), np.isfinite(other)):
            yield float("inf")
            continue
        finite = np.isfinite(one)
        exact, near = one[finite].astype("float64"), other[finite].astype("float64")
        largest = float(np.abs(exact).max(initial=0.0)) or 1.0
        yield float(np.abs(near - exact).max(initial=0.0)) / largest
