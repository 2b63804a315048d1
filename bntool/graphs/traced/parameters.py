"""Recognising the parameters and buffers of a model among the tensors that operations are given."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bntool.graphs.graph import Node, Owner
from bntool.modules.finding import walk_modules
from bntool.modules.memory import share_elements, storage_key
from bntool.names import join_name, remove_prefix


class Ones(Enum):
    """Axes of length one that a view of a parameter may have or lack beside those that the parameter has."""

    AS_THEY_ARE = "as they are"
    IN_FRONT = "in front"  # of two, as a batch of one matrix has
    BEHIND = "behind"  # two, as the weight of a convolution of one pixel has
    ANYWHERE = "anywhere"


def _axes_of(tensor: torch.Tensor, ones: Ones) -> list[tuple[int, int]]:
    """Return length and stride of the axes of a tensor, without those that do not matter."""
    axes = list(zip(tensor.shape, tensor.stride(), strict=True))
    if ones is Ones.ANYWHERE:
        return [axis for axis in axes if axis[0] != 1]
    end = {Ones.IN_FRONT: 0, Ones.BEHIND: -1}.get(ones)
    while end is not None and len(axes) > 2 and axes[end][0] == 1:
        del axes[end]
    return axes


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer of a live model.

    Attributes:
        name: its first dotted name.
        aliases: further names by which the same module, and so the tensor, can be reached.
        tied: it also belongs to another module, or to the same one under another attribute.
        module: dotted path of its module.
        owner: the module.
    """

    name: str
    module: str
    owner: nn.Module = field(repr=False, compare=False)
    aliases: tuple[str, ...] = ()
    tied: bool = False

    @property
    def role(self) -> str:
        return self.name.rpartition(".")[2]


class ParameterIndex:
    """All parameters and buffers of a model, found by tensor.

    Modules are walked through their children, because some models override ``modules()``.

    Args:
        prefix: what names go without, as in plans.

    Attributes:
        asked_for_bias: modules whose attribute ``bias`` was read since their last call, by identity; empty before a
            forward.
    """

    def __init__(self, model: nn.Module, prefix: str) -> None:
        slots: dict[int, dict[tuple[int, str], list[str]]] = {}
        owners: dict[int, tuple[nn.Module, str]] = {}
        tensors: dict[int, torch.Tensor] = {}
        self.asked_for_bias: set[int] = set()
        self.module_names: dict[int, str] = {}
        self.modules: dict[str, nn.Module] = {}  # each once, by the first of its names
        for full_path, module in walk_modules(model):
            path = remove_prefix(full_path, prefix)
            if id(module) not in self.module_names:
                self.module_names[id(module)] = path
                self.modules[path] = module
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or is_lazy(tensor):
                    continue
                tensors[id(tensor)] = tensor
                owners.setdefault(id(tensor), (module, path))
                names = slots.setdefault(id(tensor), {}).setdefault((id(module), leaf), [])
                names.append(join_name(path, leaf))
        self.by_name: dict[str, Parameter] = {}
        self._by_identity: dict[int, Parameter] = {}
        self._by_storage: dict[int, list[tuple[Parameter, torch.Tensor]]] = {}
        self._tensors = tensors  # keeps identities valid
        for identity, places in slots.items():
            first, *others = [name for names in places.values() for name in names]
            owner, path = owners[identity]
            parameter = Parameter(first, path, owner, aliases=tuple(others), tied=len(places) > 1)
            self.by_name[first] = parameter
            self._by_identity[identity] = parameter
            self._by_storage.setdefault(storage_key(tensors[identity]), []).append((parameter, tensors[identity]))
        for entries in self._by_storage.values():
            for parameter, tensor in entries:
                if any(share_elements(tensor, other) for _, other in entries if other is not tensor):
                    self._mark_tied(parameter, tensor)

    def _mark_tied(self, parameter: Parameter, tensor: torch.Tensor) -> None:
        tied = Parameter(parameter.name, parameter.module, parameter.owner, aliases=parameter.aliases, tied=True)
        self.by_name[parameter.name] = self._by_identity[id(tensor)] = tied

    def find(
        self, tensor: torch.Tensor, *, transposed: bool = False, ones: Ones = Ones.AS_THEY_ARE
    ) -> Parameter | None:
        """Find the parameter that a tensor is a view of (``transposed``: with reversed axes).

        Args:
            ones: which axes of length one either may have that the other lacks.
        """
        known = self._by_identity.get(id(tensor))
        if known is not None:
            return None if transposed and tensor.dim() > 1 else known
        wanted = _axes_of(tensor, ones)
        for parameter, candidate in self._by_storage.get(storage_key(tensor), ()):
            axes = _axes_of(candidate, ones)
            same_place = candidate.storage_offset() == tensor.storage_offset() and candidate.dtype == tensor.dtype
            if same_place and wanted == (axes[::-1] if transposed else axes):
                return self.by_name[parameter.name]
        return None

    def find_matrices(self, tensor: torch.Tensor) -> Parameter | None:
        """Find the parameter of several matrices, as a sparse convolution has one for each tap, of which a tensor is
        one or all.
        """
        for parameter, candidate in self._by_storage.get(storage_key(tensor), ()):
            ends = [(one.shape[-2:], one.stride()[-2:], one.dtype) for one in (tensor, candidate)]
            if candidate.dim() < 3 or not candidate.numel() or not candidate.is_contiguous() or ends[0] != ends[1]:
                continue
            size = math.prod(candidate.shape[-2:])
            first, rest = divmod(int(tensor.storage_offset()) - int(candidate.storage_offset()), size)
            whole = not first and tensor.numel() == candidate.numel()
            if not rest and (whole or (tensor.dim() == 2 and 0 <= first < math.prod(candidate.shape[:-2]))):
                return self.by_name[parameter.name]
        return None

    def find_slice(self, tensor: torch.Tensor) -> tuple[Parameter, int] | None:
        """Find the vector that a tensor is a run of elements of, and the position of the first of these elements."""
        if tensor.dim() != 1:
            return None
        for parameter, candidate in self._by_storage.get(storage_key(tensor), ()):
            if candidate.dim() != 1 or candidate.dtype != tensor.dtype or candidate.stride() != tensor.stride():
                continue
            distance = int(tensor.storage_offset()) - int(candidate.storage_offset())
            first, rest = divmod(distance, candidate.stride(0) or 1)
            if not rest and first >= 0 and first + len(tensor) <= len(candidate):
                return self.by_name[parameter.name], first
        return None

    def take_bias_slot(self, parameter: Parameter) -> bool:
        """Return whether a weight's module has no bias, and code that would use one: the forward asked for it since
        it was last taken, so that each call of a weight is known to add a bias by itself.
        """
        owner = parameter.owner
        empty = "bias" in owner._parameters and owner._parameters["bias"] is None
        asked = id(owner) in self.asked_for_bias
        self.asked_for_bias.discard(id(owner))
        return empty and asked and parameter.role == "weight"

    @contextlib.contextmanager
    def noticing_biases(self) -> Iterator[None]:
        """Note inside the context which modules are asked for their bias."""
        original = nn.Module.__getattr__

        def notice(module: nn.Module, name: str) -> Any:
            if name == "bias":
                self.asked_for_bias.add(id(module))
            return original(module, name)

        nn.Module.__getattr__ = notice  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__getattr__ = original  # type: ignore[method-assign]

    def touching(self, tensor: torch.Tensor) -> frozenset[str]:
        """Return names of all parameters that share elements with a tensor."""
        return frozenset(
            parameter.name
            for parameter, candidate in self._by_storage.get(storage_key(tensor), ())
            if candidate is tensor or share_elements(candidate, tensor)
        )

    def tensor(self, parameter: Parameter) -> torch.Tensor:
        """Return the live tensor of a parameter or buffer."""
        module = parameter.owner
        found: torch.Tensor | None = module._parameters.get(parameter.role)
        found = module._buffers.get(parameter.role) if found is None else found
        assert found is not None
        return found

    def judge_owner(
        self,
        module: nn.Module,
        path: str,
        node: Node,
        inside: Sequence[Node],
        *,
        reads_input: bool,
        whole: bool,
    ) -> Owner:
        """Find out from the calls inside a module whether it does more than its own BatchNorm.

        Args:
            path: its dotted path.
            node: the BatchNorm.
            inside: everything that ran while the module did.
            reads_input: the first of these read the module's input, as it came.
            whole: the module's output is the BatchNorm's.
        """
        before = [other for other in inside if other.index < node.index and "mul" not in other.operator]
        after = [other for other in inside if other.index > node.index]
        if not reads_input or before:
            return Owner.PART
        if whole and not after:
            return Owner.WHOLE
        inner = tuple(join_name(path, child) for child in ("act", "drop"))
        runs_children_only = all(
            any(other.layer == child or other.layer.startswith(child + ".") for child in inner) for other in after
        )
        has_activation = isinstance(module._modules.get("act"), nn.Module)
        return Owner.WITH_ACTIVATION if has_activation and runs_children_only else Owner.PART

    @property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        return {name: parameter.aliases for name, parameter in self.by_name.items() if parameter.aliases}

    @property
    def tied(self) -> frozenset[str]:
        return frozenset(name for name, parameter in self.by_name.items() if parameter.tied)
