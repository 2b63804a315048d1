"""TensorFlow checkpoints, against what TensorFlow read and what the models held (tests/oracles)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.checkpoint import StateDict
from bntool.checkpoints.containers.crc32c import crc32c, unmask
from bntool.checkpoints.containers.leveldb_table import unpack_snappy
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.origin import describe_origin
from bntool.checkpoints.tensors import read_bytes
from bntool.conversion.checkpoint import plan_conversion
from bntool.conversion.options import ConversionTarget
from bntool.errors import CorruptFileError, FileError, RefusedError, UnknownFormatError, UnsafeFileError
from bntool.freezing.checkpoint import plan_freeze
from tests.checkpoints.tensorflow.bundle_files import (
    HEADER,
    field,
    make_block,
    make_entry,
    make_table,
    masked_crc32c,
    varint,
    write_bundle,
)
from tests.places import INTEROP, SAMPLES

RECORDED = INTEROP / "tensorflow"
VALUES: dict[str, dict[str, dict[str, Any]]] = json.loads((RECORDED / "values.json").read_text())
# Keras's words in PyTorch's
TRANSLATED = {
    "kernel": "weight",
    "weights": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def assert_holds(state_dict: StateDict, name: str, *, prefix: str = "") -> None:
    for key, wanted in VALUES[name].items():
        layer, _, role = key.replace("/", ".").rpartition(".")
        full = f"{prefix}{layer}.{TRANSLATED.get(role, role)}" if layer else f"{prefix}{role}"
        tensor = state_dict.tensors[full]
        assert (str(tensor.dtype), list(tensor.shape)) == (wanted["dtype"], wanted["shape"]), full
        assert read_bytes(tensor).hex() == wanted["data"], full


@pytest.mark.parametrize(
    ("name", "prefix"), [("keras2", ""), ("keras3", "net."), ("saved_model", ""), ("exported", "net.")]
)
def test_reads_what_the_model_held(name: str, prefix: str) -> None:
    with open_checkpoint(RECORDED / name) as checkpoint:
        (state_dict,) = checkpoint.state_dicts
        assert_holds(state_dict, name, prefix=prefix)
        assert {norm.name for norm in find_batchnorms(state_dict)} == {f"{prefix}bn", f"{prefix}bare"}
        assert not any("adam" in key.lower() or key.startswith("optimizer") for key in state_dict.tensors)
        assert checkpoint.format.verify_checksums(checkpoint)


@pytest.mark.parametrize("name", ["dtypes", "snappy"])
def test_reads_every_dtype_from_two_shards(name: str) -> None:
    with open_checkpoint(RECORDED / name) as checkpoint:
        assert_holds(checkpoint.state_dict(""), name)
        assert checkpoint.format.verify_checksums(checkpoint) == len(VALUES[name])


def test_reads_names_and_averages_of_tensorflow_1() -> None:
    with open_checkpoint(RECORDED / "named.ckpt") as checkpoint:
        assert [s.key for s in checkpoint.state_dicts] == ["", "ema"]
        model, averaged = checkpoint.state_dicts
        assert_holds(model, "named.ckpt")
        assert set(averaged.tensors) == set(model.tensors) - {"table"}
        assert read_bytes(averaged.tensors["bn.weight"]) != read_bytes(model.tensors["bn.weight"])
        assert model.tensors["table"].wrapper == "partitioned"  # type: ignore[attr-defined]
        assert describe_origin(checkpoint) == "variables by name, no graph, step 3, optimizer state, EMA"


def test_eps_comes_from_the_description_that_keras_2_leaves() -> None:
    with open_checkpoint(RECORDED / "saved_model") as checkpoint:
        found = {norm.name: (norm.eps, norm.momentum) for norm in find_batchnorms(checkpoint.state_dict(""))}
    assert found == {"bn": (0.002, 0.1), "bare": (0.001, 0.01)}
    with open_checkpoint(RECORDED / "keras2") as checkpoint:
        assert {norm.eps for norm in find_batchnorms(checkpoint.state_dict(""))} == {None}


def test_every_way_to_name_a_checkpoint_leads_to_it(tmp_path: Path) -> None:
    for part in RECORDED.glob("keras2.*"):
        shutil.copy(part, tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/keras2"\n')
    names = ["keras2", "keras2.index", "keras2.data-00000-of-00001", ""]
    for path in [*(tmp_path / name for name in names), RECORDED / "saved_model" / "variables"]:
        with open_checkpoint(path) as checkpoint:
            assert "bn.running_mean" in checkpoint.state_dict("").tensors


def test_the_commands_that_write_refuse_by_name(tmp_path: Path) -> None:
    from bntool.cli.main import main
    from bntool.folding.state_dict import fold_state_dict

    with open_checkpoint(RECORDED / "keras2") as checkpoint:
        with pytest.raises(RefusedError, match="without the graph"):
            plan_freeze(checkpoint)
        with pytest.raises(RefusedError, match="without the graph"):
            plan_conversion(checkpoint, ConversionTarget.SAFETENSORS)
        with pytest.raises(RefusedError, match="without the graph"):
            fold_state_dict(checkpoint, checkpoint.state_dict(""), tolerance=1e-5)
    live = ["--model", f"{SAMPLES / 'digits_net.py'}:build", "--data", str(SAMPLES / "digits_train.npz")]
    for command in (["fold"], ["freeze"], ["convert", "--to", "torch"], ["recalibrate", *live]):
        assert main([*command, str(RECORDED / "keras2"), "-o", str(tmp_path / "out")]) == 4
    assert not list(tmp_path.iterdir())


def test_names_fall_back_to_paths_where_variables_share_a_name(tmp_path: Path) -> None:
    """tf.Module calls every variable "Variable"; then the attributes tell them apart."""

    def node(children: dict[str, int], key: str = "") -> bytes:
        content = b"".join(field(1, b"\x08" + varint(c) + field(2, n.encode())) for n, c in children.items())
        value = field(1, b"VARIABLE_VALUE") + field(2, b"Variable") + field(3, key.encode())
        return field(1, content + (field(2, value) if key else b""))

    roles = ("gamma", "beta", "moving_mean", "moving_variance")
    graph = node({"norm": 1}) + node({role: number for number, role in enumerate(roles, start=2)})
    graph += b"".join(node({"loop": 0}, f"key{number}") for number in range(4))
    values: dict[str, tuple[int, tuple[int, ...], bytes]] = {
        f"key{number}": (1, (2,), np.full(2, number + 1, "<f4").tobytes()) for number in range(4)
    }
    text = varint(len(graph)) + masked_crc32c(len(graph).to_bytes(4, "little")) + graph
    path = write_bundle({**values, "_CHECKPOINTABLE_OBJECT_GRAPH": (7, (), text)}, tmp_path / "model")
    with open_checkpoint(path) as checkpoint:
        (norm,) = find_batchnorms(checkpoint.state_dict(""))
        assert norm.name == "norm"
        assert read_bytes(norm.tensors["running_var"]) == np.full(2, 4, "<f4").tobytes()


def test_reads_big_endian_shards(tmp_path: Path) -> None:
    wanted = np.arange(6, dtype="<f4")
    data = wanted.astype(">f4").tobytes()
    (tmp_path / "m.data-00000-of-00001").write_bytes(data)
    block = make_block({b"": HEADER + b"\x10\x01", b"a": make_entry(1, (6,), 0, data)})
    (tmp_path / "m.index").write_bytes(make_table([(b"a", block)]))
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert read_bytes(checkpoint.state_dict("").tensors["a"]) == wanted.tobytes()


def test_checksums_are_those_of_the_standard() -> None:
    """The examples of RFC 3720, section B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    data = np.random.default_rng(0).bytes(70_001)
    assert crc32c(data) == crc32c(data[50_000:], crc32c(data[:50_000]))  # by lanes, and byte by byte
    assert crc32c(data[:777]) == unmask(int.from_bytes(masked_crc32c(data[:777]), "little"))


def test_a_wrong_checksum_shows_when_it_is_asked_for(tmp_path: Path) -> None:
    for part in RECORDED.glob("keras2.*"):
        shutil.copy(part, tmp_path)
    shard = tmp_path / "keras2.data-00000-of-00001"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with open_checkpoint(tmp_path / "keras2") as checkpoint, pytest.raises(CorruptFileError, match="checksum"):
        checkpoint.format.verify_checksums(checkpoint)


def test_unpacks_overlapping_copies_and_long_literals() -> None:
    """Streams written down from Snappy's format description."""
    assert unpack_snappy(b"\x08abc" + b"\x05\x03", 8) == b"abcabcab"
    long = bytes(range(100))
    assert unpack_snappy(b"\xf0\x63" + long + b"\xfe\x64\x00" + b"\x07\x05\x00\x00\x00", 100 + 64 + 2) == (
        long + long[:64] + (long + long[:64])[-5:][:2]
    )
    for broken in (b"\x01\x00", b"\x08ab", b"\x09\x05", b"\xff"):
        with pytest.raises(CorruptFileError):
            unpack_snappy(broken, 8)


def _table(entries: dict[bytes, bytes], **options: Any) -> bytes:
    return make_table([(max(entries), make_block(entries))], **options)


GOOD = make_entry(1, (2,), 0, bytes(8))
BROKEN: dict[str, tuple[bytes, type[FileError], str]] = {
    "no_header": (_table({b"a": GOOD}), UnknownFormatError, "not the index of a TensorFlow checkpoint"),
    "no_footer": (_table({b"": HEADER, b"a": GOOD})[:-1], UnknownFormatError, "truncated"),
    "short": (b"\0\0", UnknownFormatError, "truncated"),
    "many_shards": (_table({b"": b"\x08\xff\xff\x03", b"a": GOOD}), UnsafeFileError, "65535 shards"),
    "missing_shard": (_table({b"": b"\x08\x02", b"a": GOOD}), FileError, "no such file"),
    "no_such_shard": (
        _table({b"": HEADER, b"a": make_entry(1, (2,), 0, bytes(8), shard=7)}),
        CorruptFileError,
        "shard 7, but counts 1",
    ),
    "beyond_the_shard": (_table({b"": HEADER, b"a": make_entry(1, (2,), 5, bytes(8))}), CorruptFileError, "beyond"),
    "huge_offset": (_table({b"": HEADER, b"a": make_entry(1, (2,), 1 << 63, bytes(8))}), CorruptFileError, "beyond"),
    "size_against_shape": (_table({b"": HEADER, b"a": make_entry(1, (3,), 0, bytes(8))}), CorruptFileError, "do not"),
    "negative_extent": (
        _table({b"": HEADER, b"a": make_entry(1, ((1 << 64) - 1,), 0, bytes(8))}),
        CorruptFileError,
        "impossible shape",
    ),
    "endless_varint": (_table({b"": HEADER, b"a": b"\x08" + b"\xff" * 11}), CorruptFileError, "no end"),
    "keys_out_of_order": (
        make_table([(b"b", make_block({b"": HEADER, b"b": GOOD, b"a": GOOD}))]),
        CorruptFileError,
        "not in order",
    ),
    "unknown_compression": (_table({b"": HEADER, b"a": GOOD}, compression=9), CorruptFileError, "unknown way"),
    "cut_block": (make_table([(b"a", b"\1\0")]), CorruptFileError, "cut"),
    "restarts_beyond_the_block": (make_table([(b"a", b"\xff\xff\xff\x7f")]), CorruptFileError, "cut"),
    "shares_more_than_there_is": (
        make_table([(b"a", b"\x05\x01\x00a" + bytes(4) + b"\1\0\0\0")]),
        CorruptFileError,
        "beyond its block",
    ),
    "giant_key": (
        make_table([(b"a", b"\0" + varint(5000) + b"\0" + bytes(5000) + bytes(4) + b"\1\0\0\0")]),
        UnsafeFileError,
        "5000 bytes",
    ),
    "snappy_of_another_length": (_table({b"": HEADER}, compression=1), CorruptFileError, "does not unpack"),
    "snappy_bomb": (make_table([(b"a", varint(1 << 40) + b"\0")], compression=1), UnsafeFileError, "more than"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_index_is_one_error(name: str, tmp_path: Path) -> None:
    index, error, words = BROKEN[name]
    (tmp_path / "m.index").write_bytes(index)
    (tmp_path / "m.data-00000-of-00001").write_bytes(bytes(8))
    with pytest.raises(error, match=words) as caught:
        open_checkpoint(tmp_path / "m")
    assert caught.value.path is not None


def test_a_block_named_many_times_is_not_read_forever(tmp_path: Path) -> None:
    block = make_block({b"": HEADER, b"a": GOOD + field(15, bytes(200_000))})
    first = make_table([(b"a", block)])
    handle = varint(0) + varint(len(block))
    many = make_block({b"%06d" % number: handle for number in range(1000)})
    table = first[: len(block) + 5] + many + b"\0" + masked_crc32c(many + b"\0")
    footer = varint(0) + varint(0) + varint(len(block) + 5) + varint(len(many))
    (tmp_path / "m.index").write_bytes(table + footer.ljust(40, b"\0") + first[-8:])
    with pytest.raises(FileError):
        open_checkpoint(tmp_path / "m.index")


def test_flipped_bits_in_the_index_are_found(tmp_path: Path) -> None:
    for part in RECORDED.glob("keras2.*"):
        shutil.copy(part, tmp_path)
    index = tmp_path / "keras2.index"
    data = bytearray(index.read_bytes())
    data[100] ^= 4
    index.write_bytes(data)
    with pytest.raises(CorruptFileError, match="checksum of the block"):
        open_checkpoint(index)


def test_a_checkpoint_of_version_1_is_named() -> None:
    with pytest.raises(UnknownFormatError, match="version 1"):
        open_checkpoint(RECORDED / "version_1.ckpt")
