"""Run one command and print its exit code, CPU seconds, peak resident kilobytes and seconds by the clock.

A process of its own, and a small one: a child's peak memory counts from that of the process that started it.
"""

from __future__ import annotations

import contextlib
import os
import pty
import sys
import time


def main(terminal: str, *command: str) -> None:
    start = time.monotonic()
    if terminal == "terminal":
        child, descriptor = pty.fork()
        if child == 0:
            os.environ.update(TERM="xterm-256color", COLUMNS="120", LINES="40")
            os.execvp(command[0], command)
        with contextlib.suppress(OSError):
            while os.read(descriptor, 1 << 16):
                pass
        os.close(descriptor)
    else:
        nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        child = os.posix_spawnp(command[0], command, os.environ, file_actions=nowhere)
    _, status, usage = os.wait4(child, 0)
    print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss, time.monotonic() - start)


main(*sys.argv[1:])
