"""Keras files, held against h5py and against what Keras and tf_keras made the fixtures from."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import bntool
from bntool.batchnorm import NormKind
from bntool.checkpoints.batchnorms import find_batchnorms, find_norms
from bntool.checkpoints.containers.hdf5 import read_hdf5
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.keras.content import make_checkpoint, read_content
from bntool.checkpoints.keras.model import order_layers, parse_config, read_model
from bntool.checkpoints.tensors import read_bytes, read_numbers
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.errors import CorruptFileError, UnknownFormatError, UnsafeFileError
from bntool.inspection.safety import SafetyVerdict, find_dangers, judge_safety
from bntool.plan import RemoveModule
from tests import programs
from tests.places import INTEROP

TINY = {  # in the words of PyTorch, and as Keras keeps it
    "conv1.weight": ("conv1/kernel", (4, 3, 3, 3)),
    "dw.weight": ("dw/kernel", (8, 1, 3, 3)),
    "dw.bias": ("dw/bias", (8,)),
    "deconv.weight": ("deconv/kernel", (8, 5, 2, 2)),
    "sep.depthwise_weight": ("sep/depthwise_kernel", (5, 1, 3, 3)),
    "sep.weight": ("sep/pointwise_kernel", (6, 5, 1, 1)),
    "fc.weight": ("fc/kernel", (7, 6)),
    "bn1.weight": ("bn1/gamma", (4,)),
    "bn1.running_mean": ("bn1/moving_mean", (4,)),
    "bn_dw.bias": ("bn_dw/beta", (8,)),
    "bn_dw.running_var": ("bn_dw/moving_variance", (8,)),
    "bn_dc.weight": ("bn_dc/gamma", (5,)),
}


@pytest.fixture
def interop(fixtures: Path) -> Path:
    return fixtures / "interop"


def weights_of(path: Path) -> Any:
    if path.suffix == ".keras":
        return io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5"))
    return path


@pytest.mark.parametrize(
    "name",
    ["keras_tiny.keras", "keras_tiny.h5", "keras_nested_models.keras", "keras_nested_renorm.keras", "keras_bf16.keras",
     "tfkeras2_tiny.h5", "tfkeras2_tiny_legacyw.h5"],
)  # fmt: skip
def test_lists_what_h5py_lists(name: str, interop: Path) -> None:
    stream = weights_of(interop / name)
    data = stream.getvalue() if isinstance(stream, io.BytesIO) else stream.read_bytes()
    path = interop / name
    with h5py.File(io.BytesIO(data)) as expected:
        wanted: dict[str, Any] = {}
        expected.visititems(lambda n, o: wanted.update({n: o[()]}) if isinstance(o, h5py.Dataset) else None)
    from bntool.checkpoints.files import MemorySource

    found = read_hdf5(MemorySource(data))
    assert set(found.datasets) == set(wanted), path
    for key, array in wanted.items():
        assert found.datasets[key].shape == array.shape
        assert read_bytes(found.datasets[key]) == array.tobytes()


@pytest.mark.parametrize("name", ["keras_tiny.keras", "keras_tiny.h5"])
def test_kernels_are_seen_with_the_dimensions_of_pytorch(name: str, interop: Path) -> None:
    with h5py.File(interop / "keras_tiny.h5") as file, open_checkpoint(interop / name) as checkpoint:
        tensors = checkpoint.state_dict("").tensors
        for key, (place, shape) in TINY.items():
            array = file[f"model_weights/{place.split('/')[0]}/{place}"][()]
            if key in ("dw.weight", "sep.depthwise_weight"):
                array = np.stack([array[..., c, m] for c in range(array.shape[2]) for m in range(array.shape[3])])[
                    :, None
                ]
            elif array.ndim == 4:
                array = np.moveaxis(array, (3, 2), (0, 1))
            elif array.ndim == 2:
                array = array.T
            assert tuple(tensors[key].shape) == shape == array.shape, key
            assert read_bytes(tensors[key]) == np.ascontiguousarray(array).tobytes(), key


def test_eps_momentum_and_missing_parts_come_from_the_configuration(interop: Path) -> None:
    for name in ("keras_tiny.keras", "keras_tiny.h5"):
        with open_checkpoint(interop / name) as checkpoint:
            norms = {norm.name: norm for norm in find_batchnorms(checkpoint.state_dict(""))}
        assert {n: (norm.eps, norm.momentum) for n, norm in norms.items()} == {
            "bn1": (1e-3, 0.01), "bn_dw": (1e-5, 0.01), "bn_dc": (1e-3, 0.01), "bn_sep": (1e-3, 0.01),
            "bn_fc": (1e-3, 0.1),
        }  # fmt: skip
        assert "weight" not in norms["bn_dw"].tensors  # scale=False
        assert "bias" not in norms["bn_dc"].tensors  # center=False


def test_weights_alone_have_names_but_no_eps(interop: Path) -> None:
    with open_checkpoint(interop / "keras_tiny.weights.h5") as checkpoint:
        state_dict = checkpoint.state_dict("")
        norms = {norm.name: norm for norm in find_batchnorms(state_dict)}
        assert {n: norm.eps for n, norm in norms.items()} == dict.fromkeys(["bn1", "bn_dw", "bn_dc", "bn_sep", "bn_fc"])
        with open_checkpoint(interop / "keras_tiny.keras") as whole:
            others = whole.state_dict("").tensors
            for key, (_, shape) in TINY.items():
                layer = key.partition(".")[0]  # weight or bias of these: only the configuration can tell
                name = f"{layer}.gamma_or_beta" if key in ("bn_dw.bias", "bn_dc.weight") else key
                assert tuple(state_dict.tensors[name].shape) == shape
                assert read_bytes(state_dict.tensors[name]) == read_bytes(others[key])


def test_nested_models_give_the_same_names_in_every_layout(interop: Path) -> None:
    seen = []
    for suffix in (".keras", ".h5", ".weights.h5"):
        with open_checkpoint(interop / f"keras_nested_models{suffix}") as checkpoint:
            tensors = checkpoint.state_dict("").tensors
            seen.append({k: read_bytes(t) for k, t in tensors.items() if not k.startswith("td.")})
            assert {n.name for n in find_batchnorms(checkpoint.state_dict(""))} == {"blk.b", "fun.b", "bf"}
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 17


def test_renorm_has_seven_variables(interop: Path) -> None:
    with open_checkpoint(interop / "keras_nested_renorm.keras") as checkpoint:
        norms = find_norms(checkpoint.state_dict(""))
        assert [(n.name, n.kind, len(n.tensors)) for n in norms] == [
            ("blk.batch_normalization", NormKind.BATCH_NORM, 4),
            ("rn", NormKind.BATCH_NORM, 7),
        ]


def test_bfloat16_is_known_by_its_attribute(interop: Path) -> None:
    with open_checkpoint(interop / "keras_bf16.keras") as checkpoint:
        tensors = checkpoint.state_dict("").tensors
        assert {t.dtype.name for t in tensors.values()} == {"bfloat16"}
        assert list(read_numbers(tensors["b2.running_var"])) == [1.0, 1.0]


@pytest.mark.parametrize(
    "options", [{"compression": "gzip"}, {"chunks": (2, 2), "shuffle": True}, {"compression": "lzf"}]
)
def test_compressed_and_big_endian_datasets_are_decoded(options: dict[str, Any], tmp_path: Path) -> None:
    array = np.arange(24.0, dtype=">f4").reshape(4, 6)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("layers/dense/vars/0", data=array, **options)
        file.create_dataset("layers/dense/vars/1", data=np.arange(6, dtype=">f8"))
        file.create_group("vars")
    with open_checkpoint(tmp_path / "a.h5") as checkpoint:
        tensors = checkpoint.state_dict("").tensors
        assert list(read_numbers(tensors["dense.weight"])) == array.T.ravel().tolist()
        assert list(read_numbers(tensors["dense.bias"])) == list(range(6))


def test_another_hdf5_file_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.arange(3)
    with pytest.raises(UnknownFormatError, match="those of Keras and Caffe are read"):
        open_checkpoint(tmp_path / "a.h5")


def test_an_index_of_weights_in_several_files_is_named(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 8.0}, "weight_map": {"/layers/dense/vars": ["a_00000.weights.h5"]}}
    (tmp_path / "a.weights.json").write_text(json.dumps(index))
    with pytest.raises(UnknownFormatError, match="one by one"):
        open_checkpoint(tmp_path / "a.weights.json")


def test_tensors_are_taken_out_in_the_order_of_pytorch(interop: Path, tmp_path: Path) -> None:
    """As loading them into a PyTorch model of the same layers needs them."""
    source, target = interop / "keras_tiny.keras", tmp_path / "a.pt"
    assert main(["convert", str(source), "--to", "torch", "-o", str(target), "--quiet"]) == ExitCode.DONE
    loaded = torch.load(target, weights_only=True)
    convolution = torch.nn.Conv2d(3, 4, 3, bias=False)
    convolution.load_state_dict({"weight": loaded["conv1.weight"]})
    norm = torch.nn.BatchNorm2d(4)
    names = ("weight", "bias", "running_mean", "running_var")
    norm.load_state_dict({name: loaded[f"bn1.{name}"] for name in names}, strict=False)
    assert main(["convert", str(source), "--to", "frozen-batchnorm", "--dry-run"]) == ExitCode.REFUSED
    assert main(["freeze", str(source), "--emit", "python", "-o", str(tmp_path / "b.keras")]) == ExitCode.REFUSED


# hostile files


def _external_link(file: h5py.File, beside: Path) -> None:
    file["layers/dense/vars/0"] = h5py.ExternalLink(str(beside), "secret")


def _soft_link(file: h5py.File, beside: Path) -> None:
    file["layers/dense/vars/0"] = h5py.SoftLink("/layers")


def _hard_cycle(file: h5py.File, beside: Path) -> None:
    file["layers/dense/vars"]["0"] = file["layers"]


def _two_names(file: h5py.File, beside: Path) -> None:
    file["layers/dense/vars/0"] = np.zeros((2, 3))
    file["layers/dense/vars/1"] = file["layers/dense/vars/0"]


def _external_storage(file: h5py.File, beside: Path) -> None:
    file["layers/dense/vars"].create_dataset("0", (3,), "f4", external=[(str(beside), 0, 12)])


def _virtual(file: h5py.File, beside: Path) -> None:
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource(str(beside), "secret", (3,))
    file["layers/dense/vars"].create_virtual_dataset("0", layout)


def _huge(file: h5py.File, beside: Path) -> None:
    file["layers/dense/vars"].create_dataset("0", (1 << 40, 4), "f4", chunks=(1 << 10, 4), compression="gzip")


def _deep(file: h5py.File, beside: Path) -> None:
    file.create_group("/".join("a" * 100))


@pytest.mark.parametrize(
    "build", [_external_link, _soft_link, _hard_cycle, _two_names, _external_storage, _virtual, _huge, _deep]
)
def test_a_file_that_reaches_beyond_itself_is_refused(build: Any, tmp_path: Path) -> None:
    beside = tmp_path / "beside.h5"
    with h5py.File(beside, "w") as secret:
        secret["secret"] = np.arange(3.0, dtype="f4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("layers/dense/vars")
        build(file, beside)
    beside.chmod(0)
    error, *opened = programs.run("opened_files", tmp_path / "a.h5").stdout.splitlines()
    assert error == "UnsafeFileError"
    assert str(tmp_path / "a.h5") in opened
    assert not any("beside" in path for path in opened)


def test_elements_beyond_the_end_are_refused(interop: Path, tmp_path: Path) -> None:
    data = (interop / "keras_tiny.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptFileError, match="damaged"):
        open_checkpoint(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("offset", "nbytes", "words"),
    [
        (0, 1 << 20, "bytes are kept for elements of"),
        (-12, 0, "its elements lie where those of .* are"),
    ],
)
def test_datasets_that_lie_over_each_other_are_refused(
    offset: int, nbytes: int, words: str, interop: Path, tmp_path: Path
) -> None:
    data = (interop / "keras_tiny.h5").read_bytes()
    with h5py.File(interop / "keras_tiny.h5") as file:
        place = file["model_weights/dw/dw/bias"].id
        found = struct.pack("<QQ", place.get_offset(), place.get_storage_size())
        changed = struct.pack("<QQ", place.get_offset() + offset, place.get_storage_size() + nbytes)
    assert data.count(found) == 1
    (tmp_path / "overlapping.h5").write_bytes(data.replace(found, changed))
    with pytest.raises(CorruptFileError, match=words), open_checkpoint(tmp_path / "overlapping.h5"):
        pass


def test_a_heap_that_never_ends_is_refused(interop: Path, tmp_path: Path) -> None:
    """libhdf5 2.0 goes round in circles where an object of a heap says that it has no size."""
    data = bytearray((interop / "keras_tiny.h5").read_bytes())
    heap = data.rindex(b"GCOL")
    end, position = heap + int.from_bytes(data[heap + 8 : heap + 16], "little"), heap + 16
    while data[position] or data[position + 1]:  # to the free space at its end
        length = int.from_bytes(data[position + 8 : position + 16], "little")
        position += 16 + length + -length % 8
    assert int.from_bytes(data[position + 8 : position + 16], "little") == end - position
    data[position + 8 : position + 16] = bytes(8)
    (tmp_path / "a.h5").write_bytes(data)
    with pytest.raises(CorruptFileError, match="add up"):
        open_checkpoint(tmp_path / "a.h5")


def test_a_lambda_with_code_is_not_harmless(interop: Path, tmp_path: Path) -> None:
    source = zipfile.ZipFile(interop / "keras_tiny.keras")
    config = json.loads(source.read("config.json"))
    relu = next(layer for layer in config["config"]["layers"] if layer["name"] == "relu1")
    code = {"class_name": "__lambda__", "config": {"code": "4wEAAAA=", "defaults": None, "closure": None}}
    relu.update(class_name="Lambda", config={"name": "relu1", "trainable": True, "function": code})
    target = tmp_path / "lambda.keras"
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, json.dumps(config) if name == "config.json" else source.read(name))
    with open_checkpoint(interop / "keras_tiny.keras") as checkpoint:
        assert judge_safety(checkpoint).verdict is SafetyVerdict.HARMLESS
    with open_checkpoint(target) as checkpoint:
        safety = judge_safety(checkpoint)
        assert safety.verdict is SafetyVerdict.SUSPICIOUS
        assert safety.suspicious == ("keras.layers.Lambda",)
        assert len(find_batchnorms(checkpoint.state_dict(""))) == 5
        assert "safe_mode" in find_dangers(safety)[0].message


def test_functions_and_classes_that_loading_would_import_are_named(interop: Path) -> None:
    config = parse_config(zipfile.ZipFile(interop / "keras_tiny.keras").read("config.json"))
    layers = config["config"]["layers"]
    layers[1]["config"]["activation"] = {"module": "builtins", "class_name": "function", "config": "exec"}
    layers[3]["config"]["other"] = {"module": "builtins", "class_name": "function", "config": "relu"}
    layers[5].update(module="os", class_name="system", registered_name=None)
    with open_checkpoint(interop / "keras_tiny.keras") as checkpoint:
        content = read_content(config, checkpoint.content.hdf5)
        found = make_checkpoint(checkpoint.file, checkpoint.format, content, entries={}, history=())
    safety = judge_safety(found)
    assert (safety.suspicious, safety.unknown) == (("builtins.exec", "os.system"), ())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c["config"]["layers"].append(c["config"]["layers"][1]), CorruptFileError),
        (lambda c: c["config"]["layers"][1].update(name=None, config={}), CorruptFileError),
        (lambda c: c["config"]["output_layers"].__setitem__(1, 7), CorruptFileError),
        (lambda c: c["config"]["layers"].extend([{"name": str(i)} for i in range(100_001)]), UnsafeFileError),
    ],
)  # fmt: skip
def test_contradicting_configurations_are_refused(change: Any, error: type[Exception], interop: Path) -> None:
    config = parse_config(zipfile.ZipFile(interop / "keras_tiny.keras").read("config.json"))
    change(config)
    with pytest.raises(error):
        read_model(config)


def test_layers_are_counted_as_keras_counts_them(interop: Path) -> None:
    """Keras lists the layers of a configuration in the order in which it numbers their weights."""
    for path in sorted(interop.glob("*.keras")):
        with open_checkpoint(path) as checkpoint:
            model = checkpoint.content.model
            nested = [layer.model for layer in model.walk() if layer.model is not None]
            for one in (model, *nested):
                assert order_layers(one) == tuple(layer.name for layer in one.layers), path.name


def test_keras_2_12_counts_layers_with_weights_twice(interop: Path, tmp_path: Path) -> None:
    """The second convolution is ``conv2d_2``: a file that Keras 2.12 wrote, in which b0 to ib2 follow c0 to ic2."""
    path = interop / "keras_2.12_nested_models.keras"
    groups = {"c1": "conv2d_2", "b1": "batch_normalization_2", "seq.ib2": "sequential/{}/batch_normalization_2"}
    container = "_layer_checkpoint_dependencies"
    with h5py.File(weights_of(path)) as file, open_checkpoint(path) as checkpoint:
        for name, group in groups.items():
            place = f"{container}/{group.format(container)}/vars/0"
            assert checkpoint.content.names.places[f"{name}.weight"] == place
            assert place in file
    folded = tmp_path / "folded.keras"
    fold = bntool.fold_checkpoint(path, folded)
    assert {s.module for s in fold.plan.steps if isinstance(s, RemoveModule)} == {"b0", "b1", "seq.ib", "seq.ib2"}
    with h5py.File(weights_of(folded)) as file:
        assert {"conv2d", "conv2d_2", "dense", "dense_2"} <= set(file[container])
        assert not [name for name in file[container] if "batch" in name]
        before, after = _weights(path, "c1", "b1"), np.asarray(file[container]["conv2d_2"]["vars"]["0"])
    scale = before["b1.weight"].astype("f8") / np.sqrt(before["b1.running_var"].astype("f8") + 1e-3)
    assert np.allclose(after, before["c1.weight"].transpose(2, 3, 1, 0) * scale, rtol=1e-6)


def _weights(path: Path, *layers: str) -> dict[str, Any]:
    with open_checkpoint(path) as checkpoint:
        return {
            name: np.asarray(read_numbers(tensor)).reshape(tensor.shape)
            for name, tensor in checkpoint.state_dict("").tensors.items()
            if name.split(".")[0] in layers
        }


def nest(called: list[Any], outputs: list[Any], *, inner: str = "Functional") -> Any:
    """A model that calls another one twice, in the words of the file that Keras writes."""
    inside = {"name": "inner", "layers": [{"class_name": "InputLayer", "name": "i", "config": {"name": "i"}}]}
    ends = {"input_layers": [["i", 0, 0]], "output_layers": [["i", 0, 0]]}
    layers = [
        {"class_name": "InputLayer", "name": "x", "config": {"name": "x"}, "inbound_nodes": []},
        {"class_name": "ReLU", "name": "relu", "config": {}, "inbound_nodes": called[:1]},
        {
            "class_name": inner,
            "name": "inner",
            "config": {**inside, **(ends if inner == "Functional" else {})},
            "inbound_nodes": called[1:3],
        },
        {"class_name": "ReLU", "name": "last", "config": {}, "inbound_nodes": called[3:]},
    ]
    config = {"layers": layers, "input_layers": [["x", 0, 0]], "output_layers": outputs}
    return {"class_name": "Functional", "config": config}


def tensor(name: str, call: int) -> Any:
    history = {"shape": [None, 8], "keras_history": [name, call, 0]}
    return {"args": [{"class_name": "__keras_tensor__", "config": history}], "kwargs": {}}


@pytest.mark.parametrize(
    "config",
    [
        nest(
            [tensor("x", 0), tensor("x", 0), tensor("relu", 0), tensor("inner", 1)], [["inner", 1, 0], ["last", 0, 0]]
        ),
        nest(
            [tensor("x", 0), tensor("x", 0), tensor("relu", 0), tensor("inner", 1)],
            [["inner", 0, 0], ["last", 0, 0]],
            inner="Sequential",
        ),
        nest(
            [[[["x", 0, 0, {}]]], [[["x", 0, 0, {}]]], [[["relu", 0, 0, {}]]], [[["inner", 2, 0, {}]]]],
            [["inner", 1, 0], ["last", 0, 0]],
        ),
        nest(
            [[[["x", 0, 0, {}]]], [[["x", 0, 0, {}]]], [[["relu", 0, 0, {}]]], [[["inner", 2, 0, {}]]]],
            [["inner", 1, 0], ["last", 0, 0]],
            inner="Sequential",
        ),
    ],
    ids=["Functional of Keras 3", "Sequential of Keras 3", "Functional of tf_keras", "Sequential of tf_keras"],
)
def test_calls_of_nested_models_are_counted_as_keras_does(config: Any) -> None:
    """Each file that Keras 3.15 and tf_keras 2.21 write for ``m = inner(x); [m, last(inner(relu(x)))]``."""
    model = read_model(config)
    assert model is not None
    inner, last = (next(one for one in model.layers if one.name == name) for name in ("inner", "last"))
    assert inner.calls == ((("x", 0, 0),), (("relu", 0, 0),))
    assert last.calls == ((("inner", 1, 0),),)
    assert model.outputs == (("inner", 0, 0), ("last", 0, 0))


def test_without_h5py_one_sentence_says_what_to_install(
    interop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert main(["inspect", str(interop / "keras_tiny.keras")]) == 2
    said = capsys.readouterr().err
    assert 'pip install "bntool[keras]"' in said
    assert len(said.strip().splitlines()) == 1


def test_an_hdf5_file_is_only_opened_by_position(interop: Path) -> None:
    with SourceFile(interop / "keras_tiny.h5") as file:
        assert len(read_hdf5(file).datasets) == 27


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process in this way")
def test_a_false_length_of_a_text_allocates_no_gigabyte(fixtures: Path) -> None:
    """Found by mutation: libhdf5 took 1.3 GB for a file of 46 kB before it saw that the length was false."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(CorruptFileError, match="memory allocation failed"):
        open_checkpoint(fixtures / "broken" / "keras_text_of_false_length.h5")
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_folding_twice_gives_the_same_bytes(interop: Path, tmp_path: Path) -> None:
    for seed in ("1", "2", "3"):  # of the order in which Python goes through sets
        subprocess.run(
            [
                sys.executable,
                "-m",
                "bntool",
                "fold",
                str(interop / "keras_tiny.keras"),
                "-o",
                f"{tmp_path}/{seed}.keras",
            ],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def _write_keras_1(path: Path, *, config: bool, suffix: str = "", inside: str = "") -> dict[str, Any]:
    """A file of Keras 1: names joined by an underscore, a variance that is called running_std."""
    rng = np.random.default_rng(0)
    layers = [{"class_name": "BatchNormalization", "config": {"name": "bn_1", "epsilon": 1e-3, "mode": 0, "axis": -1}}]
    model: Any = {"class_name": "Sequential", "config": layers}
    if inside:
        model = {"class_name": "Sequential", "config": [{**model, "name": inside}]}
    values = {f"bn_1_{name}": rng.uniform(1, 2, 6) for name in ("gamma", "beta", "running_mean", "running_std")}
    with h5py.File(path, "w") as file:
        if config:
            file.attrs["model_config"] = json.dumps(model).encode()
            file.attrs["keras_version"] = b"1.2.2"
        root = file.create_group("model_weights") if config else file
        owner = inside or "bn_1"
        root.attrs["layer_names"] = [owner.encode()]
        group = root.create_group(owner)
        group.attrs["weight_names"] = [f"{name}{suffix}".encode() for name in values]
        for name, numbers in values.items():
            group[name + suffix] = numbers.astype("f4")
    return values


@pytest.mark.parametrize("suffix", ["", ":0"])
@pytest.mark.parametrize(("config", "inside"), [(True, ""), (False, ""), (True, "model_1")])
def test_keras_1_calls_its_variance_running_std(config: bool, inside: str, suffix: str, tmp_path: Path) -> None:
    values = _write_keras_1(tmp_path / "a.h5", config=config, suffix=suffix, inside=inside)
    with open_checkpoint(tmp_path / "a.h5") as checkpoint:
        (layer,) = find_batchnorms(checkpoint.state_dict(""))
        found = {role: list(read_numbers(layer.tensors[role])) for role in layer.tensors}
    assert layer.name == (f"{inside}.bn_1" if inside else "bn_1")
    assert layer.eps == (1e-3 if config else None)
    words = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_std"}
    assert found == {role: list(values[f"bn_1_{name}"].astype("f4")) for role, name in words.items()}


@pytest.mark.parametrize("missing", ["running_mean", "running_std"])
def test_half_of_the_statistics_are_not_passed_over(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_keras_1(tmp_path / "a.h5", config=False)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        names = [name for name in np.asarray(file["bn_1"].attrs["weight_names"], "S") if missing.encode() not in name]
        file["bn_1"].attrs["weight_names"] = names
    assert main(["inspect", str(tmp_path / "a.h5"), "--fail-on", "error"]) == ExitCode.FINDINGS
    out = capsys.readouterr().out
    assert "not-understood" in out
    assert "no BatchNorm layer was found" not in out


def test_vectors_of_an_unknown_layer_are_not_passed_over(interop: Path, tmp_path: Path) -> None:
    """Weights alone: a group that is named after no class of Keras, with four vectors of one length."""
    path = tmp_path / "a.weights.h5"
    path.write_bytes((interop / "keras_tiny.weights.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        file.move("layers/batch_normalization", "layers/my_norm")
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.not_understood) == 1
        assert len(find_batchnorms(checkpoint.state_dict(""))) == 4


def test_a_weight_that_is_named_and_not_there_is_said(tmp_path):
    path = tmp_path / "model.h5"
    shutil.copy(INTEROP / "keras_tiny.h5", path)
    with h5py.File(path, "r+") as file:
        del file["model_weights/deconv/deconv/bias"]
    with pytest.raises(CorruptFileError, match="names 'deconv/bias' of layer 'deconv', and does not hold it"):
        open_checkpoint(path)


@pytest.mark.parametrize("backend", ["theano", "tensorflow"])
def test_kernels_of_theano_are_said_to_be_turned(backend: str, interop: Path, tmp_path: Path) -> None:
    """Keras 2 turns them when it loads such a file on another backend."""
    shutil.copy(interop / "tfkeras2_tiny_legacyw.h5", tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        file.attrs["backend"] = backend
    found = bntool.convert(tmp_path / "w.h5", tmp_path / "w.pt", to="torch").plan.assumptions
    assert bool([one for one in found if "Theano" in one]) is (backend == "theano")


# weights that are not those of the configuration


def _edit_weights(path: Path, target: Path, change: Any) -> Path:
    data = io.BytesIO(weights_of(path).getvalue() if path.suffix == ".keras" else path.read_bytes())
    with h5py.File(data, "r+") as file:
        change(file)
    if path.suffix != ".keras":
        target.write_bytes(data.getvalue())
        return target
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, data.getvalue() if name == "model.weights.h5" else old.read(name))
    return target


def _edit_config(path: Path, target: Path, change: Any) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                config = json.loads(data)
                change(config)
                data = json.dumps(config).encode()
            new.writestr(name, data)
    return target


def _quantize(config: Any) -> None:
    (dense,) = [one for one in config["config"]["layers"] if one["class_name"] == "Dense"]
    dense["config"]["dtype"] = {"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8"}}


def _share_convolutions(config: Any) -> None:
    nested = [one for one in config["config"]["layers"] if "layers" in one["config"]]
    for layer in [one for model in nested for one in model["config"]["layers"]]:
        if layer["class_name"] == "Conv2D":
            layer["shared_object_id"] = 7


def _drop_name(file: Any) -> None:
    group = file["model_weights"]
    group.attrs["layer_names"] = [name for name in group.attrs["layer_names"] if name not in (b"bn1", "bn1")]


def _rename(file: Any) -> None:
    group = file["model_weights"]
    group.move("bn1", "bn9")
    group.attrs["layer_names"] = ["bn9" if name in (b"bn1", "bn1") else name for name in group.attrs["layer_names"]]


MOVED: dict[str, tuple[str, Any, str]] = {  # a file, what becomes of its weights, and what is said of that
    "a group under another class": (
        "keras_tiny.keras", lambda f: f.move("layers/conv2d", "layers/dense_9"),
        "layer 'conv1' has 1 variables there, and 0 in the file, which holds 'layers/dense_9/vars/0' of no layer"),
    "a group within another": (
        "keras_tiny.keras", lambda f: f.move("layers/conv2d/vars", "layers/batch_normalization_3/vars/conv2d"),
        "layer 'conv1' has 1 variables there, and 0 in the file"),
    "a copy beside the variables": (
        "keras_tiny.keras", lambda f: f.copy("layers/batch_normalization/vars", "layers/batch_normalization/more"),
        "'layers/batch_normalization/more/0', which belongs to no layer there"),
    "a copy of a layer": (
        "keras_tiny.keras", lambda f: f.copy("layers/conv2d", "layers/conv2d_7"),
        "'layers/conv2d_7/vars/0', which belongs to no layer there"),
    "a copy of a nested layer": (
        "keras_nested_models.keras",
        lambda f: f.copy("layers/sequential/layers/conv2d", "layers/sequential/layers/conv2d_5"),
        "which belongs to no layer there"),
    "a nested model elsewhere": (
        "keras_nested_models.keras", lambda f: f.move("layers/sequential/layers", "layers/input_layer/layers"),
        "0 in the file"),
    "a statistic that is gone": (
        "keras_tiny.keras", lambda f: f.__delitem__("layers/batch_normalization/vars/3"), "3 in the file"),
    "a variable under a gap": (
        "keras_tiny.keras", lambda f: f.move("layers/batch_normalization/vars/3", "layers/batch_normalization/vars/5"),
        "'layers/batch_normalization/vars/5', which belongs to no layer there"),
    "two kernels exchanged": (
        "keras_tiny.keras", lambda f: (f.move("layers/conv2d", "x"), f.move("layers/dense", "layers/conv2d"),
                                       f.move("x", "layers/dense")),
        "there, and"),
    "a layer that is not listed": ("keras_tiny.h5", _drop_name, "layer 'bn1' has 4 variables there, and 0 in the file"),
    "a layer under another name": ("keras_tiny.h5", _rename, "which holds 'bn9' of no layer"),
}  # fmt: skip


@pytest.mark.parametrize("what", MOVED)
def test_weights_of_another_model_are_refused_by_reading(
    what: str, interop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, fact = MOVED[what]
    path = _edit_weights(interop / name, tmp_path / name, change)
    target = tmp_path / f"out{path.suffix}"
    for command in (
        ["inspect", str(path)],
        ["fold", str(path), "--dry-run"],
        ["fold", str(path), "-o", str(target)],
        ["freeze", str(path), "-o", str(target)],
        ["convert", str(path), "--to", "safetensors", "-o", str(target)],
    ):
        assert main(command) == ExitCode.FILE, command
        error = capsys.readouterr().err
        assert "the weights of this file are not those of its configuration" in error
        assert fact in error
    assert not target.exists()


def test_what_a_model_has_beside_its_layers_is_no_fault(interop: Path, tmp_path: Path) -> None:
    """Keras writes a layer that is an attribute of a model beside the container, and does not read it."""
    path = _edit_weights(
        interop / "keras_tiny.keras", tmp_path / "a.keras", lambda f: f.copy("layers/conv2d", "my_attribute")
    )
    with open_checkpoint(path) as checkpoint:
        assert "my_attribute/vars/0" in checkpoint.content.names.places.values()


def test_scales_of_quantized_layers_are_no_fault(interop: Path, tmp_path: Path) -> None:
    """Keras keeps the scales of an int8 kernel after its variables."""
    path = _edit_weights(
        interop / "keras_tiny.keras",
        tmp_path / "a.keras",
        lambda f: f["layers/dense/vars"].create_dataset("2", data=np.ones(7, "f4")),
    )
    with pytest.raises(CorruptFileError, match="no layer"), open_checkpoint(path):
        pass
    with open_checkpoint(_edit_config(path, tmp_path / "b.keras", _quantize)) as checkpoint:
        assert not [layer for layer in checkpoint.not_understood if layer.name == "fc"]


def test_a_layer_that_two_models_share_is_not_folded(interop: Path, tmp_path: Path) -> None:
    """Keras 3 writes the same number for it in both, and its weights once: what it is given differs."""
    whole = interop / "keras_nested_models.keras"
    path = _edit_weights(whole, tmp_path / "a.keras", lambda f: f.__delitem__("layers/functional/layers/conv2d"))
    with pytest.raises(CorruptFileError, match=r"'fun\.c' has 2 variables there, and 0"), open_checkpoint(path):
        pass
    shared = _edit_config(path, tmp_path / "b.keras", _share_convolutions)
    plan = bntool.fold_checkpoint(shared, None, dry_run=True).plan
    skipped = {skip.layer for skip in plan.skips}
    assert skipped >= {"blk.b", "fun.b"}, plan
