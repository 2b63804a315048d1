"""Graphs in files: folded as recorded, where onnxruntime and OpenCV agreed with the original to 1e-5; and torch."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from bntool.batchnorm import NormKind
from bntool.checkpoints.batchnorms import find_norms
from bntool.checkpoints.containers.protobufs.writing import embed, integer_field, packed_integers
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_numbers
from bntool.errors import BntoolError, UsageError
from bntool.graphs.graph import Evidence
from bntool.graphs.sources import read_stored_graph
from tests.fuzz import mutate, time_limit
from tests.graphs.stored.folding import fold_file, freeze_net
from tests.places import INTEROP

FOLDER = INTEROP
RECORDED = {
    (kind, key): facts
    for kind in ("onnx", "caffe")
    for key, facts in json.loads((FOLDER / f"{kind}_folding" / "index.json").read_text()).items()
}


@pytest.mark.parametrize(("kind", "key"), RECORDED)
def test_folds_as_the_runtimes_approved(kind: str, key: str, tmp_path: Path) -> None:
    """Byte for byte the files that onnxruntime and OpenCV ran (tests/oracles/onnx_folding.py, caffe_folding.py)."""
    facts, recorded = RECORDED[kind, key], FOLDER / f"{kind}_folding"
    name, _, layout = key.rpartition(".")
    suffix = {"onnx": ".onnx", "caffe": ".caffemodel"}[kind]
    plan = fold_file(recorded / f"{name}{suffix}", tmp_path / f"{key}{suffix}", layout=layout)
    assert {fold.layer: list(fold.into) for fold in plan.folds} == facts["folds"]
    assert {skip.layer: skip.reason.value for skip in plan.skips} == facts["skips"]
    assert plan.assumptions == ()
    for written in tmp_path.iterdir():
        assert written.read_bytes() == (recorded / written.name).read_bytes(), written.name
    assert facts["error"] <= (4e-3 if name.startswith("half") else 1e-5)


@pytest.mark.parametrize("form", ["policy", "constant"])
def test_freezes_nets_as_the_runtime_approved(form: str, tmp_path: Path) -> None:
    """Byte for byte the files whose outputs OpenCV found to be those of the original."""
    recorded, name = FOLDER / "caffe_folding", f"in_place.{form}.caffemodel"
    freeze_net(recorded / "in_place.caffemodel", tmp_path / name, form=form)
    for written in tmp_path.iterdir():
        assert written.read_bytes() == (recorded / written.name).read_bytes(), written.name
    same = (recorded / "in_place.caffemodel").read_bytes() == (recorded / name).read_bytes()
    assert same is (form == "policy")


def tensors_of(path: Path) -> Mapping[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.state_dict("").tensors
        return {
            n: torch.tensor(list(read_numbers(t)), dtype=torch.float64).reshape(t.shape) for n, t in tensors.items()
        }


@pytest.mark.parametrize("layout", ["std", "eps1e3", "old4d", "double", "nv5_f32", "nv5_f16", "noscale", "sf0"])
@pytest.mark.parametrize("fold", [False, True])
def test_torch_computes_what_caffe_computed(layout: str, fold: bool, tmp_path: Path) -> None:
    """The tensors as bntool reads them, and as it folds them, in PyTorch, against the outputs of the original."""
    source = FOLDER / f"caffe_tiny_{layout}.caffemodel"
    expected = torch.from_numpy(np.load(FOLDER / f"caffe_tiny_{layout}_expected.npy")).double()
    x = torch.from_numpy(np.load(FOLDER / "caffe_tiny_input.npy")).double()
    if fold:
        shutil.copyfile(source, tmp_path / "in.caffemodel")
        plan = fold_file(tmp_path / "in.caffemodel", tmp_path / "out.caffemodel")
        source = tmp_path / "out.caffemodel"
        assert plan.layers == ("bn1",)
    found = tensors_of(source)
    y = functional.conv2d(x, found["conv1.weight"], found.get("conv1.bias"), padding=1)
    if not fold:
        eps = 1e-3 if layout == "eps1e3" else 1e-5
        statistics = found["bn1.running_mean"], found["bn1.running_var"]
        y = functional.batch_norm(y, *statistics, found.get("bn1.weight"), found.get("bn1.bias"), eps=eps)
    error = (y.relu() - expected).abs().max() / expected.abs().max()
    assert error < (2e-3 if layout == "nv5_f16" else 1e-5)


def test_the_graph_of_a_file_is_proof() -> None:
    with open_checkpoint(FOLDER / "onnx_tiny.onnx") as checkpoint:
        graph = read_stored_graph(checkpoint)
        assert graph.evidence is Evidence.STORED
        assert {layer: calls[0].eps for layer, calls in graph.batchnorms.items()} == {
            "bn1": pytest.approx(1e-3),
            "bn2": 1e-5,
        }


def test_a_file_without_a_graph_has_none() -> None:
    with open_checkpoint(FOLDER.parent / "torch_tiny.pth") as checkpoint:
        assert read_stored_graph(checkpoint) is None


@pytest.mark.parametrize("suffix", [".onnx", ".caffemodel"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # signalling NaN in a damaged tensor
def test_damaged_graphs_are_refused_or_folded(suffix: str, tmp_path: Path) -> None:
    rng = random.Random(2)
    seeds = [path.read_bytes() for path in sorted(FOLDER.rglob(f"*{suffix}")) if "ext" not in path.name]
    source = tmp_path / f"mutant{suffix}"
    folded = 0
    for number in range(250):
        source.write_bytes(mutate(rng.choice(seeds), rng, seeds))
        try:
            with time_limit(5):
                folded += bool(fold_file(source, tmp_path / f"{number}{suffix}").folds)
        except BntoolError:
            pass
    assert folded > 10


@pytest.mark.parametrize("switch", [True, False])
def test_a_layer_that_uses_batch_statistics_when_tested_is_left_alone(switch: bool, tmp_path: Path) -> None:
    shutil.copyfile(FOLDER / "caffe_tiny_std.caffemodel", tmp_path / "a.caffemodel")
    text = (FOLDER / "caffe_tiny_std.prototxt").read_text()
    assert "use_global_stats: true" in text
    (tmp_path / "a.prototxt").write_text(
        text.replace("use_global_stats: true", f"use_global_stats: {str(switch).lower()}")
    )
    plan = fold_file(tmp_path / "a.caffemodel", tmp_path / "b.caffemodel")
    assert bool(plan.folds) is switch
    assert [skip.reason.value for skip in plan.skips] == ([] if switch else ["normalises by batch statistics"])


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
def test_folds_the_batchnorm_of_pspnet(layout: str, tmp_path: Path) -> None:
    """A fork's layer with slope, bias, mean and variance, which no runtime at hand has: torch computes both sides."""
    rng = np.random.default_rng(0)
    blobs = [rng.normal(size=(1, 4, 1, 1)) for _ in range(3)] + [rng.uniform(1, 2, size=(1, 4, 1, 1))]
    make_net(tmp_path / "net.caffemodel", {"conv": [rng.normal(size=(4, 3, 1, 1))], "bn": blobs})
    with pytest.raises(UsageError, match="eps is not known"):
        fold_file(tmp_path / "net.caffemodel", tmp_path / "out.caffemodel", layout=layout)
    plan = fold_file(tmp_path / "net.caffemodel", tmp_path / "out.caffemodel", layout=layout, eps=1e-3)
    assert plan.layers == ("bn",)
    before, after = tensors_of(tmp_path / "net.caffemodel"), tensors_of(tmp_path / "out.caffemodel")
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def run(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        y = functional.conv2d(x, state["conv.weight"], state.get("conv.bias"))
        if "bn.running_mean" not in state:
            return y
        roles = (state[f"bn.{role}"].flatten() for role in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(y, *roles, eps=1e-3)

    assert ("bn.running_mean" in after) is (layout == "same-keys")
    assert (run(after) - run(before)).abs().max() < 1e-5 * run(before).abs().max()


def test_the_batchnorm_of_segnet_is_a_scale_and_a_shift(tmp_path: Path) -> None:
    """Its statistics are already part of both blobs: nothing is to be folded, and nothing is shown as a BatchNorm."""
    blobs = [np.full((1, 4, 1, 1), value) for value in (2.0, 3.0)]
    make_net(tmp_path / "net.caffemodel", {"conv": [np.ones((4, 3, 1, 1))], "bn": blobs})
    with open_checkpoint(tmp_path / "net.caffemodel") as checkpoint:
        (norm,) = find_norms(checkpoint.state_dict(""))
        assert norm.kind is NormKind.NORM_WITHOUT_STATISTICS
        assert list(read_numbers(norm.tensors["bias"])) == [3.0] * 4
    assert not fold_file(tmp_path / "net.caffemodel", tmp_path / "out.caffemodel").folds


@pytest.mark.parametrize(("kernel", "options", "is_folded"), [
    (1, "", True), (1, "pad: 1", True), (1, "stride: 2", False), (1, "stride_h: 1 stride_w: 2", False), (2, "", False),
    (3, "pad: 1", False), (2, "stride: 2", False),
])  # fmt: skip
@pytest.mark.parametrize("beside", [True, False])
def test_a_shift_into_a_deconvolution(kernel: int, options: str, is_folded: bool, beside: bool, tmp_path: Path) -> None:
    """By the options of the net beside it, or of the model itself; torch computes both sides."""
    rng = np.random.default_rng(0)
    numbers = {"pad": 3, "stride": 6, "stride_h": 13, "stride_w": 14}
    words = options.replace(":", "").split()
    chosen = {key: int(value) for key, value in zip(words[::2], words[1::2], strict=True)}
    blobs = {
        "bn": [rng.normal(size=3), rng.uniform(1, 2, size=3), np.ones(1)],
        "up": [rng.normal(size=(3, 4, kernel, kernel)), rng.normal(size=4)],
    }
    of_up = [integer_field(1, 4), integer_field(4, kernel), *(integer_field(numbers[k], v) for k, v in chosen.items())]
    more = {"bn": (), "up": embed(106, *of_up)}
    names = {"bn": ("BatchNorm", "data", "bn"), "up": ("Deconvolution", "bn", "up")}
    model, text = b"", 'input: "data"\n'
    for name, (kind, bottom, top) in names.items():
        pieces = [
            *embed(1, name.encode()),
            *embed(2, kind.encode()),
            *embed(3, bottom.encode()),
            *embed(4, top.encode()),
        ]
        for array in blobs[name]:
            pieces += embed(7, *embed(7, packed_integers(1, array.shape)), *embed(5, array.astype("<f4").tobytes()))
        model += b"".join(embed(100, *pieces, *more[name]))
        parameters = f"convolution_param {{ num_output: 4 kernel_size: {kernel} {options} }}" if name == "up" else ""
        text += f'layer {{ name: "{name}" type: "{kind}" bottom: "{bottom}" top: "{top}" {parameters} }}\n'
    (tmp_path / "net.caffemodel").write_bytes(model)
    if beside:
        (tmp_path / "net.prototxt").write_text(text)
    plan = fold_file(tmp_path / "net.caffemodel", tmp_path / "out.caffemodel")
    assert plan.layers == (("bn",) if is_folded else ())
    if not is_folded:
        assert "not all of whose taps meet every position" in plan.skips[0].detail
        return
    before, after = tensors_of(tmp_path / "net.caffemodel"), tensors_of(tmp_path / "out.caffemodel")
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = functional.batch_norm(x, before["bn.running_mean"], before["bn.running_var"], eps=1e-5)
    old, new = (
        functional.conv_transpose2d(data, state["up.weight"], state["up.bias"], padding=chosen.get("pad", 0))
        for data, state in ((expected, before), (x, after))
    )
    assert (new - old).abs().max() < 1e-5 * old.abs().max()


def make_net(path: Path, blobs: Mapping[str, list[np.ndarray]]) -> None:
    """A convolution and a layer of type BN in place behind it."""
    model, text = b"", 'input: "data"\n'
    for (name, arrays), kind, bottom in zip(blobs.items(), ("Convolution", "BN"), ("data", "y"), strict=True):
        pieces = [*embed(1, name.encode()), *embed(2, kind.encode()), *embed(3, bottom.encode()), *embed(4, b"y")]
        for array in arrays:
            pieces += embed(7, *embed(7, packed_integers(1, array.shape)), *embed(5, array.astype("<f4").tobytes()))
        model += b"".join(embed(100, *pieces))
        parameters = "convolution_param { num_output: 4 kernel_size: 1 bias_term: false }" if name == "conv" else ""
        text += f'layer {{ name: "{name}" type: "{kind}" bottom: "{bottom}" top: "y" {parameters} }}\n'
    path.write_bytes(model)
    path.with_suffix(".prototxt").write_text(text)
