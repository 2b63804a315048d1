"""Plain pickles of numpy arrays: the model zoo of detectron2, Caffe2 blobs, Paddle, whatever pickle.dump wrote."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.checkpoint import (
    Checkpoint,
    Format,
    GlobalName,
    GlobalTrust,
    LoadingCode,
    NotUnderstood,
    StateDict,
)
from bntool.checkpoints.containers.pickles.nodes import Node, as_mapping, is_mapping
from bntool.checkpoints.containers.pickles.reading import read_pickle
from bntool.checkpoints.containers.pickles.trust import list_globals
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.tensors import Storage
from bntool.checkpoints.torch.arrays import ArrayReader
from bntool.checkpoints.torch.modules import StateDictSource
from bntool.checkpoints.torch.state_dicts import TorchContent, find_state_dicts
from bntool.checkpoints.torch.tensors import StorageReference
from bntool.errors import CorruptFileError, UnknownFormatError

# Caffe2's names as detectron2 reads them (detectron2/checkpoint/c2_model_loading.py)
_CAFFE2_ENDINGS = {
    "bn_s": "bn.weight",
    "bn_b": "bn.bias",
    "bn_rm": "bn.running_mean",
    "bn_riv": "bn.running_var",
}
_PADDLE_STATISTICS = {"_mean": "running_mean", "_variance": "running_var"}
# in a program, which names parameters after the operator that reads them, and counts those
_PADDLE_PROGRAMS = {"w_0": "weight", "b_0": "bias", "w_1": "running_mean", "w_2": "running_var"}
_PADDLE_LAYER = r"(?:^|/)(?:sync_)?batch_norm(?:[123]d)?_\d+$"
_PADDLE_NAMES = "StructuredToParameterName@@"
_PADDLE_PARTS = "UnpackBigParamInfor@@"  # tensors of Paddle cut into parts


class NumpyPickle(Format):
    """A plain pickle of numpy arrays."""

    name = "numpy-pickle"
    title = "pickle of numpy arrays"
    has_records = False
    writer = "torch.numpy_pickle_writing:write"
    loading = LoadingCode(
        ("import pickle", "arrays = pickle.load(open({path}, 'rb'), encoding='latin1')  # runs code of the file")
    )

    def recognises(self, path: Location, head: bytes) -> bool:
        return (head[:1] == b"\x80" and head[1:2] <= b"\x05") or path.suffix in (".pkl", ".pickle")

    def read(self, file: SourceFile) -> Checkpoint:
        pickle = read_pickle(file)
        reader = ArrayReader(_no_storage)
        found = find_state_dicts(pickle.root, reader)
        entries: Mapping[str, object] = as_mapping(pickle.root) if is_mapping(pickle.root) else {}
        state_dicts, is_paddle = [], False
        for state_dict in found.state_dicts:
            paddle = _name_paddle(state_dict.tensors)
            is_paddle |= _PADDLE_NAMES in entries or any(name != new for name, new in paddle.items())
            names = {name: _translate(new) for name, new in paddle.items()}
            if state_dict.key == "":
                entries = {names.get(name, name): value for name, value in entries.items()}
            state_dicts.append(_rename(state_dict, found.sources[state_dict.key], names))
        if not reader.array_nodes:
            raise UnknownFormatError(_describe_other_pickle(list_globals(pickle)))
        return Checkpoint(
            file=file,
            format=Paddle() if is_paddle else self,
            state_dicts=tuple(state_dicts),
            entries=entries,
            globals=list_globals(pickle),
            not_understood=(*found.not_understood, *_find_parts(pickle.root)),
            content=TorchContent(pickle, reader, found.sources),
        )


class Paddle(NumpyPickle):
    """A file that paddle.save wrote."""

    def describe_assumptions(self, state_dict: StateDict) -> Sequence[str]:
        matrices = [name for name, tensor in state_dict.tensors.items() if len(tensor.shape) == 2]
        if not matrices:
            return ()
        more = f" and {len(matrices) - 1} more" if len(matrices) > 1 else ""
        which = f"{matrices[0]}{more} {'are' if more else 'is'} not of a Linear"
        return (f"{which}, whose weight Paddle keeps as (in, out) and PyTorch as (out, in): it would be transposed",)


def _no_storage(reference: StorageReference) -> Storage:
    raise CorruptFileError(f"the pickle of numpy arrays names a torch storage {quote(reference.key)}")


def _describe_other_pickle(globals_: Iterable[GlobalName]) -> str:
    what = "this is a pickle that torch.save did not write, and no numpy array has a name in it"
    suspicious = [name.path for name in globals_ if name.trust is GlobalTrust.SUSPICIOUS]
    return what + (
        f"; it names {quote(suspicious[0])}, which can run code or reach files: do not unpickle it"
        if suspicious
        else ""
    )


def _name_paddle(names: Iterable[str]) -> dict[str, str]:
    """Return PyTorch's names for the statistics of Paddle's BatchNorms."""
    found = {name: name for name in names}
    for name in found:
        layer, _, leaf = name.rpartition(".")
        if leaf in _PADDLE_STATISTICS and all(_join(layer, one) in found for one in _PADDLE_STATISTICS):
            found[name] = _join(layer, _PADDLE_STATISTICS[leaf])
        elif leaf in _PADDLE_PROGRAMS and re.search(_PADDLE_LAYER, layer) and f"{layer}.w_2" in found:
            found[name] = f"{layer}.{_PADDLE_PROGRAMS[leaf]}"
    return found


def _find_parts(root: Node) -> Iterator[NotUnderstood]:
    if _PADDLE_PARTS in as_mapping(root):
        yield NotUnderstood(_PADDLE_PARTS, "tensors that Paddle cut into parts are not put together", left_out=True)


def _join(layer: str, leaf: str) -> str:
    return f"{layer}.{leaf}" if layer else leaf


def _rename(state_dict: StateDict, source: StateDictSource, names: Mapping[str, str]) -> StateDict:
    """Return the state dict under other names, where they change and none comes twice."""
    if all(name == new for name, new in names.items()) or len(set(names.values())) < len(names):  # ambiguous
        return state_dict
    source.tensor_nodes = {names[name]: node for name, node in source.tensor_nodes.items()}
    tensors = {names[name]: tensor for name, tensor in state_dict.tensors.items()}
    return dataclasses.replace(state_dict, tensors=tensors, stored=tensors)


def _translate(name: str) -> str:
    """Return PyTorch's name for a tensor of Caffe2's BatchNorm; the names of other tensors stay."""
    stem, underscore, ending = name.rpartition("_")
    layer, _, last = stem.rpartition("_")
    new = _CAFFE2_ENDINGS.get(f"{last}_{ending}")
    return f"{layer}_{new}" if underscore and layer and new else name
