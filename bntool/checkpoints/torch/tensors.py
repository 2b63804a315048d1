"""Recognising tensors and storages in the nodes of a pickle that torch wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from bntool.checkpoints.containers.pickles.nodes import Construction, Global, Instance, Node, PersistentId, text_of
from bntool.checkpoints.dtypes import BY_NAME, BY_STORAGE, UINT8, DType
from bntool.checkpoints.tensors import MAX_DIMENSIONS, Storage, StoredTensor, contiguous_strides
from bntool.errors import BntoolError, CorruptFileError, UnknownFormatError

MAX_NESTING = 20  # of tensors in subclasses in parameters; two or three are seen

# from the value of a persistent id to the storage that it names
StorageResolver = Callable[["StorageReference"], Storage]

_STORAGELESS = {
    "torch._utils._rebuild_meta_tensor_no_storage": "meta",
    "torch._utils._rebuild_wrapper_subclass": "wrapper subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "from numpy",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "from another device",
    "torch._utils._rebuild_xla_tensor": "from numpy",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch.nn.parameter.UninitializedParameter": "uninitialized",
    "torch.nn.parameter.UninitializedBuffer": "uninitialized",
}
# classes that are given a tensor, and the helper of pickle that calls them
_WRAPPERS = frozenset(
    {
        "torch.nn.parameter.Parameter",
        "torch.nn.Parameter",
        "torch.nn.parameter.Buffer",
        "torch.autograd.variable.Variable",
        "torch.autograd.Variable",
    }
)
_PLAIN = "torch._utils._rebuild_tensor_v2"
_BY_PICKLE = "torch.storage._load_from_bytes"
_NEW = frozenset({"copyreg.__newobj__", "copy_reg.__newobj__"})
_PLAIN_SUBCLASSES = (
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
)


class StorageReference(NamedTuple):
    """The persistent id of a storage, taken apart.

    Attributes:
        dtype: element type; uint8 for an untyped storage.
        key: names the storage in the file.
        device: where it lived.
        elements: how many it has.
        view: (key, offset, count) of a view into it, in files from before torch 0.4.
    """

    dtype: DType
    key: str
    device: str
    elements: int
    view: tuple[str, int, int] | None = None

    @property
    def nbytes(self) -> int:
        return self.dtype.byte_count(self.elements)


def read_storage_reference(node: Node) -> StorageReference | None:
    """Return the storage that a persistent id names; None where it names something else.

    Raises:
        CorruptFileError: it is meant to name a storage but does not.
    """
    if not isinstance(node, PersistentId):
        return None
    if not isinstance(node.reference, StorageReference):
        node.reference = _read_storage_reference(node.value)
    return node.reference


def _read_storage_reference(value: Node) -> StorageReference | None:
    if not isinstance(value, tuple) or not value or text_of(value[0]) != "storage":
        return None
    if len(value) not in (5, 6) or not isinstance(value[1], Global):
        raise CorruptFileError("the reference to a storage is malformed")
    key, device, count = text_of(value[2]), text_of(value[3]), value[4]
    if key is None or device is None or not _is_count(count):
        raise CorruptFileError("the reference to a storage is malformed")
    name = value[1].name
    dtype = UINT8 if name == "UntypedStorage" else BY_STORAGE.get(name)
    if dtype is None:
        raise CorruptFileError(f"unknown storage type {value[1].path:.80}")
    view = value[5] if len(value) == 6 else None
    if view is None:
        return StorageReference(dtype, key, device, count)
    if not isinstance(view, tuple) or len(view) != 3 or not _is_count(view[1]) or not _is_count(view[2]):
        raise CorruptFileError("the view of a storage is malformed")
    return StorageReference(dtype, key, device, count, (text_of(view[0]) or "", view[1], view[2]))


def _is_count(value: Node) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # what fits in torch's own integers


class TensorReader:
    """Turns nodes into tensors, each node once.

    Args:
        resolve: finds the bytes of a storage.

    Attributes:
        array_nodes: the node of each numpy array that was read, by the key of its storage.
    """

    def __init__(self, resolve: StorageResolver) -> None:
        self._resolve = resolve
        self.array_nodes: dict[str, Instance] = {}
        self._known: dict[int, StoredTensor | None] = {}
        self._named: dict[int, tuple[DType, Storage] | None] = {}
        self._depth = 0
        self._storages: dict[tuple[str, DType, tuple[str, int, int] | None], Storage] = {}

    def read(self, node: Node) -> StoredTensor | None:
        """Return the tensor that a node stands for; None where it stands for something else.

        Raises:
            CorruptFileError: a tensor whose facts contradict each other or reach outside of its storage.
        """
        if not isinstance(node, Instance):
            return None
        place = id(node)
        if place in self._known:
            return self._known[place]
        self._known[place] = None  # a hostile file can nest a tensor in itself
        tensor = self._known[place] = self._read(node)
        return tensor

    def read_named(self, name: str, node: Node) -> StoredTensor | None:
        """Read a tensor; errors name it. See :meth:`read`."""
        try:
            return self.read(node)
        except BntoolError as error:
            error.tensor = error.tensor or name
            raise

    def find_storage(self, node: Node) -> tuple[DType, Storage] | None:
        """Return the storage that a persistent id names, and the type of its elements; None where it names something
        else.

        Raises:
            CorruptFileError: the file has no such storage.
        """
        place = id(node)
        if place in self._named:
            return self._named[place]
        reference = read_storage_reference(node)
        found = self._named[place] = reference and (reference.dtype, self._storage(reference))
        return found

    def mark_parameter(self, node: Node) -> StoredTensor | None:
        """Read a tensor that is a parameter although its node does not say so; see :meth:`read`."""
        tensor = self.read(node)
        if tensor is None or tensor.is_parameter:
            return tensor
        self._known[id(node)] = dataclasses.replace(tensor, is_parameter=True)
        return self._known[id(node)]

    def is_array(self, tensor: StoredTensor) -> bool:
        """Return whether a tensor was read from a numpy array, which may lie among tensors of torch."""
        return bool(self.array_nodes) and tensor.storage is not None and tensor.storage.key in self.array_nodes

    def _read(self, node: Instance) -> StoredTensor | None:
        self._depth += 1
        try:
            if self._depth > MAX_NESTING:
                raise CorruptFileError("a tensor of the pickle is nested in itself, or too deeply")
            if node.path == _PLAIN and isinstance(node.arguments, tuple):  # nearly all
                return self._strided("_rebuild_tensor_v2", node.arguments)
            return self._rebuild(node)
        except (IndexError, TypeError, ValueError) as error:
            raise CorruptFileError("a tensor of the pickle is malformed") from error
        finally:
            self._depth -= 1

    def _rebuild(self, node: Instance) -> StoredTensor | None:  # noqa: PLR0911 (one for each function)
        path, arguments = node.path, node.arguments
        if path in _STORAGELESS:
            return _storageless(path, arguments)
        if path in _WRAPPERS or path in _NEW:
            return self._wrapped(node)
        if not path.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")):
            return None
        if not isinstance(arguments, tuple):
            raise CorruptFileError("a tensor of the pickle is malformed")
        name = path.rpartition(".")[2]
        if name in ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_tensor_v3"):
            return self._strided(name, arguments)
        if name == "_rebuild_qtensor":
            return dataclasses.replace(self._strided("_rebuild_tensor", arguments[:4]), wrapper="quantized")
        if name in ("_rebuild_sparse_tensor", "_rebuild_sparse_csr_tensor"):
            return self._sparse(arguments[1])
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            inner = self.read(arguments[0])
            return inner and dataclasses.replace(inner, is_parameter=True, requires_grad=bool(arguments[1]))
        if name == "_rebuild_from_type_v2":
            return self._subclass(arguments)
        return None

    def _wrapped(self, node: Instance) -> StoredTensor | None:
        """Return a tensor given to a class: ``Parameter(tensor)``, as whole modules of torch 0.1 to 0.3 have it."""
        kind, arguments = node.path, node.arguments
        if kind in _NEW and isinstance(arguments, tuple) and arguments and isinstance(arguments[0], Global):
            kind, arguments = arguments[0].path, arguments[1:]
        if kind not in _WRAPPERS or not isinstance(arguments, tuple) or not arguments:
            return None
        inner = self.read(arguments[0])
        if inner is None:
            return None
        is_parameter = kind.endswith(".Parameter")
        state = node.state  # (requires_grad, volatile, hooks) in files of torch 0.1 to 0.3
        recorded = state[0] if isinstance(state, tuple) and state else is_parameter
        gradient = arguments[1] if len(arguments) > 1 else recorded
        return dataclasses.replace(inner, is_parameter=is_parameter, requires_grad=bool(gradient))

    def _strided(self, rebuild: str, arguments: tuple[Node, ...]) -> StoredTensor:
        found = self.find_storage(arguments[0])
        offset, shape, strides = arguments[1:4]
        if found is None and isinstance(arguments[0], Instance) and arguments[0].path == _BY_PICKLE:
            raise UnknownFormatError(
                "its tensors were written by pickle, which puts a file of torch into each, and not by torch.save; "
                "where you trust it, load it and give its state dict to torch.save"
            )
        if found is None or not _is_count(offset) or not _are_counts(shape) or not _are_counts(strides):
            raise CorruptFileError("a tensor of the pickle is malformed: storage, offset, size or stride")
        dtype, storage = found
        metadata: Node = arguments[6] if rebuild == "_rebuild_tensor_v2" and len(arguments) > 6 else None
        if rebuild == "_rebuild_tensor_v3":
            dtype = _dtype_of(arguments[6])
            metadata = arguments[7] if len(arguments) > 7 else None
        tensor = StoredTensor(
            dtype=dtype,
            shape=tuple(shape),
            strides=tuple(strides),
            storage_offset=offset,
            storage=storage,
            requires_grad=bool(arguments[4]) if len(arguments) > 4 else False,
            wrapper="conjugate or negative view" if metadata is not None else None,
        )
        tensor.check_bounds("")
        return tensor

    def _sparse(self, parts: Node) -> StoredTensor:
        """Return the dtype of its values, which come last of its tensors, and its size."""
        nodes = parts[:8] if isinstance(parts, tuple | list) else ()
        tensors = [tensor for tensor in map(self.read, nodes) if tensor is not None]
        sizes = [size for size in map(as_shape, nodes) if size is not None]
        shape = sizes[-1] if sizes else ()
        return StoredTensor(tensors[-1].dtype, shape, contiguous_strides(shape), 0, None, wrapper="sparse")

    def _storage(self, reference: StorageReference) -> Storage:
        key = (reference.key, reference.dtype, reference.view)
        storage = self._storages.get(key)
        if storage is None:
            storage = self._storages[key] = self._resolve(reference)
        return storage

    def _subclass(self, arguments: tuple[Node, ...]) -> StoredTensor | None:
        function, kind, inner_arguments = arguments[:3]
        if not isinstance(function, Global):
            raise CorruptFileError("a tensor subclass of the pickle is malformed")
        inner = self._read(Instance(function, inner_arguments, construction=Construction.REDUCE))
        if inner is None or not isinstance(kind, Global) or kind.path in _PLAIN_SUBCLASSES:
            return inner
        return dataclasses.replace(inner, wrapper=kind.path)


def _are_counts(values: Node) -> bool:
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMENSIONS:
        return False
    for value in values:  # noqa: SIM110 (many thousands of short ones, for which a generator takes twice as long)
        if type(value) is not int or not 0 <= value < 1 << 63:
            return False
    return True


def as_shape(node: Node) -> tuple[int, ...] | None:
    """Return a tuple of counts, bare or as torch.Size; None for anything else."""
    if isinstance(node, Instance) and node.path == "torch.Size" and isinstance(node.arguments, tuple):
        node = node.arguments[0] if node.arguments else ()
    return tuple(node) if isinstance(node, tuple) and _are_counts(node) else None


def _dtype_of(node: Node) -> DType:
    dtype = BY_NAME.get(node.name) if isinstance(node, Global) else None
    if dtype is None:
        raise CorruptFileError("a tensor of the pickle has an unknown dtype")
    return dtype


def _storageless(path: str, arguments: Node) -> StoredTensor:
    """Return a tensor that is shown but never interpreted: its dtype and shape as far as they are plain to see."""
    values = arguments if isinstance(arguments, tuple) else ()
    dtypes = [BY_NAME[v.name] for v in values if isinstance(v, Global) and v.module == "torch" and v.name in BY_NAME]
    shapes = [shape for shape in map(as_shape, values) if shape is not None]
    shape = shapes[0] if shapes else ()
    return StoredTensor(
        dtype=dtypes[0] if dtypes else BY_NAME["float32"],
        shape=shape,
        strides=contiguous_strides(shape),
        storage_offset=0,
        storage=None,
        wrapper=_STORAGELESS[path],
    )
