"""A command of bntool, with Ctrl-C when it opens its first file."""

import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

from bntool.__main__ import run
from bntool.checkpoints import formats


def interrupt(_file):
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("nothing happened")


formats.open_file = interrupt
run()
