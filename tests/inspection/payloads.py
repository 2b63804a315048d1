"""Calls that leave a trace in the file system, ways to make a pickle call them, and files that hold such pickles.

Each is really loaded by the tests: what leaves a trace may not be called harmless.
"""

from __future__ import annotations

import bz2
import code
import collections
import cProfile
import dbm.dumb
import functools
import gzip
import io
import itertools
import logging
import lzma
import mailbox
import marshal
import operator
import os
import pathlib
import pickle
import profile
import py_compile
import runpy
import shelve
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
import threading
import timeit
import trace
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.inspection.attacks import LEGACY_PARTS, save_legacy, split_legacy


class Call:
    """An object whose pickle is a call, and what to do to its result."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None, items: Any = None) -> None:
        self.function, self.arguments, self.state, self.items = function, arguments, state, items

    def __reduce__(self) -> Any:
        return self.function, self.arguments, self.state, self.items


def _code(canary: str) -> str:
    return f"__import__('os').mkdir({canary!r})"


def _evil(canary: str) -> bytes:
    return pickle.dumps(Call(os.mkdir, canary), 2)


def _script(canary: str) -> str:
    path = f"{canary}.needed.py"
    Path(path).write_text(_code(canary))
    return path


def _saved(canary: str) -> str:
    path = f"{canary}.needed.pt"
    torch.save(Call(os.mkdir, canary), path)
    return path


def _array(canary: str) -> str:
    path = f"{canary}.needed.npy"
    np.save(path, np.array([Call(os.mkdir, canary)], object), allow_pickle=True)
    return path


def _compiled(canary: str) -> bytes:
    return marshal.dumps(compile(_code(canary), "x", "exec"))


def _partial(function: Any, *arguments: Any) -> Any:
    return functools.partial(function, *arguments)


PAYLOADS: dict[str, Callable[[str], Any]] = {
    # programs
    "os.system": lambda c: Call(os.system, f"mkdir {c}"),
    "os.popen": lambda c: Call(os.popen, f"mkdir {c}"),
    "os.spawnlp": lambda c: Call(os.spawnlp, os.P_WAIT, "mkdir", "mkdir", c),
    "os.posix_spawn": lambda c: Call(os.posix_spawn, shutil.which("mkdir"), ["mkdir", c], {}),
    "subprocess.call": lambda c: Call(subprocess.call, ["mkdir", c]),
    "subprocess.run": lambda c: Call(subprocess.run, ["mkdir", c]),
    "subprocess.Popen": lambda c: Call(subprocess.Popen, ["mkdir", c]),
    "subprocess.check_output": lambda c: Call(subprocess.check_output, ["mkdir", c]),
    "subprocess.getoutput": lambda c: Call(subprocess.getoutput, f"mkdir {c}"),
    # files
    "os.mkdir": lambda c: Call(os.mkdir, c),
    "os.makedirs": lambda c: Call(os.makedirs, c),
    "os.mknod": lambda c: Call(os.mknod, c),
    "os.symlink": lambda c: Call(os.symlink, "x", c),
    "os.open": lambda c: Call(os.open, c, os.O_CREAT | os.O_WRONLY),
    "open": lambda c: Call(open, c, "w"),
    "io.FileIO": lambda c: Call(io.FileIO, c, "w"),
    "Path.touch": lambda c: Call(pathlib.Path.touch, Call(pathlib.Path, c)),
    "Path.write_text": lambda c: Call(pathlib.Path.write_text, Call(pathlib.Path, c), "x"),
    "shutil.copyfile": lambda c: Call(shutil.copyfile, _script(c + "x"), c),
    "shutil.copytree": lambda c: Call(shutil.copytree, os.path.dirname(__file__), c),
    "shutil.make_archive": lambda c: Call(shutil.make_archive, c, "tar", os.path.dirname(__file__)),
    "zipfile.ZipFile": lambda c: Call(zipfile.ZipFile, c, "w"),
    "tarfile.open": lambda c: Call(tarfile.open, c, "w"),
    "gzip.open": lambda c: Call(gzip.open, c, "w"),
    "bz2.BZ2File": lambda c: Call(bz2.BZ2File, c, "w"),
    "lzma.open": lambda c: Call(lzma.open, c, "w"),
    "sqlite3.connect": lambda c: Call(sqlite3.connect, c),
    "shelve.open": lambda c: Call(shelve.open, c),
    "dbm.dumb.open": lambda c: Call(dbm.dumb.open, c, "c"),
    "logging.FileHandler": lambda c: Call(logging.FileHandler, c),
    "mailbox.Maildir": lambda c: Call(mailbox.Maildir, c),
    "tempfile.NamedTemporaryFile": lambda c: Call(
        tempfile.NamedTemporaryFile, "w", -1, None, None, "", c, os.path.dirname(c), False
    ),
    "py_compile.compile": lambda c: Call(py_compile.compile, _script(c), c),
    "torch.save": lambda c: Call(torch.save, 1, c),
    "torch.from_file": lambda c: Call(torch.from_file, c, True, 8),
    "UntypedStorage.from_file": lambda c: Call(torch.UntypedStorage.from_file, c, True, 8),
    "PyTorchFileWriter": lambda c: Call(torch._C.PyTorchFileWriter, c),
    "torch.package.PackageExporter": lambda c: Call(torch.package.PackageExporter, c),
    "numpy.save": lambda c: Call(np.save, c, 1),
    "numpy.savetxt": lambda c: Call(np.savetxt, c, [1]),
    "numpy.memmap": lambda c: Call(np.memmap, c, "u1", "w+", 0, (1,)),
    "numpy.open_memmap": lambda c: Call(np.lib.format.open_memmap, c, "w+", "u1", (1,)),
    "numpy.ndarray.tofile": lambda c: Call(np.ndarray.tofile, np.zeros(1), c),
    "numpy.ndarray.dump": lambda c: Call(np.ndarray.dump, np.zeros(1), c),
    # code
    "eval": lambda c: Call(eval, _code(c)),
    "exec": lambda c: Call(exec, _code(c)),
    "timeit.timeit": lambda c: Call(timeit.timeit, _code(c), "pass", timeit.default_timer, 1),
    "cProfile.run": lambda c: Call(cProfile.run, _code(c), f"{c}.profile"),
    "profile.run": lambda c: Call(profile.run, _code(c), f"{c}.profile"),
    "trace.Trace.run": lambda c: Call(trace.Trace.run, Call(trace.Trace, 0, 0), _code(c)),
    "code.InteractiveInterpreter": lambda c: Call(
        code.InteractiveInterpreter.runsource, Call(code.InteractiveInterpreter), _code(c)
    ),
    "runpy.run_path": lambda c: Call(runpy.run_path, _script(c)),
    "exec of marshal.loads": lambda c: Call(exec, Call(marshal.loads, _compiled(c))),
    "runpy._run_code": lambda c: Call(runpy._run_code, Call(marshal.loads, _compiled(c)), {}),
    "threading.Timer": lambda c: Call(threading.Timer.run, Call(threading.Timer, 0, os.mkdir, [c])),
    # other loaders
    "pickle.loads": lambda c: Call(pickle.loads, _evil(c)),
    "Unpickler.load": lambda c: Call(pickle.Unpickler.load, Call(pickle.Unpickler, Call(io.BytesIO, _evil(c)))),
    "pickle._loads": lambda c: Call(pickle._loads, _evil(c)),
    "_load_from_bytes": lambda c: Call(torch.storage._load_from_bytes, Path(_saved(c)).read_bytes()),
    "torch.load": lambda c: Call(functools.partial(torch.load, weights_only=False), Call(io.BytesIO, _legacy(c))),
    "numpy.load": lambda c: Call(np.load, _array(c), None, True),
    "numpy.lib.format.read_array": lambda c: Call(
        np.lib.format.read_array, Call(io.BytesIO, Path(_array(c)).read_bytes()), True
    ),
    # what calls what it is given
    "partial called": lambda c: Call(_partial(os.mkdir, c)),
    "partial of partial": lambda c: Call(_partial(_partial(os.mkdir), c)),
    "list of map": lambda c: Call(list, Call(map, os.mkdir, [c])),
    "tuple of map": lambda c: Call(tuple, Call(map, os.mkdir, [c])),
    "set of filter": lambda c: Call(set, Call(filter, os.mkdir, [c])),
    "deque of map": lambda c: Call(collections.deque, Call(map, os.mkdir, [c])),
    "dict of zip of map": lambda c: Call(dict, Call(zip, [1], Call(map, os.mkdir, [c]))),
    "list of starmap": lambda c: Call(list, Call(itertools.starmap, os.mkdir, [(c,)])),
    "list of accumulate": lambda c: Call(list, Call(itertools.accumulate, [c, 0o700], os.mkdir)),
    "functools.reduce": lambda c: Call(functools.reduce, os.mkdir, [c, 0o700]),
    "operator.methodcaller": lambda c: Call(operator.methodcaller("mkdir"), Call(pathlib.Path, c)),
    "defaultdict": lambda c: Call(operator.getitem, Call(collections.defaultdict, _partial(os.mkdir, c)), 1),
    "rebuild from type": lambda c: Call(torch._tensor._rebuild_from_type_v2, os.mkdir, int, (c,), None),
    "iter until": lambda c: Call(list, Call(itertools.islice, Call(iter, _partial(os.mkdir, c), 1), 1)),
    "numpy.vectorize": lambda c: Call(np.vectorize(os.mkdir), [c]),
    "numpy.apply_along_axis": lambda c: Call(np.fromiter, Call(map, os.mkdir, [c]), "O"),
    "state by a call": lambda c: Call(collections.OrderedDict, state={"x": Call(os.mkdir, c)}),
    "item by a call": lambda c: [Call(os.mkdir, c)],
    "key by a call": lambda c: {1: {2: (3, Call(os.mkdir, c))}},
    "array of objects": lambda c: np.array([Call(os.mkdir, c)], object),
    "attribute of a tensor": lambda c: Call(torch.Tensor._make_subclass, torch.Tensor, Call(os.mkdir, c)),
}


def _legacy(canary: str) -> bytes:
    parts, rest = split_legacy(save_legacy())
    parts[LEGACY_PARTS.index("object")] = _evil(canary)
    return b"".join(parts) + rest


def save_zip(folder: Path, value: Any, *, protocol: int = 2) -> Path:
    path = folder / "zip.pt"
    torch.save({"model": {"bn.weight": torch.ones(2)}, "more": value}, path, pickle_protocol=protocol)
    return path


def save_latest(folder: Path, value: Any) -> Path:
    return save_zip(folder, value, protocol=pickle.HIGHEST_PROTOCOL)


def save_old(folder: Path, value: Any) -> Path:
    path = folder / "old.pth"
    state = {"bn.weight": torch.ones(2), "more": value}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def save_tar(folder: Path, value: Any) -> Path:
    """As torch before 0.1.2."""
    path, zero = folder / "tar.pth", pickle.dumps(0, 2)
    contents = {"storages": zero + pickle.dumps([], 2), "tensors": zero, "pickle": pickle.dumps({"more": value}, 2)}
    with tarfile.open(path, "w") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def save_arrays(folder: Path, value: Any) -> Path:
    path = folder / "arrays.pkl"
    path.write_bytes(pickle.dumps({"bn.weight": np.ones(2, "f"), "more": value}, 4))
    return path


def save_text(folder: Path, value: Any) -> Path:
    """The protocol of Python 1."""
    path = folder / "text.pkl"
    path.write_bytes(pickle.dumps({"bn.weight": np.ones(2, "f"), "more": value}, 0))
    return path


def load_torch(path: Path) -> None:
    torch.load(path, weights_only=False)


def load_pickle(path: Path) -> None:
    with path.open("rb") as file:
        pickle.load(file)


CONTAINERS: dict[str, tuple[Callable[[Path, Any], Path], Callable[[Path], None]]] = {
    "zip": (save_zip, load_torch),
    "zip of the last protocol": (save_latest, load_torch),
    "legacy": (save_old, load_torch),
    "tar": (save_tar, load_torch),
    "arrays": (save_arrays, load_pickle),
    "arrays as text": (save_text, load_pickle),
}
