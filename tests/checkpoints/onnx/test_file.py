"""ONNX models, without the onnx package; it made the fixtures (tests/oracles/onnx_folding.py)."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.containers.protobufs.writing import embed, integer_field
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.checkpoints.tensors import read_bytes, read_numbers
from bntool.errors import BntoolError, CorruptFileError, RefusedError, UnreadableFileError, UnsafeFileError
from bntool.plan import Operation, Plan, Record, RemoveTensor, SetAttribute, SetTensor, Values
from tests.fuzz import mutate, time_limit
from tests.places import INTEROP

FOLDER = INTEROP
SELF_CONTAINED = sorted(p for p in FOLDER.rglob("*.onnx") if "ext" not in p.name)


def tensor(*, dims: list[int], code: int, fields: list, name: str = "t") -> tuple:
    return (*(integer_field(1, d) for d in dims), integer_field(2, code), *embed(8, name.encode()), *fields)


def model(*initializers: tuple, nodes: list = (), outputs: list = ()) -> bytes:
    graph = [p for i in initializers for p in embed(5, *i)]
    graph += [p for node in nodes for p in embed(1, *node)]
    return b"".join([integer_field(1, 8), *embed(7, *graph), *embed(8, integer_field(2, 17))])


def test_every_batchnormalization_is_a_layer() -> None:
    with open_checkpoint(FOLDER / "onnx_tiny.onnx") as checkpoint:
        state_dict = checkpoint.state_dict("")
        first, second = find_batchnorms(state_dict)
        assert (first.name, first.eps, second.eps) == ("bn1", 1e-3, 1e-5)
        assert first.momentum == pytest.approx(0.1)  # ONNX keeps 0.9 by default
        assert list(first.tensors) == ["weight", "bias", "running_mean", "running_var"]
        assert list(state_dict.tensors)[8:] == ["w", "w2", "b2"]


def test_a_tensor_in_another_file_is_the_same_tensor() -> None:
    with (
        open_checkpoint(FOLDER / "onnx_tiny.onnx") as inside,
        open_checkpoint(FOLDER / "onnx_tiny_ext.onnx") as outside,
    ):
        wanted, found = inside.state_dict("").tensors, outside.state_dict("").tensors
        assert {name: read_bytes(t) for name, t in found.items()} == {name: read_bytes(t) for name, t in wanted.items()}


@pytest.mark.parametrize(
    ("one", "other"),
    [("typed_fields", "constant_nodes"), ("half", "half_in_integers"), ("external", "typed_fields")],
)
def test_where_elements_lie_does_not_matter(one: str, other: str) -> None:
    """The same net, its tensors in raw bytes, in typed fields, in Constant nodes, in another file."""
    folder = FOLDER / "onnx_folding"
    with open_checkpoint(folder / f"{one}.onnx") as first, open_checkpoint(folder / f"{other}.onnx") as second:
        wanted, found = first.state_dict("").tensors, second.state_dict("").tensors
        assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
            n: (t.dtype, t.shape) for n, t in wanted.items()
        }
        if other != "half_in_integers":
            assert {name: read_bytes(t) for name, t in found.items()} == {n: read_bytes(t) for n, t in wanted.items()}


def pack(values: list[int]) -> bytes:
    from bntool.checkpoints.containers.protobufs.writing import varint

    return b"".join(varint(value) for value in values)


@pytest.mark.parametrize(
    ("code", "fields", "expected"),
    [
        (7, [*embed(7, pack([1, -2, 300]))], [1, -2, 300]),
        (7, [integer_field(7, 1), integer_field(7, -2), integer_field(7, 300)], [1, -2, 300]),
        (6, [*embed(5, pack([1, -2, 300]))], [1, -2, 300]),
        (3, [*embed(5, pack([1, -2, 100]))], [1, -2, 100]),
        (2, [*embed(5, pack([1, 2, 255]))], [1, 2, 255]),
        (9, [*embed(5, pack([1, 0, 1]))], [True, False, True]),
        (10, [*embed(5, pack([0x3C00, 0xC000, 0x0001]))], [1.0, -2.0, 2.0**-24]),
        (16, [*embed(5, pack([0x3F80, 0xC000, 0x7F80]))], [1.0, -2.0, float("inf")]),
        (13, [*embed(11, pack([1, 2, (1 << 64) - 1]))], [1, 2, (1 << 64) - 1]),
        (1, [*embed(4, np.array([1, 2], "<f4").tobytes()), *embed(4, np.array([3], "<f4").tobytes())], [1, 2, 3]),
        (11, [*embed(10, np.array([1, 2, 3], "<f8").tobytes())], [1, 2, 3]),
    ],
)
def test_reads_typed_fields(code: int, fields: list, expected: list, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(model(tensor(dims=[3], code=code, fields=fields)))
    with open_checkpoint(tmp_path / "a.onnx") as checkpoint:
        assert list(read_numbers(checkpoint.state_dict("").tensors["t"])) == expected


def test_texts_and_small_integers_are_shown_and_passed_through(tmp_path: Path) -> None:
    texts = tensor(dims=[2], code=8, fields=[*embed(6, b"a"), *embed(6, b"b")], name="texts")
    nibbles = tensor(dims=[2], code=22, fields=[*embed(9, b"\x12")], name="nibbles")
    (tmp_path / "a.onnx").write_bytes(model(texts, nibbles))
    with open_checkpoint(tmp_path / "a.onnx") as checkpoint:
        shown = {name: t.dtype.name for name, t in checkpoint.state_dict("").tensors.items()}
        assert shown == {"texts": "string", "nibbles": "int4"}
        save_checkpoint(checkpoint, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()


@pytest.mark.parametrize("path", SELF_CONTAINED, ids=lambda p: p.name)
def test_copies_what_is_not_edited(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(path.parent, folder, ignore=lambda _, names: [n for n in names if not n.startswith("external")])
    shutil.copyfile(path, folder / path.name)
    with open_checkpoint(folder / path.name) as checkpoint:
        save_checkpoint(checkpoint, tmp_path / path.name)
        if checkpoint.format.single_file:
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()
        with open_checkpoint(tmp_path / path.name) as written:
            assert {n: read_bytes(t) for n, t in written.state_dict("").tensors.items()} == {
                n: read_bytes(t) for n, t in checkpoint.state_dict("").tensors.items()
            }


def test_a_record_is_kept_beside_the_metadata_of_others(tmp_path: Path) -> None:
    source = FOLDER / "onnx_folding" / "opset13.onnx"
    for number, note in enumerate(({"n": 1}, {"n": 2}), start=1):
        checkpoint = open_checkpoint(source)
        source = tmp_path / f"{number}.onnx"
        save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=(Record(note),))), source)
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.records == {"": ({"n": 1}, {"n": 2})}
        assert checkpoint.entries["author"] == "somebody"


def test_a_shared_constant_is_changed_only_for_the_layer_asked_for(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FOLDER / "onnx_folding" / "shared_constants.onnx")
    plan = Plan(Operation.RECALIBRATE, steps=(SetTensor("bn2.running_mean", Values((1.0, 2.0, 3.0, 4.0), (4,))),))
    save_checkpoint(apply_plan(checkpoint, plan), tmp_path / "new.onnx")
    with open_checkpoint(tmp_path / "new.onnx") as written:
        tensors = {name: list(read_numbers(t)) for name, t in written.state_dict("").tensors.items()}
        assert tensors["bn2.running_mean"] == [1.0, 2.0, 3.0, 4.0]
        assert tensors["bn2.bias"] == tensors["bn1.running_mean"] == tensors["zeros"] == [0.0] * 4


def test_what_onnx_cannot_hold_is_refused(tmp_path: Path) -> None:
    for step in (SetAttribute("bn1", "training", value=False), RemoveTensor("w"), RemoveTensor("bn1.weight")):
        checkpoint = open_checkpoint(FOLDER / "onnx_tiny.onnx")
        with pytest.raises(RefusedError):
            save_checkpoint(apply_plan(checkpoint, Plan(Operation.FOLD, steps=(step,))), tmp_path / "new.onnx")
        assert not list(tmp_path.iterdir())


def external(location: str, *, offset: str = "0", length: str = "8") -> tuple:
    entries = {"location": location, "offset": offset, "length": length}
    fields = [p for k, v in entries.items() for p in embed(13, *embed(1, k.encode()), *embed(2, v.encode()))]
    return tensor(dims=[2], code=1, fields=[*fields, integer_field(14, 1)])


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "C:\\secret", "", "link"]
)
def test_data_outside_of_the_folder_are_never_read(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(8))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "a.onnx").write_bytes(model(external(location)))
    with pytest.raises(UnsafeFileError, match="of its folder"):
        open_checkpoint(folder / "a.onnx")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"offset": "4"}, CorruptFileError),
        ({"offset": "-4"}, CorruptFileError),
        ({"length": "4"}, CorruptFileError),
        ({"offset": "many"}, CorruptFileError),
        ({"location": "other"}, UnreadableFileError),
    ],
)
def test_data_that_do_not_fit_are_refused(change: dict, error: type, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(8))
    (tmp_path / "a.onnx").write_bytes(model(external(**{"location": "data", **change})))
    with pytest.raises(error):
        open_checkpoint(tmp_path / "a.onnx")


def test_the_source_of_external_data_is_never_written_to(tmp_path: Path) -> None:
    shutil.copyfile(FOLDER / "onnx_tiny_ext.onnx", tmp_path / "a.onnx")
    shutil.copyfile(FOLDER / "onnx_tiny_ext.data", tmp_path / "onnx_tiny_ext.data")
    checkpoint = open_checkpoint(tmp_path / "a.onnx")
    save_checkpoint(checkpoint, tmp_path / "b.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "b.onnx", "b.onnx.data", "onnx_tiny_ext.data"}
    again = open_checkpoint(tmp_path / "b.onnx")
    with pytest.raises(BntoolError, match="exists"):
        save_checkpoint(open_checkpoint(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    with pytest.raises(BntoolError):
        save_checkpoint(again, tmp_path / "b.onnx", force=True)


def test_a_graph_nested_without_end_is_unsafe(tmp_path: Path) -> None:
    graph: tuple = ()
    for _ in range(60):
        graph = embed(1, *embed(4, b"If"), *embed(5, *embed(1, b"then_branch"), *embed(6, *graph)))
    (tmp_path / "a.onnx").write_bytes(b"".join([integer_field(1, 8), *embed(7, *graph)]))
    with pytest.raises(UnsafeFileError, match="nested"):
        open_checkpoint(tmp_path / "a.onnx")


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    rng = random.Random(7)
    seeds = [
        path.read_bytes()
        for path in SELF_CONTAINED
        if path.stem in ("onnx_tiny", "nested_graphs", "typed_fields", "opset9_inputs")
    ]
    seeds.append((FOLDER / "onnx_tiny_ext.onnx").read_bytes())
    shutil.copyfile(FOLDER / "onnx_tiny_ext.data", tmp_path / "onnx_tiny_ext.data")
    path = tmp_path / "mutant.onnx"
    accepted = 0
    for number in range(400):
        path.write_bytes(mutate(rng.choice(seeds), rng, seeds))
        try:
            with time_limit(5), open_checkpoint(path) as checkpoint:
                for state_dict in checkpoint.state_dicts:
                    find_batchnorms(state_dict)
                    for one in state_dict.tensors.values():
                        if getattr(one, "wrapper", None) is None:
                            read_bytes(one)
                if number % 4 == 0:  # each waits for the disk
                    save_checkpoint(checkpoint, tmp_path / "out.onnx", force=True)
            accepted += 1
        except BntoolError:
            pass
    assert 30 < accepted < 370
