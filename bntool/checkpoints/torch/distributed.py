"""Folders of torch.distributed.checkpoint: ``.metadata`` says which tensor lies where in the ``.distcp`` files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Content, Format, GlobalName, GlobalTrust
from bntool.checkpoints.containers.pickles.nodes import (
    Construction,
    Dict,
    ExtensionCode,
    Global,
    Instance,
    LongBytes,
    Node,
    PersistentId,
    Set,
    Update,
    as_mapping,
    iterate_pairs,
    text_of,
)
from bntool.checkpoints.containers.pickles.reading import Pickle, read_pickle
from bntool.checkpoints.containers.pickles.trust import list_globals
from bntool.checkpoints.dtypes import BY_NAME
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.tensors import Storage, StoredTensor
from bntool.checkpoints.torch.distributed_pieces import FolderReader, Item, Piece, assemble
from bntool.checkpoints.torch.state_dicts import find_state_dicts
from bntool.checkpoints.torch.tensors import StorageReference, TensorReader, as_shape
from bntool.errors import CorruptFileError, OtherFormatError, UnsafeFileError

METADATA = ".metadata"
MAX_OBJECTS = 10_000  # pickled objects beside the tensors
MAX_PLACES = 1_000_000
_MODULE = "torch.distributed.checkpoint.metadata."
_TENSOR, _BYTES = f"{_MODULE}TensorStorageMetadata", f"{_MODULE}BytesStorageMetadata"


@dataclass(frozen=True)
class FolderContent(Content):
    """The files of the folder."""

    folder: FolderReader


class Distributed(Format):
    """A folder of torch.distributed.checkpoint; it is only read."""

    name = "distributed"
    title = "torch.distributed.checkpoint"
    has_records = False
    read_only = (
        "folders of torch.distributed.checkpoint are read, not written; make one file of it with "
        "bntool convert CKPT --to torch -o NEW, and work on that"
    )

    def locate(self, path: Path) -> Path | None:
        inside = path / METADATA
        return inside if inside.is_file() else None

    def recognises(self, path: Location, head: bytes) -> bool:
        return path.name == METADATA and head[:1] == b"\x80"

    def check_unchanged(self, checkpoint: Checkpoint) -> None:
        super().check_unchanged(checkpoint)
        FolderContent.of(checkpoint).folder.check_unchanged()

    def read(self, file: SourceFile) -> Checkpoint:
        pickle = read_pickle(file)
        root = pickle.root
        if not isinstance(root, Instance) or root.path != f"{_MODULE}Metadata":
            raise OtherFormatError("this .metadata was not written by torch.distributed.checkpoint")
        content = _state(root)
        items = _read_items(content.get("storage_data"))
        folder = FolderReader(file)
        reader = _LeafReader()
        tree = _build_tree(content, items, folder, reader)
        state_dicts = find_state_dicts(tree, reader).state_dicts
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=state_dicts,
            entries=as_mapping(tree),
            globals=(*list_globals(pickle, *_read_objects(content, items, folder)), *_name_unread(content, items)),
            content=FolderContent(folder),
        )


class _LeafReader(TensorReader):
    """Knows the tensors of the leaves of the tree."""

    def __init__(self) -> None:
        super().__init__(_no_storage)
        self.tensors: dict[int, tuple[Instance, StoredTensor]] = {}  # by id of the leaf, which must stay alive

    def read(self, node: Node) -> StoredTensor | None:
        found = self.tensors.get(id(node))
        return found[1] if found is not None else None


def _no_storage(reference: StorageReference) -> Storage:
    raise CorruptFileError(f"the metadata names a storage {quote(reference.key)}")


_Items = Mapping[tuple[str, tuple[int, ...] | None], Item]


def _read_items(node: Node) -> dict[tuple[str, tuple[int, ...] | None], Item]:
    """Find where each piece of each tensor, and each object, lies: by its name and its first index."""
    items: dict[tuple[str, tuple[int, ...] | None], Item] = {}
    for number, (key, value) in enumerate(iterate_pairs(node)):
        index, place = _state(key), _state(value)
        name, path = text_of(index.get("fqn")), text_of(place.get("relative_path"))
        offset, length = place.get("offset"), place.get("length")
        if number >= MAX_PLACES:
            raise UnsafeFileError(f"the metadata names more than {MAX_PLACES} places")
        if name is None or path is None or type(offset) is not int or type(length) is not int:
            raise CorruptFileError("the places of the tensors are malformed")
        first = index.get("offset")
        offsets = as_shape(first)
        if first is not None and offsets is None:
            raise CorruptFileError("the places of the tensors are malformed", tensor=name)
        items[name, offsets] = Item(path, offset, length, is_transformed=_is_true(place.get("transform_descriptors")))
    return items


def _is_true(node: Node) -> bool:
    """Return whether Python takes the value for true, as torch does to tell what is transformed.

    Raises:
        UnsafeFileError: it is an object of which that is not known.
    """
    if isinstance(node, Dict):
        return bool(node.pairs)
    if isinstance(node, Set):
        return bool(node.members)
    if isinstance(node, LongBytes):
        return node.length > 0
    if isinstance(node, Instance | Global | PersistentId | ExtensionCode):
        raise UnsafeFileError("the metadata leaves open which parts of the folder are transformed")
    return bool(node)


def _state(node: Node) -> Mapping[str, Node]:
    """Return the attributes of one of the objects that the metadata is made of.

    Raises:
        UnsafeFileError: they are set several times, so that they are not those of the last time only.
    """
    if not isinstance(node, Instance):
        return {}
    if sum(update is Update.STATE for update, _ in node.updates) > 1:
        raise UnsafeFileError("the metadata sets the attributes of an object several times")
    return as_mapping(node.state)


def _build_tree(content: Mapping[str, Node], items: _Items, folder: FolderReader, reader: _LeafReader) -> Dict:
    """Return the nested mappings that were saved: the planner keeps the path of each flattened name."""
    paths = as_mapping(content.get("planner_data"))
    root = Dict()
    children: dict[tuple[int, str], Dict] = {}
    leaves: set[tuple[int, str]] = set()
    for name, node in as_mapping(content.get("state_dict_metadata")).items():
        path = paths.get(name)
        parts = [str(part) for part in path] if isinstance(path, tuple) and path else [name]
        if len(parts) > 100:
            raise UnsafeFileError(f"the metadata holds a name of {len(parts)} parts")
        place = root
        for part in parts[:-1]:
            key = (id(place), part)
            if key not in children:
                children[key] = Dict()
                place.pairs.append((part, children[key]))
            place = children[key]
        leaf = Instance(Global("", name), (), construction=Construction.REDUCE)
        if (id(place), parts[-1]) in leaves:
            raise CorruptFileError("two tensors of the metadata have one name", tensor=name)
        leaves.add((id(place), parts[-1]))
        place.pairs.append((parts[-1], leaf))
        if isinstance(node, Instance) and node.path == _TENSOR:
            reader.tensors[id(leaf)] = (leaf, _read_tensor(name, _state(node), items, folder))
    return root


def _read_tensor(name: str, facts: Mapping[str, Node], items: _Items, folder: FolderReader) -> StoredTensor:
    properties = facts.get("properties")
    state = properties.state if isinstance(properties, Instance) else None
    dtype_node = state[0] if isinstance(state, tuple) and state else as_mapping(state).get("dtype")
    dtype = BY_NAME.get(dtype_node.name) if isinstance(dtype_node, Global) else None
    shape, chunks = as_shape(facts.get("size")), facts.get("chunks")
    if dtype is None or shape is None or not isinstance(chunks, list):
        raise CorruptFileError("the metadata of this tensor is malformed", tensor=name)
    pieces = []
    for chunk in chunks:
        offsets, sizes = as_shape(_state(chunk).get("offsets")), as_shape(_state(chunk).get("sizes"))
        if offsets is None or sizes is None or len(offsets) != len(shape) or len(sizes) != len(shape):
            raise CorruptFileError("the pieces of this tensor are malformed", tensor=name)
        item = items.get((name, offsets)) or (items.get((name, None)) if len(chunks) == 1 else None)
        if item is None:
            raise CorruptFileError("the metadata does not say where this tensor lies", tensor=name)
        pieces.append(Piece(folder, item, dtype, offsets, sizes))
    return assemble(name, dtype, shape, pieces)


def _name_objects(content: Mapping[str, Node], items: _Items) -> list[str]:
    """Return the names of what is no tensor.

    Raises:
        UnsafeFileError: absurdly many, or an entry of which it is not certain what torch takes it for.
    """
    names = []
    for key, node in iterate_pairs(content.get("state_dict_metadata")):
        name, path = text_of(key), node.path if isinstance(node, Instance) else ""
        if name is None or path not in (_TENSOR, _BYTES):
            raise UnsafeFileError("the metadata describes something that is neither a tensor nor an object")
        if path == _BYTES and (name, None) in items:
            names.append(name)
    if len(names) > MAX_OBJECTS:
        raise UnsafeFileError(f"the metadata names more than {MAX_OBJECTS} objects")
    return names


def _name_unread(content: Mapping[str, Node], items: _Items) -> list[GlobalName]:
    """Return objects that loading the folder unpickles and that are compressed or otherwise transformed."""
    names = [name for name in _name_objects(content, items) if items[name, None].is_transformed]
    return [GlobalName(f"{name} (transformed)", called=True, trust=GlobalTrust.UNKNOWN) for name in names]


def _read_objects(content: Mapping[str, Node], items: _Items, folder: FolderReader) -> list[Pickle]:
    """Return the pickles of what is no tensor: loading the folder unpickles them too."""
    places = [items[name, None] for name in _name_objects(content, items)]
    return [folder.read_object(item) for item in places if not item.is_transformed]
