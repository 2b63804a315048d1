"""Open a checkpoint; print the class of the error, or nothing, and then each file that was opened meanwhile."""

import sys

import h5py  # noqa: F401

import bntool.checkpoints.containers.hdf5  # noqa: F401
from bntool.checkpoints.formats import open_checkpoint

opened = []
sys.addaudithook(lambda event, facts: opened.append(str(facts[0])) if event == "open" else None)
error = ""
try:
    open_checkpoint(sys.argv[1])
except Exception as caught:
    error = type(caught).__name__
print(error, *opened, sep="\n")
