"""Tensors as arrays of numpy, for those who look at numbers; imports numpy when one is asked for."""

from __future__ import annotations

from typing import Any

from bntool.checkpoints.dtypes import NumberKind, decode_numbers
from bntool.errors import NoNumbersError


class AsArray:
    """A tensor that gives its elements in chunks, and can be had as an array."""

    __slots__ = ()

    def numpy(self: Any) -> Any:
        """Return the elements as an array of numpy, read now; bfloat16 and smaller floats come as float32, exactly.

        Raises:
            NoNumbersError: there are no plain elements to read, or numpy has no such dtype.
        """
        import numpy as np  # listing a file needs none

        data, name = b"".join(self.chunks()), self.dtype.name
        if name == "bfloat16":
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        elif name.startswith("float8"):
            values = np.array(decode_numbers(data, self.dtype), "f4")
        elif self.dtype.kind is NumberKind.OPAQUE or name == "complex32":
            raise NoNumbersError(f"numpy has no {name}")
        else:
            values = np.frombuffer(data, np.dtype(name).newbyteorder("<"))
        return values.reshape(self.shape)
