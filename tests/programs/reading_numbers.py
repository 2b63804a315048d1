"""List a file and read the numbers of its running_var; print the modules that this loaded."""

import sys

before = set(sys.modules)

from bntool.checkpoints.batchnorms import find_batchnorms
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.tensors import read_numbers

(norm,) = find_batchnorms(open_checkpoint(sys.argv[1]).state_dicts[0])
assert len(read_numbers(norm.tensors["running_var"])) == 4
print(*sorted(set(sys.modules) - before))
