"""Running a folded file and its original in the format's own runtime, before the folded one appears."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bntool.errors import VerificationError

_INPUTS = 3
_BATCH = 2
_EXTENTS = (32, 8, 64, 224, 1)  # tried for dimensions that the model leaves open
_KINDS = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}
_WHOLE = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(uint8)": "uint8", "tensor(bool)": "bool"}
_ROUNDINGS = 8  # of the stored dtype that the two may differ by, where that is more than the tolerance


@dataclass(frozen=True)
class RuntimeAgreement:
    """What a runtime made of both files.

    Attributes:
        runtime: its name and version; "" where none ran.
        inputs: how many random ones were compared.
        error: largest difference of the outputs, relative to the largest output; None where none ran.
        reason: why none ran; "" where one did.
    """

    runtime: str
    inputs: int
    error: float | None
    reason: str


def compare_in_onnxruntime(original: Path, folded: Path, *, tolerance: float, unit: float) -> RuntimeAgreement:
    """Run two ONNX models on random inputs, without the optimisations that would fold the original as well.

    Args:
        tolerance: largest difference of outputs, relative to the largest output.
        unit: relative spacing of numbers in the coarsest dtype of the tensors.

    Raises:
        VerificationError: the folded model does not run, or puts out something else.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return _not_run("onnxruntime is not installed")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what is fatal

    def open_model(path: Path) -> Any:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    try:
        before = open_model(original)
        extent, expected = _find_extent(before)
    except Exception as error:  # noqa: BLE001 each operator of the runtime has errors of its own
        return _not_run(f"onnxruntime cannot run the original: {_first_line(error)}")
    worst = 0.0
    try:
        after = open_model(folded)
        for seed in range(_INPUTS):
            given = _make_inputs(before, extent, seed)
            wanted = expected if seed == 0 else before.run(None, given)
            worst = max(worst, *_differences(wanted, after.run(None, given)), 0.0)
    except Exception as error:
        raise VerificationError(f"onnxruntime does not run the folded model: {_first_line(error)}") from error
    bound = max(tolerance, _ROUNDINGS * unit)
    if not worst <= bound:
        raise VerificationError(
            f"onnxruntime puts out something else for the folded model: off by {worst:.2g} of the largest output, "
            f"{bound:.2g} is allowed; nothing was written"
        )
    return RuntimeAgreement(f"onnxruntime {onnxruntime.__version__}", _INPUTS, worst, "")


def _not_run(reason: str) -> RuntimeAgreement:
    return RuntimeAgreement("", 0, None, reason)


def _find_extent(session: Any) -> tuple[int, list[Any]]:
    """An extent for open dimensions that the model takes, and its outputs for the first input.

    Raises:
        Exception: of the runtime, where it takes none.
    """
    failure: Exception | None = None
    for extent in _EXTENTS:
        try:
            return extent, session.run(None, _make_inputs(session, extent, 0))
        except Exception as error:  # noqa: BLE001 as above
            failure = failure or error
    raise failure or ValueError("it has no inputs")


def _make_inputs(session: Any, extent: int, seed: int) -> Mapping[str, Any]:
    random = np.random.default_rng(seed)
    given = {}
    for formal in session.get_inputs():
        sizes = [d if isinstance(d, int) else extent if i else _BATCH for i, d in enumerate(formal.shape)]
        if formal.type in _KINDS:
            given[formal.name] = random.standard_normal(sizes).astype(_KINDS[formal.type])
        else:
            given[formal.name] = random.integers(0, 2, sizes).astype(_WHOLE[formal.type])
    return given


def _differences(wanted: list[Any], found: list[Any]) -> Iterator[float]:
    """Of each floating output; whole numbers may be ranks of equals."""
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


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"an input of type {error.args[0]}"
    return " ".join(str(error).split())[:200]
