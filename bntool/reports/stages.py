"""Layers put together by the stage of the network that they belong to, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bntool.reports.text import count_shared

_NUMBERED = re.compile(r"\d(?!d)", re.ASCII)  # layer1, blocks.3, Mixed_5b; not backbone2d
FEW = 12  # layers that are listed one by one before they are put together


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
