"""The result of `diff`, for people and as JSON data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bntool.batchnorm import ROLES
from bntool.checkpoints.state_dicts import FLAT_AVERAGE, find_averaged_parts, part_flat_average
from bntool.comparison.checkpoint import Change, Comparison, LayerComparison
from bntool.comparison.options import Expectation
from bntool.reports.blocks import Block, Cell, Column, Style, Table, line
from bntool.reports.pictures.channels import draw_shifts
from bntool.reports.text import plural
from bntool.reports.worst_channels import describe_unusable_channels, describe_worst_channel
from bntool.representation import format_number, list_first
from bntool.shells import quote_word
from bntool.verification.statistics_shift import NO_SHIFT

_SHOWN = 10
_NAMED = 3  # layers in a sentence


def describe_comparison(comparison: Comparison, *, path_b: str) -> dict[str, Any]:
    """Return the facts as JSON data."""
    expectation, violations = comparison.expectation, comparison.violations
    counts = Counter(comparison.others.values())
    return {
        "other_file": path_b,
        "state_dicts": [comparison.a.key, comparison.b.key],
        "not_compared": [list(keys) for keys in comparison.not_compared],
        "prefixes": [comparison.a.prefix + comparison.path_a, comparison.b.prefix + comparison.path_b],
        "identical": comparison.identical,
        **({"notes": [list(notes) for notes in comparison.notes]} if any(comparison.notes) else {}),
        "layers": [_describe_layer(layer) for layer in comparison.layers],
        "assumptions": list(comparison.assumptions),
        "others": {
            "counts": {change.value: counts[change] for change in Change if counts[change]},
            "changed": {n: change.value for n, change in comparison.others.items() if change is not Change.SAME},
        },
        "expectation": None
        if expectation is None
        else {
            "name": expectation.value,
            "met": not violations,
            "violations": list(violations),
            "recorded_layers": list(comparison.recorded),
        },
    }


# the same facts as of a layer that is recalibrated
_SHIFTS = ("mean_shift", "worst_mean_shift", "variance_ratio", "variance_spread", "worst_variance_ratio")


def _describe_layer(layer: LayerComparison) -> dict[str, Any]:
    shift = layer.statistics
    return {
        "name": layer.name,
        "changed": layer.changed,
        "tensors": {role: change.value for role, change in layer.changes.items()},
        "settings": {name: list(values) for name, values in layer.settings.items()},
        **{name: None if shift is None else getattr(shift, name) for name in _SHIFTS},
        "worst_channel": None if shift is None else shift.find_worst_channel(),
        "scale_change": layer.scale_change,
        "shift_change": layer.shift_change,
        "eps_known": layer.eps_known,
    }


def show_comparison(
    comparison: Comparison,
    *,
    path_a: str,
    path_b: str,
    every: bool = False,
) -> list[Block]:
    """Return lines and tables for people; layers that did not change are counted only, unless ``every``."""
    changed = [layer for layer in comparison.layers if layer.changed]
    count, others = len(comparison.layers), comparison.others
    blocks: list[Block] = [line(f"{len(changed)} of {plural(count, 'BatchNorm layer')} changed", Style.HEADING)]
    if others:
        same = sum(change is Change.SAME for change in others.values())
        blocks.append(line(f"{plural(len(others), 'other tensor')}: {same} the same in every bit", Style.HEADING))
    if comparison.expectation is not None:
        blocks += _expectation(comparison.expectation, comparison.violations)
    blocks += _moved_most(changed)
    for side, path, key, notes in (
        ("A", path_a, comparison.a.key, comparison.notes[0]),
        ("B", path_b, comparison.b.key, comparison.notes[1]),
    ):
        blocks.append(line(f"{side} {_name(path, key)}"))
        blocks += [line(note, Style.MUTED, indent=2) for note in notes]
    blocks += _selection(comparison)
    if (path_a, comparison.a.key, comparison.path_a) == (path_b, comparison.b.key, comparison.path_b):
        blocks.append(line(_advise_on_one_file(comparison), Style.WARNING))
    shown = comparison.layers if every else changed
    if shown:
        blocks += [line(), _table(shown)]
        if not all(layer.eps_known for layer in shown):
            blocks.append(line("eps is not in the files; 1e-5 stands in for it here", Style.MUTED))
        blocks += [line(f"assumed: {text}", Style.MUTED) for text in comparison.assumptions]
    differing = _others(others)
    return [*blocks, line(), line("other tensors", Style.HEADING), *differing] if differing else blocks


def _moved_most(layers: Sequence[LayerComparison]) -> list[Block]:
    """Return the channel whose statistics moved most: the measures of its layer may hide it among the others."""
    known = [(layer.name, layer.statistics) for layer in layers if layer.statistics is not None]
    unusable = [f"{name}{describe_unusable_channels(shift)}" for name, shift in known if not shift.finite]
    blocks: list[Block] = []
    if unusable:
        named = list_first(unusable, _NAMED)
        text = f"moved most: {named}, statistics that are NaN, infinite or negative in A or B"
        blocks.append(line(text, Style.WARNING))
    finite = [one for one in known if one[1].finite]
    name, shift = max(finite, key=lambda one: one[1].worst, default=("", NO_SHIFT))
    if worst := describe_worst_channel(shift):
        others = " of the others" * bool(unusable)
        blocks.append(line(f"moved most{others}: {name}, {worst}"))
    return blocks


def _selection(comparison: Comparison) -> list[Block]:
    """Describe what was compared with what, and what was not."""
    blocks: list[Block] = []
    for side, path in (("A", comparison.path_a), ("B", comparison.path_b)):
        if path:
            blocks.append(line(f"names of {side} are compared without {path!r}", Style.MUTED))
    for side, keys in zip("AB", comparison.not_compared, strict=True):
        if keys:
            listed = ", ".join(repr(key) for key in keys[:_SHOWN])
            blocks.append(line(f"not compared of {side}: state dict {listed}", Style.MUTED))
    if comparison.recorded:
        count = len(comparison.recorded)
        layers = "layer, the one" if count == 1 else "layers, those"
        blocks.append(line(f"compared: {count} {layers} that bntool freeze recorded in A", Style.MUTED))
    return blocks


def _advise_on_one_file(comparison: Comparison) -> str:
    """Say how two copies of a model in one file are compared, where a state dict was held against itself."""
    said = "A and B are one state dict of one file"
    others, averages = comparison.not_compared[1], find_averaged_parts(comparison.b)
    if others:
        return f"{said}; --state-dict-b {quote_word(others[0])} compares another one of the file with it"
    if part_flat_average(comparison.b) is not None:
        return f"{said}; --prefix-b {FLAT_AVERAGE} compares the average that mmcv's EMAHook keeps in it with the model"
    if averages:
        return f"{said}; --prefix and --prefix-b {quote_word(averages[0] + '.')} compare the copies that lie in it"
    return said


def _name(path: str, key: str) -> str:
    return f"{path}, {key}" if key else path


def _table(layers: Sequence[LayerComparison]) -> Table:
    statistics = [layer.statistics for layer in layers]
    columns = (
        Column("layer", shrinks=True),
        Column("changed"),
        Column("", pictures=True),
        Column("mean", right=True, wide=100),
        Column("worst mean", right=True),
        Column("", pictures=True),
        Column("var", right=True, wide=100),
        Column("spread", right=True, wide=120),
        Column("worst var", right=True),
        Column("scale", right=True),
        Column("shift", right=True),
    )
    means, ratios, caption = draw_shifts([None if s is None or s.old is None else s for s in statistics])
    return Table(columns, [_row(*one) for one in zip(layers, means, ratios, strict=True)], caption)


# short names so that a row fits 80 columns
_SHORT = {"weight": "w", "bias": "b", "running_mean": "mean", "running_var": "var", "num_batches_tracked": "n"}


def _row(layer: LayerComparison, means: Cell, ratios: Cell) -> tuple[Cell, ...]:
    shift = layer.statistics
    return (
        Cell(layer.name),
        Cell(describe_changes(layer), Style.WARNING if layer.changed else Style.MUTED),
        means,
        Cell(_number(shift.mean_shift if shift is not None else None, "σ")),
        Cell(_number(shift.worst_mean_shift if shift is not None else None, "σ")),
        ratios,
        Cell(_number(shift.variance_ratio if shift is not None else None, "×")),
        Cell(_number(shift.variance_spread if shift is not None else None, "×")),
        Cell(_number(shift.worst_variance_ratio if shift is not None else None, "×")),
        Cell(_percent(layer.scale_change)),
        Cell(_percent(layer.shift_change)),
    )


def describe_changes(layer: LayerComparison) -> str:
    kinds = set(layer.changes.values())
    if len(kinds) == 1 and not layer.settings:
        (kind,) = kinds
        if kind is Change.SAME:
            return "-"
        if kind is not Change.VALUES:
            return str(kind.value)
    parts = []
    for role in ROLES:
        change = layer.changes.get(role, Change.SAME)
        if change is Change.VALUES:
            parts.append(_SHORT[role])
        elif change is not Change.SAME:
            parts.append(f"{_SHORT[role]} {change.value}")
    parts += [f"{name} {_setting(old)}→{_setting(new)}" for name, (old, new) in layer.settings.items()]
    return " ".join(parts)


def _setting(value: object) -> str:
    return format_number(value) if isinstance(value, float) else str(value)


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else format_number(value, 2) + unit


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value, "%")


def _others(others: Mapping[str, Change]) -> list[Block]:
    """List the tensors that are not the same, by how they differ."""
    blocks: list[Block] = []
    for change in Change:
        names = [name for name, found in others.items() if found is change]
        if names and change is not Change.SAME:
            listed = list_first(names, _SHOWN)
            blocks.append(line(f"{len(names)} {_WORDS[change]}: {listed}", indent=2))
    return blocks


_WORDS = {
    Change.VALUES: "changed",
    Change.DTYPE: "hold the same numbers in another dtype",
    Change.SHAPE: "have another shape",
    Change.ONLY_A: "only in A",
    Change.ONLY_B: "only in B",
    Change.UNKNOWN: "cannot be compared",
}


def _expectation(expectation: Expectation, violations: Sequence[str]) -> list[Block]:
    if not violations:
        return [line(f"as expected: {MEANINGS[expectation]}", Style.GOOD)]
    blocks: list[Block] = [line(f"not as expected ({expectation.value}: {MEANINGS[expectation]})", Style.ERROR)]
    blocks += [line(violation, indent=2) for violation in violations[:_SHOWN]]
    if len(violations) > _SHOWN:
        blocks.append(line(f"and {len(violations) - _SHOWN} more", indent=2))
    return blocks


MEANINGS = {
    Expectation.IDENTICAL: "every tensor and setting is the same in every bit",
    Expectation.FROZEN: "no tensor or setting of a BatchNorm changed",
    Expectation.NORM_EVAL: "no statistics or settings of a BatchNorm changed",
    Expectation.STATS_ONLY: "nothing but statistics of BatchNorm layers changed",
}
