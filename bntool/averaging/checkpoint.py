"""Averaging checkpoints: parameters by their weights, running statistics as those of one population."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bntool.averaging.statistics import PooledStatistics, pool_statistics
from bntool.batchnorm import COUNTER, STATISTICS, BatchNorm
from bntool.checkpoints.addresses import as_location
from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_norms
from bntool.checkpoints.checkpoint import Checkpoint, StateDict, check_changeable
from bntool.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, NumberKind
from bntool.checkpoints.files import quote
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.records import make_record
from bntool.checkpoints.saving import check_output, write_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.checkpoints.tensors import (
    StoredTensor,
    Tensor,
    describe_shape,
    equal_streams,
    has_elements,
    read_number,
    read_numbers,
)
from bntool.checkpoints.ties import find_tied
from bntool.errors import BntoolError, CorruptFileError, RefusedError, UsageError
from bntool.plan import Averaged, Operation, Plan, SetTensor, Values
from bntool.representation import html_repr, list_first, repr_of_change

_AVERAGED = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)
_MASK, _PRUNED = "_mask", "_orig"  # of torch.nn.utils.prune
_SHOWN = 3  # names that a refusal lists


@dataclass(frozen=True)
class PooledLayer:
    """A layer whose statistics are those of all files together.

    Attributes:
        name: of the layer.
        between: the largest share of a channel's variance that comes from means that differ, 0 to 1.
        between_channel: whose that is.
        ratio: the largest factor between the files' variances + eps of a channel.
        ratio_channel: whose that is.
    """

    name: str
    between: float
    between_channel: int
    ratio: float
    ratio_channel: int


@dataclass(frozen=True)
class Average:
    """An average that was planned.

    Attributes:
        sources: the checkpoints, the first of which the output is made of.
        weights: one each, as they were used: they sum to 1.
        plan: what changes in the first; its layers are those whose statistics change.
        averaged: how many tensors are averages.
        pooled: the layers whose statistics were pooled; empty where these are from one file.
        statistics_from: that file; None where they were pooled.
        kept: tensors of whole numbers that differ and are those of the first file.
        counters: how many num_batches_tracked are the largest of all files.
        other_entries: what else the first file holds and the output therefore does, such as optimizer state.
        output: the file that was written; None where nothing was.
        written: what it holds.
    """

    sources: tuple[Checkpoint, ...]
    weights: tuple[float, ...]
    plan: Plan
    averaged: int
    pooled: tuple[PooledLayer, ...]
    statistics_from: str | None
    kept: tuple[str, ...]
    counters: int
    other_entries: tuple[str, ...]
    output: str | None = None
    written: Checkpoint | None = None

    def __repr__(self) -> str:
        files = f"{self.averaged} tensors averaged over {len(self.sources)} files"
        path, layers = self.sources[0].path, len(self.plan.layers)
        return repr_of_change(self, path, changed=layers, more=files, output=self.output)

    _repr_html_ = html_repr


def average_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    weights: Sequence[float] | None = None,
    statistics_from: str | os.PathLike[str] | None = None,
    state_dict: str | None = None,
    force: bool = False,
) -> Average:
    """Average the weights of checkpoints of one model; what ``bntool average`` does.

    Floating tensors are averaged in float64 and rounded once to the dtype of the first file. Running statistics are
    pooled by the law of total variance, or taken from one file; in both cases they are those of no model that was run:
    recalibrate the output. num_batches_tracked is the largest of all files. Everything else is that of the first file.

    Examples:
        >>> bntool.average_checkpoints(["epoch_8.pt", "epoch_9.pt"], "average.pt", weights=[1, 3])

    Args:
        paths: the checkpoints, at least two; never written to.
        output: the file to write, in the format of the first; None to write none.
        weights: of each file, not negative; None for equal ones. Only their ratios count.
        statistics_from: a file with the same layers whose statistics are taken.
        state_dict: its key in all files; None for the one chosen by rule in each.
        force: replace a file that exists.

    Raises:
        UsageError: fewer than two files, or weights that are none.
        RefusedError: the files do not hold the same tensors, or statistics that are not finite or negative.
        FileError, VerificationError: see :mod:`bntool.errors`; nothing is written then.
    """
    if isinstance(paths, str | os.PathLike):
        raise UsageError("several files are averaged: give a list of them")
    shares = _normalise(weights, len(paths))
    target = None if output is None else Path(output)
    with contextlib.ExitStack() as opened:
        sources = [opened.enter_context(open_checkpoint(path)) for path in paths]
        check_changeable(sources[0])
        for one in sources:
            check_output(one, target, force=force, keeps_format=one is sources[0])
        _check_format(sources[0])
        chosen = [choose_state_dict(one, state_dict) for one in sources]
        other = None
        if statistics_from is not None:
            given = opened.enter_context(open_checkpoint(statistics_from))
            check_output(given, target, force=force, keeps_format=False)
            other = choose_state_dict(given, state_dict)
        planned = _plan_average(sources, chosen, shares, statistics_from=statistics_from, statistics=other)
        if target is None:
            return planned
        averaged = apply_plan(sources[0], planned.plan, chosen[1:])
        with OutputFiles(force=force, mode=sources[0].file.mode) as files:
            write_checkpoint(averaged, target, files)
            for one in sources[1:]:  # that of the first was looked at while it was written
                one.format.check_unchanged(one)
    with open_checkpoint(target) as written:
        pass
    return replace(planned, output=str(target), written=written)


def _normalise(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Scale weights so that they sum to 1.

    Raises:
        UsageError: they are not one for each of at least two files, or not positive numbers.
    """
    if count < 2:
        raise UsageError("an average takes at least two checkpoints")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise UsageError(f"there are {count} checkpoints and {len(given)} weights")
    if not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise UsageError("weights are positive numbers: leave out a file that is not to count")
    total = math.fsum(given)
    return tuple(weight / total for weight in given)


def _check_format(checkpoint: Checkpoint) -> None:
    """Refuse files that are no state dicts.

    Raises:
        RefusedError: it is one.
    """
    if not checkpoint.format.is_pytorch:
        raise RefusedError(
            f"{checkpoint.format.title} models are no state dicts of PyTorch, which are what is averaged",
            path=checkpoint.path,
        )


def _plan_average(
    sources: Sequence[Checkpoint],
    chosen: Sequence[StateDict],
    weights: tuple[float, ...],
    *,
    statistics_from: str | os.PathLike[str] | None,
    statistics: StateDict | None,
) -> Average:
    first = chosen[0]
    names = [first.strip(name) for name in first.tensors]
    if not names:
        raise RefusedError("the state dict holds no tensors", path=sources[0].path)
    for checkpoint, state_dict in zip(sources[1:], chosen[1:], strict=True):
        _check_same(sources[0], first, checkpoint, state_dict)
    steps: list[SetTensor] = []
    layers, pooled, of_statistics = [], [], set()
    for layer in _find_layers_with_statistics(first):
        steps_of_layer, statistics_of_layer = _plan_statistics(
            layer, sources, chosen, weights, statistics=statistics, statistics_path=statistics_from
        )
        steps += steps_of_layer
        layers.append(layer.name)
        of_statistics |= {step.name for step in steps_of_layer}
        if statistics is None:
            pooled.append(_summarize(layer.name, statistics_of_layer))
    counters = {layer.name_of(COUNTER) for layer in find_norms(first) if COUNTER in layer.tensors}
    kept = []
    for name in names:
        if name not in of_statistics:
            tensors = [one.tensor(name) for one in chosen]
            _check_mask(tensors, name, names, sources)
            step = _plan_tensor(name, tensors, weights, is_counter=name in counters)
            if step is not None:
                steps.append(step)
            elif not all(_are_equal(tensors[0], tensor) for tensor in tensors[1:]):
                _check_whole_numbers(tensors, name, sources)
                kept.append(name)
    plan = Plan(Operation.AVERAGE, state_dict=first.key, steps=tuple(steps), layers=tuple(layers))
    if sources[0].format.can_record(sources[0], first):
        details = {"files": [one.path.name for one in sources], "weights": list(weights)}
        origin = "pooled" if statistics_from is None else as_location(statistics_from).name
        plan = plan.with_record(make_record(plan, statistics=origin, **details))
    return Average(
        sources=tuple(sources),
        weights=weights,
        plan=plan,
        averaged=sum(isinstance(step.value, Averaged) for step in steps),
        pooled=tuple(pooled),
        statistics_from=None if statistics_from is None else str(statistics_from),
        kept=tuple(kept),
        counters=len(counters),
        other_entries=_list_other_entries(sources[0], first),
    )


def _plan_tensor(
    name: str, tensors: Sequence[Tensor], weights: tuple[float, ...], *, is_counter: bool
) -> SetTensor | None:
    """Plan one tensor of the average; None where it stays that of the first file."""
    if is_counter:
        largest = max(read_number(tensor, name=name) for tensor in tensors)
        return SetTensor(name, Values([largest], tuple(tensors[0].shape)))
    return SetTensor(name, Averaged(weights)) if all(map(_can_be_averaged, tensors)) else None


def _check_same(a: Checkpoint, first: StateDict, b: Checkpoint, other: StateDict) -> None:
    """Make sure that two state dicts have the same names, shapes and ties.

    Raises:
        RefusedError: they have not; it says which.
    """
    names, others = ({one.strip(name): None for name in one.tensors} for one in (first, other))
    for missing, lacking, having in (
        ([name for name in names if name not in others], b, a),
        ([name for name in others if name not in names], a, b),
    ):
        if missing:
            listed = list_first(list(map(quote, missing)), _SHOWN)
            raise RefusedError(f"it lacks {listed} of {quote(str(having.path))}", path=lacking.path)
    for name in names:
        shapes = [tuple(one.tensor(name).shape) for one in (first, other)]
        if shapes[0] != shapes[1]:
            here, there = map(describe_shape, reversed(shapes))
            raise RefusedError(f"its shape is {here}, in {quote(str(a.path))} {there}", path=b.path, tensor=name)
    tied = find_tied(first, names)
    loose = sorted(tied - find_tied(other, tied))
    if loose:
        raise RefusedError(
            f"it shares memory with another tensor in {quote(str(a.path))}, not here: one value for both is wrong",
            path=b.path,
            tensor=loose[0],
        )


def _find_layers_with_statistics(state_dict: StateDict) -> list[BatchNorm]:
    """Return all normalisation layers that keep a mean and a variance, BatchNorm or not."""
    return [one for one in find_norms(state_dict) if one.has_statistics]


def _plan_statistics(
    layer: BatchNorm,
    sources: Sequence[Checkpoint],
    chosen: Sequence[StateDict],
    weights: tuple[float, ...],
    *,
    statistics: StateDict | None,
    statistics_path: str | os.PathLike[str] | None,
) -> tuple[list[SetTensor], PooledStatistics]:
    """Return steps that set the statistics of a layer, and what they were pooled to.

    Raises:
        RefusedError: a file has none, or such as no data have.
    """
    import numpy as np

    names = [layer.name_of(role) for role in STATISTICS]
    if statistics is None:
        places = [(one.path, state_dict) for one, state_dict in zip(sources, chosen, strict=True)]
    else:
        places, weights = [(as_location(statistics_path or ""), statistics)], (1.0,)
    read = []
    for path, state_dict in places:
        try:
            tensors = [state_dict.tensor(name) for name in names]
            mean, variance = (
                np.asarray(read_numbers(tensor, name=name), dtype="<f8")
                for name, tensor in zip(names, tensors, strict=True)
            )
        except UsageError:
            raise RefusedError(f"it has no statistics of {quote(layer.name)}", path=path) from None
        except BntoolError as error:
            raise error.about(path) from None
        if [tuple(tensor.shape) for tensor in tensors] != [tuple(chosen[0].tensor(name).shape) for name in names]:
            raise RefusedError(f"the statistics of {quote(layer.name)} are of another shape", path=path)
        if mean.shape != variance.shape:
            raise CorruptFileError(
                f"it has {mean.size} means and {variance.size} variances", path=path, tensor=layer.name
            )
        if not (np.isfinite(mean).all() and np.isfinite(variance).all() and (variance >= 0).all()):
            raise RefusedError(
                "its statistics are not finite, or a variance is negative: the average would be, too",
                path=path,
                tensor=layer.name,
            )
        read.append((mean, variance))
    pooled = pool_statistics([mean for mean, _ in read], [variance for _, variance in read], weights)
    shape = tuple(chosen[0].tensor(names[0]).shape)
    values = [Values(pooled.mean.tolist(), shape), Values(pooled.variance.tolist(), shape)]
    return [SetTensor(name, value) for name, value in zip(names, values, strict=True)], pooled


def _summarize(name: str, pooled: PooledStatistics) -> PooledLayer:
    """Measure how far the files differ in the worst channels of a layer."""
    if not len(pooled.between):
        return PooledLayer(name, 0.0, 0, 1.0, 0)
    between, ratio = int(pooled.between.argmax()), int(pooled.ratio.argmax())
    return PooledLayer(name, float(pooled.between[between]), between, float(pooled.ratio[ratio]), ratio)


def _check_mask(tensors: Sequence[Tensor], name: str, names: Sequence[str], checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse a mask of torch.nn.utils.prune that differs: weights are products with it, whose average is no product of
    averages.

    Raises:
        RefusedError: it does.
    """
    if not name.endswith(_MASK) or name.removesuffix(_MASK) + _PRUNED not in names:
        return
    for tensor, checkpoint in zip(tensors, checkpoints, strict=True):
        if not _are_equal(tensors[0], tensor):
            message = (
                "the files are pruned in different places, and a product with an average of masks would be neither"
            )
            raise RefusedError(f"{message}: torch.nn.utils.prune.remove first", path=checkpoint.path, tensor=name)


def _check_whole_numbers(tensors: Sequence[Tensor], name: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse a tensor that differs between the files and is neither averaged nor taken from the first.

    Raises:
        RefusedError: it is one.
    """
    for tensor, checkpoint in zip(tensors, checkpoints, strict=True):
        is_whole = tensor.dtype.kind in (NumberKind.INTEGER, NumberKind.BOOL) and has_elements(tensor)
        if not is_whole and not _can_be_averaged(tensor):
            what = (isinstance(tensor, StoredTensor) and tensor.wrapper) or f"{tensor.dtype}"
            message = f"{what} tensors are not averaged, and the files differ"
            raise RefusedError(message, path=checkpoint.path, tensor=name)
        if len(tensor.shape) > 1:  # quantised weights, or masks
            message = f"{tensor.dtype} of {len(tensor.shape)} axes are not averaged, and the files differ"
            raise RefusedError(message, path=checkpoint.path, tensor=name)
    kinds = dict.fromkeys(str(tensor.dtype) for tensor in tensors)
    if any(tensor.dtype.is_floating for tensor in tensors):
        raise RefusedError(f"it is {' and '.join(kinds)} in the files", path=checkpoints[0].path, tensor=name)


def _can_be_averaged(tensor: Tensor) -> bool:
    return tensor.dtype in _AVERAGED and has_elements(tensor)


def _are_equal(a: Tensor, b: Tensor) -> bool:
    if not has_elements(a) or not has_elements(b):
        return False
    return a.dtype is b.dtype and equal_streams(a.chunks(), b.chunks())


def _list_other_entries(checkpoint: Checkpoint, chosen: StateDict) -> tuple[str, ...]:
    """Return keys of the root of the file beside the state dict that was averaged."""
    own = chosen.key.partition(".")[0]
    return tuple(str(key) for key in checkpoint.entries if str(key) != own) if chosen.key else ()
