"""The recommender's judge: all placed geometries, all ways to give instances to jobs, by plain enumeration.

Shares no code with the recommender: its own intervals, its own reading of the table, its own objective. The
proof and the tests hold the recommender against it; nothing else uses it, for it is slow.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import product
from typing import Any

from migperf.jobs import InferenceJob, Job, TrainingJob
from migperf.profiles import Layout
from migperf.tables import OpenLoop, Table

Placed = tuple[str, int]


def placed_states(layout: Layout, names: Collection[str]) -> Iterator[frozenset[Placed]]:
    """Yield every placed geometry of these profiles, the empty one included."""
    slots = [(p.name, start) for p in layout.profiles if p.name in names for start in p.starts]

    def grow(chosen: list[Placed], rest: list[Placed]) -> Iterator[frozenset[Placed]]:
        yield frozenset(chosen)
        for index, slot in enumerate(rest):
            if possible(layout, [*chosen, slot]):
                yield from grow([*chosen, slot], rest[index + 1 :])

    yield from grow([], slots)


def cells_of(layout: Layout, slot: Placed) -> set[int]:
    """Return the memory slices of a placed profile."""
    profile = next(p for p in layout.profiles if p.name == slot[0])
    return set(range(slot[1], slot[1] + profile.size))


def possible(layout: Layout, slots: Sequence[Placed]) -> bool:
    """Return whether placed profiles can exist together."""
    taken = [cell for slot in slots for cell in cells_of(layout, slot)]
    names = [name for name, _ in slots]
    return (
        len(taken) == len(set(taken))
        and all(names.count(p.name) <= p.maximum for p in layout.profiles)
        and sum("+me" in name for name in names) <= 1
    )


def lost_slices(layout: Layout, state: Collection[Placed]) -> int:
    """Return the memory slices that are neither taken nor could be taken by one more instance."""
    covered = {cell for slot in state for cell in cells_of(layout, slot)}
    for profile in layout.profiles:
        for start in profile.starts:
            if possible(layout, [*state, (profile.name, start)]):
                covered |= cells_of(layout, (profile.name, start))
    return layout.axis - len(covered)


def capacity(job: InferenceJob, table: Table, layout: Layout, name: str) -> float:
    """Return the most items per second in time, over the batches."""
    memory = next(p for p in layout.profiles if p.name == name).memory_mib
    best = 0.0
    for (workload, profile, batch), cell in table.cells.items():
        if workload != table.resolve(job.workload, "infer") or profile != name or cell.status != "ok":
            continue
        if memory is not None and cell.memory_mib is not None and 1.1 * cell.memory_mib > memory:
            continue
        kept = [load.rate for load in cell.open_loop if in_time(job, load)]
        broken = [
            load.rate for load in cell.open_loop if not in_time(job, load) and load.status != "insufficient"
        ]
        best = max([best, *kept])
        if cell.throughput is not None and max(broken, default=0.0) <= max(kept, default=0.0):
            best = max(best, estimated(job, batch, cell.throughput.middle))
    return best


def in_time(job: InferenceJob, load: OpenLoop) -> bool:
    """Return whether an open loop kept the objective."""
    return load.status == "ok" and load.latency_ms["p99"].middle <= job.slo_ms


def estimated(job: InferenceJob, batch: int, throughput: float) -> float:
    """Return the most items per second by Kingman's wait with an exponential tail, utilisation to 0.8.

    Steps always take equally long.
    """
    from scipy.optimize import brentq

    step = 1000 * batch / throughput

    def late(u: float) -> float:
        return step + step / batch / 2 / (1 - u) * max(0.0, math.log(max(u, 1e-12) / 0.01)) - job.slo_ms

    if 2 * step > job.slo_ms:  # an item that just misses a step waits for it
        return 0.0
    if late(0.8) <= 0:
        return 0.8 * throughput
    root: Any = brentq(late, 0.0, 0.8, xtol=1e-13)
    return throughput * root


def training_rates(job: TrainingJob, table: Table, layout: Layout) -> dict[str, float]:
    """Return the job's throughput in each profile in which it fits, as a share of the best one's."""
    rates = {}
    for profile in layout.profiles:
        cell = table.cells.get((table.resolve(job.workload, "train"), profile.name, job.batch))
        if cell is None or cell.status != "ok" or cell.throughput is None:
            continue
        if profile.memory_mib is not None:
            if cell.memory_mib is not None and 1.1 * cell.memory_mib > profile.memory_mib:
                continue
            if job.min_memory_mib is not None and profile.memory_mib < job.min_memory_mib:
                continue
        rates[profile.name] = cell.throughput.middle
    best = max(rates.values(), default=1.0)
    return {name: rate / best for name, rate in rates.items()}


def best_ranks(
    layout: Layout,
    jobs: Sequence[Job],
    table: Table,
    names: Collection[str],
    live: frozenset[Placed] = frozenset(),
) -> tuple[float, ...]:
    """Return the best (objectives met, weighted training share, -lost slices, -instances changed)."""
    caps = {
        (job.name, name): capacity(job, table, layout, name)
        for job in jobs
        if isinstance(job, InferenceJob)
        for name in names
    }
    shares = {job.name: training_rates(job, table, layout) for job in jobs if isinstance(job, TrainingJob)}
    best = (-1.0, 0.0, 0.0, 0.0)
    lost: dict[frozenset[Placed], int] = {}
    nobody = [None] if live else []  # nobody would create an instance for no job
    for state in placed_states(layout, names):
        slots = sorted(state)
        for owners in product([*nobody, *jobs], repeat=len(slots)):
            used = frozenset(slot for slot, owner in zip(slots, owners, strict=True) if owner is not None)
            if any(owner is None and slot not in live for slot, owner in zip(slots, owners, strict=True)):
                continue
            score = value(jobs, caps, shares, slots, owners)
            if score is None or score < best[:2]:
                continue
            if used not in lost:
                lost[used] = lost_slices(layout, used)
            best = max(best, (*score, -lost[used], -len(state ^ live)))
    return best


def value(
    jobs: Sequence[Job],
    caps: dict[tuple[str, str], float],
    shares: dict[str, dict[str, float]],
    slots: Sequence[Placed],
    owners: Sequence[Job | None],
) -> tuple[float, float] | None:
    """Return objectives met and training throughput of one way to give instances away; None if it is none."""
    met = trained = 0.0
    for job in jobs:
        mine = [name for (name, _), owner in zip(slots, owners, strict=True) if owner is job]
        if isinstance(job, InferenceJob):
            if mine and (any(not caps[job.name, name] for name in mine)):
                return None
            met += sum(caps[job.name, name] for name in mine) >= job.rate * (1 - 1e-9)
        elif len(mine) > 1 or (mine and mine[0] not in shares[job.name]):
            return None
        elif mine:
            trained += job.weight * shares[job.name][mine[0]]
    return met, round(trained, 7)
