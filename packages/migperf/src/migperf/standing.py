"""Standing crews: workers of all cells are started once and wait; their windows are interleaved at random.

A process that waits for its next window blocks on a pipe and takes no core. That makes many short windows
affordable on a CPU, where starting a process takes longer than measuring it. On a GPU waiting workers would
hold memory: there `migperf.sweep` starts new processes for each window.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from migperf import contamination, sweeps
from migperf.backends.cpu import CpuBackend
from migperf.measuring import CellRun, Crew, Result
from migperf.parts import Part, assign, own_schedule
from migperf.sweeps import Cell


@dataclass
class Measured:
    """What the windows of one cell gave.

    Attributes:
        results: By repeat; a repeat that was measured again has its last window.
        attempts: How many windows were measured.
        contaminated: How many of them told nothing.
    """

    results: dict[int, Result] = field(default_factory=dict)
    attempts: int = 0
    contaminated: int = 0

    def dirty(self, repeat: int) -> bool:
        """Whether a repeat is missing or tells nothing."""
        found = self.results.get(repeat)
        return found is None or any(record.contaminated for record in found.records)


def interleave(
    backend: CpuBackend,
    wanted: dict[str, Cell],
    *,
    duration: float,
    repeats: Sequence[int],
    run_id: str,
    deadline: float,
    patience: float = 0.0,
    warmup_seconds: float = 1.0,
    timeout: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """Measure cells window by window, in each repeat all of them in a random order of its own.

    Args:
        backend: The CPUs.
        wanted: Name -> cell.
        duration: Seconds of each window.
        repeats: Their numbers, which are also the seeds of order and arrivals.
        run_id: Of the records.
        deadline: Value of `time.monotonic()` after which no window begins.
        patience: Seconds for which contaminated repeats may be measured again.
        warmup_seconds: As for `migperf.run`.
        timeout: Seconds that all workers of a cell have to get ready.
        progress: Told which window comes next.

    Returns:
        Name -> what its windows gave; some repeats may be missing.
    """
    found = {name: Measured() for name in wanted}
    with ExitStack() as stack:
        crews: dict[str, tuple[Crew, list[Part]]] = {}
        for name, cell in wanted.items():
            if time.monotonic() > deadline:
                return found
            if progress is not None:
                progress(f"start {name}")
            left = max(1.0, min(timeout, deadline - time.monotonic()))
            parts = _parts(backend, cell)
            crews[name] = stack.enter_context(Crew(parts, left, warmup_seconds)), parts

        def measure(name: str, repeat: int) -> None:
            if progress is not None:
                progress(name)
            crew, parts = crews[name]
            seeded = [replace(part, load=own_schedule(part.load, i, repeat)) for i, part in enumerate(parts)]
            cell = wanted[name]
            run = CellRun(backend, seeded, cell.mode, duration, run_id, cell.name(duration), repeat)
            run.window(crew, contamination.baseline())
            found[name].attempts += 1
            found[name].contaminated += any(record.contaminated for record in run.records)
            records = [replace(record, geometry=cell.geometry) for record in run.records]
            found[name].results[repeat] = Result(records, run.raws)

        names = list(wanted)
        for number, repeat in enumerate(repeats):
            for index, _ in sweeps.interleaved(len(names), 1, repeats[number]):
                if time.monotonic() > deadline:
                    return found
                measure(names[index], repeat)
        limit = min(deadline, time.monotonic() + patience)
        while todo := [(name, r) for name in names for r in repeats if found[name].dirty(r)]:
            for name, repeat in todo:
                if time.monotonic() > limit:
                    return found
                measure(name, repeat)
    return found


def _parts(backend: CpuBackend, cell: Cell) -> list[Part]:
    # The cores stay where they are when the block ends: cells take turns, and so may overlap.
    with sweeps.cut(backend, cell.geometry) as instances:
        count = len(instances)
        workloads = cell.workloads * count if len(cell.workloads) == 1 else cell.workloads
        given = cell.loads * count if len(cell.loads) == 1 else cell.loads
        return assign(workloads, instances, backend, given, cell.mode)
