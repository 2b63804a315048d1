"""Watching the activations that BatchNorm layers normalise, right before they do."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.overrides import TorchFunctionMode

from bntool.batchnorm import FUSED_ACTIVATION_CLASSES
from bntool.errors import RefusedError
from bntool.modules.borrowing import Borrowed
from bntool.modules.calling import tensors_in
from bntool.modules.finding import original_class
from bntool.modules.memory import count_writes, share_elements, storage_key, storage_keys

Observe = Callable[[str, torch.nn.Module, torch.Tensor], None]
_TORCH = (_BatchNorm.forward, SyncBatchNorm.forward)
_BATCH_NORM = re.compile(r"(^|_)batch_norm(\.|$)")  # torch's functions and operators of that name
# what reads no element of a tensor: attributes, shapes and views
_PASSIVE = frozenset((
    "__get__", "__getitem__", "data_ptr", "detach", "dim", "element_size", "expand", "expand_as", "get_device",
    "is_contiguous", "is_floating_point", "ndimension", "numel", "size", "squeeze", "stride", "unsqueeze",
    "untyped_storage", "view", "view_as",
))  # fmt: skip


class InterruptedForwardError(BaseException):
    """Ends a forward for a reason that is not the model's. No Exception: a model must not be able to swallow it."""


class _Noticed(Enum):
    NOTHING = auto()
    FUNCTION = auto()
    READ = auto()


@dataclass
class _Call:
    """A layer that is running.

    Attributes:
        name, layer: which.
        given: the first tensor that it was called with; None where there is none.
        noticed: how it was noticed that it normalises.
        measured: what was taken for its activations when it first read its statistics, and the version of these.
    """

    name: str
    layer: torch.nn.Module
    given: torch.Tensor | None
    noticed: _Noticed = _Noticed.NOTHING
    measured: tuple[torch.Tensor, int] | None = None

    def uses(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor shows the layer's statistics."""
        own = [self.layer._buffers[role] for role in ("running_mean", "running_var")]
        return any(buffer is not None and share_elements(tensor, buffer) for buffer in own)


class Activations(TorchFunctionMode):
    """Calls back with what layers normalise, while they have not yet looked at their statistics.

    torch's own classes normalise what they are called with. Classes with a forward of their own may transpose it, mask
    it or put it through something else first: what they give torch's function together with their statistics counts.
    Those that call none, such as FrozenBatchNorm, are taken to normalise what they were called with, as it is when
    they first read their statistics. A layer that is not seen to use them is not called back for.

    Args:
        layers: by name.
        borrowed: to add hooks through.
        observe: called with name, layer and activations, channels in dimension 1; may change the layer's statistics.
        called: is given the names of the layers that run.
    """

    def __init__(
        self, layers: Mapping[str, torch.nn.Module], borrowed: Borrowed, observe: Observe, *, called: set[str]
    ) -> None:
        super().__init__()
        self._called = called
        self._layers = layers
        self._observe = observe
        self._refusal: RefusedError | None = None
        self._running = threading.local()
        self._are_direct = True
        for name, layer in layers.items():
            statistics = layer._buffers["running_mean"]
            if _is_direct(layer):
                borrowed.add_forward_pre_hook(layer, partial(self._observe_input, name, statistics), with_kwargs=True)
            else:
                self._are_direct = False
                borrowed.add_forward_pre_hook(layer, partial(self._enter, name, statistics), with_kwargs=True)
                borrowed.add_forward_hook(layer, self._leave)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch one forward inside the context, in the thread that runs it.

        Raises:
            RefusedError: it cannot be told what a layer normalises, or it runs with statistics that are not its own.
        """
        self._running.calls = []
        try:
            with contextlib.nullcontext() if self._are_direct else self:
                yield
        except InterruptedForwardError:
            if self._refusal is None:
                raise
        if self._refusal is not None:
            raise self._refusal

    def _observe_input(
        self, name: str, statistics: torch.Tensor | None, layer: torch.nn.Module, args: Any, kwargs: Any
    ) -> None:
        self._check_own(name, statistics, layer)
        self._called.add(name)
        values = _find_input(args, kwargs)
        if values is not None:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._tell(name, layer, _put_channels_second(values, layer))

    def _enter(
        self, name: str, statistics: torch.Tensor | None, layer: torch.nn.Module, args: Any, kwargs: Any
    ) -> None:
        self._check_own(name, statistics, layer)
        self._called.add(name)
        self._calls.append(_Call(name, layer, _find_input(args, kwargs)))

    def _leave(self, layer: torch.nn.Module, _args: Any, _output: Any) -> None:
        calls = self._calls
        while calls and calls[-1].layer is not layer:
            calls.pop()  # left by an exception that the model caught
        if calls:
            calls.pop()

    @property
    def _calls(self) -> list[_Call]:
        if not hasattr(self._running, "calls"):
            self._running.calls = []
        calls: list[_Call] = self._running.calls
        return calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._calls and getattr(function, "__name__", "") not in _PASSIVE:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                tensors = tensors_in((args, kwargs))
                is_batch_norm = bool(_BATCH_NORM.search(getattr(function, "__name__", "")))
                for call in self._calls:
                    uses = any(map(call.uses, tensors))
                    if is_batch_norm and (uses or (call is self._calls[-1] and not self._are_anothers(call, tensors))):
                        self._note_function(call, args[0] if args else kwargs["input"], uses=uses)
                    elif uses:
                        self._note_read(call, tensors)
        return function(*args, **kwargs)

    def _are_anothers(self, call: _Call, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether such a function is given the statistics of another layer."""
        others = (_Call(name, layer, None) for name, layer in self._layers.items() if layer is not call.layer)
        return any(other.uses(tensor) for other in others for tensor in tensors)

    def _note_function(self, call: _Call, values: torch.Tensor, *, uses: bool) -> None:
        if call.noticed is _Noticed.READ:
            if not _is_unchanged(values, call.measured):
                self._refuse(
                    call.name, "reads its statistics before it normalises something else than it is called with"
                )
            call.noticed = _Noticed.FUNCTION
        elif uses:
            call.noticed = _Noticed.FUNCTION
            self._tell(call.name, call.layer, values)

    def _note_read(self, call: _Call, tensors: Sequence[torch.Tensor]) -> None:
        if call.noticed is _Noticed.FUNCTION:
            return
        given = call.given
        activations = [t for t in tensors if t.ndim > 1 and t.numel() > t.shape[1] and not call.uses(t)]
        if given is None or not all(_shows(t, given) for t in activations):
            self._refuse(call.name, "normalises something else than it is called with, without a function of torch's")
        assert given is not None
        if call.measured is None:
            call.noticed = _Noticed.READ
            values = _put_channels_second(given, call.layer)
            call.measured = values, count_writes(values)
            self._tell(call.name, call.layer, values)
        elif activations and count_writes(call.measured[0]) != call.measured[1]:
            self._refuse(call.name, "changes what it normalises after it has read its statistics")

    def _tell(self, name: str, layer: torch.nn.Module, values: torch.Tensor) -> None:
        if torch._C._functorch.is_functorch_wrapped_tensor(values):
            self._refuse(name, "runs inside of torch.func or vmap, which show none of the values that it is given")
        channels = layer._buffers["running_mean"].numel()  # type: ignore[union-attr]
        if values.ndim > 1 and values.numel() and values.shape[1] != channels:
            if channels == 1:
                self._refuse(name, f"normalises {values.shape[1]} channels by one mean and variance for all of them")
            self._refuse(
                name,
                f"normalises {values.shape[1]} channels and keeps statistics of {channels}: a part of the model is "
                "active, whose statistics would be those of another; make all of it active",
            )
        self._observe(name, layer, values)

    def _check_own(self, name: str, statistics: torch.Tensor | None, layer: torch.nn.Module) -> None:
        if layer._buffers.get("running_mean") is not statistics:
            self._refuse(
                name, "has other statistics than its own while it runs, as torch.func.functional_call gives them"
            )

    def _refuse(self, layer: str, reason: str) -> None:
        if self._refusal is None:  # what follows from the first in another thread says less
            self._refusal = RefusedError(f"this layer {reason}", tensor=layer)
        raise InterruptedForwardError(layer)


class StatisticsReads(TorchFunctionMode):
    """Notes which layers' statistics are read by code outside of them while it is active.

    Attributes:
        layers: names of those.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        self.layers: set[str] = set()
        self._names: dict[int, str] = {}
        for name, layer in layers.items():
            variance = layer._buffers["running_var"]
            assert variance is not None
            self._names[storage_key(variance)] = name

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") not in _PASSIVE:
            with torch._C.DisableTorchFunction():
                keys = storage_keys(tensors_in((args, kwargs)))
                self.layers.update(self._names[key] for key in keys if key in self._names)
        return function(*args, **(kwargs or {}))


def _is_direct(layer: torch.nn.Module) -> bool:
    is_torchs = "forward" not in vars(layer) and original_class(type(layer)).forward in _TORCH
    return is_torchs or any(name in type(layer).__name__ for name in FUSED_ACTIVATION_CLASSES)


def _is_unchanged(values: torch.Tensor, measured: tuple[torch.Tensor, int] | None) -> bool:
    """Return whether such a function is given what was measured, or a copy in another layout or dtype."""
    if measured is None or values.shape != measured[0].shape or count_writes(measured[0]) != measured[1]:
        return False
    before = measured[0]
    at_one_place = values.data_ptr() == before.data_ptr() and values.stride() == before.stride()
    return at_one_place or torch.equal(values.to(before.dtype), before)


def _shows(tensor: torch.Tensor, given: torch.Tensor) -> bool:
    """Return whether a tensor is a view of all of another one, or a copy in another layout or dtype."""
    is_view = share_elements(tensor, given) and tensor.numel() == given.numel()
    return is_view or (tensor.shape == given.shape and torch.equal(tensor.to(given.dtype), given))


def _find_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    values = args[0] if args else next(iter(kwargs.values()), None)
    return values if isinstance(values, torch.Tensor) else None


def _put_channels_second(values: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    channels = layer._buffers["running_mean"].numel()  # type: ignore[union-attr]
    if values.ndim == 2 or values.shape[1] == channels:
        return values
    # (N, L, C), which a layer with arithmetic of its own takes
    return values.movedim(-1, 1) if values.shape[-1] == channels else values
