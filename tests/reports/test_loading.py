"""The printed lines are run: they load the state dict that they are printed for, wherever it lies in the file."""

from __future__ import annotations

import collections
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from bntool.checkpoints.formats import open_checkpoint
from bntool.reports.loading import show_loading_code
from tests.checkpoints.foreign import as_arrays
from tests.checkpoints.samples import tiny_net
from tests.checkpoints.torch.test_reading import Inert


def _odd(state: Any) -> Inert:
    holder = Inert(None)
    holder.__dict__ = {"a = 1; b": state}
    return holder


LAYOUTS = {
    "root": lambda one, two: two,
    "dotted": lambda one, two: {"a.b": two},
    "nested": lambda one, two: {"a": {"b": two}},
    "numbers": lambda one, two: {0: one, 1: two},
    "texts": lambda one, two: {"0": one, "1": two},
    "both": lambda one, two: {"0": one, 0: two},
    "decays": lambda one, two: {"ema": {0.9: one, 0.99: two}},
    "list": lambda one, two: [one, (3, two)],
    "deque": lambda one, two: {"kept": collections.deque([one, two])},
    "attribute": lambda one, two: {"first": one, "holder": Inert(two)},
    "odd attribute": lambda one, two: {"first": one, "holder": _odd(two)},
    "arrays": lambda one, two: [one, as_arrays(two)],
    "mixed": lambda one, two: [one, {**two, "1.bias": two["1.bias"].numpy()}],
    "arrays under a prefix": lambda one, two: [one, as_arrays({f"module.{n}": t for n, t in two.items()})],
    "module": lambda one, two: [one, {"nets": {3: _loaded(two)}}],
}


def _loaded(state: Any) -> torch.nn.Module:
    net = tiny_net()
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_lines_load_the_last_state_dict(name: str, tmp_path: Path) -> None:
    one, two = tiny_net().state_dict(), copy.deepcopy(tiny_net().state_dict())
    two["1.running_mean"] += 1
    path = tmp_path / "model.pt"
    torch.save(LAYOUTS[name](one, two), path)
    with open_checkpoint(path) as checkpoint:
        lines = show_loading_code(checkpoint, checkpoint.state_dicts[-1], str(path))
    scope: dict[str, Any] = {"model": tiny_net()}
    exec("\n".join(lines), scope)
    found = scope["model"].state_dict()
    assert found.keys() == two.keys()
    assert all(torch.equal(found[key], two[key]) for key in two)


class Whole(torch.nn.Module):
    """Has all that it has under the name that Lightning gives a network."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_net()


@pytest.mark.parametrize("make", [tiny_net, Whole])
@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("arrays", [False, True])
def test_what_all_names_begin_with_may_be_the_models_own(make: Any, wrapper: str, arrays: bool, tmp_path: Path) -> None:
    state = make().state_dict()
    state = {name: tensor + 1 for name, tensor in state.items()}
    named = {wrapper + name: tensor for name, tensor in state.items()}
    path = tmp_path / "model.pt"
    torch.save({"net": as_arrays(named) if arrays else named}, path)
    with open_checkpoint(path) as checkpoint:
        lines = show_loading_code(checkpoint, checkpoint.state_dicts[-1], str(path))
    scope: dict[str, Any] = {"model": make()}
    exec("\n".join(lines), scope)
    found = scope["model"].state_dict()
    assert all(torch.equal(found[key], state[key]) for key in found)
