"""Several processes that measure together: each its share of the batches, all the same result."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bntool.errors import BntoolError, RefusedError
from bntool.modules.borrowing import Borrowed
from bntool.modules.finding import walk_modules
from bntool.recalibration.options import Method

Result = TypeVar("Result")
_SHARDING = ("FullyShardedDataParallel", "FSDPModule")
_EXCHANGES = ("c10d", "_c10d_functional")
_FRAME = 1 << 17  # bytes: moments of 1,024 channels for seven batches
_SIZE = 8


@dataclass(frozen=True)
class Ranks:
    """The processes of a job.

    Attributes:
        rank: the number of this one.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def share(self, work: Callable[[], Result]) -> list[Result]:
        """Do this rank's part; what each rank's part gave, in order of ranks, on every rank.

        An error of one rank becomes an error of all, so that none waits for one that is gone.

        Raises:
            RefusedError: another rank failed, or was lost.
            whatever ``work`` raises.
        """
        if self.world == 1:
            return [work()]
        try:
            result, error = work(), None
        except Exception as caught:  # noqa: BLE001 it is raised again, after the others know
            result, error = None, caught
        failed = None if error is None else (error.message if isinstance(error, BntoolError) else repr(error))
        try:
            gathered = _gather((failed, result), self.world)
        except RuntimeError as lost:
            raise error or RefusedError(f"another rank was lost: {' '.join(str(lost).split())}") from lost
        if error is not None:
            raise error
        for rank, (message, _) in enumerate(gathered):
            if message is not None:
                raise RefusedError(f"rank {rank} failed: {message}")
        return [part for _, part in gathered]


def _gather(value: Any, world: int) -> list[Any]:
    """Gather what each rank gives, in order of ranks.

    As ``all_gather_object``, which asks for the sizes first, where one exchange does for most: exact statistics make
    one at each layer.
    """
    gathered: list[Any] = [None] * world
    if dist.get_backend() != dist.Backend.GLOO:  # others exchange what is on their device
        dist.all_gather_object(gathered, value)
        return gathered
    content = pickle.dumps(value)
    frames = _exchange(len(content).to_bytes(_SIZE, "little") + content[: _FRAME - _SIZE], _FRAME, world)
    sizes = [int.from_bytes(frame[:_SIZE], "little") for frame in frames]
    contents = [frame[_SIZE:] for frame in frames]
    if max(sizes) > _FRAME - _SIZE:
        contents = _exchange(content, max(sizes), world)
    # of ranks of this job, as all_gather_object takes it
    return [pickle.loads(part[:size]) for part, size in zip(contents, sizes, strict=True)]  # noqa: S301


def _exchange(content: bytes, length: int, world: int) -> list[bytes]:
    """Exchange bytes of one length with each rank; this one gives ``content``, filled up."""
    given = torch.frombuffer(bytearray(content.ljust(length, b"\0")), dtype=torch.uint8)
    parts = [torch.empty(length, dtype=torch.uint8, device="cpu") for _ in range(world)]
    dist.all_gather(parts, given)
    return [part.numpy().tobytes() for part in parts]


def find_ranks() -> Ranks:
    """Return the job of torch.distributed that this process is part of; a job of one where there is none."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextlib.contextmanager
def join_job() -> Iterator[Ranks]:
    """Join the job that ``torchrun`` started this process for, if it did, and leave it again.

    Only small objects on the CPU are exchanged, so the backend is gloo, whatever device the model is on.

    Raises:
        RefusedError: the other processes cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield find_ranks()
        return
    try:
        from torch.distributed.rendezvous import rendezvous  # not every torch has it

        store, rank, world = next(rendezvous("env://"))
        # torchrun starts lost processes again with the store that the lost ones had: what they left there is not ours
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=own, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        raise RefusedError(f"the other processes of the job cannot be reached: {error}") from error
    try:
        yield find_ranks()
        # one that closes its connections while another still reads from them may take that one down (SIGABRT in
        # gloo), so all wait for the last; one that failed does not come here, and whoever waits learns it at once
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    finally:
        dist.destroy_process_group()


def isolate_forwards(model: torch.nn.Module, borrowed: Borrowed, *, method: Method) -> None:
    """Let no forward wait for other ranks, nor share its work with other devices.

    Not all ranks have as many batches, paused forwards wait on their way, and replicas have statistics of their own.

    Raises:
        RefusedError: it cannot be kept from that.
    """
    for name, module in walk_modules(model):
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            borrowed.set_attribute(module, "require_forward_param_sync", False)
        elif isinstance(module, torch.nn.DataParallel):
            borrowed.set_attribute(module, "device_ids", [])
        elif method is Method.EXACT and any(kind.__name__ in _SHARDING for kind in type(module).__mro__):
            raise RefusedError(
                "its parameters are sharded: each forward gathers them from the other ranks, which exact statistics "
                "would interrupt; use --method pooled with equally many batches on each rank",
                tensor=name or None,
            )


class NoExchange(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses whatever exchanges something with the other processes of a job, while it is active.

    Raises:
        RefusedError
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler; see :class:`bntool.recalibration.exact.memory.LiveTensors`."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _EXCHANGES and find_ranks().world > 1:
            raise RefusedError(
                f"a forward of the model exchanges something with the other ranks ({func}), and exact statistics let "
                "batches wait in the middle of it; use --method pooled with equally many batches on each rank"
            )
        return func(*args, **(kwargs or {}))
