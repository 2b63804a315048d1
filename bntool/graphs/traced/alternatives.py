"""Modules that did not run and may take the place of some that did: several BatchNorms behind one convolution.

Which of them runs may hang on an argument or an attribute (domain-specific BatchNorm, AdvProp). A forward that is
observed shows one. What it does not show is told by how modules lie together: a BatchNorm that did not run, without a
convolution or linear of its own beside it that did not run either, may read what its nearest relatives read, and feed
what they feed. So may a convolution or linear of the same size without a BatchNorm of its own, and a BatchNorm of
another size among nothing but BatchNorms (slimmable layers).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from bntool.graphs.graph import Node, NodeKind
from bntool.modules.finding import is_batchnorm


@dataclass(frozen=True)
class Alternative:
    """A module that did not run.

    Attributes:
        path, module: which.
        relatives: calls of those that did, whose inputs it may read.
        feeds: those of them whose output its own may take the place of.
    """

    path: str
    module: nn.Module
    relatives: tuple[Node, ...]
    feeds: tuple[Node, ...]


def find_alternatives(
    modules: Mapping[str, nn.Module], nodes: Sequence[Node], ran: Collection[str], *, skipped: Collection[int]
) -> Iterator[Alternative]:
    """Yield the modules that may take the place of others.

    Args:
        modules: all of the model, by path, in order of definition.
        nodes: what ran.
        ran: paths of the modules that were called.
        skipped: nodes that stand for nothing by themselves.
    """
    calls = [node for node in nodes if node.index not in skipped and node.layer in modules]
    used = {*ran, *(node.layer for node in calls)}
    idle = {path: module for path, module in modules.items() if path not in used}
    for path, module in idle.items():
        features = _count_inputs(module)
        if features is None:
            continue
        normalises = is_batchnorm(module)
        kinds = (NodeKind.BATCH_NORM,) if normalises else (NodeKind.CONVOLUTION, NodeKind.LINEAR)
        for scope in _find_scopes(path):
            near = (node for node in calls if node.kind in kinds and _is_within(node.layer, scope))
            any_size = normalises and _is_switch(modules[scope])
            relatives = tuple(n for n in near if any_size or _count_inputs(modules[n.layer]) == features)
            if relatives:
                outputs = features if normalises else _count_outputs(module)
                producers, norms = _count_idle(idle, scope, outputs)
                if not normalises:
                    same = (node for node in relatives if _count_outputs(modules[node.layer]) == outputs)
                    yield Alternative(path, module, relatives, () if norms >= producers else tuple(same))
                elif norms > producers:
                    yield Alternative(path, module, relatives, relatives)
                break


def find_idle(
    modules: Mapping[str, nn.Module], ran: Collection[str], used: Collection[str]
) -> dict[str, frozenset[int]]:
    """Return modules that did not run, with the numbers of channels that they may read; BatchNorms aside.

    Args:
        modules: all of the model, by path.
        ran: paths of the modules that were called.
        used: names of parameters and buffers that were read, whoever called whom.
    """
    idle = {}
    for path, module in modules.items():
        if path in ran or is_batchnorm(module) or any(f"{path}.{name}" in used for name in module._parameters):
            continue
        channels = frozenset(_list_channels(module))
        if channels:
            idle[path] = channels
    return idle


def _list_channels(module: nn.Module) -> Iterator[int]:
    """Yield channels that a module may read: what it says of itself, else the sizes of its parameters."""
    told = [getattr(module, name, None) for name in ("in_channels", "in_features", "num_channels", "num_features")]
    if any(isinstance(number, int) for number in told):
        return (number for number in told if isinstance(number, int))
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None and not is_lazy(p)}
    return (size for name, shape in shapes.items() for size in shape if name != "bias" or len(shapes) == 1)


def _is_switch(module: nn.Module) -> bool:
    """Return whether a module holds several BatchNorms and nothing else, so that its forward chooses one of them."""
    inside = [child for child in module._modules.values() if child is not None]
    return len(inside) > 1 and all(map(is_batchnorm, inside))


def _count_idle(idle: Mapping[str, nn.Module], scope: str, channels: int | None) -> tuple[int, int]:
    """Count the producers with this many output channels that did not run, and the BatchNorms that did not run."""
    inside = [module for path, module in idle.items() if _is_within(path, scope)]
    norms = sum(is_batchnorm(module) and _count_inputs(module) == channels for module in inside)
    return sum(_count_outputs(module) == channels for module in inside), norms


def _find_scopes(path: str) -> Iterator[str]:
    """Yield the modules that contain a module, from the innermost to the model itself, whose name is ""."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _is_within(path: str, scope: str) -> bool:
    return not scope or path == scope or path.startswith(f"{scope}.")


def _count_inputs(module: nn.Module) -> int | None:
    """Return how many channels a module reads; None where its class does not tell."""
    if is_batchnorm(module):
        tensors = (module._buffers.get("running_mean"), module._parameters.get("weight"))
        sized = next((tensor.numel() for tensor in tensors if tensor is not None), None)
        return sized if sized is not None else getattr(module, "num_features", None)
    found = getattr(module, "in_channels", getattr(module, "in_features", None))
    return found if isinstance(found, int) else None


def _count_outputs(module: nn.Module) -> int | None:
    found = getattr(module, "out_channels", getattr(module, "out_features", None))
    return found if isinstance(found, int) and module._parameters.get("weight") is not None else None
