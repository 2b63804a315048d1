"""Files of MXNet, recorded from MXNet (tests/oracles/mxnet_files.py), and changed where they lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

import bntool
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_numbers
from bntool.errors import BntoolError, CorruptFileError, RefusedError, UnsafeFileError
from tests.places import INTEROP

FACTS = json.loads((INTEROP / "mxnet" / "index.json").read_text())


@pytest.mark.parametrize("name", FACTS)
def test_arrays_are_those_that_mxnet_reads(name: str) -> None:
    with open_checkpoint(INTEROP / "mxnet" / name) as checkpoint:
        (state_dict,) = checkpoint.state_dicts
        assert state_dict.renamed.keys() == FACTS[name].keys()
        for old, new in state_dict.renamed.items():
            values, tensor = np.asarray(FACTS[name][old]), state_dict.tensors[new]
            assert tensor.shape == values.shape or not values.size, old
            assert np.allclose(read_numbers(tensor), values.ravel(), rtol=1e-7), old


@pytest.mark.parametrize(("name", "layer"), [("gluon.params", "1"), ("net-0003.params", "net_batchnorm0")])
def test_layers_are_found_under_names_of_gluon_and_of_symbols(name: str, layer: str, tmp_path: Path) -> None:
    (found,) = bntool.inspect(INTEROP / "mxnet" / name).state_dicts[0].layers
    assert (found.layer.name, set(found.layer.tensors)) == (layer, {"weight", "bias", "running_mean", "running_var"})
    assert found.layer.eps is None
    assert found.tensors["running_mean"].maximum > 0.05
    with pytest.raises(RefusedError, match="fix_gamma"):
        bntool.fold_checkpoint(INTEROP / "mxnet" / name, tmp_path / "o.params", pairs={layer: "0"}, eps=1e-5)


HEAD = struct.pack("<QQ", 0x112, 0)
ARRAY = struct.pack("<IiIqiii", 0xF993FAC9, 0, 1, 1, 1, 0, 0) + bytes(4)
NAME = struct.pack("<QQ", 1, 1) + b"a"


def test_older_arrays_are_read(tmp_path: Path) -> None:
    first = struct.pack("<IIiii", 1, 2, 1, 0, 0) + np.array([1, 2], "f4").tobytes()
    second = struct.pack("<IIqiii", 0xF993FAC8, 1, 2, 1, 0, 0) + np.array([3, 4], "f4").tobytes()
    never = struct.pack("<IiI", 0xF993FAC9, 0, 0)
    (tmp_path / "a.params").write_bytes(HEAD + struct.pack("<Q", 3) + first + second + never + struct.pack("<Q", 0))
    with open_checkpoint(tmp_path / "a.params") as checkpoint:
        tensors = checkpoint.state_dict("").tensors
        assert {name: list(read_numbers(tensor)) for name, tensor in tensors.items()} == {"0": [1, 2], "1": [3, 4]}


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (struct.pack("<Q", 1 << 62), UnsafeFileError, "claims to hold 4611686018427387904 arrays"),
        (struct.pack("<Q", 1) + ARRAY, CorruptFileError, "ends at byte"),
        (struct.pack("<Q", 1) + ARRAY + NAME + b"x", CorruptFileError, "1 bytes stand behind"),
        (struct.pack("<Q", 2) + ARRAY + ARRAY + NAME, CorruptFileError, "2 arrays and 1 names"),
        (struct.pack("<Q", 2) + 2 * ARRAY + struct.pack("<Q", 2) + 2 * NAME[8:], CorruptFileError, "one name"),
        (struct.pack("<Q", 1) + ARRAY + struct.pack("<QQ", 1, 1 << 40), UnsafeFileError, "name of an array"),
        (struct.pack("<Q", 1) + ARRAY + NAME[:-1] + b"\xff", CorruptFileError, "no UTF-8"),
        (struct.pack("<QIi", 1, 0xF993FAC9, 1), CorruptFileError, "sparse"),
        (struct.pack("<QIiI", 1, 0xF993FAC9, 0, 65), CorruptFileError, "65 dimensions"),
        (struct.pack("<QIiIq", 1, 0xF993FAC9, 0, 1, -5), CorruptFileError, "impossible shape"),
        (struct.pack("<QIiIqiii", 1, 0xF993FAC9, 0, 1, 1 << 62, 1, 0, 0), CorruptFileError, "beyond the end"),
        (struct.pack("<QIiIqiii", 1, 0xF993FAC9, 0, 1, 1, 1, 0, 99), CorruptFileError, "unknown type: 99"),
        (struct.pack("<QI", 1, 1 << 31), CorruptFileError, "2147483648 dimensions"),
    ],
)
def test_a_lying_file_is_one_error(data: bytes, error: type[BntoolError], words: str, tmp_path: Path) -> None:
    (tmp_path / "a.params").write_bytes(HEAD + data)
    with pytest.raises(error, match=words):
        open_checkpoint(tmp_path / "a.params")
