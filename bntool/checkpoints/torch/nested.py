"""Parts of another file that torch.load or pickle.load reads: judged by the rules of files of their own."""

from __future__ import annotations

from bntool.checkpoints.checkpoint import GlobalName
from bntool.checkpoints.containers.pickles.reading import OpcodeBudget, Pickle, read_pickle
from bntool.checkpoints.containers.pickles.trust import list_globals
from bntool.checkpoints.containers.zips.reading import read_archive
from bntool.checkpoints.files import SourceFile
from bntool.checkpoints.torch.legacy import read_pickles, starts_as_legacy
from bntool.checkpoints.torch.zip import find_layout, read_main_pickle

_ZIP = b"PK\x03\x04"


def list_nested_globals(file: SourceFile, budget: OpcodeBudget) -> tuple[GlobalName, ...]:
    """Return the globals of a file of torch.save, or of a plain pickle, that is a part of another file.

    Raises:
        CorruptFileError, OtherFormatError, UnsafeFileError: it is neither, or cannot be judged.
    """
    head = file.read(0, min(file.size, 64))
    if head.startswith(_ZIP):
        pickles: tuple[Pickle, ...] = (read_main_pickle(find_layout(read_archive(file)), budget=budget),)
    elif starts_as_legacy(head):
        pickles = read_pickles(file, budget=budget)
    else:
        pickles = (read_pickle(file, budget=budget),)
    return list_globals(*pickles)
