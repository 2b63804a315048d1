"""What a BatchNorm layer normalises of what it is called with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from bntool.errors import RefusedError

_SAMPLES = 2
_TORCH = (_BatchNorm.forward, SyncBatchNorm.forward)
_KERNELS = (torch.nn.functional.batch_norm, torch.batch_norm, torch.native_batch_norm)


class ActivationReader:
    """Finds the activations that one layer normalises.

    torch's own classes normalise what they are called with. Others may transpose it, mask it or put it through
    something else first. So their forward is run on a copy, and what arrives at the kernel counts: with a few samples
    at the first call, to see whether that is the very tensor that came in, unchanged, and if not, at every call.
    Classes that call no kernel, such as FrozenBatchNorm, normalise what they are called with.

    Args:
        name: of the layer, for messages.
        layer: that will be called.
    """

    def __init__(self, name: str, layer: torch.nn.Module) -> None:
        self._name = name
        self._statistics = layer._buffers["running_mean"]
        self._is_direct: bool | None = None

    def __call__(self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The activations of one call, channels in dimension 1.

        Args:
            module: the layer, or a replica of it.
            args, kwargs: what it is called with.

        Raises:
            RefusedError: several tensors are normalised in one call, or the layer runs with statistics that are not its
                own and not ours to write to.
        """
        if module._buffers.get("running_mean") is not self._statistics and not getattr(module, "_is_replica", False):
            raise RefusedError(
                "while it runs this layer has other statistics than its own, as torch.func.functional_call gives them",
                tensor=self._name,
            )
        if self._is_direct is None:
            self._is_direct = _is_torchs(module) or _is_direct(module, args, kwargs)
        if self._is_direct:
            return _put_channels_second(_find_input(args, kwargs), module)
        kernels = _run_copy(module, args, kwargs, samples=None)
        if len(kernels.given) != 1:
            raise RefusedError(f"this layer normalises {len(kernels.given)} tensors in one call", tensor=self._name)
        return kernels.given[0]


class _Kernels(TorchFunctionMode):
    """Notes what is given to kernels together with the statistics of one layer; nothing is computed of it."""

    def __init__(self, module: torch.nn.Module, called_with: torch.Tensor) -> None:
        super().__init__()
        self._statistics = module._buffers["running_mean"]
        self._called_with = called_with
        self._before = called_with.clone()
        self.given: list[torch.Tensor] = []
        self.are_direct = True

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _KERNELS and any(value is self._statistics for value in (*args, *kwargs.values())):
            values = args[0] if args else kwargs["input"]
            self.given.append(values)
            self.are_direct &= values is self._called_with and torch.equal(values, self._before)
            return torch.zeros_like(values)
        return function(*args, **kwargs)


def _is_torchs(module: torch.nn.Module) -> bool:
    return "forward" not in vars(module) and type(module).forward in _TORCH


def _is_direct(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    for samples in (_SAMPLES, None):  # it may want whole batches, and what raises even so will do so when it is called
        with contextlib.suppress(Exception):
            return _run_copy(module, args, kwargs, samples=samples).are_direct
    return True


def _run_copy(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, samples: int | None
) -> _Kernels:
    """Run a layer on a copy of the first samples of what it is called with, or of all."""
    batch = _find_input(args, kwargs).shape[0]

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return (value[:samples] if value.ndim and value.shape[0] == batch else value).clone()

    args, kwargs = tree_map(copy, tuple(args)), tree_map(copy, dict(kwargs))
    kernels = _Kernels(module, _find_input(args, kwargs))
    with kernels:
        module.forward(*args, **kwargs)
    return kernels


def _find_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    values = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(values, torch.Tensor)
    return values


def _put_channels_second(values: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    channels = module._buffers["running_mean"].numel()  # type: ignore[union-attr]
    if values.ndim == 2 or values.shape[1] == channels:
        return values
    # (N, L, C), which a layer with arithmetic of its own takes
    return values.movedim(-1, 1) if values.shape[-1] == channels else values
