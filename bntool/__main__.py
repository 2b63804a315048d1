"""``python -m bntool`` and the console script."""

from __future__ import annotations

import atexit
import gc
import os
import sys


def run() -> None:
    """Run the command line and exit with its code."""
    gc.set_threshold(100_000)  # a short-lived process that builds many small objects and drops few
    _start_few_threads()
    _open_closed_streams()
    code = 1  # of what nobody foresaw
    atexit.register(lambda: _leave(code))  # the first to register is the last to be called

    from bntool.cli.interrupts import InterruptHandler

    interrupts = InterruptHandler()
    interrupts.install()
    from bntool.cli.exit_codes import ExitCode
    from bntool.cli.main import main

    gc.freeze()
    code = main(sys.argv[1:])
    if code == ExitCode.INTERRUPTED:
        interrupts.end_process()
    sys.exit(code)


def _start_few_threads() -> None:
    """Let numpy start no threads for matrix products where no code of the user runs: files need none.

    Each of them waits busily while numpy is imported: on two cores that costs nearly as much again as the import. And
    sums of products, which biases are, have the same bits on every number of cores then.
    """
    if not any(argument.startswith(("--model", "--data")) for argument in sys.argv):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _open_closed_streams() -> None:
    """Give what was closed (``>&-``) to nobody: else the next file that is opened gets its number, and the output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def _leave(code: int) -> None:
    """End the process without taking apart what it holds: torch takes seconds, a listing a tenth of its time.

    Python calls it when threads are joined and all other functions registered with ``atexit`` have run. What the user's
    code wrote to files that it did not close is flushed, as taking them apart would have done.
    """
    import io

    # only commands with torch run code of the user
    written = gc.get_objects() if "torch" in sys.modules else [sys.stdout, sys.stderr]
    for thing in written:
        if type(thing) in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
            try:
                thing.flush()
            except (OSError, ValueError):  # a full disk; a file that is closed or only read
                continue
    os._exit(code)


if __name__ == "__main__":
    run()
