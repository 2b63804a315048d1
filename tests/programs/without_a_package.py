"""Run bntool where a package is not installed: ``PACKAGE ARGUMENT...``."""

import sys

from bntool.__main__ import run

sys.modules[sys.argv.pop(1)] = None
run()
