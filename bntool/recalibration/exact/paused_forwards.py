"""Forwards that stop on their way: one thread for each, of which one runs at a time."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator

import torch

from bntool.data.batches import find_placement
from bntool.errors import RefusedError
from bntool.recalibration.moments import Moments

_LOOKS = 30  # one after another at which nothing has used CPU time: the forward waits for another
_PAUSE = 1.0  # seconds from one look to the next; the first one after the process was stopped itself sees a long one

_ENDING_SECONDS = 5.0  # seconds; a forward that is abandoned ends at once unless it waits for something else


class AbandonedError(BaseException):
    """Raised inside the model's forward of a batch that is not to go on."""


class PausedForward:
    """One batch on its way through the model, in a thread of its own that runs only while it is its turn.

    The thread is what lets a forward stop in the middle of any model's code and go on later.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self.reached: tuple[str, Moments] | None = None
        self._run = run
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._abandoned = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._main,), daemon=True, name="bntool-forward")

    def _main(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                self._run()
        except BaseException as error:  # noqa: BLE001 handed to the thread that waits for it
            self._end_with(error)
        self._back.release()

    def _end_with(self, error: BaseException) -> None:
        """Keep the first error: a later one, perhaps in another thread, only follows from it."""
        with self._lock:
            if self._error is None:
                self._error = error

    def advance(self) -> None:
        """Let it run to the next layer, or to the end: then ``reached`` is None.

        Raises:
            whatever the run raised.
        """
        self.reached = None
        if not self._thread.ident:
            start_thread(self._thread)
        self._go.release()
        self._wait_for_return()
        if self._error is not None:
            raise self._error

    def _wait_for_return(self) -> None:
        idle, used = 0, time.process_time()
        while not self._back.acquire(timeout=_PAUSE):
            before, used = used, time.process_time()
            idle = idle + 1 if used - before < _PAUSE / 100 else 0
            if idle == _LOOKS:
                raise RefusedError(
                    "the model waits for something that another batch holds, perhaps a lock in its forward; exact "
                    "statistics need all batches on their way at once, use --method pooled"
                )

    def pause_at(self, layer: str, moments: Moments) -> None:
        """Hand the turn back and wait for the next; called by the run itself."""
        if self._abandoned:  # code of the model caught what ended it at an earlier layer
            raise AbandonedError
        if threading.current_thread() is not self._thread:
            self._end_with(
                RefusedError(
                    "the model calls this layer in a thread of its own, which cannot be stopped on its way; use "
                    "--method pooled",
                    tensor=layer,
                )
            )
            self._back.release()  # the forward may wait for that thread for ever
            raise AbandonedError
        self.reached = (layer, moments)
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise AbandonedError

    def abandon(self) -> None:
        """End the run where it is."""
        self._abandoned = True
        self._go.release()

    def join(self) -> None:
        """Wait until the thread of an abandoned run has ended."""
        if self._thread.ident:
            self._thread.join(timeout=_ENDING_SECONDS)


def start_thread(thread: threading.Thread) -> None:
    """Start the thread of a batch.

    Raises:
        RefusedError: the system gives no more threads.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise RefusedError("the system gives no more threads, one for each batch; use --method pooled") from error


def copy_context(model: torch.nn.Module) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Copy what is set for this thread and must hold in others: no gradients, autocast, modes, the CUDA device."""
    device, _ = find_placement(model)
    kind = device.type if device is not None else "cpu"
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call] # the default device

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                torch.overrides._push_mode(mode)  # type: ignore[no-untyped-call]
                stack.callback(torch.overrides._pop_mode)
            stack.enter_context(torch.no_grad())
            if dtype is not None:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if device is not None and kind == "cuda":
                stack.enter_context(torch.cuda.device(device))
            yield

    return context
