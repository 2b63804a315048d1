"""``python -m bntool`` and the console script."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line and exit with its code."""
    from bntool.cli.main import main

    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
