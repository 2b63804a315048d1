"""Objects that other installed packages offer to bntool, by the entry points of their metadata."""

from __future__ import annotations

import functools
from typing import Any

from bntool.errors import ExtensionError


@functools.cache
def load_extensions(group: str) -> tuple[Any, ...]:
    """Return the objects behind the entry points of a group, in the order of their names.

    Looking for them takes longer than listing a checkpoint: ask only where bntool itself does not know.

    Args:
        group: ``bntool.formats`` or ``bntool.graph_sources``; CONTRIBUTING.md says what each holds.

    Raises:
        ExtensionError: the package that offers one cannot be imported.
    """
    from importlib import metadata

    found = []
    for entry_point in sorted(metadata.entry_points(group=group), key=lambda one: one.name):
        try:
            found.append(entry_point.load())
        except Exception as error:
            package = entry_point.dist.name if entry_point.dist is not None else entry_point.value
            raise ExtensionError(f"{group} {entry_point.name} of {package} cannot be imported: {error}") from error
    return tuple(found)
