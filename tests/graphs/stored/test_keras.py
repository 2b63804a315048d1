"""Keras models folded as recorded, where Keras 3 agreed with the original to 1e-5; and what a rewrite leaves alone."""

from __future__ import annotations

import io
import json
import random
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.keras.model import order_layers, read_model
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import read_numbers
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.errors import BntoolError, RefusedError
from bntool.freezing.checkpoint import Carrier, plan_freeze
from bntool.graphs.graph import Evidence
from bntool.graphs.sources import read_stored_graph
from bntool.plan import (
    AddTensor,
    Operation,
    Plan,
    Record,
    RemoveEntry,
    RemoveTensor,
    SetAttribute,
    SetTensor,
    Step,
    Values,
)
from tests.fuzz import time_limit
from tests.graphs.stored.folding import fold_file
from tests.places import INTEROP

FOLDER = INTEROP
RECORDED = FOLDER / "keras_folding"
INDEX = json.loads((RECORDED / "index.json").read_text())


def contents(path: Path) -> dict[str, Any]:
    """Everything in a file: records of the archive, and groups, datasets and attributes of the HDF5 part."""
    found: dict[str, Any] = {}
    stream: Any = path
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            found = {name: archive.read(name) for name in archive.namelist()}
        stream = io.BytesIO(found.pop("model.weights.h5"))
    with h5py.File(stream) as file:
        for name, one in [("", file), *_objects(file)]:
            value = (one[()].dtype.str, one.shape, one[()].tobytes()) if isinstance(one, h5py.Dataset) else "group"
            found[f"h5:{name}"] = (value, {key: np.asarray(v).tolist() for key, v in one.attrs.items()})
    return found


def _objects(file: h5py.File) -> list[tuple[str, Any]]:
    objects: list[tuple[str, Any]] = []
    file.visititems(lambda name, one: objects.append((name, one)))
    return objects


@pytest.mark.parametrize("key", INDEX)
def test_folds_as_keras_approved(key: str, tmp_path: Path) -> None:
    """The same content as the files that Keras ran (tests/oracles/keras_folding.py)."""
    facts = INDEX[key]
    name, _, suffix = key.partition(".folded")
    plan = fold_file(RECORDED / f"{name}{suffix}", tmp_path / key)
    assert {fold.layer: list(fold.into) for fold in plan.folds} == facts["folds"]
    assert {skip.layer: skip.reason.value for skip in plan.skips} == facts["skips"]
    assert contents(tmp_path / key) == contents(RECORDED / key)
    assert facts["error"] <= 1e-5


@pytest.mark.parametrize("key", INDEX)
def test_the_new_model_is_listed_as_keras_counts(key: str) -> None:
    with open_checkpoint(RECORDED / key) as checkpoint:
        model = checkpoint.content.model
        for one in (model, *(layer.model for layer in model.walk() if layer.model is not None)):
            assert order_layers(one) == tuple(layer.name for layer in one.layers)


def test_convolutions_are_numbered_anew_where_depths_change(tmp_path: Path) -> None:
    """Two convolutions of one shape change places: by the old numbers each would get the weights of the other."""
    before = [layer["name"] for layer in config_of(RECORDED / "uneven_branches.keras")["config"]["layers"]]
    fold_file(RECORDED / "uneven_branches.keras", tmp_path / "a.keras")
    after = [layer["name"] for layer in config_of(tmp_path / "a.keras")["config"]["layers"]]
    assert [name for name in before if name in after] != after
    old, new = contents(RECORDED / "uneven_branches.keras"), contents(tmp_path / "a.keras")
    assert old["h5:layers/conv2d_5/vars"][1] == {"name": "a3"} == new["h5:layers/conv2d_4/vars"][1]
    assert old["h5:layers/conv2d_5/vars/0"] == new["h5:layers/conv2d_4/vars/0"]


def config_of(path: Path) -> Any:
    return json.loads(zipfile.ZipFile(path).read("config.json"))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_torch_computes_what_keras_computed_from_folded_tensors(suffix: str, tmp_path: Path) -> None:
    """The tensors as bntool shows them, in PyTorch in float64, against the outputs of the original in Keras."""
    recorded = np.load(FOLDER / "keras_tiny_io.npz")
    fold_file(FOLDER / f"keras_tiny{suffix}", tmp_path / f"a{suffix}")
    with open_checkpoint(tmp_path / f"a{suffix}") as checkpoint:
        tensors = checkpoint.state_dict("").tensors
        t = {k: torch.tensor(list(read_numbers(v))).double().reshape(v.shape) for k, v in tensors.items()}
    x = torch.from_numpy(recorded["x"]).double().movedim(-1, 1)
    x = functional.conv2d(x, t["conv1.weight"], t["conv1.bias"], padding=1).relu()
    x = functional.conv2d(x, t["dw.weight"], t["dw.bias"], padding=1, groups=4)
    x = functional.conv_transpose2d(x, t["deconv.weight"], t["deconv.bias"], stride=2)
    x = functional.conv2d(x, t["sep.depthwise_weight"], groups=5)
    x = functional.conv2d(x, t["sep.weight"], t["sep.bias"])
    y = functional.linear(x.mean((2, 3)), t["fc.weight"], t["fc.bias"])
    expected = torch.from_numpy(recorded["y"]).double()
    assert (y - expected).abs().max() / expected.abs().max() < 1e-5


def test_what_is_not_folded_keeps_its_bytes(tmp_path: Path) -> None:
    for suffix in (".keras", ".h5"):
        source, target = RECORDED / f"nested{suffix}", tmp_path / f"a{suffix}"
        with open_checkpoint(source) as checkpoint:
            steps = (SetTensor("d.bias", Values((1.0, 2.0, 3.0), (3,))),)
            save_checkpoint(apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=steps)), target)
            save_checkpoint(checkpoint, tmp_path / f"b{suffix}")
        assert (tmp_path / f"b{suffix}").read_bytes() == source.read_bytes()
        old, new = contents(source), contents(target)
        changed = [key for key in old if old[key] != new[key]]
        assert old.keys() == new.keys()
        assert changed == ["h5:layers/dense/vars/1" if suffix == ".keras" else "h5:model_weights/d/d/bias"]


def test_same_keys_leave_the_configuration_alone(tmp_path: Path) -> None:
    fold_file(FOLDER / "keras_tiny.keras", tmp_path / "a.keras", layout="same-keys")
    old, new = contents(FOLDER / "keras_tiny.keras"), contents(tmp_path / "a.keras")
    assert old.keys() == new.keys()
    assert old["config.json"] == new["config.json"]


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_the_record_can_be_read_back(suffix: str, tmp_path: Path) -> None:
    with open_checkpoint(FOLDER / f"keras_tiny{suffix}") as checkpoint:
        plan = Plan(Operation.FOLD, steps=(Record({"operation": "fold", "layers": ["größe"]}),))
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / f"a{suffix}")
    with open_checkpoint(tmp_path / f"a{suffix}") as checkpoint:
        assert checkpoint.records == {"": ({"operation": "fold", "layers": ["größe"]},)}


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_the_optimizer_can_be_removed(suffix: str, tmp_path: Path) -> None:
    entry = "optimizer" if suffix == ".keras" else "optimizer_weights"
    with open_checkpoint(FOLDER / f"keras_nested_models{suffix}") as checkpoint:
        assert entry in checkpoint.entries
        plan = Plan(Operation.FOLD, steps=(RemoveEntry((entry,)),))
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / f"a{suffix}")
    with open_checkpoint(tmp_path / f"a{suffix}") as checkpoint:
        assert entry not in checkpoint.entries


@pytest.mark.parametrize(
    "step",
    [
        RemoveTensor("conv1.weight"),
        AddTensor("relu1.bias", Values((1.0,), (1,)), dtype="float32", after="conv1.weight"),
        SetAttribute("bn1", "training", value=False),
        SetAttribute("nowhere", "trainable", value=False),
    ],
)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_what_keras_has_no_place_for_is_refused(step: Step, suffix: str, tmp_path: Path) -> None:
    with open_checkpoint(FOLDER / f"keras_tiny{suffix}") as checkpoint, pytest.raises(RefusedError):
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=(step,))), tmp_path / "a.keras")
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_say_why_they_cannot_be_folded() -> None:
    with (
        open_checkpoint(FOLDER / "keras_tiny.weights.h5") as checkpoint,
        pytest.raises(RefusedError, match="weights only"),
    ):
        read_stored_graph(checkpoint)


def test_the_configuration_is_proof() -> None:
    with open_checkpoint(FOLDER / "keras_tiny.keras") as checkpoint:
        graph = read_stored_graph(checkpoint)
        assert graph is not None
        assert graph.evidence is Evidence.STORED
        assert {layer: calls[0].eps for layer, calls in graph.batchnorms.items()}["bn_dw"] == 1e-5


OWN_CLASSES = {  # as Keras 3 and, in .h5 files, Keras 2 and 3 write layers that are not their own
    "registered": {"module": None, "class_name": "Conv2D", "registered_name": "mine>Conv2D"},
    "registered, and says it is Keras's": {"module": "keras.layers", "registered_name": "mine>Conv2D"},
    "in a script": {"module": None, "class_name": "Conv2D", "registered_name": "Conv2D"},
    "in a package": {"module": "mine.layers", "class_name": "Conv2D", "registered_name": "Conv2D"},
    "of another name": {"class_name": "MyConv2D"},
    "of Keras 2": {"class_name": "mine>Conv2D"},
}
OWN_MODELS = {
    "registered": {"module": None, "class_name": "Twice", "registered_name": "mine>Twice"},
    "registered as Functional": {"module": None, "class_name": "Functional", "registered_name": "mine>Functional"},
    "in a script": {"module": None, "class_name": "Twice", "registered_name": "Twice"},
    "of Keras 2": {"class_name": "Twice"},
}


@pytest.mark.parametrize("case", OWN_CLASSES)
def test_a_convolution_with_a_forward_of_its_own_is_no_producer(case: str, tmp_path: Path) -> None:
    config = config_of(FOLDER / "keras_tiny.keras")
    next(one for one in config["config"]["layers"] if one["name"] == "conv1").update(OWN_CLASSES[case])
    _rewrite_config(config, tmp_path / "a.keras")
    if case == "of another name":
        _move_weights(tmp_path / "a.keras", "layers/conv2d", "layers/my_conv2d")
    plan = fold_file(tmp_path / "a.keras", tmp_path / "b.keras")
    (skip,) = (skip for skip in plan.skips if skip.layer == "bn1")
    assert skip.reason.value == "not adjacent"
    assert "conv1" in skip.detail
    assert "bn1" not in {fold.layer for fold in plan.folds}


@pytest.mark.parametrize("case", [case for case, entry in OWN_CLASSES.items() if entry.get("class_name") == "Conv2D"])
def test_a_batchnorm_with_a_forward_of_its_own_is_not_judged(case: str, tmp_path: Path) -> None:
    change = {key: str(value).replace("Conv2D", "BatchNormalization") for key, value in OWN_CLASSES[case].items()}
    change |= {"module": None} if OWN_CLASSES[case].get("module", "") is None else {}
    config = config_of(FOLDER / "keras_tiny.keras")
    next(one for one in config["config"]["layers"] if one["name"] == "bn1").update(change)
    _rewrite_config(config, tmp_path / "a.keras")
    with open_checkpoint(tmp_path / "a.keras") as checkpoint:
        assert [one.name for one in checkpoint.not_understood] == ["bn1"]
        assert len(find_batchnorms(checkpoint.state_dict(""))) == 4
    assert main(["inspect", str(tmp_path / "a.keras"), "--fail-on", "error"]) == ExitCode.FINDINGS
    assert "bn1" not in {fold.layer for fold in fold_file(tmp_path / "a.keras", tmp_path / "b.keras").folds}


@pytest.mark.parametrize("case", OWN_MODELS)
@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_with_a_forward_of_its_own_is_refused(case: str, sequential: bool, tmp_path: Path) -> None:
    source = RECORDED / "sequential.keras" if sequential else FOLDER / "keras_tiny.keras"
    config = config_of(source)
    config.update(OWN_MODELS[case])
    if "module" not in OWN_MODELS[case]:
        config.pop("module"), config.pop("registered_name")
    _rewrite_config(config, tmp_path / "a.keras", source=source)
    with open_checkpoint(tmp_path / "a.keras") as checkpoint:
        assert find_batchnorms(checkpoint.state_dict(""))
    with pytest.raises(RefusedError, match="own code"):
        fold_file(tmp_path / "a.keras", tmp_path / "b.keras")


def test_a_model_inside_with_a_forward_of_its_own_is_left_alone(tmp_path: Path) -> None:
    source = RECORDED / "nested.keras"
    config = config_of(source)
    inner = next(one for one in config["config"]["layers"] if one["class_name"] == "Functional")
    inner.update(OWN_MODELS["registered as Functional"])
    _rewrite_config(config, tmp_path / "a.keras", source=source)
    plan = fold_file(tmp_path / "a.keras", tmp_path / "b.keras")
    inside = [skip for skip in plan.skips if skip.layer.startswith(f"{inner['name']}.")]
    assert inside
    assert all("the own code of mine>Functional" in skip.detail for skip in inside)
    assert not [fold for fold in plan.folds if fold.layer.startswith(f"{inner['name']}.")]


@pytest.mark.parametrize(("version", "trainable", "uses_batch"), [
    ("3.15.1", True, True), ("3.15.1", False, False), ("2.11.0", False, False), ("2.2.4-tf", False, True),
])  # fmt: skip
def test_a_frozen_layer_that_is_told_to_train(version: str, trainable: bool, uses_batch: bool, tmp_path: Path) -> None:
    """Keras 3 and TensorFlow 2 normalise it by its statistics: `if training and self.trainable`."""
    config = config_of(FOLDER / "keras_tiny.keras")
    layer = next(one for one in config["config"]["layers"] if one["name"] == "bn1")
    layer["config"]["trainable"] = trainable
    layer["inbound_nodes"][0]["kwargs"]["training"] = True
    _rewrite_config(config, tmp_path / "a.keras", version=version)
    skips = _skips(tmp_path / "a.keras", tmp_path / "b.keras")
    assert skips.get("bn1") == ("normalises by batch statistics" if uses_batch else None)


@pytest.mark.parametrize(("wanted", "is_folded"), [([196, 4], True), ([-1, 4], True), ([4, 196], False)])
def test_positions_are_counted_where_they_become_one_axis(wanted: list[int], is_folded: bool, tmp_path: Path) -> None:
    """A convolution without padding leaves 14 rows of 16, and 14 columns: the channels stay on the last axis."""
    layers = [
        {"class_name": "Conv2D", "config": {"name": "c", "strides": 1, "kernel_size": [3, 3]}},
        {"class_name": "Reshape", "config": {"name": "r", "target_shape": wanted}},
        {"class_name": "BatchNormalization", "config": {"name": "n", "epsilon": 1e-3}},
    ]
    layers[0]["config"]["batch_input_shape"] = [None, 16, 16, 3]
    count, random_numbers = wanted[1], np.random.default_rng(1)
    weights = {"c": {"kernel": (3, 3, 3, 4), "bias": (4,)}}
    weights["n"] = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), (count,))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"name": "s", "layers": layers}})
        file.attrs["keras_version"], group = "2.11.0", file.create_group("model_weights")
        group.attrs["layer_names"] = [b"c", b"r", b"n"]
        for layer in "crn":
            names = [f"{layer}/{leaf}:0" for leaf in weights.get(layer, {})]
            group.create_group(layer).attrs["weight_names"] = [name.encode() for name in names]
            for name, shape in zip(names, weights.get(layer, {}).values(), strict=True):
                group[layer][name] = random_numbers.uniform(0.5, 2, shape).astype("f4")
    skips = _skips(tmp_path / "a.h5", tmp_path / "b.h5")
    assert skips == ({} if is_folded else {"n": "axis mismatch"})


@pytest.mark.parametrize(("kernel", "stride", "padding", "is_folded"), [
    (1, 1, "valid", True), (1, 1, "same", True), (1, 2, "valid", False), (3, 1, "valid", False), (2, 2, "valid", False),
    (3, 1, "same", False),
])  # fmt: skip
def test_a_shift_into_a_transposed_convolution(
    kernel: int, stride: int, padding: str, is_folded: bool, tmp_path: Path
) -> None:
    """Not where the border, or every other position, meets some of the taps only, without padding too."""
    shared = {"kernel_size": [kernel, kernel], "strides": [stride, stride], "padding": padding}
    layers = [
        {"class_name": "Conv2D", "config": {"name": "c", "kernel_size": [1, 1], "activation": "sigmoid"}},
        {"class_name": "BatchNormalization", "config": {"name": "n", "epsilon": 1e-3}},
        {"class_name": "Conv2DTranspose", "config": {"name": "t", "filters": 4, **shared}},
    ]
    layers[0]["config"]["batch_input_shape"] = [None, 6, 6, 3]
    kernel_of_t = {"kernel": (kernel, kernel, 4, 3), "bias": (4,)}
    _write_sequence(tmp_path / "a.h5", layers, {"c": CONV, "n": NORM, "t": kernel_of_t})
    plan = fold_file(tmp_path / "a.h5", tmp_path / "b.h5")
    assert [fold.layer for fold in plan.folds] == ["n"] * is_folded
    if not is_folded:
        assert "transposed convolution (t), not all of whose taps meet every position, does not" in plan.skips[0].detail
        return

    before, after = _read_doubles(tmp_path / "a.h5"), _read_doubles(tmp_path / "b.h5")
    x, normalised = _normalise(before)
    expected = functional.conv_transpose2d(normalised, before["t.weight"], before["t.bias"])
    found = functional.conv_transpose2d(x, after["t.weight"], after["t.bias"])
    assert (found - expected).abs().max() / expected.abs().max() < 1e-6


@pytest.mark.parametrize(("kind", "kernel", "stride", "is_folded"), [
    ("Conv2D", 1, 1, True), ("Conv2D", 1, 2, True), ("DepthwiseConv2D", 1, 1, True), ("Conv2D", 3, 1, False),
    ("SeparableConv2D", 1, 2, True), ("SeparableConv2D", 3, 1, False), ("DepthwiseConv2D", 3, 1, False),
])  # fmt: skip
def test_a_kernel_of_one_tap_reads_nothing_beyond_the_border(
    kind: str, kernel: int, stride: int, is_folded: bool, tmp_path: Path
) -> None:
    """Whatever the padding is called."""
    shared = {"kernel_size": [kernel, kernel], "strides": [stride, stride], "padding": "same"}
    layers = [
        {"class_name": "Conv2D", "config": {"name": "c", "kernel_size": [1, 1], "activation": "sigmoid"}},
        {"class_name": "BatchNormalization", "config": {"name": "n", "epsilon": 1e-3}},
        {"class_name": kind, "config": {"name": "t", "filters": 3, **shared}},
    ]
    layers[0]["config"]["batch_input_shape"] = [None, 6, 6, 3]
    first = {"Conv2D": "kernel", "DepthwiseConv2D": "depthwise_kernel", "SeparableConv2D": "depthwise_kernel"}[kind]
    kernels = {first: (kernel, kernel, 3, 3 if kind == "Conv2D" else 1)}
    if kind == "SeparableConv2D":
        kernels["pointwise_kernel"] = (1, 1, 3, 3)
    _write_sequence(tmp_path / "a.h5", layers, {"c": CONV, "n": NORM, "t": {**kernels, "bias": (3,)}})
    plan = fold_file(tmp_path / "a.h5", tmp_path / "b.h5")
    assert [fold.layer for fold in plan.folds] == ["n"] * is_folded
    if not is_folded:
        assert "reads it with zeros beyond the border" in plan.skips[0].detail or kind == "SeparableConv2D"
        return
    before, after = _read_doubles(tmp_path / "a.h5"), _read_doubles(tmp_path / "b.h5")

    def compute(x: torch.Tensor, held: dict[str, torch.Tensor]) -> torch.Tensor:
        if kind != "Conv2D":
            depthwise = held["t.depthwise_weight" if kind == "SeparableConv2D" else "t.weight"]
            bias = held["t.bias"] if kind == "DepthwiseConv2D" else None
            x = functional.conv2d(x, depthwise, bias, stride=stride, groups=3)
        if kind == "DepthwiseConv2D":
            return x
        return functional.conv2d(x, held["t.weight"], held["t.bias"], stride=stride if kind == "Conv2D" else 1)

    x, normalised = _normalise(before)
    expected = compute(normalised, before)
    assert (compute(x, after) - expected).abs().max() / expected.abs().max() < 1e-6


@pytest.mark.parametrize(("before", "own", "stays"), [
    ("mixed_float16", "float32", True), ("mixed_float16", "mixed_float16", False), ("float32", "float32", False),
    (None, "float32", False), ("float64", {"class_name": "DTypePolicy", "config": {"name": "float32"}}, True),
    ("float32", {"class_name": "DTypePolicy", "config": {"name": "float32"}}, False),
])  # fmt: skip
def test_a_layer_that_converts_to_another_dtype_stays(before: Any, own: Any, stays: bool, tmp_path: Path) -> None:
    """Without it the model would give the dtype that the convolution computes in."""
    layers = [
        {"class_name": "Conv2D", "config": {"name": "c", "kernel_size": [1, 1], "dtype": before}},
        {"class_name": "BatchNormalization", "config": {"name": "n", "epsilon": 1e-3, "dtype": own}},
    ]
    layers[0]["config"]["batch_input_shape"] = [None, 6, 6, 3]
    _write_sequence(tmp_path / "a.h5", layers, {"c": CONV, "n": NORM})
    (fold,) = fold_file(tmp_path / "a.h5", tmp_path / "b.h5").folds
    assert fold.stays is stays


CONV = {"kernel": (1, 1, 3, 3), "bias": (3,)}
NORM = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), (3,))


def _write_sequence(
    path: Path, layers: list[dict[str, Any]], weights: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> None:
    """Write a Sequential of these layers; weights by layer and name have random elements."""
    random_numbers = np.random.default_rng(1)
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"name": "s", "layers": layers}})
        file.attrs["keras_version"], group = "2.11.0", file.create_group("model_weights")
        group.attrs["layer_names"] = [layer.encode() for layer in weights]
        for layer, shapes in weights.items():
            group.create_group(layer).attrs["weight_names"] = [f"{layer}/{leaf}:0".encode() for leaf in shapes]
            for leaf, shape in shapes.items():
                group[layer][f"{layer}/{leaf}:0"] = random_numbers.uniform(0.5, 2, shape).astype("f4")


def _read_doubles(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        held = checkpoint.state_dict("").tensors
        return {k: torch.tensor(list(read_numbers(v))).double().reshape(v.shape) for k, v in held.items()}


def _normalise(held: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Some images, and what the BatchNorm ``n`` makes of them."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = [held[f"n.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    return x, functional.batch_norm(x, *norm, eps=1e-3)


@pytest.mark.parametrize("change", ["subclass", "renamed", "lora"])
def test_only_layers_of_keras_itself_are_folded(change: str, tmp_path: Path) -> None:
    config = config_of(FOLDER / "keras_tiny.keras")
    layer: dict[str, Any] = next(one for one in config["config"]["layers"] if one["name"] == "conv1")
    if change == "subclass":
        layer.update(module="mine.layers", registered_name="mine>Conv2D")
    elif change == "lora":
        layer["config"]["lora_rank"] = 4
    else:
        layer["class_name"] = "MyConv2D"
    _rewrite_config(config, tmp_path / "a.keras")
    if change == "renamed":
        _move_weights(tmp_path / "a.keras", "layers/conv2d", "layers/my_conv2d")
    skips = _skips(tmp_path / "a.keras", tmp_path / "b.keras")
    assert skips["bn1"] == "not adjacent"


@pytest.mark.parametrize(
    ("axis", "reason"), [([3], None), (3, None), ([1], "axis mismatch"), ([1, 2], "axis mismatch")]
)
def test_the_axis_decides(axis: Any, reason: str | None, tmp_path: Path) -> None:
    config = config_of(FOLDER / "keras_tiny.keras")
    next(one for one in config["config"]["layers"] if one["name"] == "bn1")["config"]["axis"] = axis
    _rewrite_config(config, tmp_path / "a.keras")
    assert _skips(tmp_path / "a.keras", tmp_path / "b.keras").get("bn1") == reason


def test_a_graph_in_a_circle_is_refused(tmp_path: Path) -> None:
    config = config_of(FOLDER / "keras_tiny.keras")
    conv = next(one for one in config["config"]["layers"] if one["name"] == "conv1")
    conv["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = "bn1"
    _rewrite_config(config, tmp_path / "a.keras")
    with pytest.raises(BntoolError, match="circle"):
        _skips(tmp_path / "a.keras", tmp_path / "b.keras")
    model = read_model(config)
    assert model is not None
    assert order_layers(model) is None


def _move_weights(path: Path, old: str, new: str) -> None:
    """As Keras names the group of a layer after its class."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    weights = io.BytesIO(records["model.weights.h5"])
    with h5py.File(weights, "r+") as file:
        file.move(old, new)
    records["model.weights.h5"] = weights.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def _rewrite_config(
    config: Any, target: Path, *, source: Path = FOLDER / "keras_tiny.keras", version: str = ""
) -> None:
    original = zipfile.ZipFile(source)
    metadata = json.loads(original.read("metadata.json"))
    if version:
        metadata["keras_version"] = version
    new = {"config.json": json.dumps(config), "metadata.json": json.dumps(metadata)}
    with zipfile.ZipFile(target, "w") as archive:
        for name in original.namelist():
            archive.writestr(name, new.get(name, original.read(name)))


def _skips(source: Path, target: Path) -> Mapping[str, str]:
    return {skip.layer: skip.reason.value for skip in fold_file(source, target).skips}


_ODD = (None, True, -1, 0, 7, 1 << 70, 1e999, "", "bn1", "valid", [], [3], ["bn1", 0, 0], {}, {"class_name": "linear"})


def damage(config: Any, rng: random.Random) -> None:
    """Put something odd at a random place of a JSON value."""
    holders: list[Any] = []
    waiting = [config]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list) and one:
            holders.append(one)
            waiting += one.values() if isinstance(one, dict) else one
    for _ in range(rng.choice((1, 1, 3))):
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        holder[key] = rng.choice((*_ODD, rng.choice(holders)))


def test_damaged_configurations_are_refused_or_folded(tmp_path: Path) -> None:
    rng = random.Random(3)
    texts = [json.dumps(config_of(RECORDED / f"{name}.keras")) for name in ("nested", "not_foldable", "sequential")]
    texts.append(json.dumps(config_of(FOLDER / "keras_tiny.keras")))
    folded = 0
    for number in range(25):
        config = json.loads(rng.choice(texts[-1:] * 3 + texts))
        damage(config, rng)
        try:
            _rewrite_config(config, tmp_path / "a.keras")
        except (ValueError, RecursionError):  # it holds itself now
            continue
        try:
            with time_limit(5):
                folded += bool(fold_file(tmp_path / "a.keras", tmp_path / f"{number}.keras").folds)
        except BntoolError:
            pass
    assert folded > 5


def test_elements_in_bfloat16_can_be_set(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "keras_bf16.keras", tmp_path / "a.keras")
    with open_checkpoint(tmp_path / "a.keras") as checkpoint:
        steps = (SetTensor("b2.running_mean", Values((1.5, -2.0), (2,))),)
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=steps)), tmp_path / "b.keras")
    with open_checkpoint(tmp_path / "b.keras") as checkpoint:
        tensor = checkpoint.state_dict("").tensors["b2.running_mean"]
        assert (tensor.dtype.name, list(read_numbers(tensor))) == ("bfloat16", [1.5, -2.0])


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_freezing_sets_trainable(suffix: str, tmp_path: Path) -> None:
    source = RECORDED / f"nested{suffix}"
    with open_checkpoint(source) as checkpoint:
        freeze = plan_freeze(checkpoint, layers=["block.*", "function.*"])
        assert freeze.carrier is Carrier.LAYERS
        assert freeze.plan.layers == ("block.b", "block.b2")
        assert [(skip.layer, skip.reason.value) for skip in freeze.plan.skips] == [("function.b", "frozen")]
        save_checkpoint(apply_plan(checkpoint, freeze.plan), tmp_path / f"a{suffix}")
    with open_checkpoint(tmp_path / f"a{suffix}") as checkpoint:
        modules = checkpoint.state_dict("").modules
        trains = {
            name: module.attributes["trainable"] for name, module in modules.items() if "eps" in module.attributes
        }
        assert trains == {"block.b": False, "block.b2": False, "function.b": False, "last": True}
        assert checkpoint.records[""][0]["operation"] == "freeze"
    if suffix == ".h5":  # as Keras lists the weights of a nested model: first those that train
        with h5py.File(tmp_path / "a.h5") as file:
            assert [name.decode() for name in np.asarray(file["model_weights/block"].attrs["weight_names"], "S")] == [
                "block/c/kernel", "block/c2/kernel", "block/c2/bias", "block/b/gamma", "block/b/beta",
                "block/b/moving_mean", "block/b/moving_variance", "block/b2/gamma", "block/b2/beta",
                "block/b2/moving_mean", "block/b2/moving_variance",
            ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm_eval": False, "requires_grad": False}, "one switch"),
        ({"requires_grad": True}, "one switch"),
        ({"frozen_stages": 1}, "--layers"),
        ({"for_file": False}, "layer.trainable = False"),
    ],
)
def test_what_trainable_cannot_say_is_refused(options: dict[str, Any], words: str) -> None:
    with open_checkpoint(FOLDER / "keras_tiny.keras") as checkpoint, pytest.raises(RefusedError, match=words):
        plan_freeze(checkpoint, **options)


def test_weights_alone_cannot_say_what_trains() -> None:
    with (
        open_checkpoint(FOLDER / "keras_tiny.weights.h5") as checkpoint,
        pytest.raises(RefusedError, match="weights only"),
    ):
        plan_freeze(checkpoint)
