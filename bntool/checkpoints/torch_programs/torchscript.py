"""TorchScript archives: the modules of data.pkl, their classes as source text under code/, storages as torch.save's."""

from __future__ import annotations

from bntool.checkpoints.checkpoint import (
    Checkpoint,
    Format,
    GlobalName,
    GlobalTrust,
    LoadingCode,
    ModuleInfo,
    StateDict,
)
from bntool.checkpoints.containers.pickles.nodes import Dict, Instance, Node, as_mapping
from bntool.checkpoints.containers.zips.reading import ZipArchive, read_archive
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.state_dicts import find_prefix
from bntool.checkpoints.tensors import StoredTensor, Tensor
from bntool.checkpoints.torch.modules import MAX_DEPTH, MAX_EFFORT, MAX_PATH, StateDictSource, plain_attributes
from bntool.checkpoints.torch.tensors import TensorReader
from bntool.checkpoints.torch.zip import (
    ArchiveContent,
    ArchiveLayout,
    check_case,
    is_big_endian,
    read_loose_records,
    read_pickle_with_globals,
    resolve_storage,
)
from bntool.checkpoints.torch_programs.torchscript_code import ClassText, CodeReader
from bntool.errors import OtherFormatError, UnsafeFileError

RECORD_NAME = "extra/bntool.json"  # where torch.jit.save puts its _extra_files


class TorchScript(Format):
    """An archive of torch.jit.save; only elements of its tensors change."""

    name = "torchscript"
    title = "TorchScript"
    only_values = True
    writer = "torch.zip_writing:write_torchscript"
    holds_code = True
    loading = LoadingCode(("import torch", "model = torch.jit.load({path})  # runs code of the file"))
    why_empty = "torch.jit.freeze and torch.jit.optimize_for_inference make tensors constants of the code"

    def read(self, file: SourceFile) -> Checkpoint:
        archive = read_archive(file)
        root = find_root(archive, "constants.pkl")
        if root is None or f"{root}data.pkl" not in archive.records:
            raise OtherFormatError("the archive has no constants.pkl beside data.pkl")
        check_case(name for name in archive.records if not name.startswith(f"{root}code/"))
        layout = ArchiveLayout(archive, root, is_big_endian(archive, root), RECORD_NAME)
        pickle, named = read_pickle_with_globals(layout)
        reader = TensorReader(lambda reference: resolve_storage(layout, reference))
        state_dict, source = _ScriptReader(reader, CodeReader(archive, root)).read(pickle.root)
        return Checkpoint(
            file=file,
            format=self,
            state_dicts=(state_dict,) if state_dict.tensors else (),
            globals=tuple(map(_judge_own, named)),
            records=read_loose_records(layout),
            content=ArchiveContent(pickle, reader, {state_dict.key: source}, layout),
        )

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:
        return ArchiveContent.of(checkpoint).layout.archive.check_records()


def find_root(archive: ZipArchive, name: str) -> str | None:
    """Return the folder of an archive, with a slash, that holds a record of this name; None for none or several."""
    found = [record.removesuffix(name) for record in archive.records if record in (name, f"{_top(record)}/{name}")]
    return found[0] if len(found) == 1 else None


def _top(name: str) -> str:
    return name.partition("/")[0]


def _judge_own(name: GlobalName) -> GlobalName:
    """Judge a class of the archive's own code, which lies under ``__torch__``: loading it imports nothing."""
    is_own = name.trust is GlobalTrust.UNKNOWN and name.path.startswith("__torch__.")
    return name._replace(trust=GlobalTrust.KNOWN) if is_own else name


class _ScriptReader:
    """Walks the modules of data.pkl: the state of each holds tensors, submodules and attributes side by side."""

    def __init__(self, reader: TensorReader, code: CodeReader) -> None:
        self._reader = reader
        self._code = code
        self._effort = 0

    def read(self, root: Node) -> tuple[StateDict, StateDictSource]:
        """Return the tensors in the order of state_dict() of the loaded module, and where they lie in the pickle.

        Raises:
            CorruptFileError: a malformed tensor.
            UnsafeFileError: more modules, or deeper ones, than any model has.
        """
        source = StateDictSource(root)
        tensors: dict[str, Tensor] = {}
        modules: dict[str, ModuleInfo] = {}
        pending: list[tuple[str, Instance, frozenset[int]]] = [("", root, frozenset())] if _is_object(root) else []
        while pending:
            path, node, ancestors = pending.pop()
            if id(node) in ancestors:
                continue
            state = as_mapping(node.state)
            self._effort += 1 + len(state)
            if self._effort > MAX_EFFORT or len(ancestors) > MAX_DEPTH or len(path) > MAX_PATH:
                raise UnsafeFileError("the TorchScript model has an absurd size or depth")
            text = self._code.find(node.path)
            modules[path] = ModuleInfo(text.class_path, {**text.attributes, **plain_attributes(state)})
            source.module_nodes[path] = node
            dotted = f"{path}." if path else ""
            self._read_own_tensors(dotted, node, text, source, tensors)
            submodules = [(dotted + name, value) for name, value in state.items() if _is_object(value)]
            pending.extend((name, value, ancestors | {id(node)}) for name, value in reversed(submodules))
        return StateDict("", find_prefix(list(tensors)), tensors, modules=modules, is_module=True), source

    def _read_own_tensors(
        self, dotted: str, node: Instance, text: ClassText, source: StateDictSource, tensors: dict[str, Tensor]
    ) -> None:
        state = as_mapping(node.state)
        for names, is_parameter in ((text.parameters, True), (text.buffers, False)):
            for name in names:
                value = state.get(name)
                tensor = self._reader.read_named(dotted + name, value)
                if tensor is not None and is_parameter:
                    tensor = self._reader.mark_parameter(value)
                if isinstance(tensor, StoredTensor):
                    tensors[dotted + name] = tensor
                    source.tensor_nodes[dotted + name] = value


def _is_object(node: Node) -> bool:
    """Return whether the node is an object of a class of the archive whose attributes are plain to see."""
    return isinstance(node, Instance) and node.path.startswith("__torch__.") and isinstance(node.state, Dict)
