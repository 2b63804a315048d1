"""Batches of input data: what a model is called with, the labels, and words for error messages."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from dataclasses import fields as fields_of
from typing import Any, TypeVar

import numpy as np
import torch

from bntool.data.policies import LeftOut
from bntool.data.preprocessing import Preprocessing
from bntool.data.shares import WHOLE, Share
from bntool.errors import UsageError
from bntool.models.user_code import running_user_code
from bntool.modules.calling import copy_tensors, map_leaves, map_tensors, pass_inputs, tensors_in
from bntool.modules.finding import unwrap, walk_modules
from bntool.representation import list_first

_GIVEN = "the batches given"  # what messages call them
_LABEL_KEYS = ("labels", "label", "y", "targets", "target")
_UNNAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_HANDS_ON = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_LABEL_NOT_PASSED = "of a batch (a, b) b is the label, which no model gets: ((a, b),) passes both as arguments"
_NO_SUCH_NAMES = "a dict passes what the forward has names for: give ((a, b),) to pass a and b by position"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        inputs: a tensor, or a tuple (positional arguments of the model), a dict (keyword arguments) or a list (one
            argument that is a list).
        labels: class indices, shape (samples,), or whatever the data gives; None where it gives none.
        description: which data it is, e.g. ``samples 64 to 127 of digits.npz``.
        samples: how many.
        names: what to call each sample, e.g. its file; empty where the source cannot tell.
        is_record: ``inputs`` is a dict as the data has it, of which a model takes what its forward has a name for.
        label_key: where in that dict the labels were.
        position: in the list of all batches, of which a share may be read; None where nobody counted.
        fields: of a named tuple that the batch or its inputs came as, all values; they are arguments where the forward
            has all of their names, see :meth:`fit`.
    """

    inputs: Any
    labels: Any
    description: str
    samples: int
    names: Sequence[str] = field(default=(), repr=False)
    is_record: bool = False
    label_key: str | None = None
    position: int | None = None
    fields: Mapping[str, Any] | None = field(default=None, repr=False)

    def describe(self, samples: Sequence[int]) -> str:
        """Name some of the samples by position; the whole batch if all are meant, or if samples have no names."""
        if not 0 < len(samples) < self.samples or len(self.names) <= max(samples):
            return self.description
        return list_first([self.names[index] for index in samples])

    def find_bad_samples(self) -> list[int]:
        """Return positions of the samples whose inputs hold NaN or infinity; all, where tensors are not by sample."""
        bad: set[int] = set()
        for tensor in tensors_in(self.inputs):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                by_sample = tensor.ndim > 0 and tensor.shape[0] == self.samples
                bad.update(find_bad_rows(tensor) if by_sample else range(self.samples))
        return sorted(bad)

    def run(self, model: torch.nn.Module, *, channels_last: bool = False) -> Any:
        """Call the model with the batch, moved to its device and floating dtype; its output.

        Args:
            model: what to call.
            channels_last: lay an input of four dimensions out so; values do not depend on it, speed does.
        """
        device, dtype = find_placement(model)
        batch = self.fit(model)
        inputs = move(batch.inputs_for(model), device=device, dtype=dtype)
        if channels_last and isinstance(inputs, torch.Tensor) and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        try:
            return pass_inputs(model, inputs)
        except TypeError as error:
            unfit = "missing" in str(error) or (batch.is_record and "unexpected keyword" in str(error))
            if unfit and (batch.is_record or batch.labels is not None):
                error.args = (f"{error}; {_NO_SUCH_NAMES if batch.is_record else _LABEL_NOT_PASSED}",)
            raise

    def fit(self, model: torch.nn.Module) -> Batch:
        """Return the batch as a model takes it: a named tuple whose names are all arguments of the forward, as a dict.

        Another named tuple is a tuple like any.
        """
        if self.fields is None:
            return self
        parameters = _find_parameters(model, self.fields)
        named = {name for name, parameter in parameters.items() if parameter.kind not in _UNNAMED}
        if not named.issuperset(self.fields):
            return replace(self, fields=None)
        if isinstance(self.inputs, tuple):  # the labels lie beside it
            return replace(self, inputs=dict(self.fields), fields=None)
        key = _find_label_key(self.fields)
        return replace(
            self,
            inputs={name: value for name, value in self.fields.items() if name != key},
            labels=None if key is None else self.fields[key],
            is_record=True,
            label_key=key,
            fields=None,
        )

    def inputs_for(self, model: torch.nn.Module) -> Any:
        """Return the inputs as :func:`~bntool.modules.calling.pass_inputs` gives them to a model: a tensor, a tuple, a
        list or a dict.

        Of a dict of the data it is what the model's forward has a name for. A single value with tensors goes to its
        first argument, whatever it is called; of several, those without tensors go where they have a name. Labels go
        only to an argument of their name that has no default, or ``y``. A forward of one argument that none of several
        values is called after takes the dict itself. One of ``*args`` and ``**kwargs`` alone hands on what it is given:
        the forward of the first module inside that has a name for any of the values counts.

        Raises:
            UsageError: the first argument is given by position only, and others have names.
        """
        if self.fields is not None:
            return self.fit(model).inputs_for(model)
        if not self.is_record:
            return self.inputs
        parameters = _find_parameters(model, self.inputs)
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        named = [name for name, parameter in parameters.items() if parameter.kind not in _UNNAMED]
        values = dict(self.inputs)
        with_tensors = [name for name, value in values.items() if tensors_in(value)]
        if self.label_key in named:
            is_needed = parameters[self.label_key].default is inspect.Parameter.empty
            if is_needed or self.label_key == "y":
                values[self.label_key] = self.labels
        if len(with_tensors) != 1:
            if not takes_all and named:  # paths, identities and such
                values = {name: value for name, value in values.items() if name in named or name in with_tensors}
            is_whole = len(named) == 1 and not takes_all and named[0] not in values
            return ({**values, self.label_key: self.labels} if self.label_key else values,) if is_whole else values
        key = with_tensors[0]
        values = {name: value for name, value in values.items() if takes_all or name in named or name == key}
        if key in named:
            is_first = len(values) == 1 and parameters[key].kind is not inspect.Parameter.KEYWORD_ONLY
            return values[key] if is_first else values
        positional = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY]
        if positional and len(values) > 1:
            raise UsageError(
                f"the model's forward takes {positional[0]} by position only, which a dict cannot hold beside other "
                f"arguments ({self.description}): give tuples ((x, y), label)"
            )
        first = next((name for name in named if name not in values), None)
        if first is None or len(values) == 1:  # beside *args there is no place for others
            return values if parameters and takes_all and len(parameters) == 1 else values[key]
        return {first: values.pop(key), **values}


def _find_parameters(model: torch.nn.Module, names: Iterable[str]) -> dict[str, inspect.Parameter]:
    """Find the parameters of a forward.

    Where it only takes ``*args, **kwargs`` and hands them on, those of the first module inside that has one of the
    names.
    """
    own = _read_parameters(unwrap(model))
    if [parameter.kind for parameter in own.values()] != list(_HANDS_ON):
        return own
    for _, module in walk_modules(model):
        inner = _read_parameters(module)
        if not inner.keys().isdisjoint(names):
            return inner
    return own


def _read_parameters(module: torch.nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(module.forward).parameters)
    except ValueError:  # of a compiled model
        return {}


@dataclass
class Batches:
    """Batches that can be iterated over as often as needed, if their source can.

    Attributes:
        open_: starts reading from the first batch.
        description: where they come from.
        samples: how many there are, None where nothing tells.
        has_labels: None where nothing tells before the first batch is read.
        bad_inputs: what could not be read and was skipped; grows while iterating.
        preprocessing: what is done to images and pixels on the way; None where nothing is.
        classes: names of the classes that labels count, where the source knows them.
        share: which of the list of all batches these are.
        count: batches in the list of all; None where nothing tells before all are read.
        identify: a fingerprint of that list, as far as can be told before it is read.
    """

    open_: Callable[[], Iterator[Batch]]
    description: str
    samples: int | None = None
    has_labels: bool | None = None
    bad_inputs: list[LeftOut] = field(default_factory=list)
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    share: Share = WHOLE
    count: int | None = None
    identify: Callable[[], str] = field(default="".format, repr=False)

    def __iter__(self) -> Iterator[Batch]:
        self.bad_inputs.clear()
        return self.open_()


def as_batches(batches: Iterable[Any], *, share: Share = WHOLE) -> Batches:
    """Take any iterable of batches as :class:`Batches`.

    Args:
        batches: :class:`Batches`, or any iterable of what :func:`split_batch` understands.
        share: which of them are read; of :class:`Batches` those that they are.

    Raises:
        UsageError: it is a tensor or an array.
    """
    if isinstance(batches, Batches):
        return batches
    if isinstance(batches, torch.Tensor | np.ndarray):
        raise UsageError("one tensor does not say where its batches end: give [tensor] where it is one, or a loader")

    def read_all() -> Iterator[Batch]:
        position = 0
        for item in _read_user_data(batches):
            with running_user_code(f"reading {_GIVEN}"):
                batch = item if isinstance(item, Batch) else split_batch(item, source=_GIVEN, position=position)
            position += batch.samples
            if batch.samples:
                yield batch

    def read() -> Iterator[Batch]:
        return take_share(read_all(), taken)

    taken = Batches(read, _GIVEN, share=share)
    return taken


def take_share(items: Iterator[Batch], batches: Batches) -> Iterator[Batch]:
    """Yield the batches of one share from a list whose length is not known; all batches are read.

    Args:
        items: all batches.
        batches: whose share is meant; is told how many there were at the end.
    """
    return (replace(batch, position=position) for position, batch in find_share(items, batches))


def find_share(items: Iterator[Item], batches: Batches) -> Iterator[tuple[int, Item]]:
    """Return what is to become batches of this share, with the position of each."""
    wanted = batches.share.list_positions()
    position, index = next(wanted), -1
    for index, item in enumerate(items):
        if index == position:
            yield index, item
            position = next(wanted)
    batches.count = index + 1


def _read_user_data(batches: Iterable[Any]) -> Iterator[Any]:
    end = object()
    with running_user_code(f"reading {_GIVEN}"):
        iterator = iter(batches)
    while True:
        with running_user_code(f"reading {_GIVEN}"):
            item = next(iterator, end)
        if item is end:
            return
        yield item


def split_batch(item: Any, *, source: str, position: int) -> Batch:
    """Separate the inputs of a batch from its labels.

    - a tensor: the input;
    - a tuple or list: its first element is the input (a tensor; a tuple, dict or list as in :class:`Batch`), the second
      the labels, as data loaders and ``torch.optim.swa_utils.update_bn`` have it;
    - a dict: labels are under ``labels``, ``label``, ``y``, ``targets`` or ``target``; what remains are arguments of
      the model, see :meth:`Batch.inputs_for`; an object of a dataclass is a dict of its fields;
    - a named tuple, all of whose names are arguments of the model's forward, is such a dict, another one a tuple.

    Arrays of numpy and whatever converts to them (TensorFlow, JAX) are as good as tensors.

    Raises:
        UsageError: it is none of these, or holds no tensor.
    """
    given, item = item, to_tensors(_open_dataclass(item))
    inputs, labels, label_key, fields = item, find_label(item), None, None
    if isinstance(item, tuple | list) and item:
        inputs = to_tensors(_open_dataclass(item[0]))
        fields = _find_fields(item) or _find_fields(inputs)
    elif isinstance(item, Mapping):
        label_key = _find_label_key(item)
        inputs = {name: value for name, value in item.items() if name != label_key}
    tensors = tensors_in(inputs)
    if not tensors:
        held = given[0] if isinstance(given, tuple | list) and given else given
        raise UsageError(
            f"a batch of {source} holds no tensor but {type(held).__name__}: give tensors, tuples or dicts of them"
        )
    first = tensors[0]
    count = len(inputs) if isinstance(inputs, list) else (first.shape[0] if first.ndim else 1)
    names = [f"sample {index} of {source}" for index in range(position, position + count)]
    description, is_record = describe_range(source, position, count), isinstance(item, Mapping)
    return Batch(inputs, labels, description, count, names, is_record=is_record, label_key=label_key, fields=fields)


def _open_dataclass(item: Any) -> Any:
    """Return the fields of an object of a dataclass as a dict; anything else as it is."""
    if not is_dataclass(item) or isinstance(item, type | tuple | list | Mapping | torch.Tensor):
        return item
    return {one.name: getattr(item, one.name) for one in fields_of(item)}


def _find_fields(item: Any) -> Mapping[str, Any] | None:
    """Return the values of a named tuple by their names; None of anything else."""
    names = getattr(item, "_fields", None)
    return dict(zip(names, item, strict=True)) if isinstance(item, tuple) and names else None


def find_label(item: Any) -> Any:
    """Return the labels of a batch, or the label of a sample; None where there is none."""
    if isinstance(item, tuple | list):
        return item[1] if len(item) > 1 else None
    key = _find_label_key(item) if isinstance(item, Mapping) else None
    return item[key] if key is not None else None


def _find_label_key(item: Mapping[Any, Any]) -> str | None:
    return next((key for key in _LABEL_KEYS if key in item), None)


def to_tensors(value: Any) -> Any:
    """Convert arrays of numpy, TensorFlow or JAX in a nest to torch tensors on the CPU."""
    return map_leaves(_to_tensor, value)


def _to_tensor(value: Any) -> Any:
    if isinstance(value, torch.Tensor | str | bytes | np.generic) or not hasattr(value, "__array__"):
        return value
    array = np.asarray(value)
    return torch.from_numpy(np.array(array)) if array.dtype.kind in "fiub" else value


def describe_range(source: str, start: int, count: int) -> str:
    """Describe a range of samples: ``samples 64 to 127 of digits.npz``."""
    return f"sample {start} of {source}" if count == 1 else f"samples {start} to {start + count - 1} of {source}"


def find_bad_rows(values: torch.Tensor) -> list[int]:
    """Return positions along the first dimension at which a tensor holds NaN or infinity."""
    finite = torch.isfinite(values).reshape(values.shape[0], -1).all(dim=1)
    return [index for index, good in enumerate(finite.tolist()) if not good]


def move(value: Any, *, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Move the tensors of a nest to a device, and floating ones to a dtype."""
    return map_tensors(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype), value)


def find_placement(model: torch.nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Return the device and floating dtype of a model; None for a model without floating tensors.

    Those of its first weight of two dimensions or more: scalars and norms are often kept in another dtype.
    """
    floating = (t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point())
    first = next(floating, None)
    if first is not None and first.ndim < 2:
        first = next((tensor for tensor in floating if tensor.ndim >= 2), first)
    return (None, None) if first is None else (first.device, first.dtype)


def copy_batch(batch: Batch) -> Batch:
    """Return the batch with tensors of its own."""
    return replace(batch, inputs=copy_tensors(batch.inputs), fields=copy_tensors(batch.fields))


def cut_batch(batch: Batch, samples: int) -> Batch:
    """Return the first samples of a batch; the whole batch where its tensors do not share their first dimension."""
    tensors = tensors_in((batch.inputs, batch.labels, batch.fields))
    if (
        batch.samples <= samples
        or isinstance(batch.inputs, list)
        or any(t.layout is not torch.strided or t.ndim == 0 or t.shape[0] != batch.samples for t in tensors)
    ):
        return batch
    inputs, labels, fields = (_first(one, samples) for one in (batch.inputs, batch.labels, batch.fields))
    return replace(batch, inputs=inputs, labels=labels, fields=fields, samples=samples, names=batch.names[:samples])


def _first(value: Any, samples: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[:samples]
    if isinstance(value, Mapping):
        return {name: _first(item, samples) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_first(item, samples) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value[:samples]
    return value
