"""The CRC-32 of zip records: by Intel's ISA-L where that is installed, which is ten times as fast as zlib."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32

__all__ = ["crc32"]
