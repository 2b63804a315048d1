"""Nodes of numpy arrays with other elements, and of new arrays, for a pickle that is written anew."""

from __future__ import annotations

from bntool.checkpoints.containers.pickles.nodes import (
    ByteString,
    Construction,
    Global,
    Instance,
    LongBytes,
    Node,
    Update,
)
from bntool.checkpoints.dtypes import NUMPY_CODES, DType, NumberKind
from bntool.checkpoints.tensors import StoredTensor, Tensor, read_bytes
from bntool.checkpoints.torch.arrays import FROM_BUFFER

_CODE_OF = {name: code for code, name in NUMPY_CODES.items()}


def replace_data(node: Instance, stored: StoredTensor, new: Tensor) -> Instance:
    """Copy an array's node with other elements, laid out as before."""
    if stored.is_contiguous and stored.storage is not None and not stored.storage.big_endian:
        data = read_bytes(new)
    else:
        from bntool.checkpoints import arrays

        _, data = arrays.place_in_span(stored, new)
    copy = Instance(node.constructor, node.arguments, construction=node.construction, keywords=node.keywords)
    if node.path in FROM_BUFFER:
        copy.arguments = (_pack(data, like=node.arguments[0]), *node.arguments[1:])
        copy.updates = list(node.updates)
    else:
        copy.updates = [(Update.STATE, (*node.state[:4], _pack(data, like=node.state[4])))]
    return copy


def make_array(tensor: Tensor, *, like: Instance) -> Instance:
    """Return a node of a new array.

    Args:
        like: the node of another array of the file, which shows how bytes are written there.
    """
    code = _CODE_OF[tensor.dtype.name]
    dtype = Instance(Global("numpy", "dtype"), (code, False, True), construction=Construction.REDUCE)
    order = "<" if tensor.dtype.kind is not NumberKind.BOOL and tensor.dtype.itemsize > 1 else "|"
    dtype.updates = [(Update.STATE, (3, order, None, None, None, -1, -1, 0))]
    example = like.arguments[0] if like.path in FROM_BUFFER else like.state[4]
    data = _pack(read_bytes(tensor), like=example)
    copy = Instance(like.constructor, like.arguments, construction=like.construction)
    if like.path in FROM_BUFFER:
        copy.arguments = (data, dtype, tensor.shape, "C")
    else:
        copy.updates = [(Update.STATE, (1, tensor.shape, dtype, False, data))]
    return copy


def can_hold(dtype: DType) -> bool:
    """Return whether numpy has the dtype."""
    return dtype.name in _CODE_OF


def _pack(data: bytes, *, like: Node) -> Node:
    """Return bytes in the form in which the file has bytes."""
    if isinstance(like, ByteString) or (isinstance(like, LongBytes) and like.opcode == 0x54):
        return ByteString(data)
    if isinstance(like, bytearray) or (isinstance(like, LongBytes) and like.opcode == 0x96):
        return bytearray(data)
    if isinstance(like, Instance):
        constructor = Global("_codecs", "encode")
        return Instance(constructor, (data.decode("latin-1"), "latin1"), construction=Construction.REDUCE)
    return data
