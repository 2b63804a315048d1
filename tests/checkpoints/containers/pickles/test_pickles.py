"""Reading pickles into nodes and writing nodes back; the oracle is pickle itself."""

from __future__ import annotations

import array
import collections
import copy
import datetime as dt
import decimal
import gc
import io
import pickle
import pickletools
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bntool.checkpoints.containers.pickles.machine import INLINE_BYTES
from bntool.checkpoints.containers.pickles.nodes import (
    ByteString,
    Construction,
    Dict,
    Global,
    Instance,
    LongBytes,
    PersistentId,
    Set,
    Update,
    as_mapping,
    children,
    is_mapping,
    iterate_pairs,
    text_of,
)
from bntool.checkpoints.containers.pickles.reading import read_pickle, read_pickle_bytes
from bntool.checkpoints.containers.pickles.trust import judge_global, list_globals
from bntool.checkpoints.containers.pickles.writing import write_pickle
from bntool.checkpoints.files import MemorySource
from bntool.errors import CorruptFileError, RefusedError

PROTOCOLS = range(6)


def _emit(root: Any, protocol: int, replacements: Any = None) -> bytes:
    parts: list[bytes] = []
    write_pickle(parts.append, root, protocol=protocol, replacements=replacements)
    return b"".join(parts)


def _through(value: Any, protocol: int) -> Any:
    """Pickled, read symbolically, written, unpickled."""
    data = pickle.dumps(value, protocol)
    read = read_pickle_bytes(data)
    assert read.end == len(data)
    return pickle.loads(_emit(read.root, read.protocol))


class Point:
    def __init__(self, x: Any, y: Any = None) -> None:
        self.x, self.y = x, y

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Keywords(tuple):
    __slots__ = ()

    def __new__(cls, *, items: Any = ()) -> Any:
        return tuple.__new__(cls, items)

    def __getnewargs_ex__(self) -> Any:
        return (), {"items": tuple(self)}


class Listing(list):  # type: ignore[type-arg]
    """Reduced with list items and a state."""


class Slots:
    __slots__ = ("a", "b")


def _hashable() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(max_size=8),
        st.binary(max_size=8),
        st.sampled_from(
            ["", "a", "é", "x" * 300, b"y" * 300, 2**31, -(2**31), 2**2100, -(2**2100), 255, 256, 65535, 65536]
        ),
        st.tuples(st.integers(), st.text(max_size=2)),
        st.frozensets(st.integers(), max_size=3),
        st.dates(),
        st.decimals(allow_nan=False),
    )


VALUES = st.recursive(
    _hashable(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(_hashable(), inner, max_size=5),
        st.tuples(inner),
        st.tuples(inner, inner),
        st.tuples(inner, inner, inner, inner),
        st.sets(st.integers(), max_size=4),
        st.builds(Point, inner, inner),
        st.builds(collections.OrderedDict, st.lists(st.tuples(st.text(max_size=3), inner), max_size=4)),
        st.builds(lambda x: [x, x, (x, x)], inner),
        st.builds(lambda x: Keywords(items=(x,)), inner),
        st.builds(lambda x: Listing([x, x]), inner),
        st.builds(lambda x: collections.deque([x]), inner),
        st.builds(bytearray, st.binary(max_size=300)),
        st.builds(lambda x: collections.defaultdict(list, {"k": x}), inner),
    ),
    max_leaves=15,
)


@settings(max_examples=150)
@given(VALUES, st.sampled_from(PROTOCOLS))
def test_any_data_survives(value: Any, protocol: int) -> None:
    assert _through(value, protocol) == value


@settings(max_examples=100)
@given(VALUES, st.sampled_from([2, 3]))
def test_emission_is_that_of_cpython(value: Any, protocol: int) -> None:
    """Byte for byte, but for strings of one character: CPython holds each of those once, and so do we on reading."""
    pickler = pickle._Pickler  # type: ignore[attr-defined]  # the C one leaves out PUTs of what nobody refers to
    buffer = io.BytesIO()
    pickler(buffer, protocol).dump(value)
    emitted = _emit(read_pickle_bytes(buffer.getvalue()).root, protocol)
    assert _opcodes(emitted) == _opcodes(buffer.getvalue())


def _opcodes(data: bytes) -> list[Any]:
    """The opcodes with memo indices, short strings and repeated globals taken out of the comparison.

    Python 3.13 names the class of ``partial(cls.__new__, cls)`` twice, others refer to the first.
    """
    simple = []
    memo: dict[int, Any] = {}
    named: set[str] = set()
    last: Any = None
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
            continue
        if opcode.name in ("BINGET", "LONG_BINGET"):
            short = memo[argument]
            last = short if short is not None and len(short[1]) < 2 else ("GET", "")
        elif opcode.name == "GLOBAL" and argument in named:
            last = ("GET", "")
        else:
            last = (opcode.name, argument) if isinstance(argument, str | bytes) else None
            named |= {argument} if opcode.name == "GLOBAL" else set()
        simple.append(last or (opcode.name, argument))
    return simple


def test_an_untouched_state_dict_is_emitted_byte_for_byte() -> None:
    import torch

    from tests.checkpoints.samples import tiny_net

    for protocol in (2, 3):
        buffer = io.BytesIO()
        pickler = pickle._Pickler(buffer, protocol)  # type: ignore[attr-defined]
        pickler.persistent_id = lambda o: (
            ("storage", o.dtype, "0", "cpu", 1) if isinstance(o, torch.storage.TypedStorage) else None
        )
        pickler.dump(tiny_net().state_dict())
        assert _emit(read_pickle_bytes(buffer.getvalue()).root, protocol) == buffer.getvalue()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_identity_and_cycles_survive(protocol: int) -> None:
    shared: list[Any] = [1]
    value: dict[str, Any] = {"a": shared, "b": shared, "t": (shared,), "s": {1}}
    value["self"] = value
    shared.append(value)
    found = _through(value, protocol)
    assert found["self"] is found
    assert found["a"] is found["b"] is found["t"][0]
    assert found["a"][1] is found


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
def test_recursive_tuples_survive(protocol: int, length: int) -> None:
    inner: list[Any] = []
    value = (inner, *range(length - 1))
    inner.append(value)
    found = _through(value, protocol)
    assert found[0][0] is found
    assert found[1:] == value[1:]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_recursive_objects_survive(protocol: int) -> None:
    point = Point(1)
    point.y = [point, {"p": point}]
    found = _through(point, protocol)
    assert found.y[0] is found
    assert found.y[1]["p"] is found
    if protocol < 2:
        return  # pickle itself cannot write the next
    holder = Listing()
    holder.append(holder)
    again = _through(holder, protocol)
    assert again[0] is again


@pytest.mark.parametrize("protocol", [4, 5])
def test_recursive_frozensets_survive(protocol: int) -> None:
    class_ = _Hashed
    member = class_()
    member.owner = frozenset([member])
    found = _through(member.owner, protocol)
    (inner,) = found
    assert inner.owner is found


class _Hashed:
    owner: Any

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 2500])
def test_batches(protocol: int, count: int) -> None:
    value = [
        list(range(count)),
        dict.fromkeys(range(count)),
        set(range(count)),
        tuple(range(count)),
        Listing(range(count)),
    ]
    assert _through(value, protocol) == value


def test_more_things_that_reduce() -> None:
    slots = Slots()
    slots.a = 1
    values: list[Any] = [
        dt.datetime(2020, 1, 2, 3, tzinfo=dt.timezone.utc),
        decimal.Decimal("1.5"),
        Path("/x/y"),
        range(3),
        array.array("d", [1, 2]),
        collections.Counter("aab"),
        complex(1, 2),
        slice(1, 2),
        Ellipsis,
        NotImplemented,
        int,
        collections.OrderedDict,
        1 << 70,
        -1,
        float("inf"),
        b"",
        "",
        (),
        [],
        {},
        set(),
        frozenset(),
        "\ud800",
    ]
    for protocol in range(2, 6):
        assert _through(values, protocol) == values
        assert _through(slots, protocol).a == 1


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_long_bytes_stay_in_the_file_until_they_are_written(protocol: int) -> None:
    value = {"b": bytes(INLINE_BYTES + 1), "a": bytearray(2 * INLINE_BYTES), "after": 1}
    root = read_pickle_bytes(pickle.dumps(value, protocol)).root
    assert isinstance(as_mapping(root)["b"], LongBytes)
    assert isinstance(as_mapping(root)["a"], LongBytes) == (protocol == 5)
    assert _through(value, protocol) == value


def test_long_texts_cross_the_window() -> None:
    value = {f"{'k' * 50_000}{i}": "v" * 70_000 for i in range(5)}
    assert _through(value, 4) == value


def test_streams_that_follow_one_another() -> None:
    data = pickle.dumps([1], 2) + pickle.dumps({"a": 2}, 4) + b"rest"
    first = read_pickle(MemorySource(data))
    second = read_pickle(MemorySource(data), offset=first.end)
    assert (first.start, first.root, second.start, second.protocol) == (0, [1], first.end, 4)
    assert list(iterate_pairs(second.root)) == [("a", 2)]
    assert data[second.end :] == b"rest"


# Python 2


@pytest.mark.parametrize(
    "text", [r"'plain'", r"'it\'s'", '"double"', r"'\x00\xff\n\r\t\\'", r"'\101\7'", r"'\q'", r"''", r"'\v\a\b\f'"]
)
@pytest.mark.filterwarnings("ignore:invalid escape")
def test_strings_of_python_2(text: str) -> None:
    data = b"S" + text.encode() + b"\n."
    expected = pickle.loads(data, encoding="bytes")
    root = read_pickle_bytes(data).root
    assert isinstance(root, ByteString)
    assert root == expected
    assert pickle.loads(_emit(root, 2), encoding="bytes") == expected


@pytest.mark.parametrize("text", ["'a' ", "'a", "a'", "'", "", "'a\"", "a"])
def test_strings_that_are_not_quoted(text: str) -> None:
    with pytest.raises(CorruptFileError, match="not quoted"):
        read_pickle_bytes(b"S" + text.encode() + b"\n.")


def test_short_and_long_strings_of_python_2() -> None:
    for data in (b"U\x03abc.", b"T\x03\x00\x00\x00abc.", b"T\x00\x02\x00\x00" + b"x" * 512 + b"."):
        root = read_pickle_bytes(data).root
        assert text_of(root) == pickle.loads(data)
        assert pickle.loads(_emit(root, 2)) == pickle.loads(data)
    long = b"T" + struct.pack("<i", INLINE_BYTES + 1) + b"x" * (INLINE_BYTES + 1) + b"."
    assert pickle.loads(_emit(read_pickle_bytes(long).root, 2)) == pickle.loads(long)


def test_old_style_instances() -> None:
    name = f"{__name__}\nPoint\n".encode()
    for data in (b"(I1\nI2\ni" + name + b".", b"(c" + name + b"I1\nI2\no.", b"(c" + name + b"I1\nI2\no}S'z'\nI3\nsb."):
        root = read_pickle_bytes(data).root
        assert isinstance(root, Instance)
        assert root.construction is Construction.OBJECT
        assert pickle.loads(_emit(root, 2)) == pickle.loads(data)


def test_text_opcodes_of_protocol_0() -> None:
    data = b"(I01\nI00\nI-7\nL12345678901234567890L\nF1.5\nVu\\u00e9\\u20ac\nNlp0\n0(dVk\ng0\nsp5\n."
    assert _same(read_pickle_bytes(data).root, pickle.loads(data))


def _same(node: Any, value: Any) -> bool:
    return bool(pickle.loads(_emit(node, 2)) == value)


# nothing is imported or called


class _Canary:
    sung = False

    def __reduce__(self) -> Any:
        return _sing, ()


def _sing() -> str:
    _Canary.sung = True
    return "song"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_called_on_reading_or_writing(protocol: int) -> None:
    data = pickle.dumps([_Canary()], protocol)
    before = set(sys.modules)
    read = read_pickle_bytes(data)
    _emit(read.root, protocol)
    read_pickle_bytes(b"cantigravity\ngeohash\n(cthis\ns\ntR.")
    assert not _Canary.sung
    assert set(sys.modules) == before
    assert [(g.path, g.called) for g in list_globals(read)] == [(f"{__name__}._sing", True)]
    pickle.loads(data)
    assert _Canary.sung
    _Canary.sung = False


def test_what_would_be_called_and_what_only_imported() -> None:
    read = read_pickle_bytes(pickle.dumps([collections.OrderedDict(), str, Point(1), print], 3))
    names = {(g.path, g.called) for g in list_globals(read)}
    assert names == {
        ("collections.OrderedDict", True),
        ("builtins.str", False),
        (f"{__name__}.Point", True),
        ("builtins.print", False),
    }


@pytest.mark.parametrize(
    ("path", "trust"),
    [
        ("collections.OrderedDict", "known"),
        ("torch._utils._rebuild_tensor_v2", "known"),
        ("torch.FloatStorage", "known"),
        ("torch.float32", "known"),
        ("torch.nn.modules.conv.Conv2d", "known"),
        ("builtins.set", "known"),
        ("builtins.eval", "suspicious"),
        ("builtins.getattr", "suspicious"),
        ("os.system", "suspicious"),
        ("posix.system", "suspicious"),
        ("subprocess.Popen", "suspicious"),
        ("torch.load", "suspicious"),
        ("numpy.load", "suspicious"),
        ("builtins.whatever", "suspicious"),
        ("os.path.join", "suspicious"),
        ("torch.serialization.os.system", "suspicious"),
        ("fastai.imports.subprocess.Popen", "suspicious"),
        ("collections.abc.sys.modules", "suspicious"),
        ("mymodel.Net", "unknown"),
        ("torch.nn.modules.conv._ConvNd.forward", "unknown"),
        ("", "unknown"),
        ("torch.nn.modules.module.register_module_forward_hook", "unknown"),
    ],
)
def test_globals_are_judged_by_name(path: str, trust: str) -> None:
    assert judge_global(path).value == trust


def test_a_global_with_a_line_break_does_not_become_opcodes() -> None:
    for module, name in (("a\nb", "c"), ("collections", "x\ncos\nsystem\n"), ("\ud800", "x"), ("a", "b\r")):
        for protocol in (2, 4):
            again = read_pickle_bytes(_emit([Global(module, name)], protocol))
            (found,) = again.root
            assert (found.module, found.name) == (module, name)
            assert len(again.referenced) == 1


# replacing


def test_replacements_take_the_place_of_nodes_everywhere() -> None:
    shared = {"x": 1}
    root = read_pickle_bytes(pickle.dumps([shared, shared, (shared,)], 2)).root
    found = pickle.loads(_emit(root, 2, {id(root[0]): Dict([("y", 2)])}))
    assert found == [{"y": 2}, {"y": 2}, ({"y": 2},)]
    assert found[0] is found[1] is found[2][0]


def test_an_instance_inside_its_own_arguments_is_refused() -> None:
    arguments: list[Any] = []
    instance = Instance(Global("a", "b"), (arguments,), construction=Construction.REDUCE)
    arguments.append(instance)
    with pytest.raises(RefusedError, match="argument of its own construction"):
        _emit(instance, 2)


def test_a_stranger_among_the_nodes_is_our_own_mistake() -> None:
    with pytest.raises(TypeError, match="no node"):
        _emit([object()], 2)


# nodes


def test_nodes_as_mappings() -> None:
    root = read_pickle_bytes(pickle.dumps(collections.OrderedDict([("a", 1), (2, "b")]), 2)).root
    assert is_mapping(root)
    assert as_mapping(root) == {"a": 1}
    assert list(iterate_pairs(root)) == [("a", 1), (2, "b")]
    assert is_mapping(read_pickle_bytes(pickle.dumps(collections.OrderedDict(), 2)).root)
    assert not is_mapping([])
    assert as_mapping(3) == {}
    assert as_mapping(Dict([("k", 1), (ByteString(b"k"), 2)])) == {"k": 2}
    node = Instance(Global("m", "n"), (1,), construction=Construction.NEW, keywords=None)
    node.updates = [(Update.ITEMS, [("k", 2)]), (Update.APPENDS, [3]), (Update.STATE, 4), (Update.ADDITIONS, [5])]
    assert [c for c in children(node) if isinstance(c, int | str)] == ["k", 2, 3, 4, 5]
    assert node.state == 4
    assert list(children(PersistentId(7))) == [7]
    assert list(children(Set([8]))) == [8]
    assert "m.n" in repr(node)
    assert copy.copy(Global("a", "b")).path == "a.b"


# damage


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_corrupt(protocol: int) -> None:
    data = pickle.dumps({"a": [1, (2, 3)], "b": Point(b"x" * 300, "y"), "c": {1.5, None}}, protocol)
    for end in range(len(data)):
        with pytest.raises(CorruptFileError):
            read_pickle_bytes(data[:end])


def test_a_pickle_of_opcodes_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from bntool.checkpoints.containers.pickles import reading
    from bntool.errors import UnsafeFileError

    monkeypatch.setattr(reading, "MAX_OPCODES", 1000)
    with pytest.raises(UnsafeFileError, match="1000 opcodes"):
        read_pickle_bytes(b"N" * 2000 + b".")


def test_objects_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million small things are a list of a sampler; two million containers are an attack on memory."""
    from bntool.checkpoints.containers.pickles import reading
    from bntool.errors import UnsafeFileError

    monkeypatch.setattr(reading, "_UNCOUNTED", 100)
    monkeypatch.setattr(reading, "MAX_OBJECTS", 1000)
    numbers = read_pickle_bytes(b"\x80\x02](" + b"K\x01" * 5000 + b"e.").root
    assert numbers == [1] * 5000
    for body in (b"}", b"]", b")R", b"\x85", b"N\x94", b"C\x00", b"X\x00\x00\x00\x00"):
        with pytest.raises(UnsafeFileError, match="more than 1000 objects"):
            read_pickle_bytes(b"\x80\x02N" + b"N" * 3000 + body * 1200 + b".")


def test_reading_is_not_quadratic() -> None:
    data = pickle.dumps([{f"layer{i}.weight": (i, i / 2, "x")} for i in range(30_000)], 2)
    started = time.process_time()
    _emit(read_pickle_bytes(data).root, 2)
    assert time.process_time() - started < 60  # were it quadratic, it would take far longer


def test_garbage_collection_goes_on_after_a_pickle_was_read_or_was_not() -> None:
    assert gc.isenabled()
    read_pickle_bytes(b"\x80\x02N.")
    assert gc.isenabled()
    with pytest.raises(CorruptFileError):
        read_pickle_bytes(b"\x80\x02N")
    assert gc.isenabled()
    gc.disable()
    try:
        read_pickle_bytes(b"\x80\x02N.")
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("called", "arguments", "danger"),
    [
        (b"c__builtin__\nset\n", b")", None),
        (b"c__builtin__\nbytearray\n", b"\x8a\x05\x00\x00\x00\x00\x10\x85", "bytearray for 68719476736 elements"),
        (b"cnumpy\nndarray\n", b"K\x01\x85N\x8c\x01x\x87", "numpy.ndarray(...) over memory"),
    ],
)
def test_a_class_given_by_a_persistent_id_is_looked_at(called: bytes, arguments: bytes, danger: str | None) -> None:
    """Files of torch before 1.6 give the classes of modules in this way, and their loader calls whatever it is."""
    given = b"(\x8c\x06module" + called + b"\x8c\x01f\x8c\x01stQ"
    found = [g.path for g in list_globals(read_pickle_bytes(b"\x80\x04" + given + arguments + b"\x81."))]
    assert len(found) == 1 + bool(danger)
    assert danger is None or any(danger in path for path in found)
