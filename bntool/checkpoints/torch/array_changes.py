"""What changes in a pickle that holds numpy arrays, alone or among torch's tensors."""

from __future__ import annotations

from bntool.checkpoints.checkpoint import Checkpoint
from bntool.checkpoints.containers.pickles.nodes import Instance, Node
from bntool.checkpoints.tensors import StoredTensor, Tensor
from bntool.checkpoints.torch.arrays import ArrayReader, can_hold, make_array, replace_data
from bntool.checkpoints.torch.changes import ChangeCollector, TorchChanges
from bntool.checkpoints.torch.mixed_arrays import MixedReader
from bntool.errors import RefusedError


def collect_changes(checkpoint: Checkpoint) -> TorchChanges:
    """Compare a checkpoint with the file it came from.

    Raises:
        RefusedError: tensors would have to be added to or removed from a pickled module, or a dtype has no storage.
    """
    return ArrayChanges(checkpoint).collect()


class ArrayChanges(ChangeCollector):
    """Arrays have no storages that could be patched: the node of a changed array gets other bytes."""

    def collect(self) -> TorchChanges:
        changes = super().collect()
        for key in [key for key in changes.patches if self.array_node(key) is not None]:
            (stored, new), *_ = changes.patches.pop(key)
            node = self.array_node(key)
            assert node is not None
            changes.replacements[id(node)] = replace_data(node, stored, new)
        return changes

    def array_node(self, key: str) -> Instance | None:
        """The node of the array with this storage; None for a storage of torch."""
        assert isinstance(self.reader, ArrayReader | MixedReader)
        return self.reader.nodes.get(key)

    def new_tensor(self, tensor: Tensor, *, like: StoredTensor) -> Node:
        node = self.array_node(like.storage.key) if like.storage is not None else None
        if node is None:
            return super().new_tensor(tensor, like=like)
        if not can_hold(tensor.dtype):
            raise RefusedError(f"a new tensor of dtype {tensor.dtype} cannot be written to this format")
        return make_array(tensor, like=node)
