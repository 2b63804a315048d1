"""Numpy arrays where torch.save was given them, judged by torch.load and numpy."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.state_dicts import choose_state_dict
from bntool.checkpoints.tensors import read_bytes, read_numbers
from bntool.errors import CorruptFileError, RefusedError
from bntool.plan import AddTensor, Operation, Plan, Record, RemoveTensor, Scaled, SetTensor, Values
from tests import programs
from tests.checkpoints.foreign import as_arrays
from tests.checkpoints.samples import STATE_DICTS, tiny_net

CASES = [case for case in STATE_DICTS if case != "bfloat16" and "float8" not in case]
LAYOUTS = [(True, 2), (True, 4), (True, 5), (False, 2), (False, 4)]


def _save(root: Any, folder: Path, *, zipped: bool = True, protocol: int = 2) -> Path:
    path = folder / ("model.pt" if zipped else "model.pth")
    torch.save(root, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_numpy_wrote(case: str, zipped: bool, tmp_path: Path) -> None:
    arrays = as_arrays(STATE_DICTS[case]())
    with open_checkpoint(_save({"model": arrays, "epoch": 3}, tmp_path, zipped=zipped)) as checkpoint:
        assert checkpoint.format.name == ("torch-zip" if zipped else "torch-legacy")
        tensors = checkpoint.state_dict("model").tensors
        assert list(tensors) == list(arrays)
        for name, array in arrays.items():
            assert (tensors[name].dtype.name, tensors[name].shape) == (array.dtype.name, array.shape)
            assert read_bytes(tensors[name]) == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize(("zipped", "protocol"), LAYOUTS)
def test_carries_out_a_plan(zipped: bool, protocol: int, tmp_path: Path) -> None:
    root = {"model": as_arrays(tiny_net().state_dict()), "epoch": 3, "history": np.arange(5.0)}
    path = _save(root, tmp_path, zipped=zipped, protocol=protocol)
    steps = (
        SetTensor("0.weight", Scaled("0.weight", (4, 27), (0.5, -2.0, 4.0, 1.0), (4, 1))),
        AddTensor("0.bias", Values((1.0, 2.0, 3.0, 4.0), (4,)), dtype="float32", after="0.weight"),
        SetTensor("1.running_mean", Values((4.0, 3.0, 2.0, 1.0), (4,))),
        SetTensor("1.num_batches_tracked", Values((12,), ())),
        RemoveTensor("1.weight"),
    )
    with open_checkpoint(path) as checkpoint:
        (norm,) = find_batchnorms(choose_state_dict(checkpoint))
        assert norm.name == "1"
        plan = Plan(Operation.FOLD, state_dict="model", steps=steps)
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "new.pt")
    found, expected = _load(tmp_path / "new.pt"), dict(root["model"])
    expected["0.weight"] = expected["0.weight"] * np.array([0.5, -2, 4, 1], "f4").reshape(4, 1, 1, 1)
    expected["0.bias"] = np.array([1, 2, 3, 4], "f4")
    expected["1.running_mean"] = np.array([4, 3, 2, 1], "f4")
    expected["1.num_batches_tracked"] = np.array(12)
    del expected["1.weight"]
    assert (found["epoch"], found["history"].tolist()) == (3, [0, 1, 2, 3, 4])
    assert list(found["model"])[:2] == ["0.weight", "0.bias"]
    assert found["model"].keys() == expected.keys()
    for name, array in expected.items():
        assert isinstance(found["model"][name], np.ndarray)
        assert found["model"][name].dtype == array.dtype
        np.testing.assert_array_equal(found["model"][name], array)


@pytest.mark.parametrize("zipped", [True, False])
def test_layouts_and_byte_orders_stay(zipped: bool, tmp_path: Path) -> None:
    base = np.arange(24, dtype="f4").reshape(4, 6)
    arrays = {"a.weight": np.asfortranarray(base), "b.weight": base.astype(">f8"), "c.weight": base[::2, ::3]}
    path = _save(arrays, tmp_path, zipped=zipped)
    steps = tuple(SetTensor(name, Values(tuple(range(100, 124)), (4, 6))) for name in ("a.weight", "b.weight"))
    with open_checkpoint(path) as checkpoint:
        for name, tensor in checkpoint.state_dict("").tensors.items():
            np.testing.assert_array_equal(np.array(read_numbers(tensor)).reshape(tensor.shape), arrays[name])
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=steps)), tmp_path / "new.pt")
    found, before = _load(tmp_path / "new.pt"), _load(path)
    for name in ("a.weight", "b.weight"):
        assert (found[name].dtype, found[name].strides) == (before[name].dtype, before[name].strides)
        np.testing.assert_array_equal(found[name], base + 100)
    np.testing.assert_array_equal(found["c.weight"], base[::2, ::3])


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_arrays_side_by_side(zipped: bool, tmp_path: Path) -> None:
    state = tiny_net().state_dict()
    state["1.running_mean"] = state["1.running_mean"].numpy()
    path = _save({"net": state, "same": state["1.running_mean"]}, tmp_path, zipped=zipped)
    steps = (
        SetTensor("1.running_mean", Values((1.0, 2.0, 3.0, 4.0), (4,))),  # an array that "same" keeps as it was
        SetTensor("1.running_var", Values((5.0, 6.0, 7.0, 8.0), (4,))),
        Record({"n": 1}),
    )
    with open_checkpoint(path) as checkpoint:
        plan = Plan(Operation.RECALIBRATE, state_dict="net", steps=steps)
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "new.pt")
    found = _load(tmp_path / "new.pt")
    np.testing.assert_array_equal(found["net"]["1.running_mean"], [1, 2, 3, 4])
    np.testing.assert_array_equal(found["same"], state["1.running_mean"])
    assert torch.equal(found["net"]["1.running_var"], torch.tensor([5.0, 6, 7, 8]))
    assert torch.equal(found["net"]["0.weight"], state["0.weight"])
    with open_checkpoint(tmp_path / "new.pt") as written:
        assert written.records == {"net": ({"n": 1},)}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_record_goes_where_there_is_a_place(zipped: bool, tmp_path: Path) -> None:
    path = _save(as_arrays(tiny_net().state_dict()), tmp_path, zipped=zipped)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format.can_record(checkpoint, checkpoint.state_dict("")) is zipped
        edited = apply_plan(checkpoint, Plan(Operation.FREEZE, steps=(Record({"n": 1}),)))
        if not zipped:
            with pytest.raises(RefusedError, match="no place for a record"):
                save_checkpoint(edited, tmp_path / "new.pt")
            return
        save_checkpoint(edited, tmp_path / "new.pt")
    with open_checkpoint(tmp_path / "new.pt") as written:
        assert written.records == {"": ({"n": 1},)}
    assert _load(tmp_path / "new.pt").keys() == tiny_net().state_dict().keys()


@pytest.mark.parametrize(
    ("layout", "keys", "chosen"),
    [
        (lambda sd, arrays: {"weight": np.ones(3), "state_dict": sd}, ["state_dict"], "state_dict"),
        (lambda sd, arrays: {"state_dict": sd, "scaler": {"scale": np.ones(3)}}, ["state_dict"], "state_dict"),
        (lambda sd, arrays: {"state_dict": sd, "ema": arrays}, ["state_dict", "ema"], "state_dict"),
        (lambda sd, arrays: {"bn": {"weight": np.ones(3), "running_var": np.ones(3)}}, ["bn"], "bn"),
        (lambda sd, arrays: [arrays, {"rng": np.arange(4)}], ["0"], "0"),
    ],
)
def test_arrays_that_are_data_are_no_state_dict(layout: Any, keys: list[str], chosen: str, tmp_path: Path) -> None:
    state = tiny_net().state_dict()
    with open_checkpoint(_save(layout(state, as_arrays(state)), tmp_path)) as checkpoint:
        assert [state_dict.key for state_dict in checkpoint.state_dicts] == keys
        assert choose_state_dict(checkpoint).key == chosen


class _Measured(np.ndarray[Any, Any]):
    """A class of its own, whose pickles have a state of their own, as those of units do."""

    def __reduce__(self) -> Any:
        rebuild, arguments, state = super().__reduce__()  # type: ignore[misc]
        return rebuild, arguments, (state, {"unit": "m"})


@pytest.mark.parametrize(
    "value",
    [np.array(["x", "yz"]), np.array([{}, 3], object), np.zeros(2, [("a", "f4")]), np.ones(2).view(_Measured)],
    ids=["texts", "objects", "records", "subclass"],
)
def test_other_arrays_are_passed_over(value: Any, tmp_path: Path) -> None:
    state = {**tiny_net().state_dict(), "odd.weight": value}
    with open_checkpoint(_save(state, tmp_path)) as checkpoint:
        assert list(checkpoint.state_dict("").tensors) == list(tiny_net().state_dict())


def test_a_dtype_that_numpy_has_not_is_refused(tmp_path: Path) -> None:
    path = _save({"a.weight": np.ones(3, "f4")}, tmp_path)
    step = AddTensor("a.bias", Values((1.0,), (1,)), dtype="bfloat16", after="a.weight")
    with open_checkpoint(path) as checkpoint, pytest.raises(RefusedError, match="bfloat16"):
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=(step,))), tmp_path / "new.pt")


def test_an_array_that_is_shorter_than_its_shape_is_corrupt(tmp_path: Path) -> None:
    path = _save({"a.weight": np.zeros(1000, "f4")}, tmp_path, zipped=False)
    path.write_bytes(path.read_bytes().replace(b"M\xe8\x03", b"M\xe7\x03", 1))
    with pytest.raises(CorruptFileError, match="do not fit its shape"):
        open_checkpoint(path)


def test_bytes_that_are_no_bytes_are_corrupt(tmp_path: Path) -> None:
    path = _save({"a.weight": np.full(5, 0x4141, "u2")}, tmp_path, zipped=False)
    path.write_bytes(path.read_bytes().replace(b"X\n\0\0\0AAAAAAAAAA", b"X\x0c\0\0\0AAAAAAAAA\xe2\x82\xac", 1))
    with open_checkpoint(path) as checkpoint, pytest.raises(CorruptFileError, match="bytes of a numpy array"):
        read_bytes(checkpoint.state_dict("").tensors["a.weight"])


def test_a_storage_of_torch_cannot_pass_for_an_array(tmp_path: Path) -> None:
    path = _save({"a.weight": np.ones(3), "b.weight": torch.ones(2)}, tmp_path, zipped=False)
    data = path.read_bytes()
    key = str(torch.load(path, weights_only=False)["b.weight"].untyped_storage()._cdata).encode()
    start = data.index(b"FloatStorage\n")
    length = data[data.index(b"X", start) + 1]
    key = data[data.index(b"X", start) + 5 :][:length]
    path.write_bytes(data.replace(key, b"array 0".ljust(length, b" ")))
    with pytest.raises(CorruptFileError, match="no storage of torch"):
        open_checkpoint(path)


def test_many_arrays_of_one_text_take_the_memory_of_one(tmp_path: Path) -> None:
    """A megabyte of text that a thousand arrays share."""
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"\0" * (1 << 20) + b"q\x01"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"
        b"(K\x01J\0\0\x10\0\x85cnumpy\ndtype\nX\x02\0\0\0u1\x89\x88\x87R\x89c_codecs\nencode\nh\x01X\x06\0\0\0latin1\x86Rtb"
    )
    items = b"".join(b"X\x05\0\0\0" + f"{number:03}.w".encode() + array for number in range(1000))
    path = tmp_path / "many.pkl"
    path.write_bytes(b"\x80\x02" + text + b"0}(" + items + b"u.")
    tracemalloc.start()
    try:
        assert len(open_checkpoint(path).state_dicts[0].tensors) == 1000
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("zipped", [True, False])
def test_reading_imports_no_numpy(zipped: bool, tmp_path: Path) -> None:
    path = _save({"model": as_arrays(tiny_net().state_dict())}, tmp_path, zipped=zipped)
    assert not {"numpy", "torch"} & set(programs.run("reading_numbers", path).stdout.split())
