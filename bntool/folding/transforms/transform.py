"""How the channels of a tensor are stored: x as a (x + b)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bntool.folding.channels import Array


@dataclass(frozen=True)
class Transform:
    """A transform a (x + b) in which the channels of a tensor are stored.

    Attributes:
        scale: a of each channel.
        shift: b of each channel, in units of the original.
    """

    scale: Array
    shift: Array

    @cached_property
    def has_scale(self) -> bool:
        return bool(np.count_nonzero(self.scale != 1))

    @cached_property
    def has_shift(self) -> bool:
        return bool(np.count_nonzero(self.shift != 0))

    @property
    def is_identity(self) -> bool:
        return not self.has_scale and not self.has_shift
