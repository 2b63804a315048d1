"""Open and rewrite files whose paths stdin names, under an audit hook that ends the program when anything else happens.

The only argument is how many of the first files are harmless.
"""

import contextlib

# codecs are modules that load when needed
import encodings.latin_1
import encodings.raw_unicode_escape
import encodings.utf_16  # noqa: F401
import importlib
import os
import sys
import traceback

from bntool.checkpoints.formats import FORMATS, open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.errors import BntoolError
from bntool.extensions import load_extensions
from bntool.inspection.safety import judge_safety

list(FORMATS)  # bntool's own modules, imported when a file may be of theirs
for name in ("hub_files", "unread_formats"):  # or when one is a folder, or of none
    importlib.import_module(f"bntool.checkpoints.{name}")
load_extensions("bntool.formats")  # and those of other installed packages


def go(path, target):
    try:
        with open_checkpoint(path) as checkpoint:
            print(path, judge_safety(checkpoint).verdict.value, flush=True)
            if checkpoint.format.read_only:
                return
            writable[:] = [os.path.abspath(os.path.dirname(target))]
            with contextlib.suppress(BntoolError):
                save_checkpoint(checkpoint, target)
    except BntoolError as error:
        print(path, error.code, flush=True)
    finally:
        writable.clear()


writable, armed = [], []
RUNS = (
    "exec",
    "import",
    "compile",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.__new__",
    "pickle.find_class",
    "ctypes.dlopen",
    "os.putenv",
    "marshal.loads",
    "code.__new__",
    "webbrowser.open",
    "shutil.rmtree",
    "os.remove",
    "os.rename",
    "os.mkdir",
)


def guard(event, args):
    if not armed:
        return
    bad = event in RUNS
    if event == "open" and not isinstance(args[0], int):
        place = os.path.realpath(os.fsdecode(args[0]))
        writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        bad = not place.startswith(writable[0] if writes and writable else HERE) or bool(writes and not writable)
    if bad and not (event in ("os.remove", "os.rename") and writable):
        armed.clear()
        print("EVENT", event, args, flush=True)
        traceback.print_stack()
        os._exit(9)


HERE = os.path.realpath(os.getcwd())
sys.addaudithook(guard)
sources = sys.stdin.read().splitlines()
harmless = int(sys.argv[1])  # the first are harmless: reading and writing them imports all that is ever needed
for number, path in enumerate(sources):
    if number == harmless:
        before = set(sys.modules)
        armed.append(True)
    go(path, os.path.join("out", str(number), os.path.basename(path)))
assert set(sys.modules) == before, set(sys.modules) - before
