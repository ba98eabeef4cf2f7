"""Seeds of the experiment side by side, each in a process of one thread."""

import queue
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing import get_context
from typing import Any

from relattn.experiment_plan import Plan, SeedResult
from relattn.experiments import OnEvent, Trained, measure_seed, run_seed, train_seed
from shared_core.workers import WITH_ALL_LOADED, WorkerPool, one_thread

_events: Any = None  # a worker's way to its parent


def run_seeds(seeds: Sequence[int], plan: Plan, on_event: OnEvent, workers: int = 2) -> list[SeedResult]:
    """Run the experiment for each seed. Results are in the seeds' order, the same as one process would give.

    Args:
        seeds: The seeds.
        plan: How large the experiment is.
        on_event: Called here, in the parent, with each worker's progress.
        workers: Processes; with one the work is done here.
    """
    if workers <= 1 or len(seeds) == 1:
        return [run_seed(seed, plan, on_event) for seed in seeds]
    events = get_context(WITH_ALL_LOADED).Queue()
    with WorkerPool(min(workers, len(seeds)), WITH_ALL_LOADED, _start, (events,)) as pool:
        # Training and measuring are tasks of their own: three seeds keep two workers busy to the end.
        training = {pool.submit(_train, seed, plan): seed for seed in seeds}
        measuring: dict[int, Future[SeedResult]] = {}
        while len(measuring) < len(seeds) or not all(future.done() for future in measuring.values()):
            for future in [future for future in training if future.done()]:
                measuring[training.pop(future)] = pool.submit(_measure, future.result(), plan)
            try:
                on_event(*events.get(timeout=0.2))
            except queue.Empty:
                continue
        return [measuring[seed].result() for seed in seeds]


def _start(events: Any) -> None:
    global _events
    _events = events
    one_thread()


def _train(seed: int, plan: Plan) -> Trained:
    return train_seed(seed, plan, lambda *event: _events.put(event))


def _measure(trained: Trained, plan: Plan) -> SeedResult:
    return measure_seed(trained, plan, lambda *event: _events.put(event))
