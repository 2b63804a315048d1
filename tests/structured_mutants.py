"""Damaged copies of files whose containers stay whole: JSON, pickles, zip and tar archives, protobufs, HDF5, prototxt.

A changed byte mostly breaks a container, and what lies behind is never reached; here the container is written again.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import random
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

_ODD = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e308, "", "x", "\udc80", "../x", "a" * 300),
    *([], {}, [[]], [None], {"": {}}, ["name", 0, 0, {}], {"class_name": "Conv2D", "config": {}}),
)
_WORDS = (  # that mean something in a configuration, a header or a graph
    *(
        "BatchNormalization",
        "Conv2D",
        "DepthwiseConv2D",
        "Functional",
        "Sequential",
        "TimeDistributed",
        "Bidirectional",
    ),
    *("Lambda", "TorchModuleWrapper", "InputLayer", "Conv", "Gemm", "If", "Loop", "Constant", "BatchNorm", "Scale"),
    *("F32", "F64", "BF16", "I64", "F8_E4M3", "float32", "float16", "keras.layers", "builtins", "model", "layers"),
)
_INSERTED = (b"0", b"1", b"2", b"(", b"t", b")", b"]", b"}", b"N", b"s", b"u", b"a", b"e", b"b", b"R", b"\x81", b"\x85")
_NUMBERS = (0, 1, 3, 255)
_WIDE = (0, 1, 2, 127, 128, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_DEEPEST = 12  # messages in messages that are looked into


def mutate_structure(data: bytes, rng: random.Random, *, depth: int = 2) -> bytes | None:
    """A damaged copy of what is known by its first bytes; None for another container, or one that is broken."""
    try:
        return _mutate_known(data, rng, depth=depth)
    except (
        ValueError,
        KeyError,
        IndexError,
        RecursionError,
        zipfile.BadZipFile,
        struct.error,
        OSError,  # h5py, of a file that was cut before
        NotImplementedError,  # zipfile, of a compression that it does not know
        tarfile.TarError,
    ):
        return None


def _mutate_known(data: bytes, rng: random.Random, *, depth: int) -> bytes | None:
    mutant = None
    if data.startswith(b"PK\3\4") and depth:
        mutant = _mutate_zip(data, rng, depth=depth)
    elif data.startswith(b"\x80"):
        mutant = _mutate_pickle(data, rng)
    elif data.startswith(b"\x89HDF"):
        mutant = _mutate_hdf5(data, rng)
    elif data[:1] in (b"\x08", b"\x0a") and _parse(data):
        mutant = mutate_protobuf(data, rng)
    elif data[257:262] == b"ustar":
        mutant = _mutate_tar(data, rng)
    elif data[:6] in (b"name: ", b"layer ", b"layers", b"input:"):
        mutant = _mutate_prototxt(data, rng)
    elif data.lstrip()[:1] in (b"{", b"["):
        mutant = _dump(_mutate_json(json.loads(data), rng))
    elif data[8:9] == b"{":
        mutant = _mutate_safetensors(data, rng)
    return mutant


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three places changed: another type, another name, gone, or twice."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _change_json(value, rng, _pick(value, rng))
    return value


def _pick(value: Any, rng: random.Random) -> Any:
    """A word, or something that lies elsewhere in the same document."""
    if rng.random() < 0.3:
        return rng.choice(_WORDS)
    for _ in range(rng.randrange(12)):
        if not isinstance(value, dict | list) or not value:
            break
        value = rng.choice(list(value.values()) if isinstance(value, dict) else value)
    return value


def _change_json(value: Any, rng: random.Random, other: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        copy, kind = dict(value), rng.randrange(12)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[rng.choice(("", "name", "config", "x" * 50))] = copy.pop(key)
        elif kind == 2:
            copy[key] = copy[rng.choice(list(copy))]
        else:
            copy[key] = _change_json(copy[key], rng, other)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.9:
        copied, place = list(value), rng.randrange(len(value))
        kind = rng.randrange(10)
        if kind == 0:
            del copied[place]
        elif kind == 1:
            copied.insert(place, copied[place])
        else:
            copied[place] = _change_json(copied[place], rng, other)
        return copied
    return rng.choice(_ODD) if rng.random() < 0.5 else other


def _mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = _dump(_mutate_json(json.loads(data[8 : 8 + length]), rng))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _mutate_pickle(data: bytes, rng: random.Random) -> bytes:  # noqa: C901 (one branch for each damage)
    """The first pickles with opcodes gone, twice, exchanged, given other numbers, or new ones between them."""
    stream, starts = io.BytesIO(data), [0]
    for _ in range(5):  # a legacy file has five
        try:
            found = [place for _, _, place in pickletools.genops(stream)]
        except (ValueError, struct.error):  # tensors follow
            break
        starts += [place for place in found if place > starts[-1]]
        starts.append(stream.tell())
    ends = [*starts[1:], starts[-1]]
    pieces = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(pieces))
        kind, piece = rng.randrange(9), pieces[place]
        if kind == 0:
            pieces[place] = b""
        elif kind == 1:
            pieces[place] = piece * 2
        elif kind == 2:
            other = rng.randrange(len(pieces))
            pieces[place], pieces[other] = pieces[other], piece
        elif kind == 3 and piece[:1] in (b"K", b"h", b"q"):
            pieces[place] = piece[:1] + bytes([rng.choice(_NUMBERS)])
        elif kind == 4 and piece[:1] == b"c":
            pieces[place] = rng.choice([one for one in pieces if one[:1] == b"c"])
        elif kind == 5 and piece[:1] in (b"X", b"\x8c", b"U", b"V"):  # a text by another
            pieces[place] = rng.choice([one for one in pieces if one[:1] == piece[:1]])
        elif kind == 6 and piece[:1] in (b"J", b"M", b"K", b"I", b"L", b"\x8a"):
            pieces[place] = b"I" + str(rng.choice((*_WIDE, -1, -(1 << 40), 10**40))).encode() + b"\n"
        elif kind == 7:
            pieces[place] = piece + b"c" + rng.choice((*_NAMES, *_pickled_names(pieces)))
        else:
            pieces[place] = piece + rng.choice(_INSERTED)
    return b"".join(pieces) + data[starts[-1] :]


_NAMES = (b"os\nsystem\n", b"builtins\nrange\n", b"functools\npartial\n", b"torch._utils\n_rebuild_parameter\n")


def _pickled_names(pieces: list[bytes]) -> list[bytes]:
    return [piece[1:] for piece in pieces if piece[:1] == b"c"]


def _mutate_tar(data: bytes, rng: random.Random) -> bytes:
    """An archive with a member renamed, gone, twice, exchanged, of another type, or itself damaged."""
    with tarfile.open(fileobj=io.BytesIO(data)) as source:
        members = [(one, (source.extractfile(one) or io.BytesIO()).read()) for one in source.getmembers()]
    place = rng.randrange(len(members))
    (member, content), kind = members[place], rng.randrange(7)
    if kind == 0:
        member.name = rng.choice(("pickle", "tensors", "storages", f"../{member.name}", member.name.upper()))
    elif kind == 1:
        del members[place]
    elif kind == 2:
        members.append(members[place])
    elif kind == 3:
        members.insert(0, members.pop(place))
    elif kind == 4:
        member.type, member.linkname = rng.choice((b"7", b"1", b"2", b"5", b"L", b"x", b"3")), "pickle"
    elif kind == 5:
        members[place] = (member, content[: rng.randrange(len(content) + 1)])
    else:
        members[place] = (member, _mutate_pickle(content, rng) if content[:1] == b"\x80" else content[::-1])
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT))) as archive:
        for one, inside in members:
            one.size = len(inside)
            archive.addfile(one, io.BytesIO(inside))
    return out.getvalue()


def _mutate_prototxt(data: bytes, rng: random.Random) -> bytes:
    """A text of Caffe with words gone, twice, exchanged, or others."""
    words = re.findall(rb'"[^"]*"|[{}:]|[^\s{}:"]+|\s+', data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, other, kind = rng.randrange(len(words)), rng.randrange(len(words)), rng.randrange(5)
        if kind == 0:
            words[place] = b""
        elif kind == 1:
            words[place] = words[place] * 2
        elif kind == 2:
            words[place], words[other] = words[other], words[place]
        elif kind == 3:
            words[place] = words[other]
        else:
            words[place] = rng.choice(
                (b"{", b"}", b"-1", b"1e999", b'"', b"true", b"layer {", b'"BatchNorm"', b'"Python"')
            )
    return b"".join(words)


def _mutate_zip(data: bytes, rng: random.Random, *, depth: int) -> bytes:
    """An archive with a record renamed, gone, twice, exchanged or itself damaged; its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        records = [[name, source.read(name)] for name in source.namelist()]
    for _ in range(rng.choice((1, 1, 2))):
        record = rng.choice(records)
        kind = rng.randrange(10)
        if kind == 0:
            record[0] = rng.choice(
                (record[0].upper(), f"../{record[0]}", f"{record[0]}/", record[0].rpartition("/")[2])
            )
        elif kind == 1 and len(records) > 1:
            records.remove(record)
        elif kind == 2:
            records.append(list(record))
        elif kind == 3:
            other = rng.choice(records)
            record[1], other[1] = other[1], record[1]
        elif kind == 4:
            record[1] = record[1][: rng.randrange(len(record[1]) + 1)]
        else:
            structured = [one for one in records if one[1][:1] in (b"{", b"[", b"\x80", b"P", b"\x89")]
            record = rng.choice(structured or records)
            record[1] = mutate_structure(record[1], rng, depth=depth - 1) or record[1][::-1]
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # of two records with one name
        for name, content in records:
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED)
    return out.getvalue()


def _mutate_hdf5(data: bytes, rng: random.Random) -> bytes:
    """An HDF5 file with an object, or an attribute, gone, changed or moved."""
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(rng.choice((1, 1, 2))):
            with contextlib.suppress(KeyError, ValueError, TypeError, RuntimeError, OSError):  # what h5py refuses
                _change_object(file, rng.choice(["/", *names]), names, rng)
    return buffer.getvalue()


def _change_object(file: h5py.File, name: str, names: list[str], rng: random.Random) -> None:
    one, kind = file[name], rng.randrange(6)
    if kind == 0:
        del file[name]
    elif kind == 1:
        file.move(name, rng.choice([f"{name}_1", f"{rng.choice(names)}/x", "layers/vars/0", "vars"]))
    elif kind == 2:
        shape = rng.choice([(), (0,), (1,), (3,), (4,), (2, 3), (1,) * 9])
        dtype = rng.choice(["f2", "f4", ">f8", "i1", "u8", "S3", "?", "c8"])
        del file[name]
        file.create_dataset(name, data=np.zeros(shape, dtype))
    elif kind == 3:
        file.create_group(f"{name}/{rng.choice(['vars', 'layers', '0', 'bn'])}")
    elif one.attrs and kind == 4:
        attribute = rng.choice(list(one.attrs))
        del one.attrs[attribute]
        if rng.random() < 0.7:
            one.attrs[attribute] = rng.choice([b"", "x", b"{}", b"[1]", 1.5, [b"a", b"b"], [b"bn1"] * 3, np.zeros(2)])
    else:
        for attribute in ("model_config", "training_config"):
            if attribute in file.attrs:
                file.attrs[attribute] = _dump(_mutate_json(json.loads(file.attrs[attribute]), rng))


def mutate_protobuf(data: bytes, rng: random.Random, *, depth: int = 0, texts: Sequence[bytes] = ()) -> bytes:
    """A message with a field gone, doubled, moved, or of another number, value or length, at any depth.

    Args:
        texts: words that lie elsewhere in the file, such as names of tensors: put in each other's place they make
            cycles, and two of one name.
    """
    fields = _parse(data)
    texts = texts or re.findall(rb"[\w./:]{1,30}", data)[:2000]
    if not fields:
        return data + bytes((rng.randrange(256),)) if depth else data
    place = rng.randrange(len(fields))
    number, wire, value = fields[place]
    inner = _parse(value) if wire == 2 and isinstance(value, bytes) else None
    if inner and depth < _DEEPEST and rng.random() < 0.75:
        assert isinstance(value, bytes)
        fields[place] = (number, wire, mutate_protobuf(value, rng, depth=depth + 1, texts=texts))
        return _join(fields)
    kind = rng.randrange(6)
    if kind == 0:
        del fields[place]
    elif kind == 1:
        fields.insert(rng.randrange(len(fields) + 1), fields[place])
    elif kind == 2:
        other = rng.randrange(len(fields))
        fields[place], fields[other] = fields[other], fields[place]
    elif kind == 3:
        fields[place] = (rng.choice((1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 13, 14, 15, 25, 100, 500)), wire, value)
    elif kind == 4:
        fields[place] = (number, 0, rng.choice(_WIDE))
    else:
        text = rng.choice((b"", b"x", b"BatchNormalization", b"Identity", b"\xff", b"bn1", bytes(40)))
        fields[place] = (number, 2, rng.choice(texts) if texts and rng.random() < 0.5 else text)
    return _join(fields)


_Field = tuple[int, int, int | bytes]


def _parse(data: bytes) -> list[_Field]:
    """The fields of a message; none where it is no message."""
    fields: list[_Field] = []
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        number, wire = tag >> 3, tag & 7
        if position < 0 or not number or wire not in (0, 1, 2, 5):
            return []
        if wire == 0:
            value, position = _read_varint(data, position)
            fields.append((number, wire, value))
        else:
            length = {1: 8, 5: 4}.get(wire, 0)
            if wire == 2:
                length, position = _read_varint(data, position)
            if position < 0 or position + length > len(data):
                return []
            fields.append((number, wire, data[position : position + length]))
            position += length
        if position < 0:
            return []
    return fields


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A number and where it ends; -1 where it has no end."""
    value = shift = 0
    for index in range(position, min(position + 10, len(data))):
        value |= (data[index] & 0x7F) << shift
        if data[index] < 0x80:
            return value, index + 1
        shift += 7
    return 0, -1


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))


def _join(fields: list[_Field]) -> bytes:
    parts = []
    for number, wire, value in fields:
        parts.append(_varint(number << 3 | wire))
        if isinstance(value, int):
            parts.append(_varint(value))
        else:
            parts += [_varint(len(value)) if wire == 2 else b"", value]
    return b"".join(parts)
