"""Offloading activations of batches that wait: to a file where they do not fit into memory, and back when needed."""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import shutil
import tempfile
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bntool.data.batches import Batch, copy_batch
from bntool.errors import RefusedError
from bntool.modules.calling import tensors_in
from bntool.modules.memory import storage_key, storage_keys

_IN_MEMORY = ("tmpfs", "ramfs")  # file systems that would save nothing
_PROBE = 16 << 20  # bytes
_LEAST = 1 << 16  # bytes of a storage that are worth it
_UNSEEN = frozenset(("__reduce_ex__", "__repr__", "as_tensor", "asarray", "tensor", "tolist"))
_DONTNEED, _HUGEPAGE = 4, 14  # MADV_DONTNEED and MADV_HUGEPAGE of Linux
_HUGE = 2 << 20  # bytes of a huge page


class Offloading:
    """The activations that batches hold while they wait: as much as is allowed in memory, the rest in a file.

    A storage that is set aside keeps its address and has no memory behind it. It is brought back as soon as any
    operation of torch's touches it, in the forward of its batch or of another one: what waits for a later layer, as the
    shortcut of a residual block, stays where it is until then.

    Args:
        allowed: bytes that all waiting batches may hold together.
        folder: of the file, which has no name: nothing is left of it, whatever ends the process.

    Attributes:
        held: bytes that batches hold in memory, as far as they have been asked.
        moved: bytes that were set aside so far.
        seconds: that setting aside and bringing back took.
    """

    def __init__(self, allowed: int, folder: Path) -> None:
        self.allowed = allowed
        self.held = self.moved = 0
        self.seconds = 0.0
        self._places: dict[int, _Place] = {}
        self._regions = _Regions()
        self._folder = folder
        self._lock = threading.RLock()
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 closed with this object
        except OSError as error:
            raise self._fail(error) from error

    def close(self) -> None:
        """Let go of the file; what the model itself still holds is brought back."""
        for key in list(self._places):  # some of which may be gone before it is their turn
            place = self._places.get(key)
            if place is not None and not place.is_ours:
                self.bring_back(key)
        self._file.close()

    def put(self, storage: torch.UntypedStorage, *, is_ours: bool) -> None:
        """Set a storage aside, if it is not, and worth it.

        Args:
            is_ours: nobody but bntool knows of it.
        """
        key: int = storage._cdata
        if key in self._places or storage.nbytes() < _LEAST:
            return
        with self._lock:
            place = _DevicePlace(storage) if storage.device.type != "cpu" else _FilePlace(storage, self._regions)
            place.is_ours = is_ours
            # of a storage that nobody needs any more the place is free again, in whichever thread that turns out
            place.storage = weakref.ref(storage, lambda _gone: self._forget(key, place))
            self.moved += storage.nbytes()
            with self._moving():
                place.put(storage, self._file)
            self._places[key] = place

    def holds(self, storage: torch.UntypedStorage) -> bool:
        """Return whether a storage is set aside."""
        return storage._cdata in self._places

    def bring_back(self, key: int) -> None:
        """Bring a storage back, if it is set aside."""
        if key not in self._places:
            return
        with self._lock:  # forwards that are abandoned end at the same time
            place = self._places.pop(key, None)
            if place is None:
                return
            storage = place.storage()
            if storage is None:  # it has just ended in another thread, which finds nothing to forget any more
                place.release()
                return
            with self._moving():
                place.take(storage, self._file)

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except OSError as error:
            raise self._fail(error) from error
        finally:
            self.seconds += time.perf_counter() - start

    def _forget(self, key: int, place: _Place) -> None:
        if self._places.get(key) is place and self._places.pop(key, None) is place:
            place.release()

    def _fail(self, error: OSError) -> RefusedError:
        return RefusedError(
            f"activations cannot be kept in {self._folder}: {error.strerror or error}; give more --memory"
        )


class _Place(ABC):
    """The place where a storage is kept meanwhile."""

    is_ours = False
    storage: Callable[[], torch.UntypedStorage | None]

    @abstractmethod
    def put(self, storage: torch.UntypedStorage, file: io.FileIO) -> None: ...

    @abstractmethod
    def take(self, storage: torch.UntypedStorage, file: io.FileIO) -> None: ...

    @abstractmethod
    def release(self) -> None:
        """Free what is kept: nobody needs it."""


class _DevicePlace(_Place):
    """The place of a storage of a device, in the memory of the host."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._host: torch.UntypedStorage = storage.cpu()  # type: ignore[no-untyped-call]

    def put(self, storage: torch.UntypedStorage, file: io.FileIO) -> None:  # noqa: ARG002 not in the file
        storage.resize_(0)

    def take(self, storage: torch.UntypedStorage, file: io.FileIO) -> None:  # noqa: ARG002 not in the file
        storage.resize_(self._host.nbytes())
        storage.copy_(self._host)

    def release(self) -> None:
        """Do nothing: memory is freed with this object."""


class _FilePlace(_Place):
    """The place in the file of all whole pages of a storage. Its memory is given to the system, and is there again when
    written to.

    malloc would keep for itself what is freed.
    """

    def __init__(self, storage: torch.UntypedStorage, regions: _Regions) -> None:
        first, page = storage.data_ptr(), mmap.PAGESIZE
        self._address = -(-first // page) * page
        self._size = (first + storage.nbytes()) // page * page - self._address
        self._regions = regions
        self._start = regions.take(self._size)

    def put(self, storage: torch.UntypedStorage, file: io.FileIO) -> None:  # noqa: ARG002 its address is known
        file.seek(self._start)
        view, done = self._view(), 0
        while done < self._size:
            done += file.write(view[done:])
        if self._advise(_DONTNEED):
            raise OSError("the system does not take the memory")

    def take(self, storage: torch.UntypedStorage, file: io.FileIO) -> None:  # noqa: ARG002 its address is known
        if self._size >= _HUGE:
            self._advise(_HUGEPAGE)  # or not: then 512 pages are made one by one, which takes as long as reading them
        file.seek(self._start)
        view, done = self._view(), 0
        while done < self._size:
            count = file.readinto(view[done:])
            if not count:
                raise OSError("the file became shorter")
            done += count
        self.release()

    def release(self) -> None:
        self._regions.release(self._start, self._size)

    def _advise(self, advice: int) -> int:
        code: int = ctypes.CDLL(None).madvise(ctypes.c_void_p(self._address), ctypes.c_size_t(self._size), advice)
        return code

    def _view(self) -> memoryview:
        # by its address: a storage that numpy has seen is torch's no more
        return memoryview((ctypes.c_char * self._size).from_address(self._address)).cast("B")


class _Regions:
    """The free parts of a file."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []  # start and end, in order
        self._end = 0
        self._released: deque[tuple[int, int]] = deque()

    def take(self, size: int) -> int:
        """Reserve room for so many bytes; return where it begins."""
        while self._released:
            start, length = self._released.popleft()
            self._add(start, start + length)
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        self._end += size
        return self._end - size

    def release(self, start: int, size: int) -> None:
        """Free so many bytes again; may be called in any thread."""
        self._released.append((start, size))

    def _add(self, start: int, end: int) -> None:
        index = next((i for i, (other, _) in enumerate(self._free) if other > start), len(self._free))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))


class KeptBatch:
    """A batch that is kept in memory with all that its forward holds."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context that the forward runs in."""
        return contextlib.nullcontext()

    def go_on(self) -> None:
        """Let the batch go on."""

    def bring_back(self) -> None:
        """Bring back all that the batch holds."""

    def touch(self, tensor: torch.Tensor) -> None:
        """Bring a tensor back, of whatever batch, that is about to be read where :meth:`watching` does not see it."""

    def wait(self) -> None:
        """Let the batch wait."""

    @contextlib.contextmanager
    def in_memory(self) -> Iterator[Batch]:
        """Keep the batch in memory while it is looked at."""
        self.bring_back()
        yield self.batch
        self.wait()


class MovableBatch(KeptBatch):
    """A batch whose inputs, and what its forward made and still holds, are set aside while it waits if need be.

    Args:
        as_a_whole: bring all of it back before it goes on, because not all that touches it can be seen.
    """

    def __init__(self, offloading: Offloading, batch: Batch, *, as_a_whole: bool = False) -> None:
        super().__init__(copy_batch(batch))  # memory that came from numpy cannot be given back
        self._offloading = offloading
        self._as_a_whole = as_a_whole
        self._held = HeldStorages(offloading)
        self._counted = 0
        for tensor in tensors_in(self.batch.inputs):
            self._held.add(tensor)
        self._inputs = set(self._held.keys)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with self._held, _UnseenReads(self.touch):
            yield

    def go_on(self) -> None:
        if self._as_a_whole:
            self.bring_back()

    def touch(self, tensor: torch.Tensor) -> None:
        for key in storage_keys([tensor]):
            self._offloading.bring_back(key)

    def bring_back(self) -> None:
        for key in self._held.keys:
            self._offloading.bring_back(key)

    def wait(self) -> None:
        storages = [storage for storage in self._held.storages if not self._offloading.holds(storage)]
        size = sum(storage.nbytes() for storage in storages)
        self._offloading.held += size - self._counted
        self._counted = size
        if self._offloading.held > self._offloading.allowed:
            for storage in storages:
                self._offloading.put(storage, is_ours=storage._cdata in self._inputs)
            self._offloading.held -= size
            self._counted = 0


class _UnseenReads(TorchFunctionMode):
    """Tells of tensors that are given to functions of torch's that read elements without any operation."""

    def __init__(self, touch: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._touch = touch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _UNSEEN:
            for tensor in tensors_in((args, kwargs)):
                self._touch(tensor)
        return function(*args, **(kwargs or {}))


class HeldStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes note of the storages that are made while it is active; what is touched and set aside it brings back."""

    supports_higher_order_operators = True

    def __init__(self, offloading: Offloading) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._offloading = offloading
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler; see :class:`bntool.recalibration.exact.memory.LiveTensors`."""
        return False

    @property
    def keys(self) -> list[int]:
        """The keys of the storages that are alive."""
        return list(self._storages)

    @property
    def storages(self) -> list[torch.UntypedStorage]:
        """The storages that are alive."""
        return [storage for reference in list(self._storages.values()) if (storage := reference()) is not None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = set(storage_keys(tensors_in((args, kwargs))))
        for key in given:
            self._offloading.bring_back(key)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            for key in storage_keys([tensor]):
                if key not in given:  # else a view, of a weight perhaps
                    self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Take note of the storage of a tensor, if its memory can be given back."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key not in self._storages and storage.resizable():
            self._storages[key] = weakref.ref(storage, lambda _gone: self._storages.pop(key, None))


def choose_folder() -> Path:
    """Choose a folder for files that are kept for a while: one that is not itself in memory, if there is one."""
    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]  # noqa: S108 a file without a name
    return next((folder for folder in candidates if folder.is_dir() and not _is_in_memory(folder)), candidates[0])


def _is_in_memory(folder: Path) -> bool:
    kind, longest = "", -1
    with contextlib.suppress(OSError, IndexError):  # only Linux says
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, place, system, *_ = line.split()
            if folder.resolve().is_relative_to(place) and len(place) > longest:
                kind, longest = system, len(place)
    return kind in _IN_MEMORY


def find_free(folder: Path) -> int:
    """Free bytes of its file system."""
    return shutil.disk_usage(folder).free


def measure_disk(folder: Path) -> float:
    """Measure the bytes that the disk below a folder takes in a second.

    Raises:
        RefusedError: it takes none.
    """
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.perf_counter()
            file.write(bytes(_PROBE))
            os.fsync(file.fileno())
            return _PROBE / max(time.perf_counter() - start, 1e-6)
    except OSError as error:
        raise RefusedError(f"activations cannot be kept in {folder}: {error.strerror or error}") from error


def find_offloaded_share(waiting: Sequence[float], samples: int, allowed: int) -> tuple[float, int]:
    """Return the share of what batches hold that will be set aside, over all layers, and the bytes at the layer where
    most are.

    Args:
        waiting: bytes that a sample holds at each layer.
        samples: how many there are.
        allowed: bytes that they may hold in memory.
    """
    over = [max(0, int(size * samples) - allowed) for size in waiting]
    return sum(over) / max(sum(waiting) * samples, 1.0), max(over, default=0)
