"""``python -m tests.benchmarks [NAME...]``: run all benchmarks, or those named."""

from __future__ import annotations

import compileall
import importlib
import pkgutil
import sys
from pathlib import Path

from tests.places import ROOT

_ON_DEMAND = {"on_device"}  # `make gpu`
_PLUMBING = {"measuring", "launching", "multiplying", "__main__"}


def main(wanted: list[str]) -> None:
    # as an installation is, and the peers are: else a listing takes half as long again
    compileall.compile_dir(ROOT / "bntool", quiet=1)
    names = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in _PLUMBING]
    for name in names:
        if name in wanted or (not wanted and name not in _ON_DEMAND):
            print(f"== {name}")
            importlib.import_module(f"tests.benchmarks.{name}").run()


if __name__ == "__main__":
    main(sys.argv[1:])
