"""A file, an open checkpoint, a state dict or a live model: whichever it is, listed as a checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.formats import open_checkpoint

if TYPE_CHECKING:
    import torch

Source: TypeAlias = Union[str, "os.PathLike[str]", Checkpoint, Mapping[str, Any], "torch.nn.Module"]


@contextlib.contextmanager
def open_source(source: Source) -> Iterator[Checkpoint]:
    """Open a source inside the context; a file is closed after it, an open checkpoint stays open.

    Raises:
        FileError: a file cannot be read.
        UsageError: a mapping holds no tensors.
    """
    if isinstance(source, Checkpoint):
        yield source
    elif isinstance(source, str | os.PathLike):
        with open_checkpoint(source) as opened:
            yield opened
    else:
        from bntool.modules.in_memory import list_in_memory  # torch

        yield list_in_memory(source)
