"""Plain pickles of numpy arrays, judged by pickle and numpy."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.origin import describe_origin
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import read_numbers
from bntool.errors import CorruptFileError, RefusedError
from bntool.plan import AddTensor, Operation, Plan, Record, RemoveTensor, SetTensor, Values
from tests.checkpoints.foreign import as_arrays
from tests.checkpoints.samples import tiny_net

NEW = SetTensor("1.running_mean", Values((1.0, 2.0, 3.0, 4.0), (4,)))


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes texts and bytes as Python 2 wrote its ``str``."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value: Any) -> None:
        data = value.encode("latin-1") if isinstance(value, str) else value
        head = b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + len(data).to_bytes(4, "little")
        self.write(head + data)
        self.memoize(value)

    dispatch[str] = save_string
    dispatch[bytes] = save_string


def _write(root: Any, path: Path, protocol: int) -> Path:
    with path.open("wb") as stream:
        if protocol == 2:
            _Python2Pickler(stream, 2).dump(root)
        else:
            pickle.dump(root, stream, protocol=protocol if protocol > 0 else 2)
    return path


def _detectron2() -> dict[str, Any]:
    """What detectron2's tools/convert-torchvision-to-d2.py pickles."""
    return {"model": as_arrays(tiny_net().state_dict()), "__author__": "torchvision", "matching_heuristics": True}


# -2 is protocol 2 of Python 3, where bytes are texts; 2 is that of Python 2
@pytest.mark.parametrize("protocol", [-2, 2, 3, 4, 5])
def test_values_keys_and_everything_else(protocol: int, tmp_path: Path) -> None:
    path = _write(_detectron2(), tmp_path / "model.pkl", protocol)
    plan = Plan(
        Operation.FOLD,
        state_dict="model",
        steps=(
            NEW,
            AddTensor("0.bias", Values((1.0, 2.0, 3.0, 4.0), (4,)), dtype="float32", after="0.weight"),
            RemoveTensor("1.weight"),
        ),
    )
    with open_checkpoint(path) as checkpoint:
        assert describe_origin(checkpoint) == "detectron2 model zoo"
        assert [norm.name for norm in find_batchnorms(checkpoint.state_dict("model"))] == ["1"]
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "new.pkl")
    found = pickle.loads((tmp_path / "new.pkl").read_bytes(), encoding="latin1")
    expected = _detectron2()
    expected["model"]["1.running_mean"] = np.array([1, 2, 3, 4], "f4")
    expected["model"]["0.bias"] = np.array([1, 2, 3, 4], "f4")
    del expected["model"]["1.weight"]
    assert {key: found[key] for key in found if key != "model"} == {k: expected[k] for k in expected if k != "model"}
    assert list(found["model"])[:2] == ["0.weight", "0.bias"]
    assert found["model"].keys() == expected["model"].keys()
    for key, array in expected["model"].items():
        assert found["model"][key].dtype == array.dtype
        np.testing.assert_array_equal(found["model"][key], array)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_layouts_and_byte_orders(protocol: int, tmp_path: Path) -> None:
    base = np.arange(24, dtype="f4").reshape(4, 6)
    arrays = {
        "a.weight": np.asfortranarray(base),
        "b.weight": base.astype(">f8"),
        "c.weight": base[::2, ::3],
        "d.weight": np.array(3, "i8"),
        "e.weight": np.arange(50_000, dtype="f4"),
        "f.texts": np.array(["x", "yz"]),
        "g.weight": np.zeros((0, 3), "f2"),
    }
    path = _write(arrays, tmp_path / "model.pickle", protocol)
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.state_dict("").tensors
        assert "f.texts" not in tensors
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(np.array(read_numbers(tensor)).reshape(tensor.shape), arrays[name])
        steps = tuple(SetTensor(n, Values(tuple(range(100, 124)), (4, 6))) for n in ("a.weight", "b.weight"))
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.RECALIBRATE, steps=steps)), tmp_path / "new.pkl")
    found = pickle.loads((tmp_path / "new.pkl").read_bytes(), encoding="latin1")
    before = pickle.loads(path.read_bytes(), encoding="latin1")
    for name in ("a.weight", "b.weight"):
        assert (found[name].dtype, found[name].strides) == (before[name].dtype, before[name].strides)
        np.testing.assert_array_equal(found[name], base + 100)
    np.testing.assert_array_equal(found["e.weight"], arrays["e.weight"])


def test_caffe2_names_become_those_of_pytorch(tmp_path: Path) -> None:
    blobs = {f"res_conv1_bn_{ending}": np.ones(3, "f4") for ending in ("s", "b", "rm", "riv")}
    path = _write({"blobs": {"conv1_w": np.zeros((3, 1, 1, 1), "f4"), **blobs}}, tmp_path / "R-50.pkl", 2)
    step = SetTensor("res_conv1_bn.running_var", Values((4.0, 5.0, 6.0), (3,)))
    with open_checkpoint(path) as checkpoint:
        (norm,) = find_batchnorms(checkpoint.state_dict("blobs"))
        assert (norm.name, set(norm.tensors)) == (
            "res_conv1_bn",
            {"weight", "bias", "running_mean", "running_var"},
        )
        plan = Plan(Operation.RECALIBRATE, state_dict="blobs", steps=(step,))
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "new.pkl")
        gone = Plan(Operation.FOLD, state_dict="blobs", steps=(RemoveTensor("res_conv1_bn.weight"),))
        with pytest.raises(RefusedError, match="Caffe2"):
            save_checkpoint(apply_plan(checkpoint, gone), tmp_path / "gone.pkl")
    found = pickle.loads((tmp_path / "new.pkl").read_bytes(), encoding="latin1")["blobs"]
    np.testing.assert_array_equal(found["res_conv1_bn_riv"], [4, 5, 6])
    np.testing.assert_array_equal(found["res_conv1_bn_rm"], [1, 1, 1])


def test_a_record_is_refused(tmp_path: Path) -> None:
    path = _write(_detectron2(), tmp_path / "model.pkl", 4)
    plan = Plan(Operation.FREEZE, state_dict="model", steps=(Record({"n": 1}),))
    with open_checkpoint(path) as checkpoint, pytest.raises(RefusedError, match="no place for a record"):
        save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "new.pkl")


def test_an_array_that_is_shorter_than_its_shape_is_corrupt(tmp_path: Path) -> None:
    data = pickle.dumps({"a.weight": np.zeros(1000, "f4")}, protocol=4)
    (tmp_path / "model.pkl").write_bytes(data.replace((1000).to_bytes(2, "little"), (999).to_bytes(2, "little"), 1))
    with pytest.raises(CorruptFileError, match="do not fit its shape"):
        open_checkpoint(tmp_path / "model.pkl")


def test_an_array_that_was_shared_gets_bytes_of_its_own(tmp_path: Path) -> None:
    shared = torch.arange(4.0).numpy()
    path = _write({"a.weight": shared, "b.weight": shared}, tmp_path / "model.pkl", 4)
    steps = (SetTensor("a.weight", Values((9.0, 8.0, 7.0, 6.0), (4,))),)
    with open_checkpoint(path) as checkpoint:
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=steps)), tmp_path / "new.pkl")
    found = pickle.loads((tmp_path / "new.pkl").read_bytes())
    assert (found["a.weight"].tolist(), found["b.weight"].tolist()) == ([9, 8, 7, 6], [0, 1, 2, 3])
