"""Writing an edited pickle of numpy arrays."""

from __future__ import annotations

from pathlib import Path

from bntool.checkpoints.checkpoint import Checkpoint, StateDict
from bntool.checkpoints.containers.pickles.nodes import as_mapping
from bntool.checkpoints.containers.pickles.writing import write_pickle
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.torch.changes import collect_changes
from bntool.checkpoints.torch.modules import StateDictSource
from bntool.checkpoints.torch.state_dicts import TorchContent
from bntool.errors import RefusedError


def write(checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
    """Write the pickle anew, with other bytes in its arrays.

    Raises:
        RefusedError: a record, or keys under names that bntool translates, would have to be written.
    """
    content = TorchContent.of(checkpoint)
    pickle = content.pickle
    for state_dict in checkpoint.state_dicts:
        _check_keys(state_dict, content.sources[state_dict.key])
    changes = collect_changes(checkpoint)
    if changes.loose_record is not None:
        raise RefusedError(
            "a pickle of numpy arrays has no place for a record; convert it first with "
            "bntool convert CKPT --to torch -o NEW"
        )
    file, stream = checkpoint.file, output.open(path)
    if not changes.changes_pickle:
        file.copy_to(stream, offset=0, length=file.size)
        return
    write_pickle(stream.write, pickle.root, protocol=pickle.protocol, replacements=changes.replacements)
    for chunk in file.chunks(pickle.end, file.size - pickle.end):  # what follows is not ours to drop
        stream.write(chunk)


def _check_keys(state_dict: StateDict, source: StateDictSource) -> None:
    """Check that arrays under translated names only change; none can come or go."""
    inside = as_mapping(source.node)
    is_translated = any(name not in inside for name in source.tensor_nodes)
    if is_translated and not state_dict.is_module and list(state_dict.tensors) != list(source.tensor_nodes):
        raise RefusedError(
            "arrays of Caffe2 and Paddle can change, but not come or go; convert the file to torch first"
        )
