"""A process pool that ends with the one who made it: on Ctrl-C, on an error, on a kill."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from threading import Thread, current_thread, main_thread
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

WITH_ALL_LOADED: Literal["fork", "spawn"] = "fork" if sys.platform == "linux" else "spawn"
"""How workers are started that have loaded what this process has: torch and transformers take long.

That is safe where workers use one thread and no GPU. Elsewhere than on Linux they load it themselves.
"""
GRACE = 2.0
"""Seconds that tasks have to end when their pool is left by an exception; then their workers are killed."""


def one_thread() -> None:
    """Start a worker that has one core: torch uses one thread."""
    import torch

    torch.set_num_threads(1)


class WorkerPool(ProcessPoolExecutor):
    """A `ProcessPoolExecutor` that is left at once, and whose workers leave Ctrl-C to this process.

    A block that ends by an exception ends the workers too, where the standard pool would first do all that
    was submitted. Tasks have `GRACE` seconds for their `finally` blocks. A terminal sends Ctrl-C to all
    processes: workers do not take it, so they print no tracebacks of their own. They end as well when this
    process is killed.

    Args:
        count: How many workers.
        method: How they are started. A fork of a process with threads of torch may inherit held locks.
        start: What each worker calls first.
        arguments: What it calls that with.
    """

    def __init__(
        self,
        count: int,
        method: Literal["fork", "spawn"] = "spawn",
        start: Callable[..., None] = one_thread,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(count, multiprocessing.get_context(method), _begin, (start, arguments))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit a task, as `ProcessPoolExecutor.submit` does; a worker that it starts gets no Ctrl-C."""
        with _interrupts_wait():
            return super().submit(_do, fn, args, kwargs)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        place: TracebackType | None,
    ) -> None:
        if kind is None:
            self.shutdown()
            return
        workers = list((self._processes or {}).values())  # None after a shutdown
        manager: Any = self._executor_manager_thread
        # The manager has to drop what waits before it sees that a worker has ended, and while the pool is
        # there: it stumbles over tasks that the block has cancelled.
        self.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        limit = time.monotonic() + GRACE
        for worker in workers:
            worker.join(max(0.0, limit - time.monotonic()))
            worker.kill()
            worker.join()
        if manager is not None:
            manager.join()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C come after the block, and never to processes that are started in it.

    They inherit what the thread blocks. To this process the signal may come through any other thread, and
    the main one would then leave a worker behind that it has begun to start.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    came: list[Any] = []
    handler = signal.getsignal(signal.SIGINT)
    mine = callable(handler) and current_thread() is main_thread()  # others may not set a handler
    if mine:
        signal.signal(signal.SIGINT, lambda *signal_and_frame: came.append(signal_and_frame))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if mine:
            signal.signal(signal.SIGINT, handler)
        if came and callable(handler):
            handler(*came[0])


def _begin(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Start a worker: it ends when the process that made it ends, however that comes about."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, name="ends with its parent", daemon=True).start()
    start(*arguments)


class _Terminated(BaseException):
    pass


def _terminated(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what comes now would break into the `finally` blocks
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a callback that this breaks into would complain of it
    raise _Terminated


def _do(task: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Do a task in a worker: one that is terminated meanwhile removes the task's temporary files first."""
    try:
        signal.signal(signal.SIGTERM, _terminated)
        return task(*args, **kwargs)
    except _Terminated:
        os._exit(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
