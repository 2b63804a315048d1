"""Memory of a sweep that keeps the activations of all batches: how much it needs, and how much there is."""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bntool.modules.calling import tensors_in
from bntool.modules.memory import storage_keys

_ARENA, _STACK = 64 << 20, 8 << 20  # glibc's heaps on 64 bits, and Linux's usual stack
_SPARE = 0.6  # share of memory that tensors can fill: kernels need room, allocators keep what was freed

_FILLED = 0.8  # the same where what is freed goes back to the system all the time


@dataclass(frozen=True)
class MemoryForecast:
    """Memory of a forward, from a first forward with few samples.

    Attributes:
        waits: bytes for each sample that are alive while its batch waits, at each layer.
        running: bytes for each sample at the peak of a forward.
        thread: bytes of address space for each batch, see :func:`find_thread_space`.
        kept: bytes that libraries keep for the thread of each batch, as far as that was measured.
        seconds: for each sample, without moving anything.
        moving: seconds for each sample, where it is set aside at each layer.
        moved: bytes of each sample that are then set aside, at all layers together.
    """

    waits: tuple[float, ...]
    running: float
    thread: int = 0
    kept: int = 0
    seconds: float = 0.0
    moving: float = 0.0
    moved: float = 0.0

    @property
    def waiting(self) -> float:
        """Bytes for each sample at the layer where most are."""
        return max(self.waits, default=0.0)

    def need(self, samples: int, batch_size: int) -> int:
        """Compute the bytes for so many samples on their way, of which one batch runs."""
        return int((self._keep(batch_size) * samples + self.running * batch_size) / _SPARE)

    def fit(self, available: int, batch_size: int) -> int:
        """Return how many samples fit into so many bytes."""
        return max(0, int((available * _SPARE - self.running * batch_size) / max(self._keep(batch_size), 1.0)))

    def allow(self, memory: int, batch_size: int, samples: int) -> int:
        """Return how many bytes of so much memory waiting batches may hold; below 0: not even the one that runs
        fits.
        """
        threads = self.kept * math.ceil(samples / max(batch_size, 1))
        return int((memory - threads) * _FILLED - self.running * batch_size)

    def _keep(self, batch_size: int) -> float:
        """Compute the bytes for each sample while its batch waits."""
        return self.waiting + self.thread / max(batch_size, 1)


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that were made while it is active and are still alive.

    Args:
        known: tensors that were there before.

    Attributes:
        peak: bytes at most.
        waits: bytes at each layer.
        has_unknown: whether an operation was given a tensor that is not known and that none before it made, in this
            thread.
    """

    supports_higher_order_operators = True

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_unknown = False
        self._known = set(storage_keys(known))
        self.peak = 0
        self.waits: list[int] = []
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    @property
    def live(self) -> int:
        """Bytes of those that are alive: summed up, as a tensor may end in any thread, in the middle of a count."""
        return sum(list(self._sizes.values()))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler, a second of CPU time, only to leave this mode out of it."""
        return False

    def note_waiting(self) -> None:
        """Take note of the memory in use at a layer where a batch would wait for the others."""
        self.waits.append(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # a tensor of the numbers that a model names
            given = storage_keys(tensors_in((args, kwargs)))
            self.has_unknown |= any(key not in self._known and key not in self._sizes for key in given)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        key = next(storage_keys([tensor]), None)
        if key is None or key in self._sizes:
            return
        storage = tensor.untyped_storage()
        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, lambda _gone: self._remove(key))
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int) -> None:
        self._sizes.pop(key, None)
        self._references.pop(key, None)


def find_available(device: torch.device | None) -> int | None:
    """Free bytes of the device, or of this machine and the container that this process runs in; None if unknown."""
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device is not None and device.type != "cpu":
        return None
    limit = min(_read_limits(), default=None)
    # the ranks of a job on this machine share it
    return limit if limit is None else limit // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def find_resident() -> int:
    """Return bytes of memory that this process has in use; 0 where the system does not say."""
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):  # Linux says
        import resource

        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return 0


def find_thread_space() -> int:
    """Return address space that the system reserves for a thread, its stack and malloc's arena; 0 where it is not
    limited.
    """
    try:
        import resource
    except ImportError:  # Windows
        return 0
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return 0
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return _ARENA + (_STACK if stack == resource.RLIM_INFINITY else min(stack, _STACK))


def _read_limits() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        yield int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        space, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
        if space != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            yield max(0, space - pages * resource.getpagesize())
    groups = Path("/sys/fs/cgroup")
    for limit, used in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            yield max(0, int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
