"""Caffe's HDF5 files, held against the ``.caffemodel`` of the same net."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.caffe.deployment import deploy
from bntool.checkpoints.caffe.hdf5 import name_blobs
from bntool.checkpoints.caffe.prototxt import Prototxt, read_prototxt
from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import read_bytes, read_numbers
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.errors import RefusedError, UnknownFormatError
from bntool.graphs.sources import read_stored_graph
from bntool.plan import Operation, Plan, SetTensor, Values


@pytest.fixture
def interop(fixtures: Path) -> Path:
    return fixtures / "interop"


def net_of(path: Path) -> Prototxt:
    with SourceFile(path) as file:
        return read_prototxt(file)


def open_net(interop: Path) -> Checkpoint:
    net = net_of(interop / "caffe_tiny_std.prototxt")
    return deploy(name_blobs(open_checkpoint(interop / "caffe_tiny_std.caffemodel.h5"), net), net)


def test_the_net_says_what_the_blobs_are(interop: Path) -> None:
    with open_checkpoint(interop / "caffe_tiny_std.caffemodel") as protobuf, open_net(interop) as hdf5:
        wanted, found = protobuf.state_dict("").tensors, hdf5.state_dict("").tensors
        assert list(found) == list(wanted)
        assert {n: read_bytes(t) for n, t in found.items()} == {n: read_bytes(t) for n, t in wanted.items()}
        attributes = hdf5.state_dict("").modules["bn1"].attributes
        assert attributes["scale_factor"] == pytest.approx(999.98236)


def test_without_the_net_blobs_have_numbers_only(interop: Path) -> None:
    with open_checkpoint(interop / "caffe_tiny_std.caffemodel.h5") as checkpoint:
        names = list(checkpoint.state_dict("").tensors)
        assert names == ["bn1.0", "bn1.1", "bn1.2", "conv1.0", "scale1.0", "scale1.1"]
        with pytest.raises(RefusedError, match="--prototxt"):
            read_stored_graph(checkpoint)


@pytest.mark.parametrize("layout", ["folded", "same-keys"])
def test_folds_as_the_protobuf_of_the_same_net(layout: str, interop: Path, tmp_path: Path) -> None:
    """Whose folded outputs OpenCV has approved (tests/oracles/caffe_folding.py)."""
    for suffix in (".caffemodel", ".caffemodel.h5"):
        code = main(
            ["fold", str(interop / f"caffe_tiny_std{suffix}"), "--prototxt", str(interop / "caffe_tiny_std.prototxt"),
             "--layout", layout, "-o", str(tmp_path / f"a{suffix}"), "--force", "--quiet"]
        )  # fmt: skip
        assert code == ExitCode.DONE
    net = net_of(tmp_path / "a.prototxt")
    with open_checkpoint(tmp_path / "a.caffemodel") as one, open_checkpoint(tmp_path / "a.caffemodel.h5") as other:
        wanted, found = one.state_dict("").tensors, name_blobs(other, net).state_dict("").tensors
        assert {n: read_bytes(t) for n, t in found.items()} == {n: read_bytes(t) for n, t in wanted.items()}
    with h5py.File(tmp_path / "a.caffemodel.h5") as file:
        layers = {"conv1", "data", "relu1"} if layout == "folded" else {"bn1", "conv1", "data", "relu1", "scale1"}
        assert set(file["data"]) == layers


def test_new_statistics_get_the_scale_factor_one(interop: Path, tmp_path: Path) -> None:
    with open_net(interop) as checkpoint:
        variance = list(read_numbers(checkpoint.state_dict("").tensors["bn1.running_var"]))
        steps = (SetTensor("bn1.running_mean", Values((1.0, 2.0, 3.0, 4.0), (4,))),)
        edited = apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=steps))
        save_checkpoint(edited, tmp_path / "a.caffemodel.h5")
    with h5py.File(tmp_path / "a.caffemodel.h5") as file:
        assert file["data/bn1/0"][()].tolist() == [1.0, 2.0, 3.0, 4.0]
        assert file["data/bn1/1"][()].tolist() == pytest.approx(variance)
        assert file["data/bn1/2"][()].tolist() == [1.0]


def test_hdf5_files_of_others_are_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data/x"] = np.arange(3)
    with pytest.raises(UnknownFormatError, match="those of Keras and Caffe are read"):
        open_checkpoint(tmp_path / "a.h5")


def test_nothing_is_written_without_the_net(interop: Path, tmp_path: Path) -> None:
    source = interop / "caffe_tiny_std.caffemodel.h5"
    assert main(["fold", str(source), "-o", str(tmp_path / "a.caffemodel.h5")]) == ExitCode.REFUSED
    with open_checkpoint(source) as checkpoint:
        steps = (SetTensor("bn1.2", Values((1.0,), (1,))),)
        with pytest.raises(RefusedError, match="prototxt"):
            save_checkpoint(
                apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=steps)), tmp_path / "a.caffemodel.h5"
            )
    assert list(tmp_path.iterdir()) == []
