"""A command of bntool that says "writing" and waits, when what it writes is to be brought to the disk."""

import os
import signal
import time

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)

from bntool.__main__ import run


def wait(_descriptor):
    print("writing", flush=True)
    time.sleep(100)
    raise AssertionError("nothing happened")


os.fsync = wait
run()
