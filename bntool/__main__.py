"""``python -m bntool`` and the console script."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line and exit with its code."""
    import gc

    from bntool.cli.interrupts import InterruptHandler

    InterruptHandler().install()
    from bntool.cli.main import main

    gc.freeze()
    gc.set_threshold(100_000)  # a short-lived process that builds many small objects and drops few
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
