"""A checkpoint file as an immutable value: what it holds, and what is to change."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from bntool.checkpoints.addresses import Location
from bntool.checkpoints.files import SourceFile, quote
from bntool.checkpoints.outputs import OutputFiles
from bntool.checkpoints.tensors import Tensor
from bntool.errors import RefusedError, UsageError
from bntool.representation import html_repr, list_first, short_repr

if TYPE_CHECKING:
    from typing_extensions import Self

    from bntool.plan import Step  # plans are only needed to write


class GlobalTrust(Enum):
    """The trust in a class or function that unpickling a file would import or call."""

    KNOWN = "known"  # only builds data
    UNKNOWN = "unknown"
    SUSPICIOUS = "suspicious"  # runs programs, code, or reaches files or the network


class GlobalName(NamedTuple):
    """A class or function named in a file.

    Attributes:
        path: dotted name.
        called: unpickling would call it; else only import it.
        trust: what is known of it.
    """

    path: str
    called: bool
    trust: GlobalTrust


class NotUnderstood(NamedTuple):
    """A part of a file that may be a BatchNorm, or a part of one, and could not be read as that: nothing is claimed of
    it.

    Attributes:
        name: of the layer, node or tensor.
        reason: what was seen, and why that does not suffice.
        left_out: its tensors are in no state dict.
    """

    name: str
    reason: str
    left_out: bool = False


class ModuleInfo(NamedTuple):
    """The facts that a file states of a module beside its tensors: of a pickled module, or a layer of a graph format.

    Attributes:
        class_path: dotted name of its class.
        attributes: plain attributes in PyTorch's spelling (eps, momentum, training, kernel_size, ...).
        has_statistics: it is a BatchNorm that normalises by statistics, also where no tensor of the file holds them.
    """

    class_path: str
    attributes: Mapping[str, Any]
    has_statistics: bool = False


@dataclass(frozen=True, repr=False)
class StateDict:
    """One state dict of a file.

    Attributes:
        key: where it lies in the file, "" for the root, e.g. ``state_dict`` or ``model.ema``.
        prefix: what wrappers put before all names, e.g. ``module.``; "" for none.
        tensors: by full name, in the order of the file.
        modules: by full module path; empty where the file holds tensors only.
        versions: version number of each module as ``_metadata`` records it; None where the file has none.
        is_module: the tensors belong to a pickled module.
        access: Python that gets it out of what the file loads as, e.g. ``['nets'][0]``; "" for the root.
        holds_arrays: some of its values are numpy arrays where torch has tensors.
        renamed: from names in the file to those in ``tensors``, where they differ.
        stored: the tensors as the file has them; those of ``tensors`` that are others are to change.
    """

    key: str
    prefix: str
    tensors: Mapping[str, Tensor]
    modules: Mapping[str, ModuleInfo] = field(default_factory=dict)
    versions: Mapping[str, int | None] | None = None
    is_module: bool = False
    access: str = ""
    holds_arrays: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        prefix = f", prefix {quote(self.prefix)}" if self.prefix else ""
        module = ", of a pickled module" if self.is_module else ""
        count = len(self.tensors)
        return f"<StateDict {quote(self.key)}: {count} tensor{'s' * (count != 1)}{prefix}{module}>"

    _repr_html_ = html_repr

    def __post_init__(self) -> None:
        if not self.stored:
            object.__setattr__(self, "stored", self.tensors)

    def strip(self, name: str) -> str:
        """Return the name without the wrappers' prefix."""
        return name.removeprefix(self.prefix)

    def full_name(self, name: str) -> str:
        """Return the name in the file of a tensor or module of the unwrapped model."""
        return name if self.prefix and name in self.tensors else self.prefix + name

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its name without prefix.

        Raises:
            UsageError: there is none.
        """
        try:
            return self.tensors[self.full_name(name)]
        except KeyError:
            raise UsageError("the state dict has no such tensor", tensor=name) from None


Writer: TypeAlias = Callable[["Checkpoint", Path, OutputFiles], None]


class Loader(Enum):
    """The library that usually loads a file, and runs what is in it."""

    TORCH = "torch"
    KERAS = "keras"
    TENSORFLOW = "tensorflow"
    CAFFE = "caffe"
    ONNX_RUNTIME = "onnxruntime"
    NUMPY = "numpy"
    JAX = "jax"
    MXNET = "mxnet"
    MINDSPORE = "mindspore"


class LoadingCode(NamedTuple):
    """Python that loads a file without bntool.

    Attributes:
        lines: in which ``{path}`` stands for the quoted path of the file, and ``{description}`` for that of the file
            that describes the model.
        state_dict: an expression for the state dict, where it is still to be loaded into a model; "" where not.
    """

    lines: tuple[str, ...]
    state_dict: str = ""


class Format(ABC):
    """One file format: recognising, reading and writing it, and what others have to know of its files."""

    name: str  # stable, for JSON
    title: str  # for people
    single_file: bool = True
    keeps_order: bool = True  # of the tensors, also where some come or go
    loader: Loader = Loader.TORCH
    loading: LoadingCode | None = None  # None: by torch.load, in a way that depends on what the file holds
    graph_reader: str = ""  # "module:function" that reads who feeds whom from a file; "" where files do not say it
    trains_whole_layers: bool = False  # its files say which layers train; with one that does not all of it stays
    is_for_inference: bool = False  # its files are programs in which nothing trains
    needs_prototxt: bool = False  # its files are run and trained by a .prototxt beside them
    takes_keras_config: bool = False  # its files may be of weights alone, whose layers a configuration says
    application: str = ""  # the public model whose configuration is assumed, by names and shapes
    described_by: str = ""  # ends the name of the file beside it that says what the model is
    holds_code: bool = False  # files of this format carry programs, not only data
    read_only: str = ""  # why its files are only read, and what to do instead
    only_values: bool = False  # elements of its tensors can change, but no keys come or go
    has_records: bool = True  # its files have a place for what bntool did
    writer: str = ""  # module of this package and function that write it, as ``torch.zip_writing:write``
    is_pytorch: bool = True  # names and layouts are those of state dicts, so that they can be converted to one
    entries_are_texts: bool = False  # the entries of its files are texts of a header, which any safetensors file keeps
    why_empty: str = ""  # why a file may show no state dict

    def locate(self, path: Path) -> Path | None:  # noqa: ARG002 (for those of several files)
        """Return the file to read first, where a path names a folder or several files of this format.

        Raises:
            OSError, ValueError: no file can have this name.
        """
        return None

    def recognises(self, path: Location, head: bytes) -> bool:  # noqa: ARG002 (for those that it says more about)
        """Return whether a file that FORMATS finds possible is of this format, or may be, as far as the bytes tell.

        Args:
            path: the file.
            head: its first 4 KiB, or all of it.
        """
        return True

    def describe_loading(self, checkpoint: Checkpoint, path: str) -> LoadingCode | None:  # noqa: ARG002 (for some)
        """Return the Python that loads a file; see ``loading``.

        Args:
            checkpoint: what it holds.
            path: the file, whose name some loaders go by.
        """
        return self.loading

    @abstractmethod
    def read(self, file: SourceFile) -> Checkpoint:
        """List what the file holds, reading no tensor.

        Raises:
            CorruptFileError, UnsafeFileError
        """

    def write(self, checkpoint: Checkpoint, path: Path, output: OutputFiles) -> None:
        """Write the checkpoint with its edits; the module that does it is imported now.

        Raises:
            RefusedError: the format is only read, or cannot hold an edit.
            CorruptFileError: the source turns out to be damaged.
        """
        check_changeable(checkpoint)
        module, _, function = self.writer.partition(":")
        write: Writer = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        write(checkpoint, path, output)

    def judge(self, path: Path) -> None:  # noqa: B027 (for those with a library that judges)
        """Open a written file, before it appears, with the library that others will read it with.

        Raises:
            VerificationError: it refuses the file.
        """

    def describe_other(self, checkpoint: Checkpoint) -> str:  # noqa: ARG002 (for those that hold no model)
        """Describe a file that is no model, in words; "" for models."""
        return ""

    def describe_losses(self, checkpoint: Checkpoint) -> Sequence[str]:  # noqa: ARG002 (as above)
        """List what of a file is lost when it is written again, whatever changes, in a few words each."""
        return ()

    def describe_assumptions(self, state_dict: StateDict) -> Sequence[str]:  # noqa: ARG002 (as above)
        """List what is assumed of tensors that are to become a state dict of PyTorch, one sentence each."""
        return ()

    def size(self, checkpoint: Checkpoint) -> int:
        """Count the bytes of all files that were opened."""
        return checkpoint.file.size

    def check_unchanged(self, checkpoint: Checkpoint) -> None:
        """Make sure that no file of the checkpoint was changed since it was opened.

        Raises:
            UnreadableFileError: one was changed.
        """
        checkpoint.file.check_unchanged()

    def verify_checksums(self, checkpoint: Checkpoint) -> int | None:  # noqa: ARG002 (for those that have some)
        """Compare all bytes with the checksums of the file; return how many were checked, None where it has none.

        Raises:
            CorruptFileError: one differs.
        """
        return None

    def describe_origin(self, checkpoint: Checkpoint) -> Sequence[str]:  # noqa: ARG002 (for those that know it)
        """Describe what wrote the file, and what kind of file it is, in a few words each."""
        return ()

    def can_record(self, checkpoint: Checkpoint, state_dict: StateDict) -> bool:  # noqa: ARG002 (as above)
        """Return whether this file has a place for what bntool did to the state dict."""
        return self.has_records


class Edit(NamedTuple):
    """A step of a plan and the state dict that it is for."""

    state_dict: str
    step: Step

    def __repr__(self) -> str:
        return short_repr(self)


class Content:
    """The part of a file that a format keeps to write it again; each format has a class of its own for it."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Return the content of a checkpoint that is of this class; TypeError where it is of another."""
        if not isinstance(checkpoint.content, cls):
            raise TypeError(f"a {checkpoint.format.name} checkpoint has no {cls.__name__}")
        return checkpoint.content


_LISTED = 8  # keys that a sentence names


@dataclass(frozen=True, repr=False, eq=False)
class Checkpoint:
    """An immutable view of a file.

    Attributes:
        file: the open file; closing it ends the use of the checkpoint.
        format: what can read and write it.
        state_dicts: all that were found, in the order of the file; with the edits applied.
        entries: what else lies at the top level: name to a plain value or to a symbolic node.
        globals: classes and functions that loading the file by unpickling would import or call.
        records: what bntool recorded in it, by key of the state dict.
        not_understood: what may be a BatchNorm and could not be judged.
        edits: what is to change against the file.
        content: what its format keeps of the file to write it again.
    """

    file: SourceFile
    format: Format
    state_dicts: tuple[StateDict, ...]
    entries: Mapping[str, Any] = field(default_factory=dict)
    globals: tuple[GlobalName, ...] = ()
    records: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    not_understood: tuple[NotUnderstood, ...] = ()
    edits: tuple[Edit, ...] = ()
    content: Content | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        keys = list_first([quote(one.key) if one.key else "the root" for one in self.state_dicts])
        held = f"state dict{'s' * (len(self.state_dicts) > 1)} {keys}" if keys else "no state dict"
        changes = f", {len(self.edits)} edit{'s' * (len(self.edits) > 1)}" if self.edits else ""
        return f"<Checkpoint {quote(str(self.path))}: {self.format.title}, {held}{changes}>"

    _repr_html_ = html_repr

    @property
    def path(self) -> Location:
        return self.file.path

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on how the file was found and read, a sentence each."""
        return self.file.notes

    def state_dict(self, key: str) -> StateDict:
        """Return the state dict of that key.

        Raises:
            UsageError: there is none; the message lists those there are.
        """
        for state_dict in self.state_dicts:
            if state_dict.key == key:
                return state_dict
        keys = [quote(state_dict.key) if state_dict.key else "'' (the root)" for state_dict in self.state_dicts]
        known = list_first(keys, _LISTED)
        raise UsageError(
            f"there is no state dict {quote(key)} in this file; it holds {known or 'none'}", path=self.path
        )

    def with_state_dict(self, state_dict: StateDict) -> Self:
        """Return the checkpoint with this state dict in the place of the one that has its key."""
        state_dicts = tuple(state_dict if other.key == state_dict.key else other for other in self.state_dicts)
        return replace(self, state_dicts=state_dicts)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_changeable(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of a format that is only read.

    Raises:
        RefusedError: it is of one.
    """
    if checkpoint.format.read_only:
        raise RefusedError(checkpoint.format.read_only, path=checkpoint.path)
