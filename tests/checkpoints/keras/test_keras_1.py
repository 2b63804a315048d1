"""Files of Keras 1.2.2 on Theano and TensorFlow, made and approved by Keras 1 (tests/oracles/keras_1_files.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest

import bntool
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.keras.keras_1 import has_unnamed_models, parse_version
from bntool.checkpoints.tensors import read_bytes
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.errors import RefusedError, UsageError
from tests.graphs.stored.folding import fold_file
from tests.places import INTEROP

RECORDED = INTEROP / "keras_1"
FOLDED = sorted(path.name for path in RECORDED.glob("*.folded.h5"))
SEQUENTIAL = RECORDED / "sequential-theano-th.h5"


def content(path: Path) -> tuple[Any, dict[str, bytes]]:
    with h5py.File(path) as file:
        config = json.loads(file.attrs["model_config"])
    with open_checkpoint(path) as checkpoint:
        return config, {name: read_bytes(tensor) for name, tensor in checkpoint.state_dict("").tensors.items()}


@pytest.mark.parametrize("name", FOLDED)
def test_folds_as_keras_1_approved(name: str, tmp_path: Path) -> None:
    plan = fold_file(RECORDED / name.replace(".folded", ""), tmp_path / name)
    assert plan.folds
    assert content(tmp_path / name) == content(RECORDED / name)


def test_all_backends_and_orders_are_there() -> None:
    kinds = {tuple(name.removesuffix(".folded.h5").split("-")[1:]) for name in FOLDED}
    assert kinds == {(backend, order) for backend in ("theano", "tensorflow") for order in ("th", "tf")}


@pytest.mark.parametrize("kind", ["theano-th", "theano-tf", "tensorflow-th", "tensorflow-tf"])
def test_kernels_have_the_dimensions_of_pytorch(kind: str) -> None:
    with open_checkpoint(RECORDED / f"sequential-{kind}.h5") as checkpoint:
        tensors = checkpoint.state_dict("").tensors
        shapes = [tuple(tensors[f"{name}.weight"].shape) for name in ("c1", "c2", "d1")]
        assert shapes == [(4, 3, 3, 3), (5, 4, 2, 2), (6, 5)]
        with h5py.File(RECORDED / f"sequential-{kind}.h5") as file:
            group = file["model_weights/c2"]
            kernel = group[next(iter(group))][()]
        wanted = kernel if kind.endswith("th") else kernel.transpose(3, 2, 0, 1)
        assert read_bytes(tensors["c2.weight"]) == wanted.tobytes()


def test_a_transposed_kernel_is_in_by_out() -> None:
    for order, axes in (("th", (1, 0, 2, 3)), ("tf", (2, 3, 0, 1))):
        path = RECORDED / f"transposed-theano-{order}.h5"
        with open_checkpoint(path) as checkpoint, h5py.File(path) as file:
            weight = checkpoint.state_dict("").tensors["up.weight"]
            kernel = file["model_weights/up/up_W"][()]
            assert tuple(weight.shape) == (3, 5, 2, 2)
            assert read_bytes(weight) == kernel.transpose(axes).tobytes()


def replace_weight(path: Path, layer: str, old: str, new: str, change: Any = None) -> None:
    with h5py.File(path, "r+") as file:
        group = file["model_weights"][layer]
        values = group[old][()]
        del group[old]
        group[new] = values if change is None else change(values)
        group.attrs["weight_names"] = [
            new.encode() if name == old.encode() else bytes(name) for name in group.attrs["weight_names"]
        ]


def test_kernels_of_one_dimension_lay_otherwise_before_1_1(tmp_path: Path) -> None:
    """Keras 1.2 knows them by their shape, and turns them."""
    source = RECORDED / "other_dimensions-theano-th.h5"
    shutil.copy(source, tmp_path / "old.h5")
    replace_weight(tmp_path / "old.h5", "c1", "c1_W", "c1_W", lambda kernel: kernel.transpose(3, 2, 0, 1))
    assert content(tmp_path / "old.h5") == content(source)
    fold_file(tmp_path / "old.h5", tmp_path / "folded.h5")
    assert content(tmp_path / "folded.h5") == content(RECORDED / "other_dimensions-theano-th.folded.h5")
    with h5py.File(tmp_path / "folded.h5") as file:
        assert file["model_weights/c1/c1_W"].shape == (4, 3, 3, 1)


def test_names_of_a_second_model_in_a_session_have_a_number(tmp_path: Path) -> None:
    source = RECORDED / "sequential-tensorflow-tf.h5"
    shutil.copy(source, tmp_path / "second.h5")
    replace_weight(tmp_path / "second.h5", "c2", "c2_W:0", "c2_W_1:0")
    replace_weight(tmp_path / "second.h5", "n2", "n2_running_std:0", "n2_running_std_1:0")
    assert content(tmp_path / "second.h5") == content(source)
    fold_file(tmp_path / "second.h5", tmp_path / "folded.h5")
    assert content(tmp_path / "folded.h5") == content(RECORDED / "sequential-tensorflow-tf.folded.h5")
    with h5py.File(tmp_path / "folded.h5") as file:
        assert [bytes(name) for name in file["model_weights/c2"].attrs["weight_names"]] == [b"c2_W_1:0", b"c2_b_1:0"]


def weights_alone(folder: Path, source: Path = SEQUENTIAL) -> tuple[Path, Any]:
    """What ``model.save_weights`` of Keras 1 writes, and the configuration."""
    with h5py.File(source) as file, h5py.File(folder / "alone.h5", "w") as alone:
        for name in file["model_weights"]:
            file.copy(f"model_weights/{name}", alone)
        alone.attrs["layer_names"] = file["model_weights"].attrs["layer_names"]
        config = json.loads(file.attrs["model_config"])
    return folder / "alone.h5", {**config, "keras_version": "1.2.2"}


def test_weights_alone_fold_by_the_configuration_of_keras_1(tmp_path: Path) -> None:
    path, config = weights_alone(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(config))
    bntool.fold_checkpoint(path, tmp_path / "folded.h5", keras_config=tmp_path / "model.json")
    folded = RECORDED / "sequential-theano-th.folded.h5"
    assert json.loads((tmp_path / "folded.json").read_text())["config"] == content(folded)[0]["config"]
    with open_checkpoint(tmp_path / "folded.h5") as checkpoint, open_checkpoint(folded) as wanted:
        found = checkpoint.state_dict("").tensors
        assert len(found) == len(wanted.state_dict("").tensors) == 8
        assert read_bytes(found["c2.b"]) == read_bytes(wanted.state_dict("").tensors["c2.bias"])


@pytest.mark.parametrize("mode", [1, 2])
def test_other_modes_do_not_normalise_by_running_statistics(mode: int, tmp_path: Path) -> None:
    shutil.copy(SEQUENTIAL, tmp_path / "a.h5")
    change_layer(tmp_path / "a.h5", "n1", mode=mode)
    plan = fold_file(tmp_path / "a.h5", tmp_path / "b.h5")
    assert {skip.layer: skip.reason.value for skip in plan.skips} == {"n1": "normalises by batch statistics"}


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("1.0.5", "before 1.0.7, but a standard deviation"),
        ("1.0.7", r"of Keras 1\.0\.7"),
        (None, "nothing says of which version"),
    ],
)
def test_versions_that_normalise_otherwise_are_refused(version: str | None, words: str, tmp_path: Path) -> None:
    shutil.copy(SEQUENTIAL, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file.attrs["keras_version"]
        if version is not None:
            file.attrs["keras_version"] = version.encode()
    with pytest.raises(RefusedError, match=words):
        bntool.fold_checkpoint(tmp_path / "a.h5", tmp_path / "b.h5")
    assert not (tmp_path / "b.h5").exists()


def test_a_standard_deviation_is_not_shown_as_a_variance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keras before 1.0.7 keeps the root under this name."""
    shutil.copy(SEQUENTIAL, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs["keras_version"] = b"1.0.5"
    assert main(["inspect", str(tmp_path / "a.h5"), "--fail-on", "error"]) == ExitCode.FINDINGS
    assert "running_std is no variance" in " ".join(capsys.readouterr().out.split())
    with open_checkpoint(tmp_path / "a.h5") as checkpoint:
        assert not [name for name in checkpoint.state_dict("").tensors if name.endswith("running_var")]


def test_where_no_version_is_said_the_listing_says_what_was_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = weights_alone(tmp_path)
    assert main(["inspect", str(path)]) == 0
    assert "running_std read as the variance that it is since 1.0.7" in " ".join(capsys.readouterr().out.split())


def test_freezing_is_refused() -> None:
    """Keras 1 moves the statistics of layers that do not train, which the oracle shows."""
    with pytest.raises(RefusedError, match="moves the statistics"):
        bntool.freeze_checkpoint(SEQUENTIAL)


def test_conversion_says_that_the_backend_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(SEQUENTIAL), "--to", "safetensors", "-o", str(tmp_path / "a.safetensors")]) == 0
    assert "does not note the backend" in " ".join(capsys.readouterr().out.split())


def test_models_that_a_first_merge_joins_are_listed_only(tmp_path: Path) -> None:
    """Their layers lie in the file under their own names, and the models have none in the configuration."""
    path = RECORDED / "merged.h5"
    (found,) = bntool.inspect(path).state_dicts
    assert [one.layer.name for one in found.layers] == ["left_norm", "right_norm", "norm"]
    with pytest.raises(RefusedError, match="have no names in it"):
        bntool.fold_checkpoint(path, tmp_path / "b.h5")


def change_layer(path: Path, name: str, **options: Any) -> None:
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        layers = config["config"]["layers"] if isinstance(config["config"], dict) else config["config"]
        next(one for one in layers if one["config"]["name"] == name)["config"].update(options)
        file.attrs["model_config"] = json.dumps(config).encode()


@pytest.mark.parametrize("config", [1, None, "x", [], [1], {"layers": 1}])
def test_a_merge_without_options_is_no_crash(config: Any) -> None:
    layer = {"class_name": "Merge", "config": config}
    assert has_unnamed_models({"class_name": "Sequential", "config": [layer]}) is (isinstance(config, list | dict))


@pytest.mark.parametrize("options", [{"mode": "dot"}, {"mode_type": "lambda"}, {"mode": "cos"}])
def test_a_merge_by_a_function_is_nothing_known(options: dict[str, Any], tmp_path: Path) -> None:
    source = RECORDED / "branches-tensorflow-tf.h5"
    shutil.copy(source, tmp_path / "a.h5")
    _, layers = content(source)
    assert layers
    with h5py.File(source) as file:
        config = json.loads(file.attrs["model_config"])
    merge = [one["name"] for one in config["config"]["layers"] if one["class_name"] == "Merge"][-1]
    change_layer(tmp_path / "a.h5", merge, **options)
    plan = fold_file(tmp_path / "a.h5", tmp_path / "b.h5")
    assert "of_both" in {skip.layer for skip in plan.skips}


def test_a_pool_with_padding_lets_nothing_pass(tmp_path: Path) -> None:
    shutil.copy(SEQUENTIAL, tmp_path / "a.h5")
    with h5py.File(SEQUENTIAL) as file:
        layers = json.loads(file.attrs["model_config"])["config"]
    pool = next(one["config"]["name"] for one in layers if one["class_name"] == "MaxPooling2D")
    change_layer(tmp_path / "a.h5", pool, border_mode="same")
    plan = fold_file(tmp_path / "a.h5", tmp_path / "b.h5")
    assert {skip.layer for skip in plan.skips} == {"n3", "n4"}  # which lie behind it


@pytest.mark.parametrize(
    ("text", "found"),
    [("1.2.2", (1, 2, 2)), ("0.3", (0, 3, 0)), ("2.2.4", None), ("1.2.2-tf", (1, 2, 2)), ("", None), (None, None)],
)
def test_versions(text: str | None, found: tuple[int, ...] | None) -> None:
    assert parse_version(text) == found


def test_another_model_is_refused(tmp_path: Path) -> None:
    path, config = weights_alone(tmp_path)
    next(one for one in config["config"] if one["config"]["name"] == "c2")["config"]["nb_filter"] = 7
    (tmp_path / "model.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="makes 7 channels there"):
        bntool.fold_checkpoint(path, tmp_path / "b.h5", keras_config=tmp_path / "model.json")
