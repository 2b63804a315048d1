"""Trust in the globals of a pickle: those that are known to build data only, and those that are known to do harm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bntool.checkpoints.checkpoint import GlobalName, GlobalTrust
from bntool.checkpoints.containers.pickles.dangerous_calls import name_dangers
from bntool.checkpoints.containers.pickles.lookups import GETATTR, resolve_lookups
from bntool.checkpoints.containers.pickles.reading import Pickle

_KNOWN = {
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
    "collections.deque",
    "_codecs.encode",
    "argparse.Namespace",
    "datetime.datetime",
    "datetime.date",
    "datetime.timedelta",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib.PurePosixPath",
    "pathlib.Path",
    "pathlib._local.PosixPath",
    "fastcore.foundation.L",  # a list
    "functools.partial",  # what it holds is listed beside it
    "bntool.freezing.held_modules.rebuild_held",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch._tensor._rebuild_from_type_v2",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    "torch.nn.parameter.UninitializedParameter",
    "torch.nn.parameter.UninitializedBuffer",
    "torch.nn.Parameter",
    "torch.serialization._get_layout",
    "torch.torch_version.TorchVersion",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "inspect.Parameter",
    "inspect.Signature",
    "inspect._ParameterKind",
    "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
}
_KNOWN_BUILTINS = {
    "set", "frozenset", "bytearray", "complex", "slice", "range", "object", "dict", "list", "tuple",
    "int", "float", "str", "bytes", "bool", "long", "unicode", "xrange", "zip", "enumerate", "reversed",
    "NotImplemented", "Ellipsis", "BaseException", "StopIteration", "KeyboardInterrupt", "SystemExit",
}  # fmt: skip
_DISTRIBUTED = {
    "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
    "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
}  # fmt: skip
_CLASSES = ("torch.nn.quantized.modules", "torch.optim")
_SCRIPTED_LISTS = {
    "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "build_tensor_from_id",
    "restore_type_tag",
}  # fmt: skip
_BUILTIN_MODULES = ("builtins", "__builtin__")
_PLAIN_BUILTINS = {
    "abs", "ascii", "bin", "chr", "divmod", "format", "hash", "hex", "id", "isinstance", "issubclass", "len", "oct",
    "ord", "print", "repr", "round",
}  # fmt: skip
_SUSPICIOUS_MODULES = {
    "os", "posix", "nt", "posixpath", "sys", "subprocess", "commands", "pty", "shutil", "socket", "socketserver",
    "ctypes", "cffi", "importlib", "imp", "runpy", "code", "codeop", "pdb", "bdb", "cProfile", "profile", "timeit",
    "trace", "doctest", "webbrowser", "urllib", "urllib2", "http", "httplib", "ftplib", "smtplib", "requests",
    "aiohttp", "httpx", "asyncio", "multiprocessing", "signal", "pickle", "cPickle", "_pickle", "marshal", "shelve",
    "dill", "cloudpickle", "joblib", "tempfile", "glob", "fileinput", "linecache", "pydoc", "pip", "ensurepip", "venv",
    "zipimport", "operator", "_operator", "types", "gc", "inspect", "builtins", "__builtin__", "platform", "pkgutil",
    "bz2", "gzip", "lzma", "zipfile", "tarfile", "sqlite3", "site", "idlelib", "lib2to3", "distutils", "setuptools",
    "nturl2path", "xmlrpc", "telnetlib", "ssl", "threading", "_thread", "sched", "antigravity", "this", "turtle",
    "_aix_support", "_osx_support", "_pyrepl", "concurrent", "imaplib", "modulefinder", "nntplib", "pipes", "popen2",
    "poplib", "pstats", "py_compile", "compileall", "readline", "rlcompleter", "smtpd", "tkinter", "winreg", "_winreg",
    "_winapi", "zipapp", "_testcapi", "_interpreters", "_xxsubinterpreters", "_posixsubprocess", "_ctypes", "_socket",
}  # fmt: skip
# a module that any other may have imported: torch.serialization.os.system is os.system
_REACHED_THROUGH_OTHERS = frozenset(
    {"os", "sys", "subprocess", "builtins", "importlib", "shutil", "socket", "ctypes", "runpy", "posix", "nt", "pty",
     "pickle", "eval", "exec", "system", "popen", "Popen"}
)  # fmt: skip
_SUSPICIOUS_NAMES = {
    "torch.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.jit.load",
    "torch.jit.unsupported_tensor_ops.execWrapper",
    "torch.export.load",
    "torch.utils.cpp_extension.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.utils.model_zoo.load_url",
    "torch._dynamo.guards.GuardBuilder.get",
    "torch.utils._config_module.ConfigModule.load_config",
    "torch.utils.collect_env.run",
    "torch.serialization.load",
    "torch.storage._load_from_bytes",
    "numpy.load",
    "numpy.fromfile",
    "numpy.testing._private.utils.runstring",
    "numpy.f2py.crackfortran.getlincoef",
    "functools.reduce",
    "io.open",
    "io.open_code",
    "io.FileIO",
    "_io.open",
    "_io.FileIO",
    "torch.ops.load_library",
    "torch.classes.load_library",
    "logging.config.listen",
    "pandas.read_pickle",
    "pandas.eval",
}


def judge_global(path: str) -> GlobalTrust:  # noqa: C901, PLR0911 (the first rule that fits)
    """Return what is known of a class or function, by its dotted name.

    A call of an unknown function may do anything: only listed names, torch's and numpy's own data types, and torch.nn
    modules are known.
    """
    module, _, name = path.rpartition(".")
    if path in _SUSPICIOUS_NAMES or not _REACHED_THROUGH_OTHERS.isdisjoint(path.split(".")[1:]):
        return GlobalTrust.SUSPICIOUS
    if path in _KNOWN:
        return GlobalTrust.KNOWN
    if module in _BUILTIN_MODULES or module == "exceptions":
        return _judge_builtin(name)
    first, *inner = module.split(".")
    if first in _SUSPICIOUS_MODULES or any(part.startswith("__") and part.endswith("__") for part in inner):
        return GlobalTrust.SUSPICIOUS
    if module == "torch._utils" and name.startswith("_rebuild_"):
        return GlobalTrust.KNOWN
    if module in ("torch", "torch.cuda", "torch.storage") and (
        name.endswith(("Storage", "Tensor")) or name in _TORCH_TYPES
    ):
        return GlobalTrust.KNOWN
    if module == "torch.distributed.checkpoint.metadata" and name in _DISTRIBUTED:
        return GlobalTrust.KNOWN
    if module == "torch.jit._pickle" and name in _SCRIPTED_LISTS:
        return GlobalTrust.KNOWN
    if module == "numpy.dtypes" and name.endswith("DType"):
        return GlobalTrust.KNOWN
    # exactly one part: torch.nn.modules.module.torch.(...).Popen begins like a module's class too
    if name[:1].isupper() and (module in _CLASSES or (module.startswith("torch.nn.modules.") and len(inner) == 3)):
        return GlobalTrust.KNOWN
    return GlobalTrust.UNKNOWN


def _judge_builtin(name: str) -> GlobalTrust:
    if name in _KNOWN_BUILTINS or name.endswith(("Error", "Exception", "Warning")):
        return GlobalTrust.KNOWN
    return GlobalTrust.UNKNOWN if name in _PLAIN_BUILTINS else GlobalTrust.SUSPICIOUS


def _torch_type_names() -> frozenset[str]:
    from bntool.checkpoints.dtypes import BY_NAME

    layouts = {"strided", "sparse_coo", "sparse_csr", "per_tensor_affine", "per_channel_affine", "bfloat16"}
    memory = {"contiguous_format", "preserve_format", "channels_last", "channels_last_3d"}
    return frozenset({*BY_NAME, *layouts, *memory})


_TORCH_TYPES = _torch_type_names()


def _name_globals(pickle: Pickle) -> Iterator[tuple[str, bool]]:
    """Yield dotted names, and whether unpickling would call them."""
    paths = {node.path: True for node in pickle.called} | {node.path: False for node in pickle.referenced}
    if not paths.keys().isdisjoint(GETATTR):
        attributes = resolve_lookups(pickle)
        if attributes is not None:
            paths = {path: called for path, called in paths.items() if path not in GETATTR} | attributes
    yield from paths.items()
    for node in pickle.extensions:
        yield f"copyreg extension {node.code}", True


def list_globals(*pickles: Pickle) -> tuple[GlobalName, ...]:
    """Return the globals of some pickles, each once, suspicious ones first, then unknown, then known."""
    found: dict[str, GlobalName] = {}
    for pickle in pickles:
        for path, called in _name_globals(pickle):
            if called or path not in found:
                found[path] = GlobalName(path, called=called, trust=judge_global(path))
        for path in name_dangers(pickle):
            found[path] = GlobalName(path, called=True, trust=GlobalTrust.SUSPICIOUS)
    return merge_globals(found.values())


def merge_globals(names: Iterable[GlobalName]) -> tuple[GlobalName, ...]:
    """Return the globals of several pickles, each once, suspicious ones first, then unknown, then known."""
    found: dict[str, GlobalName] = {}
    for name in names:
        if name.called or name.path not in found:
            found[name.path] = name
    order = [GlobalTrust.SUSPICIOUS, GlobalTrust.UNKNOWN, GlobalTrust.KNOWN]
    return tuple(sorted(found.values(), key=lambda name: (order.index(name.trust), not name.called, name.path)))
