"""Writing a tar file of torch.save with other elements."""

from __future__ import annotations

from pathlib import Path

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.torch.patches import patch_storage
from bntool.checkpoints.value_patches import collect_value_patches

_ADVICE = "convert it first with bntool convert CKPT --to torch -o NEW"


def write(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Copy the file and put new elements over the old ones.

    Raises:
        RefusedError: something else than elements is to change.
    """
    patches = collect_value_patches(checkpoint, advice=_ADVICE)
    file = checkpoint.file
    stream = output.open(path)
    file.copy_to(stream, offset=0, length=file.size)
    for changes in patches.values():
        for start, data in patch_storage(changes, base=0):  # a member keeps its place: offsets in the file count
            stream.seek(start)
            stream.write(data)
    stream.seek(0, 2)
