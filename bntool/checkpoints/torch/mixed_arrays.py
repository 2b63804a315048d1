"""Numpy arrays among the tensors of a pickle that torch wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bntool.checkpoints.containers.pickles.nodes import Instance
from bntool.checkpoints.files import quote
from bntool.checkpoints.tensors import Storage, StoredTensor
from bntool.checkpoints.torch.tensors import StorageReference, StorageResolver, TensorReader
from bntool.errors import CorruptFileError

if TYPE_CHECKING:
    from bntool.checkpoints.torch.arrays import ArrayReader  # most files hold no array

ARRAY_KEY = "array "  # what the keys of the storages of arrays begin with; torch's own are numbers


class MixedReader(TensorReader):
    """Turns the nodes of numpy arrays into tensors too."""

    def __init__(self, resolve: StorageResolver) -> None:
        super().__init__(resolve)
        self._arrays: ArrayReader | None = None

    @property
    def nodes(self) -> Mapping[str, Instance]:
        """The node of each array, by the key of its storage."""
        return self._arrays.nodes if self._arrays is not None else {}

    def is_array(self, tensor: StoredTensor) -> bool:
        return tensor.storage is not None and tensor.storage.key in self.nodes

    def _rebuild(self, node: Instance) -> StoredTensor | None:
        path = node.path
        if not path.startswith("numpy.") or not path.endswith(("._reconstruct", "._frombuffer")):
            return super()._rebuild(node)
        if self._arrays is None:
            from bntool.checkpoints.torch.arrays import ArrayReader

            self._arrays = ArrayReader()
        return self._arrays.read(node)

    def _storage(self, reference: StorageReference) -> Storage:
        if reference.key.startswith(ARRAY_KEY):
            raise CorruptFileError(f"no storage of torch is named {quote(reference.key)}")
        return super()._storage(reference)
