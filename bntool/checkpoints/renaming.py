"""Renaming in a state dict and what follows from it: the paths of modules, and the names in records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# what records of bntool say of layers and tensors, by key: lists of names, one name, or mappings from names
_NAMES = (
    "layers", "layer", "into", "scale_into", "shift_into", "name", "removed_modules", "copying_modules", "modules",
    "without_gradient", "in_eval", "root",
)  # fmt: skip


def rename_paths(paths: Iterable[str], renames: Mapping[str, str], names: Iterable[str]) -> dict[str, str | None]:
    """Return where the modules of a state dict are after its tensors were renamed.

    A module goes where its tensors go, the modules above it as far as their names stay alike, and a module without
    tensors goes with the one above it.

    Args:
        paths: of the modules, "" for the root.
        renames: from names of tensors to other names.
        names: of all tensors before.

    Returns:
        The new path of each; None for one that is gone, such as a wrapper's.
    """
    moved: dict[str, str] = {}
    for name in names:
        old, new = (path.rpartition(".")[0] for path in (name, renames.get(name, name)))
        while old not in moved:
            moved[old] = new
            (above, _, tail), (new_above, _, new_tail) = old.rpartition("."), new.rpartition(".")
            if not old or not new or tail != new_tail:
                break
            old, new = above, new_above
    placed: dict[str, str | None] = {}
    for path in paths:
        above, rest = path, ""
        while above and above not in moved:
            above, _, tail = above.rpartition(".")
            rest = f".{tail}{rest}"
        new_path = (moved[above] + rest).removeprefix(".") if above in moved else path
        placed[path] = new_path
    taken = {moved[path] for path in moved}
    return {old: None if old not in moved and new in taken and new == old else new for old, new in placed.items()}


def rename_versions(
    versions: Mapping[str, int | None], renames: Mapping[str, str], names: Iterable[str]
) -> dict[str, int | None]:
    """Return the versions of modules under their new paths; the root has an entry, for it may hold a record."""
    places = rename_paths(versions, renames, names)
    found = {new: versions[old] for old, new in places.items() if new is not None}
    return found if "" in found or "" not in versions else {"": None, **found}


def rename_record(record: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Rename the layers and tensors in a record.

    Args:
        places: from names and module paths to what they are now, both without prefix.
    """
    return {key: _rename(value, places) if key in _NAMES else _descend(value, places) for key, value in record.items()}


def _rename(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return places.get(value, value)
    if isinstance(value, list):
        return [_rename(item, places) for item in value]
    if isinstance(value, dict) and not value.keys() & set(_NAMES):
        return {places.get(key, key): _descend(item, places) for key, item in value.items()}
    return _descend(value, places)


def _descend(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return rename_record(value, places)
    return [_descend(item, places) for item in value] if isinstance(value, list) else value
