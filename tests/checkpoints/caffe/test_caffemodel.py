"""Caffe models, held against what made the fixtures: the values, and what Caffe's own reading rules say."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from bntool.batchnorm import EpsSource
from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.containers.protobufs.writing import embed, integer_field, packed_integers
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import StoredTensor, read_bytes, read_numbers
from bntool.errors import BntoolError, CorruptFileError, RefusedError
from bntool.inspection.checkpoint import inspect
from bntool.inspection.verdict import Health
from bntool.plan import AddTensor, Operation, Plan, Record, RemoveTensor, SetTensor, Values
from tests.fuzz import mutate, time_limit
from tests.places import INTEROP

LAYOUTS = ("std", "eps1e3", "old4d", "double", "nv5_f32", "nv5_f16")


@pytest.fixture
def interop(fixtures: Path) -> Path:
    return fixtures / "interop"


def test_every_way_to_store_a_layer_reads_the_same(interop: Path) -> None:
    """One net, written as BVLC's Caffe (now, formerly, in double) and as NVCaffe does."""
    with open_checkpoint(
        interop / "caffe_tiny_old4d.caffemodel"
    ) as checkpoint:  # its scale factor is 1: nothing is divided
        wanted = {name: read_numbers(tensor) for name, tensor in checkpoint.state_dict("").tensors.items()}
    assert list(wanted) == ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"]
    for layout in LAYOUTS:
        with open_checkpoint(interop / f"caffe_tiny_{layout}.caffemodel") as checkpoint:
            tensors = checkpoint.state_dict("").tensors
            assert list(tensors) == list(wanted)
            tolerance = 1e-3 if layout == "nv5_f16" else 1e-6
            for name, tensor in tensors.items():
                assert tensor.shape == ((4, 3, 3, 3) if name == "conv1.weight" else (4,))
                np.testing.assert_allclose(read_numbers(tensor), wanted[name], rtol=tolerance, atol=1e-7)


def test_eps_momentum_and_scale_factor_are_known(interop: Path) -> None:
    for layout, eps in (("std", 1e-5), ("eps1e3", 1e-3)):
        with open_checkpoint(interop / f"caffe_tiny_{layout}.caffemodel") as checkpoint:
            (norm,) = find_batchnorms(checkpoint.state_dict(""))
            assert (norm.name, norm.eps, norm.eps_source, norm.momentum) == ("bn1", eps, EpsSource.MODULE, 0.001)
            assert norm.num_features == 4
            assert norm.attributes["scale_factor"] == pytest.approx(999.98236)
            assert norm.attributes["scale_layer"] == "scale1"


def test_without_a_scale_layer_there_is_no_weight(interop: Path) -> None:
    with open_checkpoint(interop / "caffe_tiny_noscale.caffemodel") as checkpoint:
        (norm,) = find_batchnorms(checkpoint.state_dict(""))
        assert set(norm.tensors) == {"running_mean", "running_var"}


def test_a_scale_factor_of_zero_means_no_statistics_yet(interop: Path) -> None:
    with open_checkpoint(interop / "caffe_tiny_sf0.caffemodel") as checkpoint:
        (norm,) = find_batchnorms(checkpoint.state_dict(""))
        assert list(read_numbers(norm.tensors["running_var"])) == [0.0] * 4  # as Caffe computes: times 0


def test_the_format_before_this_one_is_read(interop: Path) -> None:
    with open_checkpoint(interop / "caffe_v1_conv.caffemodel") as checkpoint:
        state_dict = checkpoint.state_dict("")
        assert list(state_dict.tensors) == ["conv1.weight"]
        assert state_dict.modules["conv1"].class_path == "caffe.Convolution"


def _blob(values: list[float], shape: tuple[int, int, int, int]) -> tuple[bytes, ...]:
    """A BlobProto as all versions wrote it before blobs had any number of dimensions."""
    data = np.asarray(values, "<f4").tobytes()
    return (*(integer_field(number + 1, extent) for number, extent in enumerate(shape)), *embed(5, data))


def _v0(name: bytes, kind: bytes, *blobs: tuple[bytes, ...]) -> tuple[bytes, ...]:
    parts = (*embed(1, name), *embed(2, kind), *(part for blob in blobs for part in embed(50, *blob)))
    return embed(2, *embed(1, *parts))


def test_the_first_version_of_the_format_is_read(tmp_path: Path) -> None:
    """V0LayerParameter: name = 1, type = 2 in words of its own, blobs = 50 (caffe.proto)."""
    layers = (
        *_v0(b"conv1", b"conv", _blob([1, 2, 3, 4], (2, 2, 1, 1)), _blob([5, 6], (1, 1, 1, 2))),
        *_v0(b"relu1", b"relu"),
        *_v0(b"fc", b"innerproduct", _blob([7, 8, 9], (1, 1, 1, 3))),
    )
    (tmp_path / "a.caffemodel").write_bytes(b"".join([*embed(1, b"net"), *layers]))
    with open_checkpoint(tmp_path / "a.caffemodel") as checkpoint:
        state_dict = checkpoint.state_dict("")
        values = {name: list(read_numbers(tensor)) for name, tensor in state_dict.tensors.items()}
        assert values == {"conv1.weight": [1, 2, 3, 4], "conv1.bias": [5, 6], "fc.weight": [7, 8, 9]}
        assert state_dict.tensors["conv1.weight"].shape == (2, 2, 1, 1)
        assert state_dict.modules["fc"].class_path == "caffe.InnerProduct"
        plan = Plan(Operation.FOLD, steps=(SetTensor("conv1.bias", Values((0.5, 0.25), (2,))),))
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "b.caffemodel")
    old, new = (np.asarray(numbers, "<f4").tobytes() for numbers in ([5, 6], [0.5, 0.25]))
    assert (tmp_path / "b.caffemodel").read_bytes() == (tmp_path / "a.caffemodel").read_bytes().replace(old, new)


@pytest.mark.parametrize("layer", [
    _v0(b"out", b"hdf5_output"), embed(2, *embed(4, b"out"), integer_field(5, 10)),
    embed(100, *embed(1, b"out"), *embed(2, b"HDF5Output")),
], ids=["V0", "V1", "present"])  # fmt: skip
def test_layers_that_write_are_seen_in_every_version(layer: tuple[bytes, ...], tmp_path: Path) -> None:
    (tmp_path / "a.caffemodel").write_bytes(b"".join([*embed(1, b"net"), *layer]))
    with open_checkpoint(tmp_path / "a.caffemodel") as checkpoint:
        assert [one.path for one in checkpoint.globals] == ["caffe.HDF5Output"]


def _v1(name: bytes, code: int, *blobs: tuple[bytes, ...]) -> tuple[bytes, ...]:
    parts = (*embed(4, name), integer_field(5, code), *(part for blob in blobs for part in embed(6, *blob)))
    return embed(2, *parts)


def _present(name: bytes, kind: bytes, *blobs: tuple[bytes, ...]) -> tuple[bytes, ...]:
    return embed(100, *embed(1, name), *embed(2, kind), *(part for blob in blobs for part in embed(7, *blob)))


_VECTORS = (_blob([1, 2, 3], (1, 1, 1, 3)), _blob([4, 5, 6], (1, 3, 1, 1)), _blob([1], (1, 1, 1, 1)))
_MATRIX = (_blob([1, 2, 3, 4], (1, 1, 2, 2)), _blob([4, 5], (1, 1, 1, 2)))


@pytest.mark.parametrize(("layer", "said"), [
    (_v1(b"odd", 60, *_VECTORS), "'V1 type 60', which is none of Caffe's own, has 2 vectors of 3 elements"),
    (_v0(b"odd", b"bn", *_VECTORS), "'V0 type bn', which is none of Caffe's own, has 2 vectors of 3 elements"),
    (_present(b"odd", b"SyncBN", *_VECTORS), "'SyncBN', which is none of Caffe's own, has 2 vectors of 3 elements"),
    (_present(b"odd", b"MyBatchNorm", _VECTORS[0]), "'MyBatchNorm', which is none of Caffe's own, has tensors"),
    (_present(b"odd", b"BatchNorm", *_VECTORS[:2]), "'BatchNorm', with other blobs than Caffe's, has 2 vectors of 3"),
    (_v1(b"odd", 39, *_MATRIX), ""), (_v1(b"odd", 34, *_VECTORS), ""), (_v1(b"odd", 60, *_MATRIX), ""),
    (_present(b"odd", b"Scale", *_VECTORS[:2]), ""), (_present(b"odd", b"GroupNorm", *_VECTORS[:2]), ""),
    (_present(b"odd", b"Normalize", _VECTORS[0]), ""), (_present(b"odd", b"BatchNorm", *_VECTORS), ""),
])  # fmt: skip
def test_layers_of_forks_that_may_be_batchnorms_are_said(layer: tuple[bytes, ...], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.caffemodel").write_bytes(b"".join([*embed(1, b"net"), *layer]))
    with open_checkpoint(tmp_path / "a.caffemodel") as checkpoint:
        found = checkpoint.not_understood
        assert [one.name for one in found] == (["odd"] if said else [])
        assert all(one.reason.startswith(f"a layer of type {said}") for one in found)
        inspection = inspect(checkpoint)
        is_batchnorm = bool(list(find_batchnorms(checkpoint.state_dict(""))))
    assert (inspection.verdict.health is Health.NO_BATCH_NORM) is not (bool(said) or is_batchnorm)


def test_layers_of_two_versions_in_one_file_are_refused(tmp_path: Path) -> None:
    """As Caffe does: it would be loaded without one half of them."""
    present = embed(100, *embed(1, b"a"), *embed(2, b"ReLU"))
    (tmp_path / "a.caffemodel").write_bytes(b"".join([*embed(1, b"net"), *present, *_v0(b"b", b"relu")]))
    with pytest.raises(CorruptFileError, match="layers of two versions of the format"):
        open_checkpoint(tmp_path / "a.caffemodel")


def test_plain_blobs_are_not_read_before_they_are_wanted(interop: Path) -> None:
    with open_checkpoint(interop / "caffe_tiny_std.caffemodel") as checkpoint:
        weight = checkpoint.state_dict("").tensors["conv1.weight"]
        assert isinstance(weight, StoredTensor)
        assert weight.storage.source is checkpoint.file


@pytest.mark.parametrize("path", sorted((INTEROP).rglob("*.caffemodel")), ids=lambda p: p.name)
def test_copies_what_is_not_edited(path: Path, tmp_path: Path) -> None:
    save_checkpoint(open_checkpoint(path), tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_new_statistics_get_the_scale_factor_1(interop: Path, tmp_path: Path) -> None:
    source = interop / "caffe_tiny_std.caffemodel"
    checkpoint = open_checkpoint(source)
    old = {name: read_bytes(tensor) for name, tensor in checkpoint.state_dict("").tensors.items()}
    plan = Plan(Operation.RECALIBRATE, steps=(SetTensor("bn1.running_mean", Values((1.0, 2.0, 3.0, 4.0), (4,))),))
    save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "new.caffemodel")
    with open_checkpoint(tmp_path / "new.caffemodel") as written:
        state_dict = written.state_dict("")
        assert list(read_numbers(state_dict.tensors["bn1.running_mean"])) == [1.0, 2.0, 3.0, 4.0]
        assert state_dict.modules["bn1"].attributes["scale_factor"] == 1.0
        others = {name: read_bytes(tensor) for name, tensor in state_dict.tensors.items() if name != "bn1.running_mean"}
        assert others == {name: data for name, data in old.items() if name != "bn1.running_mean"}


def net_with_unknown_fields() -> bytes:
    blob = (*embed(5, np.arange(6, dtype="<f4").tobytes()), *embed(7, packed_integers(1, [2, 3])), integer_field(99, 7))
    layer = (
        *embed(1, b"ip"),
        *embed(2, b"InnerProduct"),
        *embed(500, b"layer"),
        *embed(7, *blob),
        integer_field(501, 3),
    )
    return b"".join([*embed(1, b"net"), *embed(100, *layer), *embed(900, b"net"), b"\xd5\x3e\x00\x00\x80\x3f"])


def test_unknown_fields_survive_beside_an_edit(tmp_path: Path) -> None:
    (tmp_path / "a.caffemodel").write_bytes(net_with_unknown_fields())
    checkpoint = open_checkpoint(tmp_path / "a.caffemodel")
    plan = Plan(Operation.FOLD, steps=(SetTensor("ip.weight", Values((9.0,) * 6, (2, 3))),))
    save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "b.caffemodel")
    expected = net_with_unknown_fields().replace(np.arange(6, dtype="<f4").tobytes(), np.full(6, 9, "<f4").tobytes())
    assert (tmp_path / "b.caffemodel").read_bytes() == expected


def test_what_caffe_cannot_hold_is_refused(interop: Path, tmp_path: Path) -> None:
    for step in (
        Record({"a": 1}),
        RemoveTensor("bn1.running_mean"),
        AddTensor("bn1.extra", Values((1.0,), (1,)), dtype="float32", after="bn1.bias"),
    ):
        checkpoint = open_checkpoint(interop / "caffe_tiny_std.caffemodel")
        with pytest.raises(RefusedError):
            save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=(step,))), tmp_path / "new.caffemodel")
        assert not list(tmp_path.iterdir())


def test_layers_of_one_name_are_told_apart(tmp_path: Path) -> None:
    layer = embed(
        100, *embed(1, b"a"), *embed(2, b"PReLU"), *embed(7, *embed(5, bytes(8)), *embed(7, packed_integers(1, [2])))
    )
    (tmp_path / "a.caffemodel").write_bytes(b"".join([*layer, *layer]))
    with open_checkpoint(tmp_path / "a.caffemodel") as checkpoint:
        assert list(checkpoint.state_dict("").tensors) == ["a.weight", "a@2.weight"]


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        ([*embed(5, bytes(8)), *embed(7, packed_integers(1, [3]))], "do not hold"),
        ([*embed(5, bytes(8)), *embed(7, packed_integers(1, [-2]))], "impossible shape"),
        ([*embed(5, bytes(8)), *embed(7, packed_integers(1, [1 << 62, 4]))], "do not hold"),
        ([*embed(12, bytes(4)), integer_field(10, 9)], "raw_data_type"),
    ],
)
def test_blobs_that_contradict_themselves_are_corrupt(blob: list, words: str, tmp_path: Path) -> None:
    layer = embed(100, *embed(1, b"a"), *embed(2, b"PReLU"), *embed(7, *blob))
    (tmp_path / "a.caffemodel").write_bytes(b"".join(layer))
    with pytest.raises(CorruptFileError, match=words):
        open_checkpoint(tmp_path / "a.caffemodel")


def test_every_truncation_is_refused_or_read(interop: Path, tmp_path: Path) -> None:
    data = (interop / "caffe_tiny_std.caffemodel").read_bytes()
    path = tmp_path / "cut.caffemodel"
    for length in range(1, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(BntoolError):
            open_checkpoint(path)


def test_damaged_files_are_refused_or_read(interop: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    seeds = [path.read_bytes() for path in sorted(interop.glob("*.caffemodel"))]
    path = tmp_path / "mutant.caffemodel"
    accepted = 0
    for number in range(400):
        path.write_bytes(mutate(rng.choice(seeds), rng, seeds))
        try:
            with time_limit(5), open_checkpoint(path) as checkpoint:
                for state_dict in checkpoint.state_dicts:
                    find_batchnorms(state_dict)
                    for tensor in state_dict.tensors.values():
                        read_bytes(tensor)
                if number % 4 == 0:  # each waits for the disk
                    save_checkpoint(checkpoint, tmp_path / "out.caffemodel", force=True)
            accepted += 1
        except BntoolError:
            pass
    assert 30 < accepted < 370
