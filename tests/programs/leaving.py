"""How one rank of a job ends."""

import os
import sys

import torch.distributed as dist


def leave_job() -> None:
    """Leave the job and the process, without taking apart what holds the group.

    The destructors of gloo and of DistributedDataParallel (torch 2.13) now and then wait for a rank that is gone.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
