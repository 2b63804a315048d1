"""``.npz`` archives, written by numpy and held against what it loads."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bntool
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_bytes
from bntool.errors import BntoolError, CorruptFileError, RefusedError, UnsafeFileError
from bntool.inspection.safety import SafetyVerdict
from tests.checkpoints.samples import tiny_net


def arrays_of(net: nn.Module) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}


def batchnorm(**names: str) -> dict[str, Any]:
    """Arrays of one layer under other names, each with its own values."""
    values = {role: np.arange(1, 4, dtype="f4") + 10 * place for place, role in enumerate(names)}
    return {name: values[role] for role, name in names.items()}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_layout_is_read_as_numpy_reads_it(save: Any, tmp_path: Path) -> None:
    arrays = {
        "a.weight": np.arange(24.0).reshape(2, 3, 4),
        "b.weight": np.asfortranarray(np.arange(24, dtype="<f4").reshape(2, 3, 4)),
        "c.weight": np.arange(6, dtype=">f4").reshape(2, 3),
        "d.weight": np.asfortranarray(np.arange(6, dtype=">i8").reshape(2, 3)),
        "e.weight": np.array(2.5, dtype="f2"),
        "f.weight": np.empty((3, 0, 2)),
        "g.weight": np.array([True, False]),
        "h.weight": np.array([1 + 2j, 3], dtype="c8"),
    }
    save(tmp_path / "a.npz", **arrays)
    with open_checkpoint(tmp_path / "a.npz") as checkpoint:
        tensors = checkpoint.state_dict("").tensors
        assert list(tensors) == list(arrays)
        for name, array in arrays.items():
            little = array.astype(array.dtype.newbyteorder("<"))
            assert (tensors[name].shape, read_bytes(tensors[name])) == (array.shape, little.tobytes()), name
        assert checkpoint.format.verify_checksums(checkpoint) == len(arrays)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_a_state_dict_fold(save: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)).double()
    with torch.no_grad():
        net(torch.randn(8, 3, 6, 6, dtype=torch.float64))
    save(tmp_path / "net.npz", **arrays_of(net))
    bntool.fold_checkpoint(tmp_path / "net.npz", tmp_path / "folded.npz", pairs={"1": "0"}, eps=1e-5)
    with np.load(tmp_path / "folded.npz") as folded:
        assert list(folded) == ["0.weight", "0.bias", "3.weight", "3.bias"]
        state = {name: torch.from_numpy(folded[name]) for name in folded}
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(4, 5, 1)).double()
    plain.load_state_dict(state)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert torch.allclose(plain(x), net.eval()(x), rtol=1e-12, atol=1e-12)


def test_arrays_of_a_state_dict_are_recalibrated(tmp_path: Path) -> None:
    net = tiny_net()
    np.savez(tmp_path / "net.npz", note=np.array(["a text"]), **arrays_of(net))
    batches = [torch.randn(16, 3, 6, 6) * 3 + 1]
    bntool.recalibrate_checkpoint(tmp_path / "net.npz", tmp_path / "out.npz", model=tiny_net(), data=batches)
    with torch.no_grad():
        seen = net[0](batches[0]).double()
    with np.load(tmp_path / "out.npz") as out, np.load(tmp_path / "net.npz") as old:
        assert list(out) == ["note", *(name for name in old if name != "note")]
        assert np.allclose(out["1.running_mean"], seen.mean((0, 2, 3)), atol=1e-6)
        assert np.array_equal(out["0.weight"], old["0.weight"])
        assert out["note"] == ["a text"]


OTHERS = {
    "keras": batchnorm(weight="bn/gamma:0", bias="bn/beta:0", running_mean="bn/moving_mean:0",
                       running_var="bn/moving_variance:0"),
    "slim": batchnorm(bias="net/conv/bn/beta", running_mean="net/conv/bn/moving_mean",
                      running_var="net/conv/bn/moving_variance"),
    "flax": batchnorm(weight="params/bn/scale", bias="params/bn/bias", running_mean="batch_stats/bn/mean",
                      running_var="batch_stats/bn/var"),
    "haiku": batchnorm(weight="net/~/bn/scale", bias="net/~/bn/offset", running_mean="net/~/bn/~/mean_ema/average",
                       running_var="net/~/bn/~/var_ema/average"),
    "caffe-tensorflow": batchnorm(weight="bn/scale", bias="bn/offset", running_mean="bn/mean",
                                  running_var="bn/variance"),
    "gluon": batchnorm(weight="features.bn.gamma", bias="features.bn.beta", running_mean="features.bn.running_mean",
                       running_var="features.bn.running_var"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_names_of_other_frameworks_are_understood(kind: str, tmp_path: Path) -> None:
    arrays = {**OTHERS[kind], "other/kernel": np.ones((3, 3, 2, 4))}
    np.savez(tmp_path / "a.npz", **arrays)
    found = bntool.inspect(tmp_path / "a.npz").state_dicts[0]
    (layer,) = found.layers
    assert layer.layer.name in ("bn", "net.bn", "net.conv.bn", "features.bn")
    expected = dict(zip(("weight", "bias", "running_mean", "running_var")[-len(OTHERS[kind]) :], OTHERS[kind].values(),
                        strict=True))  # fmt: skip
    for role, values in expected.items():
        assert np.array_equal(getattr(layer.layer, role), values), role
    with pytest.raises(RefusedError, match="names of TensorFlow, Keras or JAX"):
        bntool.fold_checkpoint(tmp_path / "a.npz", tmp_path / "o.npz", pairs={layer.layer.name: "other"}, eps=1e-3)


def test_the_mean_and_variance_of_inputs_are_no_layer(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"inputs/mean": np.ones(3), "inputs/var": np.ones(3)})
    assert bntool.inspect(tmp_path / "a.npz").state_dicts[0].layers == ()


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def test_objects_are_judged_and_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", objects=np.array([{"a": 1}, None], dtype=object), texts=np.array(["x"]))
    np.savez(tmp_path / "code.npz", **arrays_of(tiny_net()), objects=np.array([_Harm()], dtype=object))
    assert bntool.inspect(tmp_path / "data.npz").safety.verdict is SafetyVerdict.HARMLESS
    found = bntool.inspect(tmp_path / "code.npz")
    assert found.safety.verdict is SafetyVerdict.SUSPICIOUS
    assert "numpy.load refuses them" in found.findings[0].message
    assert len(found.state_dicts[0].layers) == 1


def npz(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return stream.getvalue()


def npy(header: str, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header.encode("latin-1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    ("member", "error", "words"),
    [
        (b"", CorruptFileError, "does not begin"),
        (b"\x93NUMPY\x09\x00" + bytes(20), CorruptFileError, "does not begin"),
        (npy("{}"), CorruptFileError, "header of the array is malformed"),
        (npy("(" * 5000), CorruptFileError, "header of the array is malformed"),
        (npy("print(1)"), CorruptFileError, "header of the array is malformed"),
        (npy("{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}", bytes(4)), CorruptFileError, "malformed"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), CorruptFileError, "impossible shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9**99,)}"), CorruptFileError, "malformed"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30},)}}"), CorruptFileError, "impossible"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (100,)}", bytes(8)), CorruptFileError, "400 bytes"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", bytes(8)), CorruptFileError, "4 bytes has 8"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + bytes(20), UnsafeFileError, "header of an array claims"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"\x80\x04\xff"), CorruptFileError, "opcode"),
    ],
)
def test_a_damaged_array_is_an_error_that_names_it(
    member: bytes, error: type[BntoolError], words: str, tmp_path: Path
) -> None:
    (tmp_path / "a.npz").write_bytes(npz(conv=member))
    with pytest.raises(error, match=words) as caught:
        open_checkpoint(tmp_path / "a.npz")
    assert caught.value.tensor == "conv"


def test_of_compressed_arrays_only_the_headers_are_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "a.npz", **{f"{n}.weight": rng.normal(size=100_000) for n in range(3)})
    monkeypatch.setattr("bntool.checkpoints.containers.zips.reading._inflate", lambda *_: pytest.fail("inflated"))
    with open_checkpoint(tmp_path / "a.npz") as checkpoint:
        assert [tensor.shape for tensor in checkpoint.state_dict("").tensors.values()] == [(100_000,)] * 3


def test_numpy_has_no_bfloat16_to_write(tmp_path: Path) -> None:
    from bntool.checkpoints.application import apply_plan
    from bntool.checkpoints.saving import save_checkpoint
    from bntool.plan import AddTensor, Operation, Plan, Values

    np.savez(tmp_path / "a.npz", **arrays_of(tiny_net()))
    steps = (AddTensor("0.bias", Values((1.0,) * 4, (4,)), dtype="bfloat16", after="0.weight"),)
    with open_checkpoint(tmp_path / "a.npz") as checkpoint, pytest.raises(RefusedError, match="numpy has no bfloat16"):
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=steps)), tmp_path / "o.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
