"""The layers of a state dict in the order in which people want to see them, with their distributions, as data."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from typing import NamedTuple

from bntool.batchnorm import DEFAULT_EPS
from bntool.inspection.findings import Severity
from bntool.inspection.results import LayerInspection, StateDictInspection
from bntool.reports.pictures.histograms import LogAxis, count_values, find_axis
from bntool.reports.text import count_shared

_NUMBERED = re.compile(r"\d(?!d)", re.ASCII)  # layer1, blocks.3, Mixed_5b; not backbone2d
_FEW = 12  # layers that are listed one by one before they are put together by the stage of the network


class LayerRow(NamedTuple):
    """A layer, or the layers of a stage that share a row.

    Attributes:
        name: of the layer, or of the stage; "" for layers that lie in no module.
        layers: one, or several.
        worst: the severity of their worst finding; None where they have none.
    """

    name: str
    layers: tuple[LayerInspection, ...]
    worst: Severity | None

    @property
    def is_stage(self) -> bool:
        """Whether the row stands for several layers."""
        return len(self.layers) > 1


def arrange_rows(state_dict: StateDictInspection, *, every: bool) -> list[LayerRow]:
    """Return rows for all layers, those with errors first, then those with warnings, else in the order of the file.

    Args:
        every: a row for each layer; else layers of one stage and one severity share a row where there are many.
    """
    worst = state_dict.find_worst()
    rows = []
    for severities in ((Severity.ERROR,), (Severity.WARNING,), (Severity.NOTICE, None)):
        layers = [layer for layer in state_dict.layers if worst[layer.name] in severities]
        if every or len(layers) <= _FEW:
            rows += [LayerRow(layer.name, (layer,), worst[layer.name]) for layer in layers]
            continue
        for stage, positions in find_stages([layer.name for layer in layers]).items():
            members = tuple(layers[position] for position in positions)
            name = stage if len(members) > 1 else members[0].name
            found = Severity.NOTICE if any(worst[layer.name] for layer in members) else None
            rows.append(LayerRow(name, members, severities[0] if severities[0] is not Severity.NOTICE else found))
    return rows


def find_stages(names: Sequence[str]) -> dict[str, list[int]]:
    """Return positions of the names by stage, in the order in which stages begin.

    A stage is the path up to the first part with a number that has modules of its own below it: ``backbone.layer3`` of
    ``backbone.layer3.0.bn1``; else the first module below what all names begin with, which decides nothing. A layer
    that lies in no module belongs to "", the model itself.
    """
    split = [name.split(".") for name in names]
    shared = count_shared([parts[:-1] for parts in split])
    stages: dict[str, list[int]] = {}
    for index, parts in enumerate(split):
        modules = range(shared, len(parts) - 1)
        end = next((i + 1 for i in modules if _NUMBERED.search(parts[i])), min(shared + 1, len(parts) - 1))
        stages.setdefault(".".join(parts[:end]), []).append(index)
    return stages


class Distribution(NamedTuple):
    """Numbers of the channels of some layers, sorted; NaN is left out.

    Attributes:
        minimum, maximum: of the finite ones; None where there are none.
    """

    values: Sequence[float]
    minimum: float | None
    maximum: float | None


Range = tuple[float | None, float | None]


class Pictures(NamedTuple):
    """One quantity of each row on one axis, so that rows can be compared.

    Attributes:
        axis: None where no row has a positive number.
        counts: of each row, how many channels lie in each slot.
        distributions: what was counted.
    """

    axis: LogAxis | None
    counts: tuple[tuple[int, ...] | None, ...]
    distributions: tuple[Distribution, ...]


def picture_variances(rows: Sequence[LayerRow]) -> Pictures:
    """Draw running_var of each row."""
    return _picture([_join([_list_variances(layer) for layer in row.layers]) for row in rows])


def picture_scales(rows: Sequence[LayerRow]) -> Pictures:
    """Return the magnitude of the scale, abs(weight) / sqrt(running_var + eps), of each row.

    Where eps is not known, PyTorch's default stands in.
    """
    return _picture([_join([list_scales(layer) for layer in row.layers]) for row in rows])


def find_scale_ranges(rows: Sequence[LayerRow]) -> list[Range]:
    """Return the smallest and the largest finite magnitude of the scale of each row: counting channels takes longer."""
    return [_find_range([list_scales(layer) for layer in row.layers]) for row in rows]


def _find_range(parts: Sequence[Sequence[float]]) -> Range:
    known = [part if math.isfinite(sum(part)) else [v for v in part if math.isfinite(v)] for part in parts]
    return min((min(part) for part in known if part), default=None), max((max(p) for p in known if p), default=None)


def _list_variances(layer: LayerInspection) -> Sequence[float]:
    variance = layer.tensors.get("running_var")
    return () if variance is None else variance.values


def list_scales(layer: LayerInspection) -> list[float]:
    """Return the magnitude of the scale of each channel: NaN where it has none, nothing where no weight is known."""
    variance, weight = layer.tensors.get("running_var"), layer.tensors.get("weight")
    if variance is None or "weight" in layer.layer.computed:
        return []
    if weight is None and "weight" in layer.layer.tensors:  # it could not be read
        return []
    if weight is not None and len(weight.values) != len(variance.values):
        return []
    eps = DEFAULT_EPS if layer.layer.eps is None else layer.layer.eps
    values = variance.values
    weights = [1.0] * len(values) if weight is None else weight.values
    sound = not variance.nonfinite and variance.minimum is not None and variance.minimum + eps > 0
    if sound:
        roots = map(math.sqrt, [v + eps for v in values])  # whole lists at a time, in half of the time
        return list(map(operator.truediv, map(abs, weights), roots))
    return [abs(w) / math.sqrt(v + eps) if v + eps > 0 else math.nan for w, v in zip(weights, values, strict=True)]


def _join(parts: Sequence[Sequence[float]]) -> Distribution:
    values = sorted(parts[0] if len(parts) == 1 else [value for part in parts for value in part])
    if values and not math.isfinite(sum(values)):
        values = sorted(value for value in values if not math.isnan(value))
    finite = values if not values or math.isfinite(values[0] + values[-1]) else [v for v in values if math.isfinite(v)]
    return Distribution(values, finite[0] if finite else None, finite[-1] if finite else None)


def _picture(distributions: Sequence[Distribution]) -> Pictures:
    axis = find_axis(one.values for one in distributions)
    edges = [] if axis is None else axis.edges()
    counts = [count_values(one.values, edges) if axis is not None and one.values else None for one in distributions]
    return Pictures(axis, tuple(counts), tuple(distributions))
