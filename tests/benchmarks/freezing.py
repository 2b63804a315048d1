"""``bntool freeze`` of a large safetensors file against ``cp`` of it; GIGABYTES=10 for the size of the promise."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tests.benchmarks.inspection import write_sparse_safetensors
from tests.benchmarks.measuring import measure, print_table, python


def run() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.safetensors", str(Path(folder) / "b.safetensors")
        write_sparse_safetensors(source, gigabytes=int(os.environ.get("GIGABYTES", "1")))
        # cp too must write every byte; sync counts for both, as bntool flushes what it wrote
        copy = f"cp --sparse=never --reflink=never {source} {target} && sync {target}"
        commands = {
            "cp and sync": (("sh", "-c", copy), False),
            "bntool freeze": (python("-m", "bntool", "freeze", str(source), "-o", target, "--force"), False),
        }
        print_table(measure(commands, rounds=5), peer="cp and sync")
