"""New names for the tensors of a state dict: prefixes taken off or put before them, and parts renamed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.containers.pickles.nodes import Node, as_mapping, is_mapping, text_of
from bntool.errors import RefusedError, UsageError
from bntool.plan import RenameTensor
from bntool.representation import list_first

_SHOWN = 3


def plan_renames(
    state_dict: StateDict, *, strip_prefix: str = "", renames: Mapping[str, str] | None = None, add_prefix: str = ""
) -> tuple[RenameTensor, ...]:
    """Plan a step for each tensor whose name changes; prefixes are taken off first and added last.

    Args:
        strip_prefix: what all or some names begin with, such as ``module.``; whole parts of names.
        renames: from the path of a module, or the name of a tensor, to another; with or without a wrapper's prefix.
        add_prefix: what is put before all names.

    Raises:
        UsageError: the prefix or a path is that of no tensor.
        RefusedError: two tensors would have one name, or one would have none.
    """
    names = {name: name for name in state_dict.tensors}
    if strip_prefix:
        prefix = strip_prefix.rstrip(".") + "."
        if not any(name.startswith(prefix) for name in names):
            raise UsageError(f"--strip-prefix {strip_prefix!r}: no tensor has it{_hint(strip_prefix, names)}")
        names = {old: name.removeprefix(prefix) for old, name in names.items()}
    for part, new in (renames or {}).items():
        names.update(_rename_part(names, part, new, prefix=state_dict.prefix))
    if add_prefix:
        prefix = add_prefix.rstrip(".") + "."
        names = {old: prefix + name for old, name in names.items()}
    taken: dict[str, str] = {}
    for old, name in names.items():
        if not name or name in taken:
            why = f"{taken[name]} would have the same name, {name!r}" if name else "nothing would be left of its name"
            raise RefusedError(f"it cannot be renamed: {why}", tensor=old)
        taken[name] = old
    return tuple(RenameTensor(old, name) for old, name in names.items() if old != name)


def _rename_part(names: Mapping[str, str], part: str, new: str, *, prefix: str) -> dict[str, str]:
    """Return new names of what is called so, or lies below it; a wrapper's prefix may be left out, as everywhere.

    Raises:
        UsageError: nothing is.
    """
    for lead in dict.fromkeys(("", prefix)):
        before, after = lead + part.strip("."), lead + new.strip(".")
        found = [old for old, name in names.items() if name == before or name.startswith(f"{before}.")]
        if found:
            return {old: f"{after}{names[old].removeprefix(before)}".removeprefix(".") for old in found}
    raise UsageError(f"--rename {part}={new}: no module or tensor is called so{_hint(part, names.values())}")


def describe_left(
    checkpoint: Checkpoint, state_dict: StateDict, *, strip_prefix: str, rest_stays: bool = True
) -> list[str]:
    """Say what keeps its old names, in one sentence each.

    Args:
        rest_stays: what else the file holds is written, too; else only the tensors of the state dict are.
    """
    left = []
    prefix = strip_prefix.rstrip(".") + "."
    kept = [name for name in state_dict.tensors if strip_prefix and not name.startswith(prefix)]
    if kept:
        left.append(
            f"one naming for all tensors: {list_first(kept, _SHOWN)} do not begin with {prefix} and keep their names"
        )
    if not rest_stays:
        return left
    others = [s.key or "(root)" for s in checkpoint.state_dicts if s is not state_dict]
    if others:
        left.append(
            f"one naming for the whole file: {list_first(others, _SHOWN)} "
            f"{'keep' if others[1:] else 'keeps'} the old names"
        )
    naming = [name for name, value in checkpoint.entries.items() if _names_parameters(value)]
    if naming:
        left.append(f"the fit of {list_first(naming, _SHOWN)}: it names parameters as they were called before")
    return left


def _names_parameters(value: Node) -> bool:
    """Return whether an optimizer's state goes by names; most number their parameters, and these keep their order."""
    for node in value if isinstance(value, list) else [value]:
        parts = as_mapping(node) if is_mapping(node) else {}
        if not {"state", "param_groups"} <= parts.keys():
            continue
        state = as_mapping(parts["state"]) if is_mapping(parts["state"]) else {}
        groups = parts["param_groups"] if isinstance(parts["param_groups"], list) else []
        named = [as_mapping(group) for group in groups if is_mapping(group)]
        if any("." in key for key in state) or any(_holds_texts(g.get(k)) for g in named for k in _KEYS):
            return True
    return False


_KEYS = ("params", "param_names")


def _holds_texts(value: Node) -> bool:
    return isinstance(value, list) and any(text_of(item) is not None for item in value)


def _hint(part: str, names: object) -> str:
    known = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2, 3)}  # type: ignore[attr-defined]
    near = difflib.get_close_matches(part.strip("."), sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {list_first(sorted(known), _SHOWN)}"
