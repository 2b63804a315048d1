"""One rank of two: what they exchange arrives whatever its size."""

import sys
import warnings

import torch.distributed as dist

from bntool.recalibration.ranks import _FRAME, find_ranks
from tests.programs.leaving import leave_job

warnings.simplefilter("error")
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
for sizes in [(0, 0), (3, 5), (_FRAME, 1), (1, 3 * _FRAME), *((_FRAME - n, 2) for n in range(64))]:
    given = [bytes([65 + r]) * size for r, size in enumerate(sizes)]
    assert find_ranks().share(lambda: given[rank]) == given, sizes  # noqa: B023
leave_job()
