"""Stands for a command line of bntool in the test of the guard; beside a file ``changed`` it does something else."""

from pathlib import Path


def main(arguments):
    _, change, *output = arguments
    changed = Path(__file__).with_name("changed").exists()
    print("done", "otherwise" if changed and change == "text" else "as ever")
    for path in output:
        Path(path).write_bytes(b"\1" if changed and change == "byte" else b"\0")
    return 3 if changed and change == "code" else 0
