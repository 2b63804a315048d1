"""Weights alone of models of keras.applications, held against the configuration that Keras itself gives."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

import bntool
from bntool.checkpoints.descriptions import describe_model
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.keras.applications import _read_index
from bntool.checkpoints.tensors import read_bytes
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.graphs.graph import Evidence
from tests.places import INTEROP

RECORDED = INTEROP / "keras_applications"  # made by Keras 3.15; the HDF5 files were compressed afterwards
KINDS = ["mobilenet.h5", "mobilenet.weights.h5"]


def unpack(name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(gzip.decompress((RECORDED / f"{name}.gz").read_bytes()))
    return path


@pytest.mark.parametrize("name", KINDS)
def test_is_what_the_configuration_of_keras_makes_of_it(name: str, tmp_path: Path) -> None:
    weights, config = unpack(name, tmp_path), unpack("mobilenet.json", tmp_path)
    found, said = (
        bntool.inspect(weights).state_dicts[0],
        bntool.inspect(weights, keras_config=config).state_dicts[0],
    )
    assert [one.title for one in found.architectures] == ["keras:MobileNet"]
    assert [one.title for one in said.architectures] == []
    assert len(found.layers) == 27
    assert [(one.layer.name, one.layer.eps, one.layer.momentum, one.layer.affine) for one in found.layers] == [
        (one.layer.name, one.layer.eps, one.layer.momentum, one.layer.affine) for one in said.layers
    ]
    suffix = name.removeprefix("mobilenet")
    mine, theirs = tmp_path / f"mine{suffix}", tmp_path / f"theirs{suffix}"
    fold = bntool.fold_checkpoint(weights, mine)
    bntool.fold_checkpoint(weights, theirs, keras_config=config)
    assert len(fold.plan.layers) == 27
    assert fold.evidence is Evidence.ASSUMED
    assert "keras:MobileNet" in fold.plan.assumptions[0]
    assert elements(mine, tmp_path / "mine.json") == elements(theirs, tmp_path / "theirs.json")


def elements(path: Path, config: Path) -> dict[str, bytes]:
    with open_checkpoint(path) as opened:
        checkpoint, _ = describe_model(opened, prototxt=None, keras_config=config, output=None, force=False)
        return {name: read_bytes(tensor) for name, tensor in checkpoint.state_dict("").tensors.items()}


PUBLISHED = "efficientnet_b0.h5"  # written by the function in keras_folding.py that Keras runs on published weights


def test_published_weights_are_run_with_a_rescaling_more(tmp_path: Path) -> None:
    """The configuration is the one that Keras makes where it loads them; weights and layers are the same."""
    weights, config = unpack(PUBLISHED, tmp_path), unpack("efficientnet_b0.json", tmp_path)
    mine, theirs = tmp_path / "mine.h5", tmp_path / "theirs.h5"
    fold = bntool.fold_checkpoint(weights, mine)
    bntool.fold_checkpoint(weights, theirs, keras_config=config)
    assert len(fold.plan.layers) == 49
    assert fold.evidence is Evidence.ASSUMED
    assert elements(mine, tmp_path / "mine.json") == elements(theirs, tmp_path / "theirs.json")
    found, wanted = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("mine", "theirs"))
    shown = [
        [
            (one["config"]["scale"], one["config"]["offset"])
            for one in text["config"]["layers"]
            if one["class_name"] == "Rescaling"
        ]
        for text in (found, wanted)
    ]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 2


def set_normalization(path: Path, mean: float, variance: float) -> None:
    with h5py.File(path, "r+") as file:
        group = file[next(name for name in file if name.startswith("normalization"))]
        for name, value in (("mean", mean), ("variance", variance)):
            place = next(one for one in group.attrs["weight_names"] if name in one)
            group[place][...] = value


def test_weights_of_a_new_model_have_no_rescaling_more(tmp_path: Path) -> None:
    weights = unpack(PUBLISHED, tmp_path)
    set_normalization(weights, 0.0, 1.0)
    bntool.fold_checkpoint(weights, tmp_path / "mine.h5")
    layers = json.loads((tmp_path / "mine.json").read_text())["config"]["layers"]
    assert [one["name"] for one in layers if one["class_name"] == "Rescaling"] == ["rescaling"]


def test_another_normalization_may_be_of_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = unpack(PUBLISHED, tmp_path)
    set_normalization(weights, 0.5, 0.25)
    assert [one.title for one in bntool.inspect(weights).state_dicts[0].architectures] == ["keras:EfficientNetB0"]
    assert main(["fold", str(weights), "-o", str(tmp_path / "mine.h5")]) == ExitCode.REFUSED
    assert "rescaled once more" in " ".join(capsys.readouterr().err.split())


def test_what_is_assumed_is_refused_under_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = unpack(KINDS[0], tmp_path)
    assert main(["fold", str(weights), "--strict", "--output", str(tmp_path / "folded.h5")]) == ExitCode.REFUSED
    assert "keras:MobileNet" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [KINDS[0]]


@pytest.mark.parametrize("change", ["shape", "name", "missing"])
def test_other_weights_are_not_taken_for_it(change: str, tmp_path: Path) -> None:
    path = unpack(KINDS[0], tmp_path)
    with h5py.File(path, "a") as file:
        names = [text.decode() if isinstance(text, bytes) else text for text in file.attrs["layer_names"]]
        if change == "name":
            file.move("conv_dw_1", "other")
            names[names.index("conv_dw_1")] = "other"
        elif change == "missing":
            del file["conv_pw_13_bn"]
            names.remove("conv_pw_13_bn")
        else:
            group = file["conv_pw_13"]
            (weight,) = group.attrs["weight_names"]
            kernel = group[weight][()]
            del group[weight]
            group.create_dataset(weight, data=kernel[..., :-1])
        file.attrs["layer_names"] = [name.encode() for name in names]
    assert bntool.inspect(path).state_dicts[0].architectures == ()
    assert main(["fold", str(path), "--output", str(tmp_path / "folded.h5")]) == ExitCode.REFUSED


def test_a_description_that_stands_there_is_not_replaced(tmp_path: Path) -> None:
    weights = unpack(KINDS[0], tmp_path)
    shutil.copy(weights, tmp_path / "kept.h5")
    (tmp_path / "folded.json").write_text(json.dumps("mine"))
    assert main(["fold", str(weights), "--output", str(tmp_path / "folded.h5")]) == ExitCode.FILE
    assert json.loads((tmp_path / "folded.json").read_text()) == "mine"
    assert not (tmp_path / "folded.h5").exists()


def test_layers_that_read_their_configuration_by_themselves_have_it_whole() -> None:
    """``Rescaling.from_config`` of Keras 3.15 does not load without the offset, also where it is the default."""
    index, data = _read_index()
    ends = list(itertools.accumulate(index["sizes"]))
    configs = [
        json.loads(zlib.decompress(data[end - size : end])) for end, size in zip(ends, index["sizes"], strict=True)
    ]
    layers = [one for config in configs for one in config["config"]["layers"] if one["class_name"] == "Rescaling"]
    assert layers
    assert all({"scale", "offset"} <= one["config"].keys() for one in layers)


def reshape(path: Path, layer: str, shape: tuple[int, ...], *, new_name: str | None = None) -> None:
    """Give the first weight of a layer another shape, and a bias as many elements; and the layer another name."""
    with h5py.File(path, "r+") as file:
        group = file[layer]
        for number, name in enumerate(group.attrs["weight_names"]):
            del group[name]
            group[name] = np.full(shape if number == 0 else shape[-1:], 0.5, "f4")
        if new_name is not None:
            file.move(layer, new_name)
            names = [one.decode() if isinstance(one, bytes) else one for one in file.attrs["layer_names"]]
            file.attrs["layer_names"] = [new_name.encode() if one == layer else one.encode() for one in names]


@pytest.mark.parametrize(
    ("shape", "name"),
    [((1280, 10), "dense_1"), ((7 * 7 * 1280, 10), "predictions"), ((1280, 1), "predictions")],
    ids=["own name", "flattened", "softmax of one class"],
)
def test_a_classifier_that_may_be_ones_own_is_not_described(
    shape: tuple[int, ...], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written beside the weights would say that it reads an average, and ends with a softmax."""
    weights = unpack(PUBLISHED, tmp_path)
    reshape(weights, "predictions", shape, new_name=name if name != "predictions" else None)
    assert [one.title for one in bntool.inspect(weights).state_dicts[0].architectures] == ["keras:EfficientNetB0"]
    assert main(["fold", str(weights), "-o", str(tmp_path / "mine.h5")]) == ExitCode.REFUSED
    assert "the file says neither pooling nor activation" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "mine.h5").exists()


def test_another_number_of_classes_is_the_same_model(tmp_path: Path) -> None:
    weights = unpack(PUBLISHED, tmp_path)
    reshape(weights, "predictions", (1280, 7))
    bntool.fold_checkpoint(weights, tmp_path / "mine.h5")
    assert json.loads((tmp_path / "mine.json").read_text())["config"]["layers"][-1]["config"]["units"] == 7


def test_images_of_other_channels_are_read(tmp_path: Path) -> None:
    """Held against the configuration that Keras gives, with the shape of its input changed as Keras would."""
    weights, config = unpack(KINDS[0], tmp_path), unpack("mobilenet.json", tmp_path)
    reshape(weights, "conv1", (3, 3, 1, 32))
    given = json.loads(config.read_text())
    given["config"]["layers"][0]["config"]["batch_shape"][-1] = 1
    config.write_text(json.dumps(given))
    bntool.fold_checkpoint(weights, tmp_path / "mine.h5")
    bntool.fold_checkpoint(weights, tmp_path / "theirs.h5", keras_config=config)
    assert elements(tmp_path / "mine.h5", tmp_path / "mine.json") == elements(
        tmp_path / "theirs.h5", tmp_path / "theirs.json"
    )
    layers = json.loads((tmp_path / "mine.json").read_text())["config"]["layers"]
    assert layers[0]["config"]["batch_shape"][-1] == 1


def test_the_model_that_own_layers_stand_behind_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = unpack(PUBLISHED, tmp_path)
    with h5py.File(weights, "r+") as file:
        file.copy(file["predictions"], file, "more")
        names = [one.decode() if isinstance(one, bytes) else one for one in file.attrs["layer_names"]]
        file.attrs["layer_names"] = [one.encode() for one in (*names, "more")]
    assert main(["fold", str(weights), "-o", str(tmp_path / "mine.h5")]) == ExitCode.REFUSED
    said = " ".join(capsys.readouterr().err.split())
    assert "these are the layers of keras:EfficientNetB0 with others behind" in said
    assert "--keras-config" in said


def test_names_that_occur_with_different_eps_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["layer_names"] = [b"res2a_branch2a", b"bn2a_branch2a"]
        kinds = (("res2a_branch2a", {"kernel": (1, 1, 3, 4), "bias": (4,)}),)
        norm = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), (4,))
        for name, variables in (*kinds, ("bn2a_branch2a", norm)):
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{one}:0".encode() for one in variables]
            for one, shape in variables.items():
                group[f"{name}/{one}:0"] = np.ones(shape, "f4")
    assert main(["fold", str(tmp_path / "a.h5"), "-o", str(tmp_path / "b.h5")]) == ExitCode.REFUSED
    said = " ".join(capsys.readouterr().err.split())
    assert "names like bn2a_branch2a occur with different eps, 1e-3 in older keras.applications" in said
    assert "--keras-config" in said
