"""Runs command lines of one tree, each in a fork of its own, and writes down what they did.

Usage: running.py TREE FOLDER RESULT; FOLDER holds the inputs and ``lines.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import pty
import signal
import sys
from pathlib import Path

# one thread: the order of sums does not depend on the load of the machine
os.environ.update(OMP_NUM_THREADS="1", PYTHONHASHSEED="0", TERM="dumb", NO_COLOR="1", PYTHONDONTWRITEBYTECODE="1")
TIME_LIMIT = 300  # seconds
WORKERS = 2
TERMINALS = 15  # the first so many listings of each worker are shown on a terminal too, in colour
COLUMNS = (80, 120)


def run(arguments: list[str], *, worker: int, columns: int = 0) -> dict[str, object]:
    """Exit code and texts of one command line; with ``columns``, what it shows on a terminal of that width."""
    places = {stream: f"{stream}.{worker}" for stream in ("stdout", "stderr")}
    sys.stdout.flush()
    if columns:
        child, terminal = pty.fork()
    else:
        child, terminal = os.fork(), -1
    if not child:
        _become(arguments, list(places.values()), columns=columns)
    shown = b""
    while columns:
        try:
            if not (some := os.read(terminal, 65536)):
                break
        except OSError:  # the child has ended
            break
        shown += some
    _, status = os.waitpid(child, 0)
    if columns:
        os.close(terminal)
        return {"code": os.waitstatus_to_exitcode(status), "terminal": shown.decode(errors="replace")}
    texts = {stream: Path(place).read_text(errors="replace") for stream, place in places.items()}
    return {"code": os.waitstatus_to_exitcode(status), **texts}


def _become(arguments: list[str], places: list[str], *, columns: int) -> None:
    code = 99
    try:
        signal.alarm(TIME_LIMIT)
        if columns:
            os.environ.update(TERM="xterm-256color", COLUMNS=str(columns), PYTHONIOENCODING="utf-8")
            os.environ.pop("NO_COLOR")
        else:
            for number, place in enumerate(places, start=1):
                os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        from bntool.cli.main import main

        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def hash_outputs(number: str) -> dict[str, str]:
    """SHA-256 of the files that a run wrote: their names begin with its number."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path("out").rglob("*"))
        if path.is_file() and path.name.lstrip(".").startswith(number)
    }


def main(tree: str, folder: str, result: str) -> None:
    sys.path.insert(0, tree)
    os.chdir(folder)
    sys.path.append(folder)
    lines: dict[str, list[str]] = json.loads(Path("lines.json").read_text())
    Path("out").mkdir()
    # what takes seconds is imported once; bntool itself is imported by each run
    import h5py  # noqa: F401
    import numpy as np  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch  # noqa: F401

    assert not any(name.startswith("bntool") for name in sys.modules)
    children = []
    for worker in range(WORKERS):
        children.append(os.fork())
        if not children[-1]:
            mine = dict(list(lines.items())[worker::WORKERS])
            Path(f"{result}.{worker}").write_text(json.dumps(run_all(mine, worker=worker)))
            os._exit(0)
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit("a worker failed")
    parts = [json.loads(Path(f"{result}.{worker}").read_text()) for worker in range(WORKERS)]
    runs = {name: found for part in parts for name, found in part.items()}
    Path(result).write_text(json.dumps(dict(sorted(runs.items()))))


def run_all(lines: dict[str, list[str]], *, worker: int) -> dict[str, object]:
    runs: dict[str, object] = {}
    shown = 0
    for name, arguments in lines.items():
        runs[name] = {**run(arguments, worker=worker), "written": hash_outputs(name.partition(" ")[0])}
        if arguments[0] in {"inspect", "diff"} and "--json" not in arguments and shown < TERMINALS:
            shown += 1
            for columns in COLUMNS:
                runs[f"{name} [terminal of {columns}]"] = run(arguments, worker=worker, columns=columns)
    return runs


if __name__ == "__main__":
    main(*sys.argv[1:])
