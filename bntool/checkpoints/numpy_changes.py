"""What changes in a pickle of numpy arrays."""

from __future__ import annotations

from bntool.checkpoints.numpy_arrays import ArrayReader, can_hold, make_array, replace_data
from bntool.checkpoints.pickles.nodes import Node
from bntool.checkpoints.tensors import StoredTensor, Tensor
from bntool.checkpoints.torch_changes import ChangeCollector, TorchChanges
from bntool.errors import RefusedError


class ArrayChanges(ChangeCollector):
    """Arrays have no storages that could be patched: the node of a changed array gets other bytes."""

    def collect(self) -> TorchChanges:
        changes = super().collect()
        assert isinstance(self.reader, ArrayReader)
        for key, patches in changes.patches.items():
            node = self.reader.nodes[key]
            (stored, new), *_ = patches
            changes.replacements[id(node)] = replace_data(node, stored, new)
        changes.patches.clear()
        return changes

    def new_tensor(self, tensor: Tensor, *, like: StoredTensor) -> Node:
        assert isinstance(self.reader, ArrayReader)
        if not can_hold(tensor.dtype) or like.storage is None:
            raise RefusedError(f"a new tensor of dtype {tensor.dtype} cannot be written to this format")
        return make_array(tensor, like=self.reader.nodes[like.storage.key])
