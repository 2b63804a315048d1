"""Proof that a changed model computes what the original does: both are run, in eval mode, on several inputs.

Float64 decides: there the same fold has to agree to rounding, because noise of lower precision is amplified by depth.
Then the tensors that will be written are run in float64, where they may only differ by what rounding them once costs,
and in their own dtype, for the report.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bntool.errors import UserCodeError, VerificationError
from bntool.modules.borrowing import borrow
from bntool.modules.calling import call, leaves_of, map_tensors
from bntool.modules.copying import copy_model
from bntool.representation import format_number, short_repr
from bntool.verification.layer_agreement import LayerAgreement, LayerOutputs, compare_layers, relative_error, watch
from bntool.verification.stored_outputs import StoredOutput

TOLERANCE = 1e-5  # relative to the largest output; for the tensors as they are written
CHECK_WHAT_WAS_GIVEN = "check that the model, the pairs and the eps that were given are those of the file"
EXACT = 1e-9  # the same, in float64
_NOISE = 16  # times what the original model itself loses to its dtype
_CHAOS = 1e-2  # however much a model amplifies rounding, an error beyond is wrong


@dataclass(frozen=True)
class Agreement:
    """The agreement of two models; errors are relative to the largest magnitude of the output.

    Attributes:
        inputs: how many inputs were run.
        outputs: how many output tensors each gave.
        exact: error of the same fold in float64; NaN where the model does not run in float64.
        rounded: error of the new tensors, run in float64.
        stored: error in the dtype of the file.
        noise: what the original loses in that dtype against float64.
        tolerance: what ``rounded`` was held against.
        layers: how well the outputs of layers inside agree, for the first sample of the first input.
    """

    inputs: int
    outputs: int
    exact: float
    rounded: float
    stored: float
    noise: float
    tolerance: float
    layers: tuple[LayerAgreement, ...] = ()

    __repr__ = short_repr


Change = Callable[[nn.Module], None]


def verify(
    model: nn.Module,
    change: Change,
    changed: nn.Module,
    inputs: Sequence[Any],
    *,
    tolerance: float = TOLERANCE,
    unit: float = 0.0,
    points: Mapping[str, str] | None = None,
    transforms: Mapping[str, StoredOutput] | None = None,
) -> Agreement:
    """Check that a changed model computes what the original does.

    In float64 they agree to 1e-9 of the largest magnitude of each output, or to 16 times what the model makes of
    rounding there, or the change is wrong.

    Args:
        model: the original; given back as it was.
        change: makes the same change to any copy of the model, in the dtype of that copy.
        changed: the model with the tensors that are to be written.
        inputs: each a tensor, a tuple of positional or a dict of keyword arguments.
        tolerance: largest error, relative to the largest magnitude of each output, of ``changed`` in float64; 16 times
            the noise of the original's own dtype is always allowed.
        unit: relative spacing of the numbers in which tensors are stored, where that is coarser than the model's own:
            16 times what such a change of every parameter does to the original is allowed too.
        points: for each layer to compare too, the module at which; see
            :func:`~bntool.folding.unchanged_outputs.find_points`. Only the outputs of the model decide.
        transforms: by module how the changed model stores its output, where that is otherwise.

    Raises:
        VerificationError: they disagree, or the outputs are such that agreeing would prove nothing.
        UserCodeError: a model raised.
    """
    points = points or {}
    watched = set(points.values())
    stored, stored_layers = _run_watched(model, inputs, watched)
    found, found_layers = _run_watched(changed, inputs, watched)
    stored_error = _largest_error(stored, found)
    exact_inputs = [_cast(item, torch.float64) for item in inputs]
    exact_layers = None
    try:
        reference, reference_layers = _run_watched(copy_model(model).double(), exact_inputs, watched)
    except UserCodeError:  # it makes tensors of a fixed dtype
        reference = None
    if reference is None:
        _check_meaning(stored)
        noise = exact = math.nan
        rounded = stored_error
        bound = tolerance
    else:
        _check_meaning(reference)
        with _said_of_original():
            noise = _largest_error(reference, stored)
        folded = copy_model(model).double()
        change(folded)
        found, found_exact = _run_watched(folded, exact_inputs, watched)
        with _explained(model, exact_inputs):
            exact, exact_layers = _largest_error(reference, found), (reference_layers, found_exact)
        if exact == 0:
            _check_dependence(model, exact_inputs)
        if not exact <= EXACT and not exact <= min(_NOISE * measure_rounding(model, exact_inputs), _CHAOS):
            raise VerificationError(
                f"in float64 the outputs differ by {format_number(exact)} of their magnitude; nothing was written",
                remedy=CHECK_WHAT_WAS_GIVEN,
            )
        with _explained(model, exact_inputs, unit=max(unit, torch.finfo(torch.float32).eps)):
            rounded = _largest_error(reference, _run(copy_model(changed).double(), exact_inputs))
        bound = max(tolerance, _NOISE * noise) if math.isfinite(noise) else tolerance
        if unit > torch.finfo(torch.float32).eps:
            bound = max(bound, _NOISE * measure_rounding(model, exact_inputs, unit=unit))
    if not rounded <= bound:
        raise VerificationError(
            f"the outputs differ by {format_number(rounded)} of their magnitude, more than the tolerance "
            f"{format_number(bound)}; nothing was written",
            remedy="a larger --tolerance would accept it",
        )
    layers = tuple(compare_layers(points, exact_layers, (stored_layers, found_layers), transforms))
    return Agreement(len(inputs), len(stored[0]), exact, rounded, stored_error, noise, bound, layers)


def measure_difference(model: nn.Module, changed: nn.Module, inputs: Any) -> float:
    """Measure the largest error of a changed model on one input, relative to the largest magnitude of each output.

    In float64, where the original runs in it; both are given back as they were.

    Raises:
        UserCodeError: the original raised.
        VerificationError: the outputs have other shapes, or only the changed model raised.
    """
    pair, item = (copy_model(model).double(), copy_model(changed).double()), _cast(inputs, torch.float64)
    try:
        wanted = run_model(pair[0], item)
    except UserCodeError:  # it makes tensors of a fixed dtype
        pair, item = (model, changed), inputs
        wanted = run_model(model, item)
    try:
        found = run_model(pair[1], item)
    except UserCodeError as error:
        raise VerificationError(f"only the changed model raised: {error}") from error
    return _largest_error([wanted], [found])


def verify_program(
    model: nn.Module, run: Callable[[Any], list[torch.Tensor]], inputs: Sequence[Any], *, tolerance: float
) -> float:
    """Check an exported program, which has one mode and one dtype, against the original model.

    Args:
        model: the original; given back as it was.
        run: gives the program's floating outputs for an input, wherever it runs.
        inputs: as for :func:`verify`, in the program's dtype.
        tolerance: largest error, relative to the largest magnitude of each output.

    Returns:
        The largest such error.

    Raises:
        VerificationError: they disagree, or the program does not run on an input.
    """
    try:
        found = [[tensor.cpu() for tensor in run(_cast(item, None))] for item in inputs]
    except Exception as problem:
        text = " ".join(str(problem).split())[:300]
        raise VerificationError(f"the exported program does not run; nothing was written ({text})") from problem
    expected = [[tensor.cpu() for tensor in outputs] for outputs in _run(model, inputs)]
    error = _largest_error(expected, found)
    if not error <= tolerance:
        raise VerificationError(
            f"the outputs of the exported program differ by {format_number(error)} of their magnitude, more than "
            f"{format_number(tolerance)}; nothing was written"
        )
    return error


def measure_rounding(model: nn.Module, inputs: Sequence[Any], *, unit: float = torch.finfo(torch.float64).eps) -> float:
    """Measure how far the outputs move in float64 when every parameter moves by up to one unit in its last place.

    Deep random networks amplify rounding by 1e6 and more; no fold can agree better than this.

    Args:
        inputs: in float64.
        unit: relative size of a unit in the last place.
    """
    original, moved = copy_model(model).double(), copy_model(model).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
                parameter.mul_(1 + (2 * noise.to(parameter.device) - 1) * unit)
    return _largest_error(_run(original, inputs), _run(moved, inputs))


def run_model(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Run a model in eval mode and return its floating outputs; the model is as it was afterwards, the inputs are not
    changed.

    Raises:
        UserCodeError: the model raised.
    """
    with borrow(model), torch.no_grad():
        model.eval()
        return list(find_outputs(call(model, _cast(inputs, None))))


def _run(model: nn.Module, inputs: Sequence[Any]) -> list[list[torch.Tensor]]:
    return [run_model(model, item) for item in inputs]


def _run_watched(
    model: nn.Module, inputs: Sequence[Any], layers: Collection[str]
) -> tuple[list[list[torch.Tensor]], LayerOutputs]:
    """Run a model on all inputs; return the outputs, and what layers gave for the first."""
    with watch(model, layers) as seen:
        first = run_model(model, inputs[0])
    return [first, *_run(model, inputs[1:])], seen


def _cast(item: Any, dtype: torch.dtype | None) -> Any:
    """Copy a model or inputs, floating tensors in another dtype."""

    def convert(value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value.clone()

    return map_tensors(convert, item)


def find_outputs(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    """Yield copies of the floating tensors of an output, also in objects that torch does not know."""
    for leaf in leaves_of(value):
        if isinstance(leaf, torch.Tensor):
            if leaf.is_complex():
                leaf = torch.view_as_real(leaf.resolve_conj())  # noqa: PLW2901 (what follows is one question)
            if leaf.is_floating_point():
                yield _as_strided(leaf.detach()).clone()
        elif isinstance(leaf, np.ndarray | np.floating | float):
            if np.issubdtype(np.asarray(leaf).dtype, np.floating):
                yield torch.from_numpy(np.array(leaf))
        elif depth and not isinstance(leaf, type | nn.Module):
            slots = [
                name for kind in type(leaf).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(leaf, name)
            ]
            held = {**{name: getattr(leaf, name) for name in slots}, **getattr(leaf, "__dict__", {})}
            yield from find_outputs(held, depth - 1) if held else ()


def _as_strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a nested or sparse tensor, which can be compared."""
    if tensor.is_nested:
        padded: torch.Tensor = torch.nested.to_padded_tensor(tensor, 0.0)
        return padded
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _check_meaning(outputs: Sequence[Sequence[torch.Tensor]]) -> None:
    """Refuse outputs that prove nothing: none, not finite, or the same for all inputs.

    Raises:
        VerificationError: they are such.
    """
    tensors = [tensor for one in outputs for tensor in one if tensor.numel()]
    if not tensors and any(outputs):
        raise VerificationError(
            "the original model's outputs are empty: it finds nothing in these inputs, so nothing can be proven; give "
            "an input on which it finds something, with --data"
        )
    if not tensors:
        raise VerificationError(
            "the model gives no floating output that could be compared; let the factory of --model give one that does, "
            "such as the scores instead of the labels, or give inputs on which it finds something, with --data"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise VerificationError(
            "the original model's outputs hold NaN or infinity, so nothing can be proven; does `bntool inspect` find "
            "broken statistics? recalibrate first, or give real inputs with --data"
        )
    if _are_the_same(outputs):
        raise VerificationError(
            "the original model's outputs are the same for all inputs, so nothing can be proven: give real inputs with "
            "--data"
        )
    if not any(bool(tensor.any()) for tensor in tensors):
        raise VerificationError("the original model's outputs are all zero, so nothing can be proven: give --data")


def _are_the_same(outputs: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Return whether all inputs give equal outputs, as far as their shapes agree; empty outputs are left out."""
    kinds: dict[tuple[torch.Size, ...], list[list[torch.Tensor]]] = {}
    for one in outputs:
        filled = [tensor for tensor in one if tensor.numel()]
        kinds.setdefault(tuple(tensor.shape for tensor in filled), []).append(filled)
    pairs = [(first, other) for first, *others in kinds.values() for other in others]
    return bool(pairs) and all(torch.equal(a, b) for first, other in pairs for a, b in zip(first, other, strict=True))


def _check_dependence(model: nn.Module, inputs: Sequence[Any]) -> None:
    """Refuse outputs that do not depend on the parameters: that they agree proves nothing.

    Raises:
        VerificationError: they do not.
    """
    try:
        moved = measure_rounding(model, inputs, unit=1e-2)
    except _OtherShapesError:
        return
    if moved == 0:
        raise VerificationError(
            "the outputs that can be compared do not depend on the parameters of the model, so nothing can be proven; "
            "give inputs with --data on which it puts out something of its own"
        )


class _OtherShapesError(VerificationError):
    """The outputs of the two models have different shapes."""


@contextlib.contextmanager
def _said_of_original() -> Iterator[None]:
    """Say, if shapes differ inside the block, that those of the original depend on rounding.

    Raises:
        VerificationError: they do, inside.
    """
    try:
        yield
    except _OtherShapesError as error:
        raise VerificationError(
            "the shapes of the original model's outputs hang on rounding (of a detector, how much it finds), so "
            "nothing can be proven; give inputs with --data on which it is sure, or fold the part before them"
        ) from error


@contextlib.contextmanager
def _explained(
    model: nn.Module, inputs: Sequence[Any], *, unit: float = torch.finfo(torch.float64).eps
) -> Iterator[None]:
    """Find out, if shapes differ inside the context, whether rounding the original's parameters changes its own."""
    try:
        yield
    except _OtherShapesError:
        with _said_of_original():
            measure_rounding(model, inputs, unit=unit)
        raise


def _largest_error(expected: Sequence[Sequence[torch.Tensor]], found: Sequence[Sequence[torch.Tensor]]) -> float:
    """Measure the largest difference of each output in relation to its largest magnitude, over all inputs."""
    largest = 0.0
    for wanted, given in zip(expected, found, strict=True):
        if [tuple(t.shape) for t in wanted] != [tuple(t.shape) for t in given]:
            raise _OtherShapesError("the outputs have other shapes than before; nothing was written")
        for a, b in zip(wanted, given, strict=True):
            error = relative_error(a, b)
            largest = max(largest, error) if not math.isnan(error) else math.nan
            if math.isnan(largest):
                return largest
    return largest
