"""A command of bntool, killed at each call in turn that makes a file, brings it to the disk or names it."""

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

from bntool.cli.main import main


def run(moment):
    left = [moment]

    def mortal(name):
        original = getattr(os, name)

        def call(*arguments, **keywords):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(os, name, call)

    child = os.fork()
    if child == 0:
        for name in ("fsync", "chmod", "link", "unlink", "replace", "fdopen"):
            mortal(name)
        try:
            os._exit(main([*sys.argv[1:], "--force", "--quiet"]))
        except SystemExit as end:
            os._exit(end.code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents():
    return {path.name: path.read_bytes() for path in sorted(Path("out").iterdir()) if path.name[0] != "."}


main([*sys.argv[1:], "--dry-run", "--quiet"])  # imports what is needed, once for all children
Path("out").mkdir()
assert run(0) == 0
new = contents()
old = {name: b"the old " + name.encode() for name in new}
for moment in itertools.count(1):
    for path in Path("out").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, data in old.items():
        Path("out", name).write_bytes(data)
    code = run(moment)
    found = contents()
    assert found.keys() == new.keys(), found.keys()
    assert all(found[name] in (old[name], new[name]) for name in found), moment
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    assert all(path.suffix in (".writing", ".replaced") for path in Path("out").iterdir() if path.name[0] == ".")
    assert run(0) == 0  # what a killed run left is in nobody's way
    assert contents() == new
print(len(new), moment)
