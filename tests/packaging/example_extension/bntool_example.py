"""An example of both things that a package can offer bntool: a format (GGUF) and a graph source.

GGUF is the file format of ggml's programs (llama.cpp, whisper.cpp): a header, texts and numbers under keys, a table of
tensors, and the tensors. What is read here is version 2 and 3, little-endian; quantised tensors are named, not read.
"""

from __future__ import annotations

import struct
from pathlib import Path

from bntool.checkpoints.checkpoint import Checkpoint, Format, LoadingCode, NotUnderstood, StateDict
from bntool.checkpoints.dtypes import BY_NAME
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.state_dicts import find_prefix
from bntool.checkpoints.tensors import Storage, StoredTensor, Tensor, contiguous_strides, count_elements
from bntool.errors import CorruptFileError
from bntool.graphs.declared import declare, read_pairs
from bntool.graphs.graph import Evidence, ModelGraph
from bntool.graphs.sources import GraphSource, Knowledge

_DTYPES = {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16"}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MAX_NAMES = 1 << 20  # tensors, keys and elements of lists that a header may claim


class _Header:
    """The header of a file, read from the front."""

    def __init__(self, file: SourceFile) -> None:
        self.file, self.position = file, 0

    def take(self, code: str) -> int:
        size = struct.calcsize(code)
        (value,) = struct.unpack(f"<{code}", self.file.read(self.position, size))
        self.position += size
        return value

    def count(self) -> int:
        number = self.take("Q")
        if number > _MAX_NAMES:
            raise CorruptFileError(f"the header claims {number} entries")
        return number

    def text(self) -> str:
        length = self.count()
        data = self.file.read(self.position, length)
        self.position += length
        return data.decode("utf-8", errors="replace")

    def value(self, kind: int) -> object:
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            inner = self.take("I")
            if inner == _LIST:
                raise CorruptFileError("the header holds lists of lists")
            return [self.value(inner) for _ in range(self.count())]
        if kind not in _NUMBERS:
            raise CorruptFileError(f"the header holds a value of the unknown type {kind}")
        return self.take(_NUMBERS[kind])


class Gguf(Format):
    """A GGUF file."""

    name = "gguf"
    title = "GGUF"
    read_only = "GGUF files are only read: convert the checkpoint that this was made from"
    loading = LoadingCode(("from gguf import GGUFReader", "tensors = GGUFReader({path}).tensors"))

    def recognises(self, path: Path, head: bytes) -> bool:
        return head.startswith(b"GGUF")

    def read(self, file: SourceFile) -> Checkpoint:
        header = _Header(file)
        header.position = 4
        if header.take("I") not in (2, 3):
            raise CorruptFileError("it is of a version of GGUF that is not known")
        tensor_count, key_count = header.count(), header.count()
        entries = {header.text(): header.value(header.take("I")) for _ in range(key_count)}
        found = [self._read_entry(header) for _ in range(tensor_count)]
        alignment = entries.get("general.alignment", 32)
        start = -(-header.position // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        quantised: list[NotUnderstood] = []
        for name, shape, kind, offset in found:
            if kind not in _DTYPES:
                quantised.append(NotUnderstood(name, f"a quantised tensor of GGUF's type {kind}"))
                continue
            dtype = BY_NAME[_DTYPES[kind]]
            storage = Storage(file, start + offset, dtype.byte_count(count_elements(shape)), key=name)
            if storage.offset + storage.nbytes > file.size:
                raise CorruptFileError("the file ends before its data", tensor=name)
            tensors[name] = StoredTensor(dtype, shape, contiguous_strides(shape), 0, storage)
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=(StateDict("", find_prefix(list(tensors)), tensors),) if tensors else (),
            entries=entries,
            not_understood=tuple(quantised),
        )

    @staticmethod
    def _read_entry(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = header.text(), header.take("I")
        if dimensions > 4:
            raise CorruptFileError(f"it claims {dimensions} dimensions", tensor=name)
        shape = tuple(header.take("Q") for _ in range(dimensions))[::-1]  # the fastest comes first
        return name, shape, header.take("I"), header.take("Q")


def _read_pairs_beside(known: Knowledge) -> ModelGraph | None:
    """The pairs of ``model.pairs`` for ``model.pt``, in the form that ``--pair @FILE`` takes."""
    if known.checkpoint is None:
        return None
    path = known.checkpoint.file.path.with_suffix(".pairs")
    return declare(known.state_dict, read_pairs([f"@{path}"])) if path.is_file() else None


PAIRS_BESIDE_THE_FILE = GraphSource(Evidence.DECLARED, _read_pairs_beside)
