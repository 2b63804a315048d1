"""Recognising public architectures by the names and shapes of tensors, in a whole state dict or under a prefix.

Names and shapes prove neither a forward nor an eps: what follows from them is an assumption, and is said to be one.
Nothing is imported that listing a file does not need.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from bntool.batchnorm import COUNTER, BatchNorm, EpsSource
from bntool.checkpoints.batchnorms import find_norms
from bntool.checkpoints.checkpoint import StateDict
from bntool.errors import RefusedError, UsageError
from bntool.graphs.architectures.catalogue import Catalogue, Entry, Scope, fingerprint_scope, load_catalogue
from bntool.representation import list_first, short_repr

_USUAL_MOMENTUM = 0.1  # of torch.nn.BatchNorm*
_DEEPEST = 8  # parts of a prefix that are tried
_MOST_TENSORS = 1 << 17  # beyond, a file is not compared with anything
_LISTED = 3

Shapes = Mapping[str, tuple[int, ...]]


class Architecture(NamedTuple):
    """A public architecture whose names and shapes a state dict has, or a part of it.

    Attributes:
        root: what stands before its names, with the dot; "" for none.
        names: of all architectures that it may be, as ``--arch`` takes them.
        whole: nothing else is in the state dict, and nothing is missing.
        eps: of each BatchNorm that eps is known of, by layer name with the root.
        layers: its BatchNorms that compute something in the forward, with the root.
        choices: what each of the names says, where they differ in eps: from the value to the names.
        structures: numbers of what the catalogue says of the forward; several where the names differ in it.
    """

    root: str
    names: tuple[str, ...]
    whole: bool
    eps: Mapping[str, float]
    layers: tuple[str, ...]
    choices: Mapping[float, tuple[str, ...]] = MappingProxyType({})
    structures: tuple[int, ...] = (0,)

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def title(self) -> str:
        """The title for people: the first names, and where they are from."""
        listed = list_first(self.names, _LISTED)
        return f"{listed} under {self.root.removesuffix('.')}" if self.root else listed

    def describe(self) -> dict[str, Any]:
        """Return the architecture as JSON data."""
        values = sorted(self.choices or set(self.eps.values()))
        return {"names": list(self.names), "root": self.root.removesuffix("."), "whole": self.whole, "eps": values}


def recognise(state_dict: StateDict, *, name: str | None = None) -> tuple[Architecture, ...]:
    """Return the architectures that a state dict holds; outer ones hide those inside of them.

    Args:
        name: the only one to look for.

    Raises:
        UsageError: the catalogue has no architecture of that name.
        RefusedError: names or shapes of the tensors are not those of ``name``.
    """
    if name is None and not _has_statistics(state_dict):
        return ()
    return recognise_in(load_catalogue(), state_dict, name=None if name is None else find_name(name))


def recognise_in(catalogue: Catalogue, state_dict: StateDict, *, name: str | None) -> tuple[Architecture, ...]:
    """Recognise tensors by a catalogue of one's own and a full name."""
    shapes = {
        state_dict.strip(full): tuple(tensor.shape)
        for full, tensor in state_dict.tensors.items()
        if not full.endswith(COUNTER)
    }
    if name is None:
        return _recognise_again(catalogue, tuple(shapes.items()))
    found = tuple(_recognise(catalogue, shapes, name))
    if not found:
        others = _recognise(catalogue, shapes, None)
        seen = ", ".join(other.title for other in others)
        raise RefusedError(
            f"names and shapes of the tensors are not those of {name}" + (f"; they are those of {seen}" if seen else "")
        )
    return found


@functools.lru_cache(maxsize=2)
def _recognise_again(catalogue: Catalogue, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[Architecture, ...]:
    """Return the files of a run have the same names and shapes."""
    return tuple(_recognise(catalogue, dict(shapes), None))


def find_name(name: str) -> str:
    """Return the full name of an architecture, from itself or from its part after the colon where that is unambiguous.

    Raises:
        UsageError: there is none, or several.
    """
    known = {full for entry in load_catalogue().entries for full in entry.names}
    if name in known:
        return name
    library, _, short = name.rpartition(":")
    same = sorted(full for full in known if not library and full.partition(":")[2] == short)
    if len(same) == 1:
        return same[0]
    if same:
        raise UsageError(f"--arch {name} may be {' or '.join(same)}")
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if not library:
        parts = difflib.get_close_matches(short, {full.partition(":")[2] for full in known}, n=2)
        close = [full for full in known if full.partition(":")[2] in parts]
    hint = f"; close to it: {', '.join(sorted(close)[:_LISTED])}" if close else ""
    raise UsageError(f"the catalogue has no architecture {name!r} with BatchNorm{hint}")


def describe_application(name: str, state_dict: StateDict) -> Architecture:
    """Return the architecture of a file whose format assumed the configuration of a public model."""
    norms = [norm for norm in find_norms(state_dict) if norm.kind.is_batch_norm]
    eps = {norm.name: norm.eps for norm in norms if norm.eps is not None}
    return Architecture(root="", names=(name,), whole=True, eps=eps, layers=tuple(norm.name for norm in norms))


def assume_eps(state_dict: StateDict, norms: Sequence[BatchNorm]) -> tuple[tuple[BatchNorm, ...], tuple[str, ...]]:
    """Return the layers, with the eps of a recognised architecture where they do not know theirs; and that in words."""
    if all(norm.eps is not None or not norm.kind.is_batch_norm for norm in norms):
        return tuple(norms), ()
    architectures = recognise(state_dict)
    given = give_eps(norms, architectures)
    assumptions = []
    for architecture in architectures:
        taken = {n.eps for n in given if n.eps_source is EpsSource.ARCHITECTURE and n.name in architecture.eps}
        if taken:
            values = " and ".join(f"{eps:g}" for eps in sorted(filter(None, taken)))
            assumptions.append(f"eps is {values}, as in {architecture.title}, by names and shapes")
    return given, tuple(assumptions)


def give_eps(norms: Sequence[BatchNorm], architectures: Sequence[Architecture]) -> tuple[BatchNorm, ...]:
    """Return the layers, with the eps of the architectures where they do not know theirs."""
    eps = {layer: value for architecture in architectures for layer, value in architecture.eps.items()}
    return tuple(
        dataclasses.replace(norm, eps=eps[norm.name], eps_source=EpsSource.ARCHITECTURE)
        if norm.eps is None and norm.name in eps and norm.kind.is_batch_norm
        else norm
        for norm in norms
    )


def find_momentum(architecture: Architecture) -> Mapping[str, tuple[float, ...]]:
    """Return the momentum that each layer of an architecture is made with, by layer name; several where its names
    differ.
    """
    found: dict[str, set[float]] = {layer: set() for layer in architecture.layers}
    for name in architecture.names:
        runs = load_catalogue().momentum(name)
        values = [_USUAL_MOMENTUM] * len(architecture.layers) if runs is None else list(_expand(runs))
        if len(values) != len(architecture.layers):  # others of its names have other layers
            return {}
        for layer, value in zip(architecture.layers, values, strict=True):
            found[layer].add(value)
    return {layer: tuple(sorted(values)) for layer, values in found.items()}


def _has_statistics(state_dict: StateDict) -> bool:
    """Return whether it is worth looking."""
    few = len(state_dict.tensors) <= _MOST_TENSORS
    return few and any(name.endswith("running_var") for name in state_dict.tensors)


def _recognise(catalogue: Catalogue, shapes: Shapes, wanted: str | None) -> Iterator[Architecture]:
    claimed: list[str] = []
    children = _children(shapes)
    for root in sorted(children, key=lambda root: (root.count("."), root)):
        if any(root.startswith(other) for other in claimed):
            continue
        architecture = _recognise_at(catalogue, shapes, root, children[root], wanted)
        if architecture is not None:
            claimed.append(root)
            yield architecture


def _children(shapes: Shapes) -> dict[str, set[str]]:
    """Return the prefixes that have BatchNorms below them, and the first part of every name below each."""
    children: dict[str, set[str]] = {"": set()}
    for name in shapes:
        if name.endswith(".running_var"):
            parts = name.split(".")[:-2]
            for depth in range(1, min(len(parts), _DEEPEST) + 1):
                children.setdefault(".".join(parts[:depth]) + ".", set())
    for name in shapes:
        start = 0
        for _ in range(_DEEPEST + 1):
            below = children.get(name[:start])
            if below is None:
                break
            end = name.find(".", start)
            below.add(name[start:end] if end >= 0 else name[start:])
            if end < 0:
                break
            start = end + 1
    return children


def _recognise_at(
    catalogue: Catalogue, shapes: Shapes, root: str, children: set[str], wanted: str | None
) -> Architecture | None:
    scopes = [
        scope
        for child in children
        for scope in catalogue.scopes.get(child, ())
        if children.issuperset(scope.children) and all(root + stem in shapes for stem in scope.stems)
    ]
    if not scopes:
        return None
    below = {name[len(root) :]: shape for name, shape in shapes.items() if name.startswith(root)} if root else shapes
    best, fitting = (0, False), list[Entry]()
    for scope in scopes:
        fingerprint, rest = fingerprint_scope(scope, below)
        entries = [e for e in catalogue.find(scope, fingerprint) if wanted is None or wanted in e.names]
        if entries:
            exact = [entry for entry in entries if entry.rest == rest]
            size = sum(name.partition(".")[0] in scope.children for name in below)
            if (size, bool(exact)) > best:
                best, fitting = (size, bool(exact)), []
            if (size, bool(exact)) == best:
                fitting += exact or entries
    if not fitting:
        return None
    return _describe(root, fitting, below, whole=best[1] and len(below) == len(shapes), wanted=wanted)


def _describe(root: str, entries: Sequence[Entry], below: Shapes, *, whole: bool, wanted: str | None) -> Architecture:
    values = [dict(zip(_find_layers(entry.scope, below), _expand(entry.eps), strict=True)) for entry in entries]
    layers = sorted(set().union(*values))
    eps = {root + layer: values[0][layer] for layer in layers if len({v.get(layer) for v in values}) == 1}
    names = [name for entry in entries for name in entry.names]
    choices: dict[float, tuple[str, ...]] = {}
    if len(eps) < len(layers):
        for entry, value in zip(entries, values, strict=True):
            for number in sorted(set(value.values())):
                choices[number] = (*choices.get(number, ()), *(entry.names if wanted is None else (wanted,)))
    return Architecture(
        root=root,
        names=tuple(dict.fromkeys(names)) if wanted is None else (wanted,),
        whole=whole,
        eps=eps,
        layers=tuple(root + layer for layer in layers),
        choices=choices,
        structures=tuple(dict.fromkeys(entry.structure for entry in entries)),
    )


def _find_layers(scope: Scope, shapes: Shapes) -> list[str]:
    return sorted(
        name.removesuffix(".running_var")
        for name in shapes
        if name.endswith(".running_var") and name.partition(".")[0] in scope.children and name not in scope.left_out
    )


def _expand(runs: Iterable[tuple[int, float]]) -> Iterator[float]:
    for count, value in runs:
        yield from [value] * count
