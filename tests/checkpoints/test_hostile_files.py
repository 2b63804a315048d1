"""Files built to do harm: nothing named in them runs, nothing beside them is read, and none is called harmless.

The tricks are those that scanners of pickles (fickling, picklescan, modelscan) and reports of their gaps describe.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bntool.checkpoints.formats import open_checkpoint
from bntool.errors import BntoolError
from bntool.inspection.safety import SafetyVerdict, judge_safety
from tests import programs
from tests.checkpoints.foreign import save_distributed
from tests.checkpoints.samples import STATE_DICTS, WRITERS
from tests.checkpoints.torch_programs.compiled_net import export, script
from tests.places import FIXTURES


def _global(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _call(path: str, *arguments: bytes) -> bytes:
    return _global(path) + b"(" + b"".join(arguments) + b"tR"


def _getattr(owner: bytes, name: str, function: str = "builtins.getattr") -> bytes:
    return _call(function, owner, _text(name))


TOUCH = _text("touch canary")
SYSTEM = _call("os.system", TOUCH) + b"."
CALLS = {  # functions that run something with a plain text
    name: _call(name, TOUCH) + b"."
    for name in (
        "os.system", "posix.system", "nt.system", "os.popen", "os.startfile", "os.execv", "os.spawnlp",
        "subprocess.run", "subprocess.check_output", "subprocess.getoutput", "commands.getoutput", "popen2.popen2",
        "pty.spawn", "builtins.eval", "builtins.exec", "builtins.compile", "__builtin__.execfile", "builtins.open",
        "builtins.__import__", "builtins.breakpoint", "builtins.map", "builtins.vars", "io.open", "_io.FileIO",
        "importlib.import_module", "importlib.__import__", "imp.load_source", "runpy.run_path", "runpy._run_code",
        "code.interact", "code.InteractiveInterpreter", "codeop.compile_command", "pdb.run", "bdb.Bdb", "timeit.timeit",
        "cProfile.run", "cProfile.runctx", "profile.run", "profile.Profile.runctx", "trace.Trace.run",
        "doctest.debug_script", "webbrowser.open", "urllib.request.urlopen", "http.client.HTTPSConnection",
        "ftplib.FTP", "socket.create_connection", "asyncio.unix_events._UnixSubprocessTransport._start",
        "ctypes.CDLL", "ctypes.cdll.LoadLibrary", "pip.main", "pip._internal.main", "ensurepip._run_pip",
        "venv.create", "pydoc.pipepager", "pydoc.locate", "shutil.rmtree", "shelve.open", "marshal.loads",
        "pickle.loads", "_pickle.loads", "pickle.Unpickler", "dill.loads", "joblib.load", "cloudpickle.loads",
        "numpy.load", "numpy.testing._private.utils.runstring", "numpy.f2py.crackfortran.getlincoef",
        "numpy.f2py.crackfortran._eval_length", "pandas.read_pickle", "torch.load", "torch.serialization.load",
        "torch.storage._load_from_bytes", "torch.hub.load", "torch.jit.load", "torch.export.load",
        "torch.utils.cpp_extension.load_inline", "torch.utils._config_module.ConfigModule.load_config",
        "torch.utils.collect_env.run", "torch._dynamo.guards.GuardBuilder.get", "torch.ops.load_library",
        "torch._inductor.codecache.compile_file", "torch.jit.unsupported_tensor_ops.execWrapper",
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression",
        "idlelib.pyshell.ModifiedInterpreter.runcode", "idlelib.run.Executive.runcode", "lib2to3.pgen2.grammar.Grammar",
        "lib2to3.pgen2.pgen.ParserGenerator.make_label", "distutils.file_util.write_file", "_pyrepl.pager.pipe_pager",
        "_aix_support._read_cmd_output", "_osx_support._read_output", "test.support.script_helper.assert_python_ok",
        "logging.config.fileConfig", "multiprocessing.util.spawnv_passfds", "operator.attrgetter",
        "_operator.methodcaller", "types.FunctionType", "types.CodeType", "functools.reduce", "gc.get_objects",
        "inspect.getmembers", "zipimport.zipimporter", "linecache.getlines", "cgitb.lookup", "site.addsitedir",
        # the same behind names that begin like harmless ones
        "torch.serialization.os.system", "torch.nn.modules.module.torch.utils.cpp_extension.subprocess.Popen",
        "torch.nn.modules.container.operator.Attrgetter", "torch.nn.modules.module.Module.__init__.__globals__.Get",
        "numpy.dtypes.sys.modules.get", "collections.abc.sys.exit", "torch._utils.importlib.import_module",
        "torch.storage.io.OpenStorage", "torch.optim.os.Popen", "argparse._os.Popen", "datetime.sys.intern",
        "pathlib.os.system", "pathlib.Path.unlink", "pathlib.Path.write_text", "collections._sys.exit",
        "torch.nn.modules.utils.Os.system", "numpy.dtypes.register", "inspect.Parameter.sys",
    )
}  # fmt: skip
TRICKS = {
    **CALLS,
    "getattr chain": _getattr(_call("builtins.__import__", _text("os")), "system") + b"(" + TOUCH + b"tR.",
    "getattr of a class, then its globals": _getattr(_getattr(_global("torch.nn.Module"), "forward"), "im_func") + b".",
    "getattr of a dunder": _getattr(_global("torch.nn.modules.conv.Conv2d"), "__subclasses__") + b")R.",
    "getattr of a module that does harm": _getattr(_global("torch.hub"), "load") + b"(" + TOUCH + b"tR.",
    "getattr of os": _getattr(_global("torch.os"), "system") + b"(" + TOUCH + b"tR.",
    "getattr with a default": _call("builtins.getattr", _global("torch.Size"), _text("x"), _global("torch.Tensor"))
    + b".",
    "getattr, dropped": _getattr(_global("enum.Enum"), "name") + b"0}.",
    "getattr as a value": _global("builtins.getattr") + b".",
    "getattr handed to another": _call("functools.partial", _global("builtins.getattr")) + b"(" + TOUCH + b"tR.",
    "getattr twice, once badly": b"("
    + _getattr(_global("enum.Enum"), "name")
    + b"0"
    + _getattr(_call("sys.intern", TOUCH), "join")
    + b"t.",
    "getattr of Python 2": _getattr(_getattr(_global("os.path"), "os", "__builtin__.getattr"), "system") + b".",
    "partial": _call("functools.partial", _global("os.system"), TOUCH) + b")R.",
    "map in a list": _call("builtins.list", _call("builtins.map", _global("os.system"), b"(" + TOUCH + b"l")) + b".",
    "defaultdict": _call("collections.defaultdict", _global("subprocess.Popen")) + b".",
    "rebuild of a subclass": _call(
        "torch._tensor._rebuild_from_type_v2", _global("os.system"), _global("torch.Tensor"), b"(" + TOUCH + b"t", b"}"
    )
    + b".",
    "reconstructor": _call("copyreg._reconstructor", _global("subprocess.Popen"), _global("builtins.object"), b"N")
    + b".",
    "protocol 4": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
    "protocol 4, dotted": b"\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93\x8c\x01x\x85R.",
    "protocol 4, name from the memo": b"\x80\x04\x8c\x06system\x940\x8c\x02os\x94h\x00\x93" + TOUCH + b"\x85R.",
    "protocol 0, text with escapes": b"cos\nsystem\n(V\\u0074ouch canary\ntR.",
    "inst": b"(S'touch canary'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch canary'\no.",
    "newobj": b"\x80\x02csubprocess\nPopen\n(S'touch'\nS'canary'\nl\x85\x81.",
    "newobj with keywords": b"\x80\x04csubprocess\nPopen\n)}\x8c\x04args" + TOUCH + b"s\x92.",
    "build": b"\x80\x02cx\ny\n)\x81}S'__setstate__'\ncos\nsystem\nsbS'touch canary'\nb.",
    "extension registry": b"\x80\x02\x82\x01.",
    "extension registry, called": b"\x80\x02\x84\x01\x00\x00\x00(" + TOUCH + b"tR.",
    "persistent id": b"\x80\x02" + _call("os.system", TOUCH) + b"Q.",
    "import only": b"cantigravity\nfly\n.",
    "pickle in bytes": _call("pickle.loads", b"C" + bytes([len(SYSTEM)]) + SYSTEM) + b".",
    "pickle in a tensor's bytes": _call("torch.storage._load_from_bytes", b"C" + bytes([len(SYSTEM)]) + SYSTEM) + b".",
    "dropped before the end": _call("os.system", TOUCH) + b"0}.",
    "dropped with a mark": b"(" + _call("os.system", TOUCH) + b"1}.",
    "left on the stack": _call("os.system", TOUCH) + b"}.",
    "key of a dict": b"}" + _call("os.system", TOUCH) + b"Ns.",
    "inside of a set": b"\x80\x04\x8f(" + _call("os.system", TOUCH) + b"\x90.",
}


def _zip(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/data/0", bytes(16))
    return buffer.getvalue()


def _legacy(data: bytes) -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join([*(pickle.dumps(part, 2) for part in head), data, pickle.dumps([], 2)])


def _tar(data: bytes, *, where: str = "pickle") -> bytes:
    empty = pickle.dumps(0, 2)
    members = {"pickle": pickle.dumps({}, 2), "storages": empty + pickle.dumps([], 2), "tensors": empty}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in {**members, where: data}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _script(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/constants.pkl", data)
        archive.writestr("m/code/__torch__.py", "class M(Module):\n  __buffers__ = []\n")
    return buffer.getvalue()


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "zip.pt": _zip,
    "legacy.pth": _legacy,
    "tar.pth": _tar,
    "script.pt": _script,
    "plain.pkl": lambda data: data,
    ".metadata": lambda data: data,  # of torch.distributed.checkpoint
}


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_is_called_harmless(trick: str, tmp_path: Path) -> None:
    opened = 0
    for name, pack in CONTAINERS.items():
        (tmp_path / name).write_bytes(pack(TRICKS[trick]))
        try:
            with open_checkpoint(tmp_path / name) as checkpoint:
                verdict = judge_safety(checkpoint).verdict
        except BntoolError:
            continue
        assert verdict is not SafetyVerdict.HARMLESS, name
        opened += 1
    assert opened >= 3  # the zip, the legacy file and the tar archive hold any pickle


SURE = ("os", "posix", "subprocess", "builtins", "__builtin__", "pickle", "socket", "runpy", "importlib", "ctypes")


@pytest.mark.parametrize("name", [n for n in CALLS if n.split(".")[0] in SURE])
def test_what_surely_does_harm_is_suspicious(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(_zip(CALLS[name]))
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert judge_safety(checkpoint).suspicious == (name,)


@pytest.mark.parametrize(
    ("data", "listed"),
    [
        # how a method of a class and a member of an enum are pickled
        (_getattr(_global("a.Buffer"), "min") + b".", [("a.Buffer", False), ("a.Buffer.min", False)]),
        (
            _getattr(_global("a.Color"), "RED", "__builtin__.getattr") + b")R.",
            [("a.Color.RED", True), ("a.Color", False)],
        ),
    ],
)
def test_a_plain_lookup_by_getattr_is_one_more_name(data: bytes, listed: list[Any], tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(_zip(b"\x80\x02}X\x01\x00\x00\x00a" + data[:-1] + b"s."))
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert [(g.path, g.called) for g in checkpoint.globals if g.trust.value == "unknown"] == listed
        assert judge_safety(checkpoint).verdict is SafetyVerdict.UNKNOWN


def test_a_real_file_with_such_lookups_is_not_suspicious() -> None:
    with open_checkpoint(FIXTURES / "layouts" / "mmengine_ema.pth") as checkpoint:
        safety = judge_safety(checkpoint)
    assert safety.suspicious == ()
    assert "mmengine.logging.history_buffer.HistoryBuffer.min" in safety.unknown


def test_every_malicious_global_is_listed_first_and_as_called(tmp_path: Path) -> None:
    state = b"\x80\x02}(" + _text("a") + SYSTEM[:-1] + _text("b") + b"cx.y\nUnknown\n)\x81u."
    (tmp_path / "x.pt").write_bytes(_zip(state))
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert [(g.path, g.called, g.trust.value) for g in checkpoint.globals] == [
            ("os.system", True, "suspicious"),
            ("x.y.Unknown", True, "unknown"),
        ]


# nothing runs, nothing outside is read


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def _link(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    _index("link")(folder)


def _index(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "m.index.json").write_text(json.dumps({"weight_map": {"a.weight": file}})) and None


def _onnx(location: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        data = (FIXTURES / "interop" / "onnx_tiny_ext.onnx").read_bytes()
        old = b"onnx_tiny_ext.data"
        assert old in data
        name = location.encode().ljust(len(old), b"/")  # of equal length: no size changes
        (folder / "m.onnx").write_bytes(data.replace(old, name))

    return write


def _distributed(name: bytes | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_distributed({"model": {"a.weight": torch.ones(2)}, "evil": Evil()}, folder)
        if name is not None:
            data = (folder / ".metadata").read_bytes()
            assert b"__0_0.distcp" in data
            (folder / ".metadata").write_bytes(data.replace(b"__0_0.distcp", name))

    return write


def _tensorflow(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\n') and None


def _zip_slip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "slip.pt", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({"a": 1}, 2))
        archive.writestr("../../canary", b"x")
        archive.writestr("/tmp/canary", b"x")


def _other_pickles(folder: Path) -> None:
    """Pickles that nobody reads, beside the one that is read."""
    with zipfile.ZipFile(folder / "more.pt", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({"a": 1}, 2) + SYSTEM)
        archive.writestr("m/extra.pkl", SYSTEM)


def _export(folder: Path) -> None:
    """An archive whose weight says that it is a pickle."""
    with zipfile.ZipFile(folder / "m.pt2", "w") as archive:
        meta = {"dtype": 7, "sizes": [{"as_int": 4}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}}
        entry = {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": {**meta, "layout": 7}}
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/data/weights/model_weights_config.json", json.dumps({"config": {"a.weight": entry}}))
        archive.writestr("m/data/weights/weight_0", SYSTEM)
        archive.writestr("m/data/sample_inputs/model.pt", SYSTEM)


def _keras(folder: Path) -> None:
    """A Lambda layer, whose code Keras would unmarshal and run."""
    config = {"class_name": "Lambda", "config": {"function": {"class_name": "__lambda__", "config": {"code": "4wEA"}}}}
    with zipfile.ZipFile(folder / "m.keras", "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.0.0"}')
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n")


FOLDERS: dict[str, Callable[[Path], None]] = {
    "index, up": _index("../secret.safetensors"),
    "index, absolute": _index("/etc/passwd"),
    "index, device": _index("/dev/stdin"),
    "index, link": _link,
    "onnx, up": _onnx("../../../etc/hosts"),
    "onnx, absolute": _onnx("/etc/./../etc/host"),
    "onnx, process": _onnx("/proc/self/environ"),
    "distributed": _distributed(None),
    "distributed, up": _distributed(b"../secret.dc"),
    "distributed, absolute": _distributed(b"/etc/passwd."),
    "tensorflow, up": _tensorflow("../secret"),
    "tensorflow, absolute": _tensorflow("/etc/secret"),
    "zip slip": _zip_slip,
    "other pickles": _other_pickles,
    "export": _export,
    "keras": _keras,
}


def test_nothing_of_a_file_runs_and_nothing_outside_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    harmless, sources = _write_harmless(tmp_path / "harmless"), []
    for number, data in enumerate(TRICKS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, pack in CONTAINERS.items():
            (folder / name).write_bytes(pack(data))
            sources.append(folder / name)
        for member in ("storages", "tensors"):
            (folder / f"{member}.pth").write_bytes(_tar(data, where=member))
            sources.append(folder / f"{member}.pth")
    for number, write in enumerate(FOLDERS.values()):
        folder = tmp_path / f"folder-{number}"
        folder.mkdir()
        write(folder)
        sources += [folder, *(path for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink())]
    everything = [str(path.relative_to(tmp_path)) for path in [*harmless, *sources]]
    for number in range(len(everything)):
        (tmp_path / "out" / str(number)).mkdir(parents=True)
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    done = programs.run("guarded_reading", len(harmless), cwd=tmp_path, input="\n".join(everything))
    lines = done.stdout.splitlines()
    assert len(lines) == len(everything)
    verdicts = {verdict.value for verdict in SafetyVerdict}
    refused = [line for line in lines[: len(harmless)] if line.rsplit(" ", 1)[1] not in verdicts]
    assert not refused
    assert sum(line.endswith("suspicious") for line in lines) > 4 * len(CALLS) // 2
    assert {path for path in tmp_path.rglob("*") if "out" not in path.parts} == before


def _write_harmless(folder: Path) -> list[Path]:
    """One file of every layout."""
    made = []
    for name, write in WRITERS.items():
        (folder / name).mkdir(parents=True)
        made.append(write(STATE_DICTS["net"](), folder / name))
    for number, make in enumerate((script, export)):
        made.append(folder / f"{number}.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            make(made[-1])
    (folder / "ext").mkdir()
    alone = ("onnx_tiny.onnx", "keras_tiny.keras", "tfkeras2_tiny.h5", "caffe_tiny_std.caffemodel")
    made += [Path(shutil.copy(FIXTURES / "interop" / name, folder)) for name in alone]
    made += [Path(shutil.copy(path, folder)) for path in (FIXTURES / "exported").glob("*.pt2")]
    shutil.copy(FIXTURES / "interop" / "onnx_tiny_ext.data", folder / "ext")
    made.append(Path(shutil.copy(FIXTURES / "interop" / "onnx_tiny_ext.onnx", folder / "ext")))
    return made
