"""Finding the tensors of a torch file that share memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from bntool.checkpoints.containers.pickles.nodes import Instance, Node, PersistentId, children, walk_nodes
from bntool.checkpoints.tensors import StoredTensor
from bntool.checkpoints.torch.modules import StateDictSource
from bntool.checkpoints.torch.tensors import TensorReader, read_storage_reference

_WHOLE = (0, 1 << 63)  # the bytes of a storage that is used as a whole


class SharedMemory:
    """The bytes of every tensor of a file, and how often each tensor is referred to.

    Args:
        root: of the pickle.
        reader: knows its tensors.
        sources: of the state dicts: modules that are used twice name a tensor twice and refer to it once.
    """

    def __init__(self, root: Node, reader: TensorReader, sources: Iterable[StateDictSource]) -> None:
        references: list[int] = []
        self._users: dict[str, list[tuple[int, int, int]]] = {}  # by storage: (id of the node, first byte, end)
        names: Counter[int] = Counter()
        inner: set[int] = set()  # storages and tensors that only serve to build another tensor
        for node in walk_nodes(root):
            references += [id(child) for child in children(node) if isinstance(child, Instance)]
            if isinstance(node, Instance):
                tensor = reader.read(node)
                if tensor is not None and tensor.storage is not None:
                    self._users.setdefault(tensor.storage.key, []).append((id(node), *tensor.byte_range))
                    inner.update(_ids_inside(node.arguments))
            elif isinstance(node, PersistentId):
                reference = read_storage_reference(node)
                if reference is not None:
                    self._users.setdefault(reference.key, []).append((id(node), *_WHOLE))
        self._references = Counter(references)
        for source in sources:
            names.update(map(id, source.tensor_nodes.values()))
        for key, users in self._users.items():
            self._users[key] = [user for user in users if user[0] not in inner or self._references[user[0]] > 1]
        self._references |= names

    def has_other_user(self, tensor: StoredTensor, users: Mapping[int, int]) -> bool:
        """Return whether somebody else uses bytes of a tensor.

        Args:
            tensor: a tensor of the file.
            users: id of a node: how many references to it are known and do not count.
        """
        assert tensor.storage is not None
        start, end = tensor.byte_range
        return any(
            first < end and start < last and max(self._references[node], 1) > users.get(node, 0)
            for node, first, last in self._users.get(tensor.storage.key, ())
        )


def _ids_inside(arguments: Node) -> Iterator[int]:
    """Yield the nodes in the arguments of a tensor, also one level down, where subclasses keep them."""
    for argument in arguments:
        yield id(argument)
        if isinstance(argument, tuple):
            yield from map(id, argument)
