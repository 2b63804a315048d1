"""Weights of Keras alone with the configuration of their model, held against the whole model."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import bntool
from bntool.checkpoints.checkpoint import GlobalTrust
from bntool.checkpoints.descriptions import describe_model
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.keras.trust import judge_configuration
from bntool.checkpoints.tensors import read_bytes
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.errors import BntoolError, RefusedError, UsageError
from bntool.reports.loading import show_loading_code
from tests.places import INTEROP

PAIRS = [  # weights alone, and the whole model of the same weights
    ("keras_tiny.weights.h5", "keras_tiny.keras"),
    ("keras_nested_models.weights.h5", "keras_nested_models.keras"),
    ("tfkeras2_tiny_w.weights.h5", "tfkeras2_tiny.keras"),
    ("tfkeras2_tiny_legacyw.h5", "tfkeras2_tiny.h5"),
]


def configuration_of(model: Path) -> Any:
    if model.suffix == ".keras":
        return json.loads(zipfile.ZipFile(model).read("config.json"))
    with h5py.File(model) as file:
        return json.loads(file.attrs["model_config"])


def elements(path: Path, config: Path | None = None) -> dict[str, bytes]:
    with open_checkpoint(path) as opened:
        checkpoint, _ = describe_model(opened, prototxt=None, keras_config=config, output=None, force=False)
        return {name: read_bytes(tensor) for name, tensor in checkpoint.state_dict("").tensors.items()}


def test_the_configuration_says_what_lies_in_a_wrapper(tmp_path: Path) -> None:
    """Variables of layers in a TimeDistributed have no names in Keras 3's weights: alone they tell no BatchNorm."""
    inside = [("Conv2D", "c", {"kernel_size": [3, 3]}), ("BatchNormalization", "n", {"epsilon": 0.25})]
    layers = [
        {"class_name": "TimeDistributed", "config": {"name": f"t{i}", "layer": {"class_name": kind, "config": config}}}
        for i, (kind, name, more) in enumerate(inside)
        if (config := {"name": name, **more})
    ]
    layers[0]["config"]["batch_input_shape"] = [None, 2, 8, 8, 3]
    model = {"class_name": "Sequential", "config": {"name": "s", "layers": layers}}
    (tmp_path / "model.json").write_text(json.dumps(model))
    arrays = [[np.ones((3, 3, 3, 4), "f4"), np.zeros(4, "f4")], [np.full(4, one, "f4") for one in (3, 1, 2, 0.75)]]
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        for i, group in enumerate(("time_distributed", "time_distributed_1")):
            file.create_group(f"layers/{group}/vars").attrs["name"] = f"t{i}"
            variables = file.create_group(f"layers/{group}/layer/vars")
            variables.attrs["name"] = inside[i][1]
            for number, values in enumerate(arrays[i]):
                variables[str(number)] = values
    target = tmp_path / "b.weights.h5"
    bntool.fold_checkpoint(tmp_path / "a.weights.h5", target, keras_config=tmp_path / "model.json")
    with h5py.File(target) as file:
        found = file["layers/time_distributed/layer/vars"]
        np.testing.assert_allclose(found["0"][...], 3.0)  # gamma / sqrt(variance + eps) = 3 / sqrt(0.75 + 0.25)
        np.testing.assert_allclose(found["1"][...], 1 - 2 * 3.0)
        assert "time_distributed_1" not in file["layers"]


@pytest.mark.parametrize(("weights", "model"), PAIRS)
def test_weights_with_a_configuration_are_the_whole_model(weights: str, model: str, tmp_path: Path) -> None:
    assert elements(INTEROP / weights, INTEROP / model) == elements(INTEROP / model)
    found, whole = (
        bntool.inspect(INTEROP / weights, keras_config=INTEROP / model).state_dicts[0].layers,
        bntool.inspect(INTEROP / model).state_dicts[0].layers,
    )
    assert [(one.layer.name, one.layer.eps, one.layer.momentum) for one in found] == [
        (one.layer.name, one.layer.eps, one.layer.momentum) for one in whole
    ]
    suffix = ".weights.h5" if weights.endswith(".weights.h5") else ".h5"
    target, folded = tmp_path / f"folded{suffix}", tmp_path / f"whole{Path(model).suffix}"
    bntool.fold_checkpoint(INTEROP / weights, target, keras_config=INTEROP / model)
    bntool.fold_checkpoint(INTEROP / model, folded)
    assert json.loads((tmp_path / "folded.json").read_text()) == configuration_of(folded)
    assert elements(target, tmp_path / "folded.json") == elements(folded)


ALONE = "tfkeras2_tiny_legacyw.h5"


@pytest.mark.parametrize(
    ("weights", "model", "target", "lines"),
    [  # each was run in Keras 3.15 and in tf_keras 2.21, which refuse other lines; see tests/oracles/keras_folding.py
        (ALONE, "tfkeras2_tiny.h5", "b.h5", ["import json", "import keras", "model = MADE", "LOAD"]),
        (
            ALONE,
            "tfkeras2_tiny.h5",
            "b.weights.h5",
            [
                *("import json", "import keras", "model = MADE"),
                "LOAD  # Keras 2.12 and later: under a name that does not end with .weights.h5",
            ],
        ),
        (
            "keras_tiny.weights.h5",
            "keras_tiny.keras",
            "b.h5",
            [
                *("import json", "import keras", "model = MADE"),
                "LOAD  # under a name that ends with .weights.h5: others are read otherwise",
            ],
        ),
    ],
)
def test_the_printed_lines_load_it(weights: str, model: str, target: str, lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / target
    fold = bntool.fold_checkpoint(INTEROP / weights, path, keras_config=INTEROP / model)
    assert fold.checkpoint is not None
    made = f"keras.models.Model.from_config(json.load(open({str(tmp_path / 'b.json')!r}))['config'])"
    expected = [line.replace("MADE", made).replace("LOAD", f"model.load_weights({str(path)!r})") for line in lines]
    assert show_loading_code(fold.checkpoint, fold.checkpoint.state_dict(""), str(path)) == expected


def test_weights_that_stay_alone_are_loaded_into_the_users_own_model() -> None:
    with open_checkpoint(INTEROP / ALONE) as checkpoint:
        found = show_loading_code(checkpoint, checkpoint.state_dict(""), "a.h5")
    assert found == ["model.load_weights('a.h5')"]


def named_otherwise(folder: Path) -> Path:
    """The configuration as another session would have counted its layers."""
    text = json.dumps(configuration_of(INTEROP / "tfkeras2_tiny.h5"))
    path = folder / "model.json"
    path.write_text(text.replace('"conv1"', '"conv2d_7"').replace('"bn1"', '"conv1"'))
    return path


def test_layers_of_other_names_go_by_their_order_as_in_keras(tmp_path: Path) -> None:
    config = named_otherwise(tmp_path)
    weights = INTEROP / "tfkeras2_tiny_legacyw.h5"
    assert elements(weights, config) == elements(INTEROP / "tfkeras2_tiny.h5")
    bntool.fold_checkpoint(weights, tmp_path / "folded.h5", keras_config=config)
    bntool.fold_checkpoint(INTEROP / "tfkeras2_tiny.h5", tmp_path / "whole.h5")
    assert elements(tmp_path / "folded.h5", tmp_path / "folded.json") == elements(tmp_path / "whole.h5")
    with h5py.File(tmp_path / "folded.h5") as file:
        assert list(file.attrs["layer_names"]) == [b"input_1", b"conv1", b"re_lu"]


def test_a_text_that_was_written_as_json_once_more_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(json.dumps(configuration_of(INTEROP / "tfkeras2_tiny.h5"))))
    assert elements(INTEROP / "tfkeras2_tiny_legacyw.h5", tmp_path / "model.json")


def test_freezing_writes_the_configuration(tmp_path: Path) -> None:
    bntool.freeze_checkpoint(
        INTEROP / "keras_tiny.weights.h5", tmp_path / "o.weights.h5", keras_config=INTEROP / "keras_tiny.keras"
    )
    layers = json.loads((tmp_path / "o.json").read_text())["config"]["layers"]
    assert {one["class_name"] for one in layers if one["config"].get("trainable") is False} == {"BatchNormalization"}
    assert elements(tmp_path / "o.weights.h5") == elements(INTEROP / "keras_tiny.weights.h5")


def change(config: Any, kind: str) -> None:
    layers = {one["config"]["name"]: one for one in config["config"]["layers"]}
    if kind == "filters":
        layers["conv1"]["config"]["filters"] = 5
    elif kind == "kernel_size":
        layers["conv1"]["config"]["kernel_size"] = [1, 1]
    elif kind == "scale":
        layers["bn1"]["config"]["scale"] = False
    elif kind == "own class":
        layers["bn1"].update(class_name="Mine", registered_name="x>Mine", module=None)
    elif kind == "own model":
        config.update(class_name="Mine", registered_name="x>Mine", module=None)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("filters", UsageError, "makes 5 channels there, and 4 in the file"),
        ("kernel_size", UsageError, r"kernel size \[1, 1\] there"),
        ("scale", UsageError, "3 variables there, and 4"),
        ("own model", RefusedError, "Python code of the model's own"),
    ],
)
def test_the_configuration_of_another_model_is_refused(
    kind: str, error: type[BntoolError], words: str, tmp_path: Path
) -> None:
    config = configuration_of(INTEROP / "keras_tiny.keras")
    change(config, kind)
    (tmp_path / "model.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words) as caught:
        elements(INTEROP / "keras_tiny.weights.h5", tmp_path / "model.json")
    assert caught.value.path == str(tmp_path / "model.json")


@pytest.mark.parametrize(
    ("weights", "model"),
    [("keras_tiny.weights.h5", "keras_nested_models.h5"), ("tfkeras2_tiny_legacyw.h5", "keras_tiny.h5")],
)
def test_a_model_of_other_layers_is_refused(weights: str, model: str) -> None:
    with pytest.raises(UsageError, match="describes another model"):
        elements(INTEROP / weights, INTEROP / model)


def test_names_in_another_order_are_refused(tmp_path: Path) -> None:
    """Keras loads by order, or by names where it is told to: both would be another model."""
    shutil.copy(INTEROP / "tfkeras2_tiny_legacyw.h5", tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        file.attrs["layer_names"] = np.asarray([b"input_1", b"bn1", b"conv1", b"re_lu"])
    with pytest.raises(UsageError, match="another order"):
        elements(tmp_path / "w.h5", INTEROP / "tfkeras2_tiny.h5")


def test_classes_that_are_not_known_need_the_names_of_the_file(tmp_path: Path) -> None:
    text = named_otherwise(tmp_path).read_text()
    (tmp_path / "model.json").write_text(text.replace('"ReLU"', '"Mine"'))
    with pytest.raises(UsageError, match="class Mine has weights is not known"):
        elements(INTEROP / "tfkeras2_tiny_legacyw.h5", tmp_path / "model.json")


def test_what_runs_code_in_the_configuration_is_named(tmp_path: Path) -> None:
    config = configuration_of(INTEROP / "keras_tiny.keras")
    config["config"]["layers"][1]["config"]["kernel_initializer"] = {
        "module": "keras.utils", "class_name": "get_file", "config": {}, "registered_name": None,
    }  # fmt: skip
    (tmp_path / "model.json").write_text(json.dumps(config))
    found = bntool.inspect(INTEROP / "keras_tiny.weights.h5", keras_config=tmp_path / "model.json")
    assert found.safety.suspicious == ("keras.utils.get_file",)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["keras_tiny.weights.h5", "keras_tiny.weights.h5"], ExitCode.USAGE, "weights alone, too"),
        (["keras_tiny.h5", "keras_tiny.keras"], ExitCode.USAGE, "holds its configuration"),
        (["onnx_tiny.onnx", "keras_tiny.keras"], ExitCode.USAGE, "goes with an .h5 file"),
        (["keras_tiny.weights.h5", "onnx_tiny.onnx"], ExitCode.FILE, "not valid JSON"),
    ],
)
def test_what_is_no_configuration_of_weights_is_said(
    arguments: list[str], code: ExitCode, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, config = (str(INTEROP / name) for name in arguments)
    assert main(["fold", weights, "--keras-config", config, "-o", str(tmp_path / "o.h5")]) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "name", "trust"),
    [
        ("os", "system", GlobalTrust.SUSPICIOUS),
        ("builtins", "eval", GlobalTrust.SUSPICIOUS),
        ("tensorflow.python.framework.tensor", "TensorSpec", None),
    ],
)
def test_the_class_of_a_type_spec_is_looked_at(module: str, name: str, trust: GlobalTrust | None) -> None:
    """Keras imports its module, and calls a method of the class."""
    spec = {"class_name": "__typespec__", "spec_name": name, "module": module, "config": [], "registered_name": None}
    assert [one.trust for one in judge_configuration({"units": spec})] == ([] if trust is None else [trust])
