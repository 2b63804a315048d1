"""ONNX Runtime in a process of its own: a model that crashes it takes nothing else down.

The module is both sides. Run as a program with a model, it answers on standard output what it reads on standard input:
archives of numpy arrays, each after its length in eight bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import Self

_LENGTH = 8  # bytes of the length of a message
_LONGEST = 300  # characters of what ONNX Runtime says of a failure
_FAILURE = "failure"  # the name of the one array of an answer that is none


class RuntimeFailure(Exception):  # noqa: N818 (a fact of the runtime, which callers put in their own words)
    """ONNX Runtime does not open or run a model, or crashes on it; the message says what it said."""


@dataclass(frozen=True)
class ModelInput:
    """An input of a model.

    Attributes:
        kind: e.g. ``tensor(float)``.
        shape: extents; texts or None where the model leaves them open.
    """

    name: str
    kind: str
    shape: tuple[Any, ...]


class OnnxRuntime:
    """A model that is open in ONNX Runtime, on the CPU, in a process of its own.

    Args:
        model: the file.
        optimised: with all optimisations of the runtime, which fold constants and BatchNorms; else with none.

    Attributes:
        version: of the runtime.
        inputs: of the model.

    Raises:
        RuntimeFailure: it does not open.
    """

    def __init__(self, model: Path, *, optimised: bool = False) -> None:
        package = Path(__file__).parents[2]
        paths = [str(package), *filter(None, sys.path)]
        self._process = subprocess.Popen(  # noqa: S603 (this module, by this interpreter)
            [sys.executable, "-m", __name__, str(model.absolute()), str(int(optimised))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            facts = json.loads(str(self._receive()["facts"]))
        except BaseException:
            self.close()
            raise
        self.version: str = facts["version"]
        self.inputs = tuple(ModelInput(name, kind, tuple(shape)) for name, kind, shape in facts["inputs"])

    def run(self, given: Mapping[str, Any]) -> list[Any]:
        """Run the model and return its outputs as arrays; None for those that are no arrays of numbers.

        Raises:
            RuntimeFailure: it does not run.
        """
        assert self._process.stdin is not None
        try:
            _write(self._process.stdin, given)
        except OSError:
            raise self._explain_end() from None
        found = self._receive()
        count = int(found.pop("count"))
        return [found.get(str(number)) for number in range(count)]

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found = _read(self._process.stdout)
        if found is None:
            raise self._explain_end()
        if _FAILURE in found:
            raise RuntimeFailure(str(found[_FAILURE]))
        return found

    def _explain_end(self) -> RuntimeFailure:
        code = self._process.wait()
        how = f"is stopped by signal {signal.Signals(-code).name}" if code < 0 else f"ends with code {code}"
        return RuntimeFailure(f"ONNX Runtime crashes: its process {how}")

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # it died with a request in its pipe
                    stream.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write(stream: IO[bytes], arrays: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{f"array_{name}": value for name, value in arrays.items()})
    data = buffer.getvalue()
    stream.write(len(data).to_bytes(_LENGTH, "little") + data)
    stream.flush()


def _read(stream: IO[bytes]) -> dict[str, Any] | None:
    """Return the arrays of a message by name; None where there is none, or only a part of one."""
    head = stream.read(_LENGTH)
    data = stream.read(int.from_bytes(head, "little")) if len(head) == _LENGTH else b""
    if len(head) != _LENGTH or len(data) != int.from_bytes(head, "little"):
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        return {name.removeprefix("array_"): found[name] for name in found.files}


def _serve(model: str, *, optimised: bool) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the runtime prints is no answer
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        options.log_severity_level = 4  # what is fatal
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = [(one.name, one.type, list(one.shape)) for one in session.get_inputs()]
        facts = {"version": onnxruntime.__version__, "inputs": inputs}
        _write(answers, {"facts": np.array(json.dumps(facts))})
    except Exception as error:  # noqa: BLE001 each operator of the runtime has errors of its own
        _write(answers, {_FAILURE: np.array(_first_line(error))})
        return
    while (given := _read(sys.stdin.buffer)) is not None:
        try:
            outputs: Sequence[Any] = session.run(None, given)
            numbers = {str(i): o for i, o in enumerate(outputs) if isinstance(o, np.ndarray) and o.dtype.kind in "fiub"}
            _write(answers, {"count": np.array(len(outputs)), **numbers})
        except Exception as error:  # noqa: BLE001 as above
            _write(answers, {_FAILURE: np.array(_first_line(error))})


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_LONGEST] or type(error).__name__


if __name__ == "__main__":
    _serve(sys.argv[1], optimised=sys.argv[2] == "1")
