"""Weights of Darknet: the network that OpenCV runs (tests/fixtures/interop/darknet) is run from the tensors as read."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import bntool
from bntool.checkpoints.arrays import to_float64
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_bytes
from bntool.cli.exit_codes import ExitCode
from bntool.cli.main import main
from bntool.errors import BntoolError, CorruptFileError, UnknownFormatError, UnsafeFileError
from tests.places import INTEROP

RECORDED = INTEROP / "darknet"


def copy(folder: Path, *, cfg: tuple[str, str] = ("", ""), cut: int = 0, more: bytes = b"") -> Path:
    text = (RECORDED / "tiny.cfg").read_text()
    assert cfg[0] in text
    (folder / "tiny.cfg").write_text(text.replace(*cfg, 1) if cfg[0] else text)
    data = (RECORDED / "tiny.weights").read_bytes()
    (folder / "tiny.weights").write_bytes(data[: len(data) - cut] + more)
    return folder / "tiny.weights"


def test_the_tensors_compute_what_opencv_computes() -> None:
    answer = np.load(RECORDED / "answer.npz")
    with open_checkpoint(RECORDED / "tiny.weights") as checkpoint:
        own = {
            name: torch.from_numpy(to_float64(read_bytes(tensor), tensor.dtype).reshape(tensor.shape))
            for name, tensor in checkpoint.state_dict("").tensors.items()
        }

    def convolve(number: int, value: torch.Tensor, groups: int = 1) -> torch.Tensor:
        weight, norm = own[f"{number}.conv.weight"], f"{number}.bn."
        value = functional.conv2d(
            value, weight, own.get(f"{number}.conv.bias"), padding=weight.shape[-1] // 2, groups=groups
        )
        if norm + "weight" in own:
            roles = ("running_mean", "running_var", "weight", "bias")
            value = functional.leaky_relu(functional.batch_norm(value, *(own[norm + r] for r in roles), eps=1e-6), 0.1)
        return value

    pooled = functional.max_pool2d(convolve(0, torch.from_numpy(answer["inputs"]).double()), 2)
    outputs = convolve(4, torch.cat([convolve(2, pooled, groups=2), pooled], 1))
    assert np.abs(2 * outputs.numpy() - answer["outputs"]).max() < 1e-4 * np.abs(answer["outputs"]).max()


def test_layers_are_found_without_eps() -> None:
    layers = bntool.inspect(RECORDED / "tiny.weights").state_dicts[0].layers
    assert [(one.layer.name, one.layer.num_features, one.layer.eps) for one in layers] == [
        ("0.bn", 6, None),
        ("2.bn", 4, None),
    ]


@pytest.mark.parametrize(("version", "width"), [((0, 1), 4), ((0, 2), 8), ((1000, 0), 4)])
def test_the_header_is_as_long_as_darknet_has_it(version: tuple[int, int], width: int, tmp_path: Path) -> None:
    path = copy(tmp_path)
    path.write_bytes(struct.pack("<iii", *version, 0) + bytes(width) + path.read_bytes()[20:])
    assert len(bntool.inspect(path).state_dicts[0].layers) == 2


@pytest.mark.parametrize(("major", "expected"), [(0, [[0, 1, 2], [3, 4, 5]]), (1001, [[0, 2, 4], [1, 3, 5]])])
def test_linear_layers_are_kept_by_outputs_or_by_inputs(major: int, expected: list, tmp_path: Path) -> None:
    """As ``load_connected_weights`` reads them, which transposes those of versions above 1000."""
    (tmp_path / "a.cfg").write_text("[net]\nheight=1\nwidth=1\nchannels=3\n[connected]\noutput=2\n")
    header = struct.pack("<iii", major, 2, 0) + bytes(4 if major else 8)
    (tmp_path / "a.weights").write_bytes(header + np.array([9, 9, *range(6)], "<f4").tobytes())
    with open_checkpoint(tmp_path / "a.weights") as checkpoint:
        tensor = checkpoint.state_dict("").tensors["0.linear.weight"]
        assert to_float64(read_bytes(tensor), tensor.dtype).reshape(tensor.shape).tolist() == expected


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"cut": 4}, CorruptFileError, "more weights than the file has"),
        ({"more": bytes(4)}, CorruptFileError, "another network"),
        ({"cfg": ("filters=6", "filters=8")}, CorruptFileError, "more weights"),
        ({"cfg": ("filters=6", "filters=-6")}, CorruptFileError, "shape"),
        ({"cfg": ("filters=6", "filters=six")}, CorruptFileError, "no number"),
        ({"cfg": ("filters=6", "filters=99999999999")}, UnsafeFileError, "filters"),
        ({"cfg": ("[maxpool]", "[lstm]")}, CorruptFileError, "lstm"),
        ({"cfg": ("layers=-1,-2", "layers=9")}, CorruptFileError, "come before"),
        ({"cfg": ("groups=2", "groups=0")}, CorruptFileError, "groups"),
        ({"cfg": ("groups=2", "groups=2\nflipped=1")}, CorruptFileError, "flipped"),
        (
            {"cfg": ("[maxpool]", "[shortcut]\nweights_type=per_channel\n[maxpool]")},
            CorruptFileError,
            "per_channel",
        ),
        ({"cfg": ("[net]", "[yolo]")}, CorruptFileError, "begin with"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict, error: type[BntoolError], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        bntool.inspect(copy(tmp_path, **changes))


def test_without_a_cfg_it_is_said_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(RECORDED / "tiny.weights", tmp_path / "other.weights")
    with pytest.raises(UnknownFormatError, match=r"other\.cfg"):
        bntool.inspect(tmp_path / "other.weights")
    assert main(["fold", str(RECORDED / "tiny.weights"), "-o", str(tmp_path / "a.weights")]) == ExitCode.REFUSED
    assert "another program has to make a file of PyTorch or ONNX" in capsys.readouterr().err
