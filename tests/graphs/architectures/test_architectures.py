"""Architectures recognised by names and shapes, held against what was recorded from the real ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.formats import open_checkpoint
from bntool.errors import RefusedError, UsageError
from bntool.folding.options import FoldOptions
from bntool.folding.planning import FoldPlan, Level, plan_fold
from bntool.graphs.architectures.catalogue import PATH, load_catalogue
from bntool.graphs.architectures.recognition import assume_eps, find_name, recognise
from bntool.graphs.architectures.structure import assume, parse_runs
from bntool.plan import SkipReason
from tests.graphs.architectures.drawn_tensors import draw_state_dict
from tests.places import FIXTURES

RECORDED = json.loads(gzip.decompress((FIXTURES / "architectures.json.gz").read_bytes()))
BY_NAME = {one["name"]: one for one in RECORDED}


def state_dict_of(name: str, **changes: Any) -> StateDict:
    """The recorded tensors; ``changes`` names some with another shape, or None for none."""
    shapes = {key: tuple(shape) for key, shape in BY_NAME[name]["shapes"]}
    shapes |= {key.replace("__", "."): shape for key, shape in changes.items()}
    return draw_state_dict({key: shape for key, shape in shapes.items() if shape is not None})


def under(root: str, name: str, **others: tuple[int, ...]) -> StateDict:
    shapes = {root + key: tuple(shape) for key, shape in BY_NAME[name]["shapes"]}
    return draw_state_dict({**shapes, **others})


def plan(state_dict: StateDict, *, name: str | None = None, eps: float | None = None) -> FoldPlan:
    return plan_fold(state_dict, assume(state_dict, recognise(state_dict, name=name), eps=eps), FoldOptions(eps=eps))


@pytest.mark.parametrize("name", BY_NAME)
def test_an_architecture_folds_from_its_tensors_alone_as_its_trace_does(name: str) -> None:
    recorded = BY_NAME[name]
    state_dict = state_dict_of(name)
    (found,) = recognise(state_dict, name=name)
    assert found.whole
    assert not found.root
    eps = next(iter(recorded["eps"].values())) if found.choices else None
    planned = plan(state_dict, name=name, eps=eps)
    assert [[fold.layer, list(fold.into), fold.level.value] for fold in planned.folds] == recorded["folds"]
    assert [[skip.layer, skip.reason.value] for skip in planned.skips] == recorded["skips"]


@pytest.mark.parametrize("name", [name for name in BY_NAME if "rcnn" not in name])
def test_eps_is_that_of_the_architecture(name: str) -> None:
    state_dict = state_dict_of(name)
    (found,) = recognise(state_dict, name=name)
    expected = BY_NAME[name]["eps"]
    assert found.eps == {layer: expected[layer] for layer in found.layers}


def test_a_bare_state_dict_is_recognised_without_a_name() -> None:
    (found,) = recognise(state_dict_of("torchvision:resnet18"))
    assert found.names[0] == "torchvision:resnet18"
    assert "timm:resnet18" in found.names
    assert found.whole


@pytest.mark.parametrize(
    "changes",
    [
        {"fc__weight": (7, 512), "fc__bias": (7,)},  # other classes
        {"fc__weight": None, "fc__bias": None},  # no classifier
        {"fc__weight": None, "fc__bias": None, "head__0__weight": (9, 512), "head__1__running_var": (9,)},
        {"conv1__weight": (64, 1, 7, 7)},  # grey images
    ],
)
def test_the_classifier_and_the_input_may_be_others(changes: dict[str, Any]) -> None:
    (found,) = recognise(state_dict_of("torchvision:resnet18", **changes))
    assert found.names[0] == "torchvision:resnet18"
    assert len(found.layers) == 20
    assert found.whole is ("fc__weight" not in changes or changes["fc__weight"] is not None)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer3__0__conv1__weight": (256, 128, 5, 5)},
        {"layer3__0__conv1__weight": None},
        {"layer2__1__bn2__running_var": None},
        {"layer1__0__extra__weight": (64, 64, 1, 1)},
    ],
)
def test_what_a_batchnorm_depends_on_must_be_there_in_its_shape(changes: dict[str, Any]) -> None:
    assert not recognise(state_dict_of("torchvision:resnet18", **changes))


@pytest.mark.parametrize("root", ["backbone.", "net.encoder.", "base."])
def test_a_part_is_recognised_under_any_prefix(root: str) -> None:
    neck = {"neck.conv.weight": (8, 8, 1, 1), "neck.bn.running_mean": (8,), "neck.bn.running_var": (8,)}
    state_dict = under(root, "torchvision:resnet18", **neck)
    (found,) = recognise(state_dict)
    assert (found.root, found.whole) == (root, False)
    planned = plan(state_dict)
    assert len(planned.folds) == 20
    assert {fold.layer for fold in planned.folds} == {root + layer for layer in BY_NAME["torchvision:resnet18"]["eps"]}
    assert [(skip.layer, skip.reason) for skip in planned.skips] == [("neck.bn", SkipReason.NO_PRODUCER)]
    assert "torchvision:resnet18" in planned.assumptions[0]


def test_two_parts_of_one_file_are_both_folded() -> None:
    one = under("query.", "torchvision:resnet18")
    two = under("key.", "torchvision:mobilenet_v2")
    state_dict = StateDict(key="", prefix="", tensors={**one.tensors, **two.tensors})
    assert {found.root for found in recognise(state_dict)} == {"query.", "key."}
    assert len(plan(state_dict).folds) == 20 + 52


def test_in_a_part_nothing_is_folded_through_what_its_surroundings_may_read() -> None:
    """A detector takes features from between the blocks: there additions and BatchNorms have more readers."""
    name = "timm:resnetv2_50d"
    whole, part = state_dict_of(name), under("backbone.", name, **{"neck.weight": (8, 8)})
    assert {fold.level for fold in plan(part).folds} <= {Level.DIRECT}
    beyond = [fold.layer for fold in plan(whole).folds if fold.level is not Level.DIRECT]
    kept = {skip.layer.removeprefix("backbone."): skip for skip in plan(part).skips}
    assert set(beyond) <= kept.keys()


def test_a_tensor_that_the_file_ties_to_another_is_left_alone(tmp_path: Path) -> None:
    """Loaded into a model that ties the two as well, the change of one would undo that of the other."""
    state = {key: torch.ones(shape) for key, shape in BY_NAME["torchvision:resnet18"]["shapes"]}
    state["layer1.0.conv1.weight"] = state["layer1.0.conv2.weight"]
    torch.save(state, tmp_path / "tied.pt")
    with open_checkpoint(tmp_path / "tied.pt") as checkpoint:
        planned = plan(checkpoint.state_dict(""))
    assert len(planned.folds) == 18
    assert {(skip.layer, skip.reason) for skip in planned.skips} == {
        ("layer1.0.bn1", SkipReason.REUSED),
        ("layer1.0.bn2", SkipReason.REUSED),
    }


def test_architectures_that_differ_in_eps_have_to_be_told_apart() -> None:
    state_dict = state_dict_of("timm:efficientnet_b0")
    (found,) = recognise(state_dict)
    assert {"timm:efficientnet_b0", "timm:tf_efficientnet_b0"} <= set(found.names)
    assert set(found.choices) == {1e-5, 1e-3}
    with pytest.raises(RefusedError, match=r"1e-05 .* 0\.001 .*--arch NAME or --eps X"):
        assume(state_dict, (found,))
    assert plan(state_dict, eps=1e-3).folds == plan(state_dict, name="timm:tf_efficientnet_b0").folds
    planned = {name: plan(state_dict, name=name) for name in ("timm:efficientnet_b0", "timm:tf_efficientnet_b0")}
    assert [len(each.folds) for each in planned.values()] == [49, 49]
    one, other = planned.values()
    assert one.steps != other.steps
    assert not assume_eps(state_dict, find_batchnorms(state_dict))[1]


def test_what_the_user_says_of_eps_is_taken_and_said() -> None:
    state_dict = state_dict_of("torchvision:resnet18")
    planned = plan(state_dict, eps=1e-3)
    assert "eps is 0.001 (option)" in planned.assumptions
    assert "eps is 1e-05, as in torchvision:resnet18" in plan(state_dict).assumptions[1]


def test_a_name_may_be_short_where_it_is_unambiguous() -> None:
    assert find_name("torchvision:resnet18") == "torchvision:resnet18"
    assert find_name("hrnet_w18") == "timm:hrnet_w18"
    with pytest.raises(UsageError, match="may be timm:resnet50 or torchvision:resnet50"):
        find_name("resnet50")


@pytest.mark.parametrize("name", ["torchvision:resnet55", "resnet_50", "mobilenet_v22"])
def test_an_unknown_name_gets_near_ones(name: str) -> None:
    with pytest.raises(UsageError, match=r"no architecture .*close to it: .*:(resnet|mobilenet)"):
        find_name(name)


def test_another_architecture_than_the_tensors_are_is_refused() -> None:
    state_dict = state_dict_of("torchvision:resnet18")
    with pytest.raises(RefusedError, match="not those of timm:hrnet_w18; they are those of torchvision:resnet18"):
        recognise(state_dict, name="timm:hrnet_w18")


@pytest.mark.parametrize(
    "names",
    [
        ["running_var"],
        ["." * 500 + "running_var"],
        [".".join("a" * 1) + f".{'b.' * 3000}running_var"],
        ["conv1.running_var", "bn1.running_var", "layer1", "layer2", "layer3", "layer4"],
    ],
)
def test_strange_names_are_recognised_as_nothing(names: list[str]) -> None:
    assert recognise(draw_state_dict(dict.fromkeys(names, (3,)))) == ()


def test_the_catalogue_is_small_and_every_structure_can_be_read() -> None:
    assert PATH.stat().st_size < 400_000
    catalogue = load_catalogue()
    entries = catalogue.entries
    assert sum(len(entry.names) for entry in entries) > 800
    for number in range(0, max(entry.structure for entry in entries), 24):
        assert catalogue.structure(number)
    assert {entry.structure for entry in entries} == set(range(1 + max(entry.structure for entry in entries)))


def test_runs_of_channels_are_read() -> None:
    assert parse_runs("0-3+7+5x2") == (0, 1, 2, 7, 5, 5)
