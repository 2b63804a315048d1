"""The verdict on what loading a Keras file may run: by its configuration, in both kinds of files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from bntool.checkpoints.formats import open_checkpoint
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.inspection.safety import SafetyVerdict, judge_safety
from tests.checkpoints.keras.configurations import (
    ADAM,
    CODE,
    OLD_CODE,
    archive,
    function,
    hdf5,
    lambda_layer,
    layer,
    torch_pickle,
)
from tests.places import INTEROP

REACHES = {  # what a layer more, or a field of the configuration, makes of a harmless file
    "a torch pickle": layer("TorchModuleWrapper", content=torch_pickle()),
    "safe mode switched off": lambda_layer("keras.config", "enable_unsafe_deserialization"),
    "the dtype of all models set": lambda_layer("keras.mixed_precision", "set_dtype_policy"),
    "the same by its inner name": lambda_layer("keras.src.dtype_policies.dtype_policy", "set_dtype_policy"),
    "a download": lambda_layer("keras.utils", "get_file"),
    "a download of tf_keras": lambda_layer("tf_keras.utils", "get_file"),
    "a download under tensorflow": lambda_layer("tensorflow.keras.utils", "get_file"),
    "a download by its inner name": lambda_layer("keras.src.utils.file_utils", "get_file"),
    "a file written by tensorflow": lambda_layer("tensorflow.io", "write_file"),
    "a raw operation": lambda_layer("tensorflow.raw_ops", "WriteFile"),
    "a raw operation by its inner name": lambda_layer("tensorflow.python.ops.io_ops.io", "write_file"),
    "a Python function of tensorflow": lambda_layer("tensorflow", "py_function"),
    "a model loaded": lambda_layer("keras.models", "load_model"),
    "a model loaded by saving": lambda_layer("keras.saving", "load_model"),
    "a plot": lambda_layer("keras.utils", "plot_model"),
    "any configuration": lambda_layer("keras.layers", "deserialize"),
    "a SavedModel": layer("TFSMLayer", filepath="saved", call_endpoint="serve"),
    "a SavedModel as a class": layer("TFSMLayer", module="keras.src.export.tfsm_layer", filepath="saved"),
    "a jax function": layer("JaxLayer", call_fn=function("keras.ops", "relu")),
    "code": layer("Lambda", function=CODE),
    "code for the shape": layer("Lambda", function=function("keras.ops", "relu"), output_shape=CODE),
    "code for the mask": layer("Lambda", function=function("keras.ops", "relu"), mask=CODE),
    "code among arguments": layer("Lambda", function=function("keras.ops", "relu"), arguments={"f": CODE}),
    "code of Keras 2": layer("Lambda", function=OLD_CODE, function_type="lambda"),
    "code of Keras 2, not called so": layer("Lambda", function=OLD_CODE),
    "code of Keras 2 for the shape": layer("Lambda", output_shape=OLD_CODE, output_shape_type="lambda"),
    "code of Keras 1": layer("Lambda", function="4wEAAAA=", function_type="lambda"),
    "an operation of Keras 2 that writes": layer("TFOpLambda", function="io.write_file"),
    "an operation of Keras 2 that runs Python": layer("TFOpLambda", function="py_function"),
    "words from a file": layer("StringLookup", vocabulary="/etc/passwd"),
    "words of a text from a file": layer("TextVectorization", vocabulary="http://example.org/words"),
    "an activation that runs": layer("Dense", units=2, activation=function("builtins", "exec")),
    "a class that runs programs": layer("system", module="os"),
    "a function that removes files": lambda_layer("shutil", "rmtree"),
    "a download within a wrapper": layer("TimeDistributed", layer=lambda_layer("keras.utils", "get_file")),
}  # fmt: skip
UNKNOWN = {
    "a class of another package": layer("Attention", module="mine.layers"),
    "a function of another package": lambda_layer("mine.ops", "swish"),
    "a registered class": {**layer("Conv2D", module=None), "registered_name": "mine>Conv2D"},
    "a registered class that calls itself Keras's": {**layer("Conv2D"), "registered_name": "mine>Conv2D"},
    "a class of Keras that is not known": layer("LayerOfTomorrow"),
    "a function of Keras 2 by name": layer("Lambda", function="mine", function_type="function", module="mine.layers"),
    "a class of keras_hub": layer("Backbone", module="keras_hub.models"),
    "an operation of tensorflow that is not known": lambda_layer("tensorflow.distribute", "get_strategy"),
}
HARMLESS = {  # of classes whose weights, which are not in the file, are not held against the configuration
    "functions of Keras": lambda_layer("keras.ops", "relu"),
    "an activation": layer("LSTM", units=2, activation=function("builtins", "relu")),
    "an activation of keras": layer("LSTM", units=2, activation=function("keras.activations", "relu")),
    "an operation of Keras 2": layer("TFOpLambda", function="math.add"),
    "another one": layer("TFOpLambda", function="reshape"),
    "words in the file": layer("StringLookup", vocabulary=["a", "b"]),
    "a range": layer("Rescaling", scale=2, offset="io.write_file"),
    "a name that only sounds like it": {**layer("LSTM", units=2), "name": "keras.utils.get_file"},
    "an initializer": layer("GRU", kernel_initializer=layer("VarianceScaling", module="keras.initializers")),
    "a policy": layer("LSTM", dtype={"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}}),
}  # fmt: skip
TRAINING: dict[str, tuple[Any, SafetyVerdict]] = {
    "a loss that downloads": ({"loss": function("keras.utils", "get_file")}, SafetyVerdict.SUSPICIOUS),
    "a metric that runs": ({"metrics": [[function("builtins", "eval")]]}, SafetyVerdict.SUSPICIOUS),
    "an optimizer of another package": ({"optimizer": {**ADAM, "module": "evil.optimizers"}}, SafetyVerdict.UNKNOWN),
    "what Keras writes": ({"optimizer": ADAM, "loss": "mse", "metrics": ["accuracy"]}, SafetyVerdict.HARMLESS),
}


def verdict_of(path: Path) -> SafetyVerdict:
    with open_checkpoint(path) as checkpoint:
        return judge_safety(checkpoint).verdict


EXPECTED = {SafetyVerdict.SUSPICIOUS: REACHES, SafetyVerdict.UNKNOWN: UNKNOWN, SafetyVerdict.HARMLESS: HARMLESS}


@pytest.mark.parametrize(
    ("verdict", "what"), [(verdict, what) for verdict, cases in EXPECTED.items() for what in cases]
)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_what_a_layer_reaches(verdict: SafetyVerdict, what: str, suffix: str, tmp_path: Path) -> None:
    entry = EXPECTED[verdict][what]
    make = archive if suffix == ".keras" else hdf5
    path = make(tmp_path / f"a{suffix}", lambda config: config["config"]["layers"].append(entry))
    assert verdict_of(path) is verdict


@pytest.mark.parametrize("what", TRAINING)
def test_what_training_reaches(what: str, tmp_path: Path) -> None:
    config, verdict = TRAINING[what]
    assert verdict_of(archive(tmp_path / "a.keras", lambda c: c.update(compile_config=config))) is verdict
    path = hdf5(tmp_path / "a.h5", lambda c: c.update(config), attribute="training_config")
    assert verdict_of(path) is verdict


def test_code_is_named_where_weights_do_not_fit_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = archive(tmp_path / "a.keras", lambda c: c["config"]["layers"].append(REACHES["an activation that runs"]))
    assert main(["inspect", str(path)]) == 0
    assert "builtins.exec" in capsys.readouterr().out
    assert main(["freeze", str(path), "-o", str(tmp_path / "out.keras")]) == ExitCode.REFUSED
    assert "2 variables there, and 0 in the file" in capsys.readouterr().err
    assert not (tmp_path / "out.keras").exists()


def test_the_finding_names_what_would_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = archive(tmp_path / "a.keras", lambda c: c["config"]["layers"].append(REACHES["a download"]))
    assert main(["inspect", str(path), "--fail-on", "warning"]) == 1
    assert "keras.utils.get_file" in capsys.readouterr().out


def test_no_recorded_file_is_called_harmful() -> None:
    paths = [*INTEROP.rglob("*.keras"), *INTEROP.glob("*keras*.h5"), *(INTEROP / "keras_folding").glob("*.h5")]
    assert len(paths) > 40
    assert {path.name: verdict for path in paths if (verdict := verdict_of(path)) is not SafetyVerdict.HARMLESS} == {}


def test_a_torch_pickle_is_named_as_keras_writes_it(tmp_path: Path) -> None:
    """Keras calls the field ``module``: within the configuration, where no module of Python is named."""
    entry = layer("TorchModuleWrapper")
    entry["config"]["module"] = torch_pickle()
    path = archive(tmp_path / "a.keras", lambda c: c["config"]["layers"].append(entry))
    assert verdict_of(path) is SafetyVerdict.SUSPICIOUS
    assert zipfile.is_zipfile(path)
