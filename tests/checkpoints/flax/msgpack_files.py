"""Writing files as flax.serialization does, by hand; tests/oracles/flax_files.py lets Flax read one."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any


def pack(value: Any) -> bytes:  # noqa: PLR0911 (one for each kind)
    """One value in msgpack; a tuple of dtype, shape and bytes is an array of Flax."""
    if isinstance(value, Mapping):
        return b"\xdf" + struct.pack(">I", len(value)) + b"".join(pack(k) + pack(v) for k, v in value.items())
    if isinstance(value, list):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(pack, value))
    if isinstance(value, tuple):
        dtype, shape, data = value
        inner = pack([list(shape), dtype, data])
        return b"\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0xA0 | len(text)]) if len(text) < 32 else b"\xdb" + struct.pack(">I", len(text))) + text
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    return b"\xcb" + struct.pack(">d", value)


def pack_variables(variables: Mapping[str, Any]) -> bytes:
    """A file; its first map has the short form, as in files of Flax."""
    body = b"".join(pack(k) + pack(v) for k, v in variables.items())
    head = bytes([0x80 | len(variables)]) if len(variables) < 16 else b"\xde" + struct.pack(">H", len(variables))
    return head + body


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Names with dots as maps in maps."""
    root: dict[str, Any] = {}
    for name, value in flat.items():
        *around, leaf = name.split(".")
        node = root
        for part in around:
            node = node.setdefault(part, {})
        node[leaf] = value
    return root
