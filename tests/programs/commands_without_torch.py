"""Run commands of bntool, one a line of stdin, where timm, mmdet, Pillow and onnx are not installed.

Prints a line of JSON for each: the exit code, what it said on stderr, and whether torch is imported then.
"""

import contextlib
import importlib.util
import io
import json
import sys

from bntool.cli.main import main

find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("timm", "mmdet", "PIL", "onnx") else find(name)
for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(line.split())
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
