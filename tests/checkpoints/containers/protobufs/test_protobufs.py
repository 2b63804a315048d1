"""Messages read by position and written again, held against the wire format as its specification has it."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bntool.checkpoints.containers.protobufs.reading import Buffer, Message, Wire, read_varints, shortest
from bntool.checkpoints.containers.protobufs.writing import (
    Edits,
    embed,
    integer_field,
    packed_integers,
    size_of,
    write_content,
)
from bntool.checkpoints.files import MemorySource
from bntool.errors import CorruptFileError, UnsafeFileError


def parse(data: bytes) -> Message:
    return Message(Buffer(MemorySource(data)), 0, len(data))


def rewrite(message: Message, edits: Edits | None = None) -> bytes:
    stream = io.BytesIO()
    content = (edits or Edits()).render(message)
    write_content(content, message.buffer, stream)
    assert len(stream.getvalue()) == size_of(content)
    return stream.getvalue()


def test_reads_the_examples_of_the_specification() -> None:
    assert parse(b"\x08\x96\x01").integer(1) == 150
    assert parse(b"\x12\x07testing").text(2) == "testing"
    assert parse(b"\x1a\x03\x08\x96\x01").message(3).integer(1) == 150
    assert parse(b"\x32\x06\x03\x8e\x02\x9e\xa7\x05").integers(6) == (3, 270, 86942)
    assert parse(b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01").integer(1) == -1
    assert parse(b"\x0d" + struct.pack("<f", 1e-5)).float32(1, 0.0) == 1e-5


def test_the_last_value_of_a_singular_field_counts() -> None:
    message = parse(b"\x08\x01\x08\x02")
    assert message.integer(1) == 2
    assert message.integers(1) == (1, 2)
    assert message.integer(5, 7) == 7


def test_groups_are_carried_along() -> None:
    data = b"\x0b\x08\x01\x13\x14\x0c\x10\x05"  # group 1 { 1: 1, group 2 {} }, 2: 5
    assert parse(data).integer(2) == 5
    assert rewrite(parse(data)) == data


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",  # no value
        b"\x08\x80\x80",  # a varint without end
        b"\x08" + b"\xff" * 11,
        b"\x12\x05abc",  # longer than what is left
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x0d\x00",  # half a float
        b"\x00\x01",  # field 0
        b"\x0e\x01",  # wire type 6
        b"\x0c",  # ends a group that is not open
        b"\x0b\x08\x01",  # a group without end
        b"\x0b\x14",  # ends another group
    ],
)
def test_what_is_no_message_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptFileError):
        parse(data)


def test_a_value_of_another_kind_is_corrupt() -> None:
    with pytest.raises(CorruptFileError, match="VARINT"):
        parse(b"\x12\x01a").integer(2)
    with pytest.raises(CorruptFileError, match="BYTES"):
        parse(b"\x08\x01").text(1)


def test_depth_and_number_of_fields_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsafeFileError, match="nested"):
        parse(b"\x0b" * 200)
    data = b""
    for _ in range(120):
        data = b"".join(embed(1, data))
    message = parse(data)
    for _ in range(100):
        message = message.message(1)
    with pytest.raises(UnsafeFileError, match="nested"):
        message.message(1)
    monkeypatch.setattr("bntool.checkpoints.containers.protobufs.reading.MAX_FIELDS", 100)
    with pytest.raises(UnsafeFileError, match="fields"):
        parse(b"\x08\x01" * 200)


def test_a_name_of_a_gigabyte_is_not_read() -> None:
    with pytest.raises(UnsafeFileError, match="bytes"):
        parse(b"".join(embed(1, bytes(2 << 20)))).text(1)


FIELDS = st.recursive(
    st.tuples(st.integers(1, 2000), st.one_of(st.integers(0, (1 << 64) - 1), st.binary(max_size=20))),
    lambda children: st.tuples(st.integers(1, 2000), st.lists(children, max_size=4)),
    max_leaves=12,
)


def encode(fields: list) -> bytes:
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(integer_field(number, value))
        else:
            parts += embed(number, value if isinstance(value, bytes) else encode(value))
    return b"".join(parts)


@given(st.lists(FIELDS, max_size=6))
def test_rewriting_loses_nothing(fields: list) -> None:
    data = encode(fields)
    message = parse(data)
    assert rewrite(message) == data
    assert [f.number for f in message.fields] == [number for number, _ in fields]
    for found, (_, value) in zip(message.fields, fields, strict=True):
        if isinstance(value, int):
            assert (found.wire, found.value) == (Wire.VARINT, value)
        elif isinstance(value, bytes):
            assert message.bytes_of(found) == value


def test_an_edit_deep_inside_leaves_everything_else() -> None:
    data = encode([(9, b"before"), (1, [(7, 7), (2, [(3, b"old"), (4, 4)]), (8, b"x" * 200)]), (9, b"after")])
    message = parse(data)
    inner = message.message(1).message(2)
    edits = Edits()
    edits.replace(inner, inner.last(3), *embed(3, b"something longer" * 20))
    edits.insert_after(inner, inner.last(4), integer_field(5, 5))
    edits.append(inner, integer_field(6, 6))
    edits.set_field(message, 11, integer_field(11, 1))
    expected = [(3, b"something longer" * 20), (4, 4), (5, 5), (6, 6)]
    outer = [(7, 7), (2, expected), (8, b"x" * 200)]
    assert rewrite(message, edits) == encode([(9, b"before"), (1, outer), (9, b"after"), (11, 1)])


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_shortest_names_the_same_float(value: float) -> None:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    assert struct.pack("<f", shortest(bits)) == struct.pack("<f", value)


def test_eps_is_shown_as_it_was_meant() -> None:
    for eps in (1e-5, 1e-3, 2e-5, 1.001e-5, 0.999, 0.9, 1e-12):
        assert shortest(struct.unpack("<I", struct.pack("<f", eps))[0]) == eps


def test_packed_integers_round_trip() -> None:
    values = [0, 1, 127, 128, 300, 1 << 40]
    assert parse(packed_integers(1, values)).integers(1) == tuple(values)
    with pytest.raises(CorruptFileError):
        read_varints(b"\x80")
    with pytest.raises(CorruptFileError):
        read_varints(b"\xff" * 12)
