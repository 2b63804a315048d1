"""Loading tensors of a file into a live module."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.parameter import is_lazy

from bntool.batchnorm import COUNTER
from bntool.checkpoints.as_array import AsArray
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.dtypes import BY_NAME, DType, NumberKind
from bntool.checkpoints.state_dicts import UNPREFIXED
from bntool.checkpoints.tensors import Tensor, count_elements
from bntool.errors import BntoolError, RefusedError
from bntool.models.user_code import describe_exception
from bntool.modules.finding import find_name_prefix
from bntool.names import add_prefix, remove_prefix
from bntool.representation import list_first

_SHOWN = 4  # tensors that a sentence names


@dataclass(frozen=True)
class LiveTensor(AsArray):
    """A tensor of a live model as bntool reads those of files."""

    live: torch.Tensor = field(repr=False, compare=False)

    @property
    def dtype(self) -> DType:
        return BY_NAME[str(self.live.dtype).removeprefix("torch.")]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.live.shape)

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.live, torch.nn.Parameter)

    @property
    def requires_grad(self) -> bool:
        return self.live.requires_grad

    def chunks(self) -> Iterator[bytes]:
        """See :class:`~bntool.checkpoints.tensors.Tensor`."""
        plain = self.live.detach().cpu().contiguous().flatten()
        yield bytes(plain.view(torch.uint8).numpy().tobytes()) if plain.numel() else b""


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Return the elements of a tensor as a torch tensor of its own memory, exactly, in its dtype.

    Raises:
        RefusedError: torch has no strided tensor like it (quantised, sparse, without bytes, sub-byte types).
    """
    if isinstance(tensor, LiveTensor):
        return tensor.live.detach().clone()
    dtype = getattr(torch, tensor.dtype.name, None)
    if dtype is None or tensor.dtype.kind is NumberKind.OPAQUE:
        raise RefusedError(f"{tensor.dtype} elements cannot be loaded into a model: work on it before it is quantised")
    try:
        data = _read_into(bytearray(tensor.dtype.byte_count(count_elements(tensor.shape))), tensor)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if not data:
        return torch.empty(tuple(tensor.shape), dtype=dtype, device="cpu")
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(tuple(tensor.shape))


def _read_into(data: bytearray, tensor: Tensor) -> bytearray:
    """Return the elements of a tensor, copied once."""
    place, position = memoryview(data), 0
    for chunk in tensor.chunks():
        place[position : position + len(chunk)] = chunk
        position += len(chunk)
    return data


def load_state(module: torch.nn.Module, state_dict: StateDict, *, may_lack: Collection[str] = ()) -> None:
    """Load all tensors of a state dict into a module: every key must find its place.

    Prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.``, ...) on either side are aligned. Files without
    ``num_batches_tracked`` load; those counters stay as they are.

    Args:
        may_lack: roles such as ``running_mean`` that the file may lack, too; they stay as they are.

    Raises:
        RefusedError: keys are missing or unexpected, or shapes differ; the message says which, and guesses why.
    """
    wanted = module.state_dict(keep_vars=True)
    prefix, own = _find_own_names(module, state_dict, wanted)
    places: dict[str, str] = {}  # the name in the file to the name in the model
    shapes: dict[str, str] = {}
    for full_name, tensor in state_dict.tensors.items():
        name = state_dict.strip(full_name)
        target = own.get(name, prefix + name)
        place = wanted.get(target)
        if place is None and name in UNPREFIXED:
            continue
        places[full_name] = target
        if isinstance(place, torch.Tensor) and not is_lazy(place) and not _fits(tensor.shape, place.shape):
            shapes[target] = f"{name} is {list(tensor.shape)} in the file, {list(place.shape)} in the model"
    if shapes:
        found = set(places.values())
        missing = [full for full in own.values() if full not in found]
        unexpected = [target for target in found if target not in wanted]
    else:
        missing, unexpected = _load(module, state_dict, places, prefix=prefix)
    optional = (COUNTER, *may_lack)
    missing = [name.removeprefix(prefix) for name in missing if name.rpartition(".")[2] not in optional]
    unexpected = [name.removeprefix(prefix) for name in unexpected]
    if missing or unexpected or shapes:
        names = [state_dict.strip(name) for name in state_dict.tensors]
        raise RefusedError(_explain(missing, unexpected, list(shapes.values()), names=names))


def _find_own_names(
    module: torch.nn.Module, state_dict: StateDict, wanted: Collection[str]
) -> tuple[str, dict[str, str]]:
    """Return what a module puts before the names of a file, and its own names by those."""
    prefix = find_name_prefix(module, map(state_dict.strip, state_dict.tensors))
    return prefix, {name.removeprefix(prefix): name for name in wanted}


def find_changed(module: torch.nn.Module, state_dict: StateDict, names: Collection[str]) -> str | None:
    """Return a tensor that a module does not hold as the file has it, since its own code changed it when it was loaded.

    Args:
        names: those to compare, without prefix.
    """
    wanted = module.state_dict(keep_vars=True)
    _, own = _find_own_names(module, state_dict, wanted)
    for full_name, tensor in state_dict.tensors.items():
        name = state_dict.strip(full_name)
        live = wanted.get(own.get(name, ""))
        if name not in names or not isinstance(live, torch.Tensor) or tuple(live.shape) != tuple(tensor.shape):
            continue
        stored, held = _read(state_dict, full_name).to(live.dtype), live.detach().cpu()
        if not bool(((stored == held) | (stored.isnan() & held.isnan())).all()):
            return full_name
    return None


def _load(
    module: torch.nn.Module, state_dict: StateDict, places: Mapping[str, str], *, prefix: str
) -> tuple[list[str], list[str]]:
    """Load, and say which keys are missing and which unexpected.

    Modules may translate keys of older versions of themselves when they load: so they are asked, not second-guessed.
    """
    state = module.state_dict()
    given = OrderedDict(
        (name, value) for name, value in state.items() if not isinstance(value, torch.Tensor)
    )  # its own
    given.update((target, _read(state_dict, full_name)) for full_name, target in places.items())
    given._metadata = _metadata(state_dict, prefix)  # type: ignore[attr-defined]
    try:
        missing, unexpected = module.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise RefusedError(f"the model does not take this state dict: {' '.join(str(error).split())}") from error
    except BntoolError:
        raise
    except Exception as error:  # code of the model, which is asked to load
        raise RefusedError(f"the model does not take this state dict: {describe_exception(error)}") from error
    return list(missing), list(unexpected)


def _read(state_dict: StateDict, full_name: str) -> torch.Tensor:
    try:
        return to_torch(state_dict.tensors[full_name])
    except RefusedError as error:
        raise RefusedError(error.message, tensor=full_name) from error


def _fits(shape: Sequence[int], other: Sequence[int]) -> bool:
    # torch before 0.4 saved scalars as one element
    return tuple(shape) == tuple(other) or (tuple(shape), tuple(other)) == ((1,), ())


def _metadata(state_dict: StateDict, prefix: str) -> OrderedDict[str, dict[str, int]]:
    """Return versions of modules under the model's own names; modules adapt old files by them."""
    versions: Mapping[str, int | None] = state_dict.versions or {}
    metadata: OrderedDict[str, dict[str, int]] = OrderedDict()
    for path, version in versions.items():
        if version is not None:
            metadata[add_prefix(remove_prefix(path, state_dict.prefix), prefix)] = {"version": version}
    return metadata


def _explain(missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str], *, names: Sequence[str]) -> str:
    parts = []
    if missing:
        parts.append(f"the file lacks {list_first(missing, _SHOWN)}")
    if unexpected:
        parts.append(f"the model has no {list_first(unexpected, _SHOWN)}")
    if shapes:
        parts.append(list_first(shapes, _SHOWN))
    hint = _guess(missing, unexpected, names)
    if shapes and not missing and not unexpected and all(_is_of_the_head(text) for text in shapes):
        hint = "; it seems to be made for another number of classes: build the model so, e.g. --model-arg num_classes="
        hint += shapes[0].partition("[")[2].partition("]")[0].split(",")[0]
    return "the state dict does not fit the model: " + "; ".join(parts) + hint


def _is_of_the_head(text: str) -> bool:
    """Return whether shapes differ only in their first dimension, like those of a last layer for another number of
    classes.
    """
    file, model = (part.partition("[")[2].partition("]")[0].split(", ") for part in text.split(" in the file, "))
    return len(file) == len(model) <= 2 and file[1:] == model[1:]


def _guess(missing: Sequence[str], unexpected: Sequence[str], names: Sequence[str]) -> str:
    """Describe a prefix that would bring names of the two sides together."""
    for here, there, whose in ((missing, names, "the file's"), (unexpected, missing, "the model's")):
        found: Counter[str] = Counter()
        for name in here:
            found.update(other.removesuffix(name) for other in there if other.endswith("." + name))
        if found:
            prefix, count = found.most_common(1)[0]
            if count > len(here) // 2:
                return f"; {whose} keys seem to have {prefix!r} in front: choose the part of the model that fits"
    return ""
