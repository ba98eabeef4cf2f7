"""One task a slide, many slides: in processes or on a Ray cluster, going on after one that fails.

A slide may be damaged, and a damaged slide may even kill the process that reads it. Neither stops the others,
and what failed is told at the end.
"""

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal

from shared_core import InputError
from shared_core.workers import WorkerPool


@dataclass(frozen=True)
class Done:
    """What became of one task: its place in the list, and a result or one line that says what was wrong.

    `fault` has the traceback where the error is a fault of the program's and not bad input.
    """

    index: int
    result: Any = None
    error: str | None = None
    fault: str | None = None


def run_all(
    work: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    jobs: int = 1,
    backend: Literal["process", "ray"] = "process",
    progress: Callable[[int, int], None] | None = None,
    gpus: float = 0,
) -> list[Done]:
    """Do all tasks and say what became of each, in the order of `tasks`. None that fails stops the others.

    Args:
        work: A function of a module (processes import it), called with one task.
        tasks: Its arguments; they and the results are sent between processes.
        jobs: Processes. With 1 (and `process`) the tasks are done in this process.
        backend: `ray` uses a cluster that runs already, all of it; or else `jobs` processes of this machine.
        progress: Called with (tasks done, tasks in all).
        gpus: How many a task needs; Ray places tasks by it, and hides GPUs from tasks that need none.

    Raises:
        InputError: `jobs` is below 1, or Ray is not installed.
    """
    if jobs < 1:
        raise InputError("expected at least 1", field="jobs", value=jobs)
    if backend == "ray":
        stream = _with_ray(work, tasks, jobs, gpus)
    elif jobs == 1 or len(tasks) < 2:
        stream = (attempt(work, index, task) for index, task in enumerate(tasks))
    else:
        stream = _with_processes(work, tasks, jobs)
    found: list[Done] = []
    for done in stream:
        found.append(done)
        if progress is not None:
            progress(len(found), len(tasks))
    return sorted(found, key=lambda done: done.index)


def attempt(work: Callable[[Any], Any], index: int, task: Any) -> Done:
    """Do one task; an exception becomes a `Done` with an error."""
    try:
        return Done(index, work(task))
    except InputError as error:
        return Done(index, error=str(error))
    except Exception as error:
        return Done(index, error=f"{type(error).__name__}: {error}", fault=traceback.format_exc())


def _single_thread() -> None:
    """Processes share the cores already; more threads would only wait. A user's own values win."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):  # read at first import
        os.environ.setdefault(name, "1")


def _pool(jobs: int) -> WorkerPool:
    # Forked processes would inherit locks of torch's and OpenSlide's threads.
    return WorkerPool(jobs, start=_single_thread)


def _with_processes(work: Callable[[Any], Any], tasks: Sequence[Any], jobs: int) -> Iterator[Done]:
    """A process that dies takes its pool along; what was unfinished runs again, each in a pool of its own."""
    suspects: list[int] = []
    with _pool(jobs) as pool:
        waiting: dict[Future[Done], int] = {}
        rest = iter(range(len(tasks)))
        broken = False
        while True:
            while not broken and len(waiting) < 2 * jobs and (index := next(rest, None)) is not None:
                try:
                    waiting[pool.submit(attempt, work, index, tasks[index])] = index
                except BrokenProcessPool:
                    broken = True
                    suspects.append(index)
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                index = waiting.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    broken = True
                    suspects.append(index)
    for index in [*suspects, *rest]:
        with _pool(1) as pool:
            try:
                yield pool.submit(attempt, work, index, tasks[index]).result()
            except BrokenProcessPool:
                yield Done(index, error="the process that worked on it died (out of memory, or a crash)")


def _with_ray(work: Callable[[Any], Any], tasks: Sequence[Any], jobs: int, gpus: float) -> Iterator[Done]:
    try:
        import ray
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise InputError("ray is not installed: pip install 'rlogist[ray]'") from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not ray.is_initialized():
        with warnings.catch_warnings():
            # Ray tells every caller of a coming change about GPUs, which tasks here ask for where needed.
            warnings.filterwarnings(
                "ignore", message="Tip: In future versions of Ray", category=FutureWarning
            )
            try:
                ray.init(address="auto", **quiet)  # of `ray start`, here or in RAY_ADDRESS
            except ConnectionError:
                ray.init(num_cpus=jobs, include_dashboard=False, **quiet)
    remote = ray.remote(max_retries=1, num_gpus=gpus)(attempt)
    waiting = {remote.remote(work, index, task): index for index, task in enumerate(tasks)}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        for reference in ready:
            index = waiting.pop(reference)
            try:
                yield ray.get(reference)
            except RayError as error:
                first = next(iter(str(error).splitlines()), type(error).__name__)
                yield Done(index, error=f"the worker died: {first}")
