"""Calling a model with inputs of any form, and the tensors in what it is given and gives."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves, tree_map

from bntool.errors import BntoolError, UserCodeError
from bntool.models.user_code import describe_exception


def leaves_of(item: Any) -> Iterator[Any]:
    """Yield all values in nested lists, tuples, sets and mappings of any class, and in what torch's pytrees know."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple | deque | AbstractSet):
        for inner in item:
            yield from leaves_of(inner)
    elif isinstance(item, Mapping):
        for inner in item.values():
            yield from leaves_of(inner)
    elif type(item) in SUPPORTED_NODES:
        yield from tree_leaves(item)
    else:
        yield item


def tensors_in(item: Any) -> list[Tensor]:
    """Return the tensors among :func:`leaves_of`."""
    return [leaf for leaf in leaves_of(item) if isinstance(leaf, Tensor)]


def map_leaves(function: Callable[[Any], Any], item: Any) -> Any:
    """Copy a nest, of the same classes, with a function applied to each of its :func:`leaves_of`."""
    if isinstance(item, tuple):
        return _make_tuple(item, [map_leaves(function, inner) for inner in item])
    if type(item) is list:
        return [map_leaves(function, inner) for inner in item]
    if isinstance(item, list | deque):
        changed = copy.copy(item)  # with whatever a subclass keeps beside its items
        for index, inner in enumerate(item):
            changed[index] = map_leaves(function, inner)
        return changed
    if isinstance(item, Mapping):
        values = {name: map_leaves(function, inner) for name, inner in item.items()}
        if type(item) is dict or not isinstance(item, MutableMapping):
            return values
        other = copy.copy(item)
        for name, value in values.items():
            other[name] = value
        return other
    return tree_map(function, item) if type(item) in SUPPORTED_NODES else function(item)


def map_tensors(function: Callable[[Tensor], Any], item: Any) -> Any:
    """Copy a nest, of the same classes, with a function applied to each of its tensors."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, item)


def _make_tuple(like: tuple[Any, ...], items: list[Any]) -> Any:
    """Make a tuple of the same class as another one, without calling a constructor whose arguments are unknown."""
    kind = type(like)
    try:
        made = tuple.__new__(kind, items)
    except TypeError:  # of a class that C makes, as torch.return_types
        return kind(items)
    if hasattr(like, "__dict__"):
        vars(made).update(vars(like))
    return made


def copy_tensors(item: Any) -> Any:
    """Copy a nest and its tensors."""
    return map_tensors(Tensor.clone, item)


class SecondCall(tuple[Any, Any]):
    """The inputs of two calls, one after the other, both while gradients are recorded, of the inputs too.

    What counts is the second.
    """

    __slots__ = ()


@contextlib.contextmanager
def calling_before(model: nn.Module, inputs: Any) -> Iterator[Any]:
    """Give what a model is called with; inside the context gradients are recorded if that is a :class:`SecondCall`,
    and the first call is over.

    What a backward pass would need is not kept, so that nothing outlives the forward because of it.
    """
    if not isinstance(inputs, SecondCall):
        yield inputs
        return
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _saved: None, _refuse_backward):
        call(model, map_tensors(_copy_with_gradients, inputs[0]))
        yield map_tensors(_copy_with_gradients, inputs[1])


def _copy_with_gradients(tensor: Tensor) -> Tensor:
    """Copy a tensor; gradients are recorded for a floating one, which may be written to all the same."""
    return tensor.detach().requires_grad_(tensor.is_floating_point()).clone()


def _refuse_backward(_nothing: None) -> Tensor:
    raise RuntimeError("there is no backward pass of a forward that is compared with another")


def pass_inputs(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a
    :class:`SecondCall` with two of these.
    """
    if isinstance(inputs, SecondCall):
        with calling_before(model, inputs) as inner:
            return pass_inputs(model, inner)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call the model; an exception of it becomes an error that names the shapes of its inputs. See :func:`pass_inputs`.

    Raises:
        UserCodeError: the model's forward raised.
    """
    try:
        return pass_inputs(model, inputs)
    except BntoolError:  # of ours, that watches the call
        raise
    except (Exception, SystemExit) as error:
        shapes = [list(tensor.shape) for tensor in tensors_in(inputs)]
        said = describe_exception(error)
        raise UserCodeError(f"the model raised on inputs of shape {shapes}: {said}") from error
