"""A live model or a state dict in memory, listed as a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from bntool.checkpoints.checkpoint import Checkpoint, Format, ModuleInfo, StateDict
from bntool.checkpoints.dtypes import BY_NAME
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.state_dicts import find_prefix
from bntool.checkpoints.tensors import LiteralTensor, StoredTensor, Tensor, contiguous_strides
from bntool.errors import RefusedError, UsageError
from bntool.modules.finding import find_wrapper_prefix, walk_modules
from bntool.modules.loading import LiveTensor


class InMemory(Format):
    """The format of models and state dicts in memory: they are only read; calls for live models change them."""

    name = "in-memory"
    title = "in memory"
    read_only = "this is a model in memory, not a file: call bntool.fold, bntool.freeze or bntool.recalibrate"

    def read(self, file: SourceFile) -> Checkpoint:
        raise RefusedError(self.read_only, path=file.path)


class _NoFile(SourceFile):
    """Stands where a checkpoint has its file."""

    def __init__(self, name: str, size: int) -> None:
        self.path, self.size, self.mode, self.identity = Path(name), size, 0, (0, 0)

    def _read_once(self, offset: int, length: int) -> bytes:
        raise AssertionError(f"nothing of {self.path} lies in a file, nor bytes {offset} to {offset + length}")

    def close(self) -> None:
        """Do nothing."""


def list_in_memory(source: object) -> Checkpoint:
    """List a live model, or a state dict of torch or numpy tensors; nothing is copied but numpy arrays.

    Raises:
        UsageError: it is neither, or a mapping that holds no tensors itself.
    """
    modules: dict[str, ModuleInfo] = {}
    if isinstance(source, torch.nn.Module):
        modules = {name: _describe(module) for name, module in walk_modules(source)}
        state: Mapping[str, Any] = source.state_dict(keep_vars=True)
        title, prefix = type(source).__name__, find_wrapper_prefix(source)
    elif not isinstance(source, Mapping):
        kind = type(source).__name__
        raise UsageError(
            f"a path, an open checkpoint, a state dict or a live model is read, not an object of the type {kind}"
        )
    else:
        state, title, prefix = source, "state dict", find_prefix([str(name) for name in source])
    tensors = {name: tensor for name, value in state.items() if (tensor := _as_tensor(value)) is not None}
    if state and not tensors and not modules:
        inner = [key for key, value in state.items() if isinstance(value, Mapping)]
        where = f"; give the state dict inside, such as the one under {inner[0]!r}" if inner else ""
        raise UsageError(f"this mapping holds no tensors{where}")
    metadata = getattr(state, "_metadata", None)
    versions = None if metadata is None else {path: facts.get("version") for path, facts in metadata.items()}
    state_dict = StateDict(
        key="",
        prefix=prefix,
        tensors={str(name): tensor for name, tensor in tensors.items()},
        modules=modules,
        versions=versions,
        is_module=bool(modules),
    )
    size = sum(tensor.dtype.byte_count(int(np.prod(tensor.shape))) for tensor in tensors.values())
    return Checkpoint(_NoFile(f"<{title}>", size), InMemory(), (state_dict,))


def _as_tensor(value: Any) -> Tensor | None:
    """Convert a value of a state dict to a tensor; None for what is no tensor, or has a dtype that bntool does not
    know.
    """
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if is_lazy(value) or value.is_meta or value.layout is not torch.strided:  # no plain elements
            shape = () if is_lazy(value) else tuple(value.shape)
            wrapper = None if is_lazy(value) or value.is_meta else str(value.layout).removeprefix("torch.")
            return StoredTensor(BY_NAME[name], shape, contiguous_strides(shape), 0, None, wrapper=wrapper)
        return LiveTensor(value) if name in BY_NAME else None
    if isinstance(value, np.ndarray | np.generic) and (dtype := BY_NAME.get(value.dtype.name)) is not None:
        plain = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
        return LiteralTensor(dtype, tuple(value.shape), plain.tobytes())
    return None


def _describe(module: torch.nn.Module) -> ModuleInfo:
    kind = type(module)
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    attributes = {
        n: value for n, value in plain.items() if value is None or isinstance(value, bool | int | float | str)
    }
    return ModuleInfo(f"{kind.__module__}.{kind.__qualname__}", attributes)
