"""New statistics of a checkpoint from partials that shares of the batches gave: without model, data and torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bntool.batchnorm import STATISTICS, check_globs, selects
from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.checkpoint import StateDict, check_changeable
from bntool.checkpoints.dtypes import BY_NAME, DType, decode_numbers, encode_numbers
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.outputs import check_outputs_apart
from bntool.checkpoints.records import check_not_folded
from bntool.checkpoints.saving import check_output, save_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.checkpoints.tensors import read_numbers
from bntool.errors import UsageError
from bntool.names import join_name
from bntool.plan import check_plan
from bntool.recalibration.dtype_limits import check_holds, fit_plan, list_promoted
from bntool.recalibration.fingerprints import fingerprint_state_dict
from bntool.recalibration.freed_memory import keeping_freed_memory
from bntool.recalibration.moments import Array
from bntool.recalibration.new_statistics import Blend, LayerFacts, Measurement, Pair, check_prior, conclude
from bntool.recalibration.partials import Origin, merge_partials
from bntool.recalibration.results import CheckpointRecalibration, PreprocessingSteps, with_record
from bntool.recalibration.warnings import warn_of_fewer, warn_of_lacking, warn_of_platforms


def merge_statistics(  # noqa: PLR0913 as many as the command has options
    path: str | os.PathLike[str],
    partials: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    prior: float = 0.0,
    promote: bool = False,
    layers: Sequence[str] = (),
    state_dict: str | None = None,
    force: bool = False,
    strict: bool = False,
) -> CheckpointRecalibration:
    """Give a checkpoint the statistics that all partials together hold; what ``--from-partials`` does.

    The file is the same, byte for byte, as one run over all batches writes, in whatever order the partials are given.

    Example:
        >>> bntool.merge_statistics("ckpt.pt", ["part-1.safetensors", "part-2.safetensors"], "out.pt")

    Args:
        path: the checkpoint that the partials were measured with; never written to.
        partials: files of :func:`~bntool.recalibration.checkpoint.recalibrate_checkpoint`, one of each shard.
        output: the file to write; None to write none.
        prior: count the old statistics as so many samples, see :func:`~bntool.recalibration.live.plan_recalibration`.
        promote: store statistics that half precision cannot hold as float32.
        layers: globs; none for all layers that were measured.
        state_dict: its key; None for that of the partials.
        force: replace a file that exists.
        strict: refuse if a layer is skipped.

    Raises:
        UsageError: there are no partials, the output is one of them, or a glob selects no layer.
        FileError: a file cannot be read or written.
        RefusedError: partials do not fit the checkpoint or each other, one is missing or there twice, or no layer can
            be given statistics.
    """
    check_prior(prior)
    target = None if output is None else Path(output)
    paths = [Path(partial) for partial in partials]
    if not paths:
        raise UsageError("there is no partial to merge")
    check_outputs_apart([target], paths)
    with open_checkpoint(path) as source:
        check_changeable(source)
        check_output(source, target, force=force)

        def choose(origin: Origin) -> StateDict:
            is_there = any(one.key == origin.state_dict for one in source.state_dicts)
            return choose_state_dict(source, origin.state_dict if state_dict is None and is_there else state_dict)

        with keeping_freed_memory():
            merged = merge_partials(paths, checkpoint=lambda origin: fingerprint_state_dict(choose(origin)), path=path)
        first, origin = merged.first, merged.first.origin
        chosen = choose(origin)
        check_not_folded(source.records.get(chosen.key, ()), path)
        measurement = Measurement.of(merged.measured, first.channels)
        measurement.check(origin.data_name)
        check_globs(layers, [*(f.name for f in first.layers.values()), *(skip.layer for skip in first.skips)])
        wanted = {name: facts for name, facts in first.layers.items() if selects(layers, facts.name)}
        lacking = tuple(facts.name for facts in wanted.values() if not _is_held(chosen, facts))
        result = conclude(
            measurement,
            wanted,
            Blend(_read_stored(chosen, wanted), method=origin.method, prior=prior),
            merged.paths,
            skips=[skip for skip in first.skips if selects(layers, skip.layer)],
            precision=origin.precision,
        )
        check_plan(result.plan, path, strict=strict)
        eps = {wanted[name].name: statistics.eps for name, statistics in result.statistics.items()}
        plan = fit_plan(result.plan, chosen, eps=eps, promote=promote)
        for name, new in result.statistics.items():
            check_holds(new.variance.tolist(), wanted[name].dtype, eps=new.eps, layer=name)
        plan = with_record(
            plan,
            source,
            chosen,
            result,
            data=origin.data_name,
            seed=origin.seed,
            preprocessing=origin.preprocessing,
        )
        edited = apply_plan(source, plan)
        if target is not None:
            save_checkpoint(edited, target, force=force)
        return CheckpointRecalibration(
            checkpoint=edited,
            state_dict=chosen,
            recalibration=result,
            before=None,
            after=None,
            flipped=None,
            output_changes=None,
            evaluated_on=None,
            output=None if target is None else str(target),
            kept=False,
            preprocessing=None
            if origin.preprocessing is None
            else PreprocessingSteps(origin.preprocessing, origin.preprocessing_origin or ""),
            promoted=list_promoted(plan),
            lacking=lacking,
            warnings=(
                *warn_of_fewer(result, asked=origin.samples, there=None, cut=False),
                *warn_of_lacking(lacking, result),
                *warn_of_platforms(merged.platforms, what="the partials were"),
            ),
        )


def _is_held(state_dict: StateDict, facts: LayerFacts) -> bool:
    return state_dict.full_name(join_name(facts.names[0], STATISTICS[0])) in state_dict.tensors


def _read_stored(state_dict: StateDict, layers: Mapping[str, LayerFacts]) -> dict[str, Pair]:
    """Return the statistics of the file as the model had them; those of a new layer where the file lacks them."""
    stored: dict[str, Pair] = {}
    for name, facts in layers.items():
        if _is_held(state_dict, facts):
            mean, variance = (
                _read(state_dict, join_name(facts.names[0], role), BY_NAME[facts.dtype]) for role in STATISTICS
            )
        else:
            mean, variance = np.zeros(facts.channels), np.ones(facts.channels)
        stored[name] = mean, variance
    return stored


def _read(state_dict: StateDict, name: str, dtype: DType) -> Array:
    numbers = read_numbers(state_dict.tensor(name), name=name)
    return np.array(decode_numbers(encode_numbers(numbers, dtype), dtype))
