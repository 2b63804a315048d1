"""CRC-32C, the checksum of TensorFlow's and LevelDB's files (RFC 3720, section B.4); zlib has another polynomial."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0x82F63B78  # reversed
_ALL = 0xFFFFFFFF
_LANE = 256  # bytes that one lane takes where numpy computes many at once
_SMALL = 1 << 16  # below this numpy is not worth its import


def crc32c(data: bytes, checksum: int = 0) -> int:
    """Return the checksum of bytes that follow those with ``checksum``."""
    register = checksum ^ _ALL
    if len(data) >= _SMALL:
        lanes = len(data) // _LANE
        register = _advance_lanes(data[: lanes * _LANE], register)
        data = data[lanes * _LANE :]
    table = _table()
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register ^ _ALL


def unmask(masked: int) -> int:
    """Return the checksum that these files store rotated and shifted, so that checksums of checksums do not
    degenerate.
    """
    rotated = (masked - 0xA282EAD8) & _ALL
    return (rotated >> 17 | rotated << 15) & _ALL


@lru_cache
def _table() -> tuple[int, ...]:
    entries = []
    for byte in range(256):
        register = byte
        for _ in range(8):
            register = register >> 1 ^ (_POLYNOMIAL if register & 1 else 0)
        entries.append(register)
    return tuple(entries)


def _advance_lanes(data: bytes, register: int) -> int:
    """Return the register after whole lanes of bytes: each lane by itself, then one after the other.

    The register is linear over GF(2): that of a text is that of its lanes, each moved over as many zeros as follow it.
    """
    import numpy as np  # listing a file never comes here

    table = np.array(_table(), dtype=np.uint32)
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, _LANE).T.astype(np.uint32, order="C")
    lanes = np.zeros(rows.shape[1], dtype=np.uint32)
    zeros = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    for row in rows:
        lanes = table[(lanes ^ row) & 0xFF] ^ (lanes >> 8)
        zeros = table[zeros & 0xFF] ^ (zeros >> 8)
    first, second, third, fourth = zeros.tolist()
    for lane in lanes.tolist():
        moved = first[register & 0xFF] ^ second[register >> 8 & 0xFF] ^ third[register >> 16 & 0xFF]
        register = moved ^ fourth[register >> 24] ^ lane
    return register
