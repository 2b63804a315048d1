"""``flax_model.msgpack`` and other files of ``flax.serialization.to_bytes``: nested maps with arrays in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import Checkpoint, Format, Loader, LoadingCode, StateDict
from bntool.checkpoints.containers.msgpack import MAX_DEPTH, Bytes, Extension, read_msgpack
from bntool.checkpoints.dtypes import BY_NAME
from bntool.checkpoints.files import ByteSource, JoinedSource, SourceFile
from bntool.checkpoints.other_names import PARAMETERS, STATISTICS, translate
from bntool.checkpoints.tensors import MAX_DIMENSIONS, Storage, StoredTensor, contiguous_strides
from bntool.errors import BntoolError, CorruptFileError, OtherFormatError, UnsafeFileError

_ENDING = ".msgpack"
_ARRAY, _SCALAR = 1, 3  # extensions of flax.serialization
_CHUNKED = "__msgpack_chunked_array__"  # arrays above a gigabyte
_OPTIMIZERS = ("opt_state", "optimizer", "optimizer_state")
_MAX_STATE_DICTS = 1000
_MAX_CHUNKS = 1 << 16


class Flax(Format):
    """Arrays of Flax; they are only read."""

    name = "flax"
    title = "Flax (.msgpack)"
    has_records = False
    is_pytorch = False
    loader = Loader.JAX
    loading = LoadingCode(("import flax", "variables = flax.serialization.msgpack_restore(open({path}, 'rb').read())"))
    read_only = (
        "a file of Flax holds arrays without the graph that uses them, in Flax's layout: bntool inspects and compares "
        "it; change the model in Flax, or load it into one of PyTorch (from_flax=True in transformers) and fold that"
    )

    def recognises(self, path: Location, head: bytes) -> bool:
        """Tell a map whose first key is a text by its first bytes."""
        start = {0xDE: 3, 0xDF: 5}.get(head[0], 1)
        is_map = 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)
        key = head[start] if len(head) > start else 0
        return path.name.endswith(_ENDING) or (is_map and (0xA1 <= key <= 0xBF or key == 0xD9))

    def read(self, file: SourceFile) -> Checkpoint:
        try:
            root = read_msgpack(file)
        except CorruptFileError as error:
            if file.path.name.endswith(_ENDING):
                raise
            raise OtherFormatError("it is no msgpack") from error  # three bytes alone do not tell
        if not isinstance(root, dict):
            raise OtherFormatError("it holds no map")
        arrays = _Arrays(file)
        state_dicts = [_make_state_dict(key, found) for key, found in _find_models(root, arrays)]
        if not arrays.count:
            raise OtherFormatError("it holds no arrays of Flax")
        entries = {str(key): _describe(value) for key, value in root.items() if key not in (PARAMETERS, STATISTICS)}
        if type(root.get("step")) is int:
            entries["global_step"] = root["step"]
        if any(name in root for name in _OPTIMIZERS):
            entries["optimizer"] = "left out"
        return Checkpoint(file, self, tuple(state_dicts), entries=entries)

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:
        return ("Flax",) if checkpoint.state_dicts else ()


def _describe(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else "a map or an array"


def _find_models(root: Mapping[Any, Any], arrays: _Arrays) -> Iterator[tuple[str, dict[tuple[str, ...], StoredTensor]]]:
    """Yield the tensors of each model by their paths: where ``params`` or ``batch_stats`` lie, else all but an
    optimizer.

    Raises:
        CorruptFileError: an array is malformed.
        UnsafeFileError: there are absurdly many.
    """
    places = list(_find_places((), root, 0))
    if len(places) > _MAX_STATE_DICTS:
        raise UnsafeFileError(f"the file holds more than {_MAX_STATE_DICTS} state dicts")
    for path, node in places or [((), root)]:
        inside = {name: node[name] for name in (PARAMETERS, STATISTICS) if name in node} if places else node
        tensors = dict(_list_arrays((), inside, arrays, 0))
        if tensors:
            yield ".".join(path), tensors
    for name, node in root.items():
        if places and isinstance(node, dict) and str(name).startswith("ema"):
            tensors = dict(_list_arrays((), node, arrays, 0))
            if tensors:
                yield str(name), tensors


def _find_places(path: tuple[str, ...], node: Any, depth: int) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    if not isinstance(node, dict) or depth > MAX_DEPTH:
        return
    if any(isinstance(node.get(name), dict) for name in (PARAMETERS, STATISTICS)):
        yield path, node
        return
    for name, inner in node.items():
        if name not in _OPTIMIZERS:
            yield from _find_places((*path, str(name)), inner, depth + 1)


def _list_arrays(
    path: tuple[str, ...], node: Any, arrays: _Arrays, depth: int
) -> Iterator[tuple[tuple[str, ...], StoredTensor]]:
    try:
        tensor = arrays.read("/".join(path), node)
    except BntoolError as error:
        error.tensor = error.tensor or "/".join(path)
        raise
    if tensor is not None:
        yield path, tensor
    elif isinstance(node, dict):
        for name, inner in node.items():
            if path or name not in _OPTIMIZERS:
                yield from _list_arrays((*path, str(name)), inner, arrays, depth + 1)


def _make_state_dict(key: str, found: Mapping[tuple[str, ...], StoredTensor]) -> StateDict:
    """Return statistics beside the parameters of their layers, in PyTorch's words."""
    translation = translate({"/".join(path): path for path in found})
    tensors = {translation.names["/".join(path)]: tensor for path, tensor in found.items()}
    layers: dict[str, None] = {}
    for name in tensors:
        layers.setdefault(name.rpartition(".")[0])
    order = {layer: place for place, layer in enumerate(layers)}
    tensors = dict(sorted(tensors.items(), key=lambda item: order[item[0].rpartition(".")[0]]))
    return StateDict(key, "", tensors, modules=translation.modules, renamed=translation.names)


class _Arrays:
    """Reads the extensions of flax.serialization as tensors; each element stays in the file."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self.count = 0

    def read(self, name: str, node: Any) -> StoredTensor | None:
        """Return the array that a value is; None for another value."""
        if isinstance(node, Extension) and node.type in (_ARRAY, _SCALAR):
            self.count += 1
            return self._read_array(name, node)
        if isinstance(node, dict) and node.get(_CHUNKED) is True:
            return self._read_chunked(name, node)
        return None

    def _read_array(self, name: str, node: Extension) -> StoredTensor:
        parts = read_msgpack(self._file, offset=node.offset, end=node.offset + node.length)
        if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[2], Bytes):
            raise CorruptFileError("an array of Flax is malformed")
        shape, kind, data = parts
        if not isinstance(shape, list) or not isinstance(kind, str):
            raise CorruptFileError("an array of Flax is malformed")
        source: ByteSource = self._file
        return _make_tensor(name, shape, kind, Storage(source, data.offset, data.length, key=name))

    def _read_chunked(self, name: str, node: Mapping[Any, Any]) -> StoredTensor:
        shape, chunks = (_as_list(node.get(part)) for part in ("shape", "chunks"))
        if shape is None or not chunks or len(chunks) > _MAX_CHUNKS:
            raise CorruptFileError("an array of Flax in chunks is malformed")
        pieces = [self.read(name, chunk) for chunk in chunks]
        found = [piece for piece in pieces if piece is not None and piece.storage is not None]
        if len(found) != len(chunks) or len({piece.dtype for piece in found}) > 1:
            raise CorruptFileError("an array of Flax in chunks is malformed")
        places = [(piece.storage.offset, piece.storage.nbytes) for piece in found if piece.storage is not None]
        source = JoinedSource(self._file, places)
        return _make_tensor(name, shape, found[0].dtype.name, Storage(source, 0, source.size, key=name))


def _as_list(node: Any) -> list[Any] | None:
    """Read what ``flax.serialization`` writes of a tuple, a map from its numbers as texts; None for anything else."""
    if isinstance(node, dict) and list(node) == [str(number) for number in range(len(node))]:
        return list(node.values())
    return None


def _make_tensor(name: str, shape: Sequence[Any], kind: str, storage: Storage) -> StoredTensor:
    if len(shape) > MAX_DIMENSIONS or not all(type(extent) is int and extent >= 0 for extent in shape):
        raise CorruptFileError("an array of Flax has an impossible shape")
    dtype = BY_NAME.get(kind)
    if dtype is None:
        raise CorruptFileError(f"an array of Flax has elements of an unknown type: {kind[:40]!r}")
    tensor = StoredTensor(dtype, tuple(shape), contiguous_strides(shape), 0, storage)
    if tensor.nbytes != storage.nbytes:
        raise CorruptFileError(f"an array of Flax of {tensor.nbytes} bytes has {storage.nbytes} in the file")
    tensor.check_bounds(name)
    return tensor
