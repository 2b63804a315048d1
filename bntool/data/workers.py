"""Reading from processes of a DataLoader, which may be lost at any moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

_LOST = "a process that reads the data was lost (killed, out of memory, or ended by its own code); try fewer workers"


class LostWorkerError(RuntimeError):
    """A worker process of a DataLoader ended unexpectedly."""


def iterate(source: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of an iterable; where it is a DataLoader with workers, the loss of one is told from other errors.

    Raises:
        LostWorkerError: a worker is gone.
        Exception: whatever the iterable raises.
    """
    if not isinstance(source, DataLoader) or not source.num_workers:
        yield from source
        return
    with _keep_child_handler():
        iterator = iter(source)
    try:
        yield from iterator
    except (ConnectionError, EOFError) as error:
        raise LostWorkerError(_LOST) from error
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            raise LostWorkerError(f"{_LOST}: {error}") from error
        raise


@contextlib.contextmanager
def _keep_child_handler() -> Iterator[None]:
    """Keep the handler of SIGCHLD that was installed before.

    torch installs one that raises wherever the program happens to be when a worker dies. Without it the loader itself
    notices, within seconds.
    """
    name = getattr(signal, "SIGCHLD", None)  # Windows has none
    if name is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(name)
    try:
        yield
    finally:
        if handler is not None:  # None: one that Python knows nothing of
            signal.signal(name, handler)
