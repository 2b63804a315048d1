"""Running calibration batches through a model and measuring what its BatchNorm layers see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from bntool.data.batches import Batch, Batches, copy_batch, find_bad_rows
from bntool.data.policies import LeftOut, OnBadData
from bntool.errors import RefusedError, UserCodeError
from bntool.models.user_code import running_user_code
from bntool.modules.borrowing import Borrowed
from bntool.modules.calling import tensors_in
from bntool.recalibration.activation_moments import HALF, measure
from bntool.recalibration.activations import Activations, StatisticsReads
from bntool.recalibration.batch_tree import BatchTree, Measured, Place
from bntool.recalibration.freed_memory import FreedMemory
from bntool.recalibration.memory_format import MemoryReads, is_faster_channels_last, is_laid_out_anew
from bntool.recalibration.moments import Array, Moments, Tally, put_side_by_side
from bntool.recalibration.ranks import Ranks, find_ranks

OnProgress = Callable[[int], None]


class NotFiniteError(BaseException):
    """A layer was given NaN or infinity. Not an Exception: a model must not be able to swallow it."""

    def __init__(self, layer: str, values: torch.Tensor) -> None:
        super().__init__(layer)
        self.layer = layer
        self.values = values


class TooFewValuesError(BaseException):
    """A batch has one value for each channel of a layer, by which nothing can be normalised."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer


@dataclass(frozen=True)
class Run:
    """One measurement: the model, its layers, and how bad batches are treated.

    Attributes:
        model: borrowed, and in eval mode throughout.
        borrowed: to add hooks through.
        layers: the layers to measure, by name.
        on_bad_data: what to do about a batch that holds NaN or infinity.
        on_progress: called with the number of samples done.
        called: layers that were called, as far as that was looked at.
        read: layers whose statistics were read by code outside of them, as far as that was looked at.
        shown: a batch to try other ways of running the model with, a copy; none where no layer may need that.
    """

    model: torch.nn.Module
    borrowed: Borrowed
    layers: Mapping[str, torch.nn.Module]
    on_bad_data: OnBadData = OnBadData.STOP
    on_progress: OnProgress | None = None
    called: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    shown: list[Batch] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """The measurement of one batch.

    Attributes:
        position: of the batch, as the data say it.
        calls: moments of each call of a layer, in order.
        samples: of the batch; 0 where it was left out.
        left_out: why, or None.
    """

    position: int | None
    calls: tuple[tuple[str, Moments], ...]
    samples: int
    left_out: LeftOut | None = None


class Keeper(Protocol):
    """Keeps what is measured while it grows."""

    def after_batch(self, tree: BatchTree, batches: Batches, position: int) -> None:
        """Note that all batches of this process's share before this position are measured."""

    def after_all(self, tree: BatchTree, batches: Batches) -> None:
        """Note that all batches of this process's share are measured."""


def measure_pooled(run: Run, batches: Batches, tree: BatchTree, keeper: Keeper | None = None) -> BatchTree:
    """Run all batches, each normalised by its own statistics in the given layers, and measure what these layers see.

    Layers stay in eval mode too: before each call of one its running statistics are set to those of the batch. That
    normalises as train mode does, and costs less.

    Args:
        run: the model and its layers.
        batches: this process's share.
        tree: what is known of others already; grows.
        keeper: is told of it.

    Returns:
        The tree, with what all ranks of a distributed job have measured.

    Raises:
        RefusedError: a batch holds NaN or infinity (``OnBadData.STOP``), or one value per channel; or a rank was lost.
        UserCodeError: the model or the data raised.
    """
    ranks = find_ranks()

    def measure_share() -> dict[Place, Measured]:
        _fill(tree, run, batches, ranks, keeper)
        return tree.nodes

    shares = ranks.share(measure_share)
    if ranks.world == 1:
        return tree
    together = BatchTree()
    for nodes in shares:
        together.update(nodes)
    return together


def _fill(tree: BatchTree, run: Run, batches: Batches, ranks: Ranks, keeper: Keeper | None) -> None:
    """Run this rank's batches, and add what they give at their positions in the list of all."""
    index_of = {name: index for index, name in enumerate(run.layers)}
    channels = count_channels(run.layers)
    # batches of the caller's own, where nobody dealt one list to the ranks: first those that come first on each rank
    is_dealt = batches.share.ranks == ranks.world
    unread, following = 0, batches.share.find_run(batches.count).start if batches.count is not None else 0
    for number, part in enumerate(_run_batches(run, batches)):
        position = number if part.position is None else part.position
        if not is_dealt:
            position = position * ranks.world + ranks.rank
        by_layer: dict[str, Tally] = {}
        for name, moments in part.calls:
            tally = Tally.of(moments)
            by_layer[name] = by_layer[name].and_(tally) if name in by_layer else tally
        came_through = part.left_out is None
        measured = Measured(
            tally=put_side_by_side([by_layer.get(name) for name in run.layers], channels) if came_through else None,
            order=tuple(index_of[name] for name in by_layer),
            samples=part.samples,
            batches=int(came_through),
            left_out=(*batches.bad_inputs[unread:], *([] if part.left_out is None else [part.left_out])),
        )
        unread, following = len(batches.bad_inputs), position + 1
        tree.add(position, measured)
        if keeper is not None:
            keeper.after_batch(tree, batches, following)
    if batches.bad_inputs[unread:]:  # nothing could be read of the batches after the last
        tree.add(following, Measured(left_out=tuple(batches.bad_inputs[unread:])))
    if keeper is not None:
        keeper.after_all(tree, batches)


def count_channels(layers: Mapping[str, torch.nn.Module]) -> list[int]:
    """Count the channels of each layer."""
    return [layer._buffers["running_mean"].numel() for layer in layers.values()]  # type: ignore[union-attr]


def _run_batches(run: Run, batches: Iterable[Batch]) -> Iterator[Part]:
    """Run the batches and yield what each gave, with images channels last where that is faster.

    They stay as they are where the model cannot take that, or computes something else with it.
    """
    channels_last = is_faster_channels_last(run.model)
    is_known = False  # whether the model would notice
    calls: list[tuple[str, Moments]] = []
    activations = Activations(run.layers, run.borrowed, partial(_normalise_by_own, calls), called=run.called)
    _prepare_halves(run.layers)
    done, memory = 0, FreedMemory()
    for batch in (batch.fit(run.model) for batch in batches):
        memory.return_unused()
        # what is laid out anew is a copy: if the model writes to it, the batch can still be run
        for layout in (True, False) if channels_last and is_laid_out_anew(batch, run.model) else (False,):
            calls.clear()
            reads = MemoryReads()
            try:
                with reads if layout and not is_known else contextlib.nullcontext():
                    left_out = _run_checked(run, batch, activations, channels_last=layout)
                if not reads.happened:
                    is_known = is_known or (layout and left_out is None)
                    break
            except UserCodeError:
                if not layout:
                    raise
            channels_last = False  # perhaps a view() that wants contiguous activations; if not, it raises again
        if not done and left_out is None:
            _let_idle_layers_run(run, batch, activations, calls)
        yield Part(batch.position, () if left_out else tuple(calls), 0 if left_out else batch.samples, left_out)
        done += batch.samples
        if run.on_progress is not None:
            run.on_progress(done)


def _let_idle_layers_run(run: Run, batch: Batch, activations: Activations, calls: list[tuple[str, Moments]]) -> None:
    """Put layers in train mode that run in it alone, if the batch then comes through them.

    Some models fold a BatchNorm on the fly where they find it in eval mode: its statistics are read, and it never runs.
    """
    idle = run.layers.keys() - {name for name, _ in calls} - run.called
    if not idle:
        return
    run.shown.append(copy_batch(batch))
    before = list(calls)
    with contextlib.suppress(UserCodeError, RefusedError):
        with StatisticsReads({name: run.layers[name] for name in idle}) as reads:
            copy_batch(batch).run(run.model)
        run.read.update(reads.layers)
        for name in reads.layers:
            run.layers[name].training = True
        calls.clear()
        if reads.layers and _run_checked(run, copy_batch(batch), activations, channels_last=False) is None:
            found = {name for name, _ in calls}
            if found >= {name for name, _ in before} and found & reads.layers:
                return
    for name in idle:
        run.layers[name].training = False
    calls[:] = before


def _normalise_by_own(
    calls: list[tuple[str, Moments]], name: str, layer: torch.nn.Module, values: torch.Tensor
) -> None:
    """Add the moments of a call, and let the layer normalise by them."""
    moments = measure(values)
    if not moments.count:  # no proposals in this image
        return
    check_moments(moments, name, values)
    calls.append((name, moments))
    if not layer.training:
        set_statistics(layer, mean=moments.mean, variance=moments.biased_variance)


def _prepare_halves(layers: Mapping[str, torch.nn.Module]) -> None:
    """Let the kernel take the statistics of a batch where a layer's own are in half precision, which holds them too
    badly.
    """
    for name, layer in layers.items():
        if _statistics_dtype(layer) in HALF:
            if isinstance(layer, torch.nn.SyncBatchNorm) and find_ranks().world > 1:
                raise RefusedError(
                    "SyncBatchNorm of half precision normalises batches with those of other ranks; make it float32, or "
                    "recalibrate in one process",
                    tensor=name,
                )
            layer.training = True


def _run_checked(run: Run, batch: Batch, activations: Activations, *, channels_last: bool) -> LeftOut | None:
    """Run a batch; why it is to be left out where it holds NaN or infinity.

    Raises:
        RefusedError, UserCodeError: as in :func:`measure_pooled`.
    """
    if not has_finite_inputs(batch):
        return accept(describe_bad(batch), run.on_bad_data)
    try:
        with activations.watching(), running_user_code(f"running the model on {batch.description}"):
            batch.run(run.model, channels_last=channels_last)
    except NotFiniteError as error:
        return accept(describe_bad(batch, error), run.on_bad_data)
    except TooFewValuesError as error:
        raise RefusedError(
            f"{batch.description} has one value for each channel of this layer, by which nothing can be normalised; "
            "use a larger --batch-size, or --method exact",
            tensor=error.layer,
        ) from None
    return None


def describe_bad(batch: Batch, error: NotFiniteError | None = None) -> LeftOut:
    """Find which samples of a batch hold NaN or infinity, or lead to it at a layer; the whole batch is left out for
    them.
    """
    if error is None:
        samples, place = batch.find_bad_samples(), "in"
    else:
        by_sample = error.values.shape[0] == batch.samples
        samples, place = find_bad_rows(error.values) if by_sample else [], f"at {error.layer}, from"
    whole = f" (all {batch.samples} samples of the batch)" if batch.samples > 1 else ""
    reason = f"NaN or infinity {place} {batch.describe(samples)}{whole}"
    return LeftOut(reason, batch.samples, error.layer if error is not None else None)


def accept(left_out: LeftOut, on_bad_data: OnBadData) -> LeftOut:
    """Give back the facts about a batch that is left out, unless the caller asked to stop at one.

    Raises:
        RefusedError: ``OnBadData.STOP``.
    """
    if on_bad_data is OnBadData.STOP:
        raise RefusedError(f"{left_out.reason}; --on-bad-data skip leaves such batches out", tensor=left_out.layer)
    return left_out


def has_finite_inputs(batch: Batch) -> bool:
    """Return whether no input holds NaN or infinity."""
    return all(map(_is_finite, tensors_in(batch.inputs)))


def _is_finite(tensor: torch.Tensor) -> bool:
    with contextlib.suppress(RuntimeError):  # of sparse, nested or meta tensors and float8 only layers can tell
        return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    return True


def check_moments(moments: Moments, layer: str, values: torch.Tensor, *, least: int = 2) -> None:
    """Raise where the moments of the values that a layer was given are not finite, or of too few values."""
    if moments.count < least:
        raise TooFewValuesError(layer)
    if not moments.is_finite:
        raise NotFiniteError(layer, values)


def set_statistics(module: torch.nn.Module, *, mean: Array, variance: Array) -> None:
    """Set the running statistics of a live module, float64 of shape (channels,), rounded to its dtype."""
    with torch.no_grad():
        module._buffers["running_mean"].copy_(torch.from_numpy(mean))  # type: ignore[union-attr]
        module._buffers["running_var"].copy_(torch.from_numpy(variance))  # type: ignore[union-attr]


def _statistics_dtype(module: torch.nn.Module) -> torch.dtype:
    return module._buffers["running_mean"].dtype  # type: ignore[union-attr]
