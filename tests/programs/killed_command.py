"""A command of bntool that gets each of some signals at each call in turn that makes a file, flushes it or names it."""

import gc
import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

from bntool.cli.exit_codes import ExitCode
from bntool.cli.interrupts import InterruptHandler
from bntool.cli.main import main

SIGNALS = [signal.Signals[name] for name in sys.argv[1].split()]
ARGUMENTS = [*sys.argv[2:], "--force", "--quiet"]
OUT = Path("out")


def run(moment, sent=None):
    left = [moment]

    def mortal(name):
        original = getattr(os, name)

        def call(*arguments, **keywords):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), sent)
            return original(*arguments, **keywords)

        setattr(os, name, call)

    child = os.fork()
    if child == 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # ignored where tests run in the background
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        interrupts = InterruptHandler()
        interrupts.install()
        for name in ("open", "fsync", "chmod", "link", "unlink", "replace", "mkdir", "rmdir"):
            mortal(name)
        code = main(ARGUMENTS)
        if code == ExitCode.INTERRUPTED:
            interrupts.end_process()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents():
    return {path.name: path.read_bytes() for path in sorted(OUT.iterdir()) if path.name[0] != "."}


def hidden():
    return [path for path in OUT.iterdir() if path.name[0] == "."]


def send_everywhere(sent):
    """How many moments there are."""
    for moment in itertools.count(1):
        for path in OUT.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, data in old.items():
            (OUT / name).write_bytes(data)
        code = run(moment, sent)
        found = contents()
        assert found.keys() == new.keys(), found.keys()
        assert all(found[name] in (old[name], new[name]) for name in found), moment
        if code == 0:
            break
        if sent == signal.SIGKILL:
            assert all(path.suffix in (".writing", ".replaced") for path in hidden())
            assert run(0) == 0  # what a killed run left is removed by the next one
            assert contents() == new
        else:
            assert found in (old, new), moment
        assert code == (ExitCode.INTERRUPTED if sent == signal.SIGINT else -sent), code
        assert not hidden(), (moment, hidden())
    return moment


sys.modules["onnxruntime"] = None  # as if it were not installed: else each child starts it
OUT.mkdir()
assert main(ARGUMENTS) == 0  # imports what is needed, once for all children
gc.freeze()  # else each child copies all of that, when it looks for what to collect
assert run(0) == 0
new = contents()
old = {name: b"the old " + name.encode() for name in new}
print(len(new), *map(send_everywhere, SIGNALS))
