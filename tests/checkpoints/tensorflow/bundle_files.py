"""Writing TensorFlow checkpoints by hand; tests/oracles/tensorflow_checkpoints.py lets TensorFlow read one."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

MAGIC = bytes.fromhex("57fb808b247547db")
HEADER = b"\x08\x01\x1a\x02\x08\x01"  # one shard, version 1
# of types.proto
DTYPES = {
    "float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "complex64": 8, "int64": 9, "bool": 10,
    "bfloat16": 14, "uint16": 17, "float16": 19, "uint32": 22, "uint64": 23, "float8_e5m2": 24, "float8_e4m3fn": 25,
    "float8_e4m3fnuz": 26, "float8_e5m2fnuz": 28,
}  # fmt: skip


def masked_crc32c(data: bytes) -> bytes:
    """Bit by bit, by its definition."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ 0x82F63B78 * (register & 1)
    register ^= 0xFFFFFFFF
    rotated = (register >> 15 | register << 17) & 0xFFFFFFFF
    return ((rotated + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def make_block(entries: Mapping[bytes, bytes]) -> bytes:
    """A block of a table whose keys share no prefixes."""
    body = b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in entries.items())
    return body + struct.pack("<II", 0, 1)


def make_table(blocks: Sequence[tuple[bytes, bytes]], *, compression: int = 0) -> bytes:
    """A table of LevelDB.

    Args:
        blocks: the last key and the contents of each.
        compression: what the byte behind each says.
    """
    table, handles = b"", {}
    for last, block in blocks:
        handles[last] = varint(len(table)) + varint(len(block))
        stored = block + bytes([compression])
        table += stored + masked_crc32c(stored)
    footer = b""
    for block in (struct.pack("<II", 0, 1), make_block(handles)):
        footer += varint(len(table)) + varint(len(block))
        table += block + b"\0" + masked_crc32c(block + b"\0")
    return table + footer.ljust(40, b"\0") + MAGIC


def make_entry(dtype: int, shape: Sequence[int], offset: int, data: bytes, *, shard: int = 0) -> bytes:
    """A BundleEntryProto."""
    dims = b"".join(field(2, b"\x08" + varint(extent)) for extent in shape)
    entry = b"\x08" + varint(dtype) + field(2, dims) + (b"\x18" + varint(shard) if shard else b"")
    # what takes minutes bit by bit is left out, as nobody asks for it
    checksum = masked_crc32c(data) if len(data) < 10_000 else bytes(4)
    return entry + b"\x20" + varint(offset) + b"\x28" + varint(len(data)) + b"\x35" + checksum


def write_bundle(values: Mapping[str, tuple[int, Sequence[int], bytes]], prefix: Path) -> Path:
    """A checkpoint with one shard.

    Args:
        values: number of the dtype, shape and bytes by key.
    """
    data, entries = b"", {b"": HEADER}
    for name in sorted(values, key=str.encode):
        dtype, shape, run = values[name]
        entries[name.encode()] = make_entry(dtype, shape, len(data), run)
        data += run
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    index = prefix.with_name(f"{prefix.name}.index")
    index.write_bytes(make_table([(max(entries), make_block(entries))]))
    return index
