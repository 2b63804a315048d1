"""Damaged copies of files whose containers stay whole: fields of JSON, opcodes of pickles, records of zip archives.

A changed byte mostly breaks a container, and what lies behind is never reached; here the container is written again.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from typing import Any

_ODD = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e308, "", "x", "\udc80", "../x", "a" * 300),
    *([], {}, [[]], [None], {"": {}}, ["name", 0, 0, {}], {"class_name": "Conv2D", "config": {}}),
)
_INSERTED = (b"0", b"1", b"2", b"(", b"t", b")", b"]", b"}", b"N", b"s", b"u", b"a", b"e", b"b", b"R", b"\x81", b"\x85")
_NUMBERS = (0, 1, 3, 255)


def mutate_structure(data: bytes, rng: random.Random, *, depth: int = 2) -> bytes | None:
    """A damaged copy of what is known by its first bytes; None for another container, or one that is broken."""
    try:
        if data.startswith(b"PK\3\4") and depth:
            return _mutate_zip(data, rng, depth=depth)
        if data.startswith(b"\x80"):
            return _mutate_pickle(data, rng)
        if data.lstrip()[:1] in (b"{", b"["):
            return _dump(_mutate_json(json.loads(data), rng))
        if data[8:9] == b"{":
            return _mutate_safetensors(data, rng)
    except (ValueError, KeyError, IndexError, RecursionError, zipfile.BadZipFile, struct.error, NotImplementedError):
        return None
    return None


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three places changed: another type, another name, gone, or twice."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _change_json(value, rng)
    return value


def _change_json(value: Any, rng: random.Random) -> Any:
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
            copy[key] = _change_json(copy[key], rng)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.9:
        copied, place = list(value), rng.randrange(len(value))
        kind = rng.randrange(10)
        if kind == 0:
            del copied[place]
        elif kind == 1:
            copied.insert(place, copied[place])
        else:
            copied[place] = _change_json(copied[place], rng)
        return copied
    return rng.choice(_ODD)


def _mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = _dump(_mutate_json(json.loads(data[8 : 8 + length]), rng))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _mutate_pickle(data: bytes, rng: random.Random) -> bytes:
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
        kind, piece = rng.randrange(6), pieces[place]
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
        else:
            pieces[place] = piece + rng.choice(_INSERTED)
    return b"".join(pieces) + data[starts[-1] :]


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
            structured = [one for one in records if one[1][:1] in (b"{", b"[", b"\x80", b"P")]
            record = rng.choice(structured or records)
            record[1] = mutate_structure(record[1], rng, depth=depth - 1) or record[1][::-1]
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # of two records with one name
        for name, content in records:
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED)
    return out.getvalue()
