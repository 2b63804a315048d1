"""Comparing two checkpoints: BatchNorm layers in their own terms, other tensors byte by byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from bntool.batchnorm import (
    AFFINE,
    BUFFERS,
    COUNTER,
    DEFAULT_EPS,
    ROLES,
    STATISTICS,
    VECTORS,
    BatchNorm,
    EpsSource,
    check_globs,
    selects,
)
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.checkpoint import Checkpoint, NotUnderstood, StateDict
from bntool.checkpoints.files import quote
from bntool.checkpoints.records import find_recorded_eps
from bntool.checkpoints.state_dicts import (
    FLAT_AVERAGE,
    choose_state_dict,
    find_not_understood,
    flatten_average,
    part_flat_average,
)
from bntool.checkpoints.tensors import (
    StoredTensor,
    Tensor,
    announce,
    count_elements,
    equal_streams,
    has_elements,
    read_bytes,
    read_numbers,
)
from bntool.choices import choose
from bntool.comparison.name_alignment import align_names
from bntool.comparison.options import Expectation
from bntool.errors import BntoolError, UsageError
from bntool.graphs.architectures.recognition import assume_eps
from bntool.modules.opening import Source, open_source
from bntool.names import join_name
from bntool.progress import OnProgress, count, ignore
from bntool.representation import html_repr, list_first
from bntool.verification.missing_statistics import describe_absence
from bntool.verification.statistics_shift import NO_SHIFT, StatisticsShift, measure_shift

_SHOWN = 6  # layers named in a repr
_SETTINGS = ("momentum", "training", "affine", "track_running_stats")
_SET_BY_FREEZE = ("training", "requires_grad")
_SAID = (EpsSource.MODULE, EpsSource.PROTOTXT)  # by the file itself
_PROGRAMS = ("onnx.",)
_WITHOUT_COUNTER = ("onnx.", "caffe.", "keras.", "tensorflow.")  # whose BatchNorm counts no batches


class Change(Enum):
    """The relation of a tensor of A to the tensor of that name in B."""

    SAME = "same"  # dtype, shape and every bit
    VALUES = "changed"  # elements differ
    DTYPE = "dtype"  # the same numbers in another dtype
    SHAPE = "shape"
    ONLY_A = "only in A"
    ONLY_B = "only in B"
    UNKNOWN = "not comparable"  # the file holds no plain elements for it


_KEPT_BY = {
    Expectation.FROZEN: ROLES,
    Expectation.NORM_EVAL: BUFFERS,
    Expectation.STATS_ONLY: AFFINE,
}


@dataclass(frozen=True)
class LayerComparison:
    """One BatchNorm in A and B.

    Attributes:
        name: in A's spelling, without prefix.
        changes: by role, for each tensor present on either side.
        settings: what both sides say of the layer beside its tensors and not alike, e.g. eps: A's value and B's.
        statistics: how far running_mean and running_var moved from A to B, in the unit that recalibrating has; None
            where that cannot be said.
        scale_change, shift_change: how far scale and shift moved as vectors, relative to their length in A.
        scales: of A and of B by channel, where both have statistics and one of them changed.
        eps_known: the file says eps, or the architecture does that it is recognised as; else PyTorch's default stands
            in, which these numbers are coarse enough for.
    """

    name: str
    changes: Mapping[str, Change]
    settings: Mapping[str, tuple[object, object]] = field(default_factory=dict)
    statistics: StatisticsShift | None = None
    scale_change: float | None = None
    shift_change: float | None = None
    eps_known: bool = False
    scales: tuple[Sequence[float], Sequence[float]] | None = field(default=None, repr=False, compare=False)

    @property
    def changed(self) -> bool:
        return bool(self.settings) or any(change is not Change.SAME for change in self.changes.values())

    @property
    def severity(self) -> float:
        """The distance that the layer moved, to sort by: the largest of its measures, of statistics in the worst
        channel.
        """
        worst = None if self.statistics is None else self.statistics.worst
        known = [measure for measure in (worst, self.scale_change, self.shift_change) if measure is not None]
        if any(math.isnan(measure) for measure in known):
            return math.inf
        return max(known, default=math.inf if self.changed else 0.0)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two state dicts side by side.

    Attributes:
        a, b: what was compared.
        path_b: what B puts before the names of A beyond wrappers' prefixes, e.g. ``backbone.``; likewise ``path_a``.
        layers: the selected BatchNorm layers of either side, those that moved most first.
        others: every other tensor by name, without prefix.
        not_compared: keys of the other state dicts of A and of B.
        expectation: what they should be to each other; None where that was not asked.
        violations: what contradicts it, one sentence each.
        recorded: the layers that a freeze recorded in A, where they are those that are compared; empty where not.
        notes: what is worth saying of how the files of A and of B were found and read.
        not_understood: what may be a BatchNorm of A and of B, and could not be read.
    """

    a: StateDict
    b: StateDict
    path_a: str
    path_b: str
    layers: tuple[LayerComparison, ...]
    others: Mapping[str, Change]
    assumptions: tuple[str, ...] = ()
    not_compared: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    expectation: Expectation | None = None
    violations: tuple[str, ...] = ()
    recorded: tuple[str, ...] = ()
    notes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    not_understood: tuple[Sequence[NotUnderstood], Sequence[NotUnderstood]] = ((), ())

    _repr_html_ = html_repr

    def __repr__(self) -> str:
        changed = [layer.name for layer in self.layers if layer.changed]
        others = sum(change is not Change.SAME for change in self.others.values())
        listed = list_first(changed, _SHOWN)
        met = "" if self.expectation is None else f"; {self.expectation.value}: {'no' if self.violations else 'yes'}"
        return (
            f"<Comparison: {len(changed)} of {len(self.layers)} BatchNorm layers changed{': ' * bool(changed)}{listed}"
            f"; {others} of {len(self.others)} other tensors{met}>"
        )

    @property
    def has_no_layers(self) -> bool:
        """Whether there is no layer that could be as expected: what the violations say is of the files."""
        return not self.layers and self.expectation not in (None, Expectation.IDENTICAL)

    @property
    def identical(self) -> bool:
        return not any(layer.changed for layer in self.layers) and all(c is Change.SAME for c in self.others.values())


def diff(  # noqa: PLR0913 as many as the command has options
    a: Source,
    b: Source,
    *,
    state_dict: str | None = None,
    state_dict_b: str | None = None,
    prefix: str | None = None,
    prefix_b: str | None = None,
    layers: Sequence[str] = (),
    others: bool = True,
    expect: Expectation | str | None = None,
    on_progress: OnProgress = ignore,
) -> Comparison:
    """Compare a state dict of one checkpoint with one of another, whatever their formats; what ``bntool diff`` does.

    Examples:
        >>> bntool.diff("before.pt", model, expect="norm-eval").violations
        ()

    Args:
        a: a path, an open checkpoint, a state dict, or a live model.
        b: likewise.
        state_dict: its key in both files; None for the one chosen by rule in each.
        state_dict_b: its key in B where it is another, e.g. the averaged copy beside the model.
        prefix: only what lies under it is compared, e.g. ``net.`` where one state dict holds a model and its average;
            in B, too, where that has such names.
        prefix_b: the same for B where it is another, e.g. ``ema.``; ``ema_`` for the average that mmcv's EMAHook keeps
            beside the model, which is compared under the model's names.
        layers: globs; only BatchNorm layers whose name matches are compared as such. Without any, and where frozen or
            norm-eval is expected, those that a freeze recorded in A, if it did.
        others: compare all other tensors, too: this reads both files whole.
        expect: what they should be to each other; what contradicts it are the violations.
        on_progress: called with how many of all other tensors were compared.

    Raises:
        UsageError: there is no such state dict or prefix, or a glob selects no layer.
        FileError: a file or a tensor cannot be read.
    """
    expectation = None if expect is None else choose(Expectation, expect, option="expect")
    with open_source(a) as one, open_source(b) as two:
        if state_dict_b is None and state_dict is not None and _has(two, state_dict):
            state_dict_b = state_dict
        side_a = choose_side(one, state_dict, prefix, option="--prefix")
        side_b = choose_side(two, state_dict_b, prefix_b, option="--prefix-b")
        side_a, side_b = _relate_sides(side_a, side_b, ask_b=prefix_b is None)
        comparison = _compare_sides(
            side_a,
            side_b,
            layers=layers,
            as_recorded=expectation in (Expectation.FROZEN, Expectation.NORM_EVAL) and not layers,
            others=others,
            on_progress=on_progress,
        )
        comparison = dataclasses.replace(comparison, notes=(one.notes, two.notes))
    if expectation is None:
        return comparison
    violations = tuple(find_violations(comparison, expectation))
    return dataclasses.replace(comparison, expectation=expectation, violations=violations)


@dataclass(frozen=True)
class Side:
    """A or B.

    Attributes:
        part: what names must begin with to be compared, after the prefix of wrappers; "" for all of them.
        is_flat: the state dict is an average that mmcv's EMAHook keeps beside its model, under the model's names.
    """

    checkpoint: Checkpoint
    state_dict: StateDict
    part: str
    is_flat: bool = False

    def spell(self, path: str) -> str:
        """Spell what compared names begin with as the file does, after the prefix of wrappers."""
        return flatten_average(path) if self.is_flat else self.part + path

    def list_layers(self) -> list[str]:
        """List its BatchNorm layers, without what their names begin with."""
        return [layer.name.removeprefix(self.part) for layer in _under(self.part, find_batchnorms(self.state_dict))]


def _compare_sides(
    side_a: Side,
    side_b: Side,
    *,
    layers: Sequence[str],
    as_recorded: bool,
    others: bool,
    on_progress: OnProgress,
) -> Comparison:
    a, one, part_a = side_a.checkpoint, side_a.state_dict, side_a.part
    b, two, part_b = side_b.checkpoint, side_b.state_dict, side_b.part
    names_a = {name.removeprefix(part_a): full for name, full in _list_names(one).items() if name.startswith(part_a)}
    names_b = {name.removeprefix(part_b): full for name, full in _list_names(two).items() if name.startswith(part_b)}
    path_a, path_b = align_names(names_a, names_b)
    tensors_a = {_align(name, path_a): one.tensors[full] for name, full in names_a.items()}
    tensors_b = {_align(name, path_b): two.tensors[full] for name, full in names_b.items()}
    found_a, assumed_a = assume_eps(one, _with_recorded_eps(a, one))
    found_b, assumed_b = assume_eps(two, _with_recorded_eps(b, two))
    layers_a = {_align(layer.name + ".", part_a + path_a).removesuffix("."): layer for layer in _under(part_a, found_a)}
    layers_b = {_align(layer.name + ".", part_b + path_b).removesuffix("."): layer for layer in _under(part_b, found_b)}
    every = list(dict.fromkeys([*layers_a, *layers_b]))
    check_globs(layers, every)
    recorded = _find_frozen(a, one) if as_recorded else ()
    frozen = {_align(f"{name}.", part_a + path_a).removesuffix(".") for name in recorded if name.startswith(part_a)}
    selected = [name for name in every if (name in frozen if frozen else selects(layers, name))]
    for found in (layers_a, layers_b):
        announce(tensor for name in selected if name in found for tensor in found[name].tensors.values())
    compared = [
        _compare_layer(name, layers_a.get(name), layers_b.get(name), tensors_a, tensors_b)
        for name in (*selected, *sorted(frozen.difference(selected)))
    ]
    ordered = sorted(compared, key=lambda layer: -layer.severity)
    in_layers = {join_name(name, role) for name in selected for role in ROLES}
    rest = [name for name in dict.fromkeys([*tensors_a, *tensors_b]) if name not in in_layers] if others else []
    sizes = {name: sum(_size(side[name]) for side in (tensors_a, tensors_b) if name in side) for name in rest}
    return Comparison(
        a=one,
        b=two,
        path_a=side_a.spell(path_a),
        path_b=side_b.spell(path_b),
        layers=tuple(ordered),
        assumptions=tuple(dict.fromkeys((*assumed_a, *assumed_b))),
        others={
            name: _compare(name, tensors_a.get(name), tensors_b.get(name))
            for name in count(sizes, "comparing tensors", on_progress)
        },
        not_compared=(_other_keys(a, one), _other_keys(b, two)),
        not_understood=(find_not_understood(a, one), find_not_understood(b, two)),
        recorded=tuple(sorted(frozen)),
    )


def _size(tensor: Tensor) -> int:
    return tensor.dtype.byte_count(count_elements(tensor.shape))


def _list_names(state_dict: StateDict) -> dict[str, str]:
    """Map each name without the prefix of wrappers to the full name."""
    return {state_dict.strip(name): name for name in state_dict.tensors}


def choose_side(checkpoint: Checkpoint, key: str | None, prefix: str | None, *, option: str) -> Side:
    """Choose the state dict of a checkpoint that is compared.

    Raises:
        UsageError: there is no such state dict, or no name in it begins with the prefix.
    """
    state_dict = choose_state_dict(checkpoint, key)
    if not prefix:
        return Side(checkpoint, state_dict, "")
    dotted = prefix if prefix.endswith(".") else f"{prefix}."
    names = _list_names(state_dict)
    for part in (dotted, dotted.removeprefix(state_dict.prefix)):
        if any(name.startswith(part) for name in names):
            return Side(checkpoint, state_dict, part)
    flat = part_flat_average(state_dict)
    if flat is not None and prefix in (FLAT_AVERAGE, FLAT_AVERAGE.rstrip("_")):
        return Side(checkpoint, flat[1], "", is_flat=True)
    parts = list(dict.fromkeys(f"{name.partition('.')[0]}." for name in names if "." in name))
    parts = [FLAT_AVERAGE, *parts] if flat is not None else parts
    listed = list_first(list(map(quote, parts)), _SHOWN)
    message = f"{option} {quote(prefix)}: no tensor's name begins with it; there are {listed or 'none with a dot'}"
    raise UsageError(message, path=checkpoint.path)


def _relate_sides(a: Side, b: Side, *, ask_b: bool) -> tuple[Side, Side]:
    """Return both sides with B under the prefix of A, where B has such names.

    Where one side is the average that mmcv keeps beside a model, the other side is its model without that average.

    Args:
        ask_b: no prefix is given for B.
    """
    if ask_b and a.is_flat:
        parted = part_flat_average(b.state_dict)
        b = b if parted is None else dataclasses.replace(b, state_dict=parted[1], is_flat=True)
    elif ask_b and any(name.startswith(a.part) for name in _list_names(b.state_dict)):
        b = dataclasses.replace(b, part=a.part)
    if a.is_flat != b.is_flat:
        whole = b if a.is_flat else a
        parted = part_flat_average(whole.state_dict)
        model = whole if parted is None else dataclasses.replace(whole, state_dict=parted[0])
        return (a, model) if a.is_flat else (model, b)
    return a, b


def _under(part: str, batchnorms: Sequence[BatchNorm]) -> list[BatchNorm]:
    return [layer for layer in batchnorms if f"{layer.name}.".startswith(part)]


def _find_frozen(checkpoint: Checkpoint, state_dict: StateDict) -> tuple[str, ...]:
    """Return the BatchNorm layers that the last freeze recorded for a state dict."""
    frozen: tuple[str, ...] = ()
    for record in checkpoint.records.get(state_dict.key, ()):
        policy = record.get("policy")
        layers = policy.get("layers") if isinstance(policy, Mapping) else None
        if record.get("operation") == "freeze" and isinstance(layers, list):
            frozen = tuple(name for name in layers if isinstance(name, str))
    return frozen


def _other_keys(checkpoint: Checkpoint, compared: StateDict) -> tuple[str, ...]:
    return tuple(state_dict.key for state_dict in checkpoint.state_dicts if state_dict.key != compared.key)


def find_violations(comparison: Comparison, expectation: Expectation) -> list[str]:
    """List what contradicts an expectation, one sentence each; empty where it is met.

    A layer that is on one side only contradicts all of them; so does there being no layer at all, except that files
    without any can be identical.
    """
    if expectation is not Expectation.IDENTICAL and not comparison.layers:
        return list(_describe_absences(comparison))
    kept = _KEPT_BY.get(expectation, ROLES)
    found = []
    for layer in comparison.layers:
        bad = _describe({role: change for role, change in layer.changes.items() if _is_bad(role, change, kept)})
        bad += [
            f"{name} differs ({old} and {new})"
            for name, (old, new) in layer.settings.items()
            if name not in _SET_BY_FREEZE or expectation is Expectation.IDENTICAL
        ]
        if not layer.changes:
            bad = ["it is in neither file, but was frozen"]
        if bad:
            found.append(f"{layer.name}: {'; '.join(bad)}")
    if expectation in (Expectation.IDENTICAL, Expectation.STATS_ONLY):
        others = {name: change for name, change in comparison.others.items() if change is not Change.SAME}
        found += [f"{name}: {_OF_ONE.get(change, change.value)}" for name, change in others.items()]
    return found


def _describe_absences(comparison: Comparison) -> Iterator[str]:
    """Say of both sides why there is no layer to hold against each other, in one sentence where it is the same."""
    a = describe_absence(comparison.a, comparison.not_understood[0])
    b = describe_absence(comparison.b, comparison.not_understood[1])
    for side, absence in (("A and B", a),) if a == b else (("A", a), ("B", b)):
        yield f"there is no layer to hold against each other, in {side} {absence}"


_SENTENCES = {
    Change.VALUES: "{} changed",
    Change.DTYPE: "the dtype of {} changed",
    Change.SHAPE: "the shape of {} changed",
    Change.ONLY_A: "{} only in A",
    Change.ONLY_B: "{} only in B",
    Change.UNKNOWN: "{} not comparable",
}


_OF_ONE = {Change.DTYPE: "its dtype changed", Change.SHAPE: "its shape changed"}


def _describe(changes: Mapping[str, Change]) -> list[str]:
    """Describe which tensors of a layer changed, grouped by how they changed."""
    roles: dict[Change, list[str]] = {}
    for role, change in changes.items():
        roles.setdefault(change, []).append(role)
    return [_SENTENCES[change].format(", ".join(those)) for change, those in roles.items()]


def _is_bad(role: str, change: Change, kept: Sequence[str]) -> bool:
    # a tensor that is there on one side only, or has another dtype or shape, is no moved statistic
    return change is not Change.SAME and (role in kept or change is not Change.VALUES)


def _has(checkpoint: Checkpoint, key: str) -> bool:
    return len(checkpoint.state_dicts) > 1 or any(s.key == key for s in checkpoint.state_dicts)


def _align(name: str, path: str) -> str:
    return name.removeprefix(path)


def _compare_layer(
    name: str,
    a: BatchNorm | None,
    b: BatchNorm | None,
    tensors_a: Mapping[str, Tensor],
    tensors_b: Mapping[str, Tensor],
) -> LayerComparison:
    changes = {}
    for role in ROLES:
        full = join_name(name, role)
        if full in tensors_a or full in tensors_b:
            changes[role] = _compare(full, tensors_a.get(full), tensors_b.get(full))
    for role, sources in _list_sources(name, a, b).items():
        compared = (_compare(source, tensors_a.get(source), tensors_b.get(source)) for source in sources)
        if role not in changes and any(change is not Change.SAME for change in compared):
            changes[role] = Change.VALUES
    if a is None or b is None:
        return LayerComparison(name, changes)
    if any(layer.class_path.startswith(_WITHOUT_COUNTER) for layer in (a, b)):
        changes.pop(COUNTER, None)
    settings = _compare_settings(a, b)
    a, b = _with_eps(a, of=b), _with_eps(b, of=a)
    if a.eps == b.eps and all(change is Change.SAME for change in changes.values()):
        return LayerComparison(name, changes, settings, NO_SHIFT, 0.0, 0.0, eps_known=a.eps is not None)
    return dataclasses.replace(_measure(name, changes, a, b), settings=settings)


def _list_sources(name: str, *layers: BatchNorm | None) -> dict[str, set[str]]:
    """Return the names of the tensors that the model computes weight or bias from, in either file."""
    found: dict[str, set[str]] = {}
    for layer in filter(None, layers):
        for role, sources in layer.computed.items():
            leaves = (source.removeprefix(f"{layer.name}.") for source in sources)
            found.setdefault(role, set()).update(f"{name}.{leaf}".removeprefix(".") for leaf in leaves)
    return found


def _compare_settings(a: BatchNorm, b: BatchNorm) -> dict[str, tuple[object, object]]:
    """Return settings of a layer that both files state and that differ; what only one file states is not compared."""
    one, two = _list_settings(a), _list_settings(b)
    return {name: (value, two[name]) for name, value in one.items() if name in two and two[name] != value}


def _list_settings(layer: BatchNorm) -> dict[str, object]:
    settings: dict[str, object] = {name: layer.attributes[name] for name in _SETTINGS if name in layer.attributes}
    if layer.class_path.startswith(_PROGRAMS) and "training" in settings:
        settings["training_mode"] = settings.pop("training")  # no switch of train(): it is part of what a node computes
    affine = {role: layer.tensors.get(role) for role in AFFINE}
    gradients = {r: t.requires_grad for r, t in affine.items() if isinstance(t, StoredTensor) and t.is_parameter}
    told = {value for value in gradients.values() if value is not None}
    if told:
        only = ", ".join(role for role, value in gradients.items() if value)
        settings["requires_grad"] = told.pop() if len(told) == 1 else f"{only} only"
    if layer.eps is not None and layer.eps_source in _SAID:
        settings["eps"] = layer.eps
    if layer.class_path:
        settings["kind"] = layer.kind.value
    return settings


def _with_recorded_eps(checkpoint: Checkpoint, state_dict: StateDict) -> tuple[BatchNorm, ...]:
    """Return the layers, with the eps that a conversion or a freeze recorded where the file has no other place for
    it.
    """
    recorded = find_recorded_eps(checkpoint.records.get(state_dict.key, ()))
    return tuple(
        dataclasses.replace(layer, eps=recorded[layer.name], eps_source=EpsSource.MODULE)
        if layer.eps is None and layer.name in recorded
        else layer
        for layer in find_batchnorms(state_dict)
    )


def _with_eps(layer: BatchNorm, *, of: BatchNorm) -> BatchNorm:
    """Give a layer the eps that the other file states, if its own file has no place for eps."""
    return layer if layer.eps is not None else dataclasses.replace(layer, eps=of.eps)


def _measure(name: str, changes: Mapping[str, Change], a: BatchNorm, b: BatchNorm) -> LayerComparison:
    before, after = _numbers(a), _numbers(b)
    lengths = {len(values) for values in (*before.values(), *after.values())}
    if len(lengths) != 1 or not all(role in side for side in (before, after) for role in STATISTICS):
        return LayerComparison(name, changes)
    eps_a, eps_b = (DEFAULT_EPS if layer.eps is None else layer.eps for layer in (a, b))
    statistics = measure_shift(
        (before["running_mean"], before["running_var"]),
        (after["running_mean"], after["running_var"]),
        old_eps=eps_a,
        new_eps=eps_b,
    )
    unread = any(
        role in one.tensors and role not in numbers for one, numbers in ((a, before), (b, after)) for role in VECTORS
    )
    if a.computed or b.computed or unread:  # weight or bias is not in the file, or no plain numbers
        return LayerComparison(name, changes, statistics=statistics)
    scale_a, shift_a = _scale_and_shift(before, eps_a)
    scale_b, shift_b = _scale_and_shift(after, eps_b)
    return LayerComparison(
        name,
        changes,
        statistics=statistics,
        scale_change=_relative(scale_a, scale_b),
        shift_change=_relative(shift_a, shift_b),
        eps_known=None not in (a.eps, b.eps),
        scales=(scale_a, scale_b),
    )


def _numbers(layer: BatchNorm) -> dict[str, Sequence[float]]:
    found: dict[str, Sequence[float]] = {}
    for role in ("weight", "bias", *STATISTICS):
        tensor = layer.tensors.get(role)
        if tensor is not None and has_elements(tensor):
            try:
                found[role] = read_numbers(tensor)
            except ValueError:
                continue
    return found


def _scale_and_shift(numbers: Mapping[str, Sequence[float]], eps: float) -> tuple[list[float], list[float]]:
    """Compute scale and shift as :func:`bntool.batchnorm.scale_and_shift`, with NaN for a channel that has none instead
    of an error.
    """
    mean, variance = numbers["running_mean"], numbers["running_var"]
    weight = numbers.get("weight", [1.0] * len(mean))
    bias = numbers.get("bias", [0.0] * len(mean))
    scale = [w / math.sqrt(v + eps) if v + eps > 0 else math.nan for w, v in zip(weight, variance, strict=True)]
    return scale, [b - m * s for b, m, s in zip(bias, mean, scale, strict=True)]


def _relative(old: Sequence[float], new: Sequence[float]) -> float:
    """Return the length of the difference divided by the length of the old vector."""
    if list(old) == list(new):
        return 0.0
    length = math.hypot(*old)
    distance = math.hypot(*(after - before for before, after in zip(old, new, strict=True)))
    return distance / length if length else math.inf


def _compare(name: str, a: Tensor | None, b: Tensor | None) -> Change:
    if a is None or b is None:
        return Change.ONLY_B if a is None else Change.ONLY_A
    if tuple(a.shape) != tuple(b.shape):
        return Change.SHAPE
    if not has_elements(a) or not has_elements(b):
        return Change.UNKNOWN
    try:
        if a.dtype != b.dtype:
            return Change.DTYPE if _equal_numbers(a, b) else Change.VALUES
        return Change.SAME if equal_streams(a.chunks(), b.chunks()) else Change.VALUES
    except BntoolError as error:
        error.tensor = error.tensor or name
        raise


def _equal_numbers(a: Tensor, b: Tensor) -> bool:
    try:
        return list(read_numbers(a)) == list(read_numbers(b))
    except ValueError:  # complex or opaque: only the bytes can tell
        return read_bytes(a) == read_bytes(b)
