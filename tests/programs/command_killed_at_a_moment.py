"""A command of bntool that is killed late, some times, in a process that has imported what it needs.

Arguments: how often, a file name with {} for the number, and the command without its output.
"""

import gc
import os
import random
import signal
import sys
import time

from bntool.cli.main import main

TIMES, NAME, COMMAND = int(sys.argv[1]), sys.argv[2], sys.argv[3:]


def start(name):
    child = os.fork()
    if child == 0:
        os._exit(main([*COMMAND, "-o", name, "--quiet"]))
    return child


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


assert main([*COMMAND, "-o", NAME.format("first"), "--quiet"]) == 0  # imports what is needed, once for all children
gc.freeze()  # else each child copies all of that, when it looks for what to collect
started = time.perf_counter()
assert end(start(NAME.format("whole"))) == 0
duration = time.perf_counter() - started
rng = random.Random(COMMAND[0])
for number in range(TIMES):
    child = start(NAME.format(number))
    time.sleep(duration * rng.uniform(0.5, 1.0))
    os.kill(child, signal.SIGKILL)
    assert end(child) in (0, -signal.SIGKILL)
