"""Feasibility: how much of a job an instance of a profile can carry, and on what evidence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from migperf.jobs import InferenceJob, TrainingJob
from migperf.profiles import Profile
from migperf.tables import Cell, OpenLoop, Spread, Table

MEMORY_MARGIN = 1.10
"""An instance must hold the measured peak and a tenth more."""
MOST_UTILISATION = 0.8
"""Above it a queue's length hangs on details that no closed loop shows."""

Evidence = Literal["measured", "predicted", "estimated"]
"""`measured`: at this load or a heavier one. `predicted`: by the two-resource law. `estimated`: latency from
queueing theory over a measured or predicted service time."""


@dataclass(frozen=True)
class Service:
    """One way to serve an inference job in one instance of a profile.

    Attributes:
        profile: Of the instance.
        cell: Of the table.
        capacity: Most items per second at which the objective still holds.
        passed: The open-loop measurement that shows it; None: it is an estimate.
        percentile: Of the job's objective.
    """

    profile: Profile
    cell: Cell
    capacity: float
    passed: OpenLoop | None
    percentile: int

    def latency_ms(self, rate: float) -> tuple[Spread, Evidence]:
        """Return the percentile of latency at a rate up to the capacity, and what it rests on."""
        for load in self.cell.open_loop:
            known = load.latency_ms.get(f"p{self.percentile}")
            if self.passed is not None and rate <= load.rate <= self.passed.rate and known is not None:
                return known, "measured"
        return estimated_latency_ms(self.cell, rate, self.percentile), "estimated"


@dataclass(frozen=True)
class Training:
    """A training job in one instance of a profile."""

    profile: Profile
    cell: Cell
    throughput: Spread
    normalised: float


def memory_problem(cell: Cell, profile: Profile, least: float | None = None) -> str:
    """Say why the cell's work does not fit into the profile; "" where it does or nothing limits it."""
    if cell.status == "oom":
        return cell.message or "out of memory"
    if profile.memory_mib is None:
        return ""
    if least is not None and profile.memory_mib < least:
        return f"has {profile.memory_mib:.0f} MiB, the job asks for {least:.0f}"
    if cell.memory_mib is not None and cell.memory_mib * MEMORY_MARGIN > profile.memory_mib:
        return (
            f"has {profile.memory_mib:.0f} MiB, the work peaks at {cell.memory_mib:.0f} and needs "
            f"{cell.memory_mib * MEMORY_MARGIN:.0f} with the margin"
        )
    return ""


def estimated_latency_ms(cell: Cell, rate: float, percentile: int) -> Spread:
    """Estimate a percentile of latency from closed-loop service times, for items that arrive at random.

    One server takes what waits, up to a batch, whenever it is free. The wait has the mean of Kingman's
    formula (exact for batch 1: Pollaczek and Khinchine) and an exponential tail that begins at the
    utilisation; the step's own percentile is added. Never less than two steps, for an item that just misses
    one waits for it.

    Args:
        cell: With throughput and mean service time.
        rate: Items per second; utilisation must stay below 1.
        percentile: 50 to 99.

    Returns:
        Milliseconds; infinite where the utilisation is 1 or more.
    """
    throughput, service = cell.throughput, cell.service_ms.get("mean")
    if throughput is None or service is None:
        return Spread(math.inf, math.inf, math.inf, 0)
    own = cell.service_ms.get(f"p{percentile}", service)
    # of normal service times the 99th percentile lies 2.326 deviations above the mean
    p99 = cell.service_ms.get("p99", service)
    service_variation = (max(0.0, p99.middle - service.middle) / (2.326 * service.middle)) ** 2
    variation = (1 / cell.batch + service_variation) / 2
    return Spread(
        _response(rate / throughput.middle, service.middle, own.middle, variation, percentile),
        _response(rate / throughput.high, service.low, own.low, variation, percentile),
        _response(rate / throughput.low, service.high, own.high, variation, percentile),
        0,
    )


def _response(utilisation: float, step: float, own: float, variation: float, percentile: int) -> float:
    """Return the percentile of wait and step; infinite where the queue grows without end."""
    if utilisation >= 1:
        return math.inf
    mean_over_utilisation = variation / (1 - utilisation) * step
    tail = math.log(max(1.0, utilisation / (1 - percentile / 100)))
    return max(2 * step, own + mean_over_utilisation * tail)


def services(job: InferenceJob, profile: Profile, table: Table) -> tuple[list[Service], list[str]]:
    """Return the ways to serve a job in an instance, one a batch at most, and why the other batches cannot.

    An open-loop measurement shows a capacity: the largest rate that kept the objective. Where closed-loop
    data exist and no heavier load was seen to break it, an estimate may go beyond.
    """
    workload = table.resolve(job.workload, job.mode)
    found, reasons = [], []
    for batch in table.batches(workload) if job.batches is None else job.batches:
        cell = table.cells.get((workload, profile.name, batch))
        if cell is None:
            reasons.append(f"{profile.name} batch {batch}: not measured")
            continue
        problem = memory_problem(cell, profile)
        if not problem and cell.status != "ok":
            problem = cell.message or cell.status
        if problem:
            reasons.append(f"{profile.name} batch {batch}: {problem}")
            continue
        service = _capacity(job, profile, cell)
        if service.capacity > 0:
            found.append(service)
        else:
            reasons.append(f"{profile.name} batch {batch}: {_least_latency(job, cell)}")
    return found, reasons


def _capacity(job: InferenceJob, profile: Profile, cell: Cell) -> Service:
    name = f"p{job.percentile}"
    passed, broken = None, False
    for load in cell.open_loop:
        known = load.latency_ms.get(name)
        if load.status == "ok" and known is not None and known.middle <= job.slo_ms:
            passed, broken = load, False
        elif load.status == "saturated" or (known is not None and known.middle > job.slo_ms):
            broken = True
    measured = 0.0 if passed is None else passed.rate
    estimate = 0.0 if broken or cell.throughput is None else _estimated_capacity(job, cell)
    if estimate > measured:
        return Service(profile, cell, estimate, passed, job.percentile)
    return Service(profile, cell, measured, passed, job.percentile)


def _estimated_capacity(job: InferenceJob, cell: Cell) -> float:
    """Return the largest rate of utilisation 0.8 at most whose estimated latency keeps the objective."""
    low, high = 0.0, MOST_UTILISATION * (cell.throughput.middle if cell.throughput else 0.0)
    if _kept(job, cell, high):
        return high
    if not _kept(job, cell, low):
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _kept(job, cell, middle) else (low, middle)
    return low


def _kept(job: InferenceJob, cell: Cell, rate: float) -> bool:
    return estimated_latency_ms(cell, rate, job.percentile).middle <= job.slo_ms


def _least_latency(job: InferenceJob, cell: Cell) -> str:
    name = f"p{job.percentile}"
    seen = [(load.latency_ms[name].middle, load.rate) for load in cell.open_loop if name in load.latency_ms]
    if seen:
        latency, rate = min(seen)
        return f"{name} {latency:.4g} ms at {rate:g} items/s, the objective is {job.slo_ms:g}"
    if cell.throughput is None:
        return f"no {name} was measured"
    least = estimated_latency_ms(cell, 0.0, job.percentile).middle
    return f"{name} estimated at {least:.4g} ms or more, the objective is {job.slo_ms:g}"


def choose(ways: Sequence[Service], rate: float) -> Service:
    """Return how an instance serves its share of a rate: measured before estimated, then least latency."""
    able = [way for way in ways if way.capacity >= rate * (1 - 1e-9)]
    return min(able, key=lambda way: _preference(way, rate))


def _preference(way: Service, rate: float) -> tuple[bool, bool, float, int]:
    latency, evidence = way.latency_ms(rate)
    return evidence != "measured", way.cell.source != "measured", latency.middle, way.cell.batch


def trainings(
    job: TrainingJob, profiles: Sequence[Profile], table: Table
) -> tuple[list[Training], list[str]]:
    """Return the profiles in which a job can train, each with its share of the best one's throughput."""
    workload = table.resolve(job.workload, job.mode)
    found: list[tuple[Profile, Cell, Spread]] = []
    reasons = []
    for profile in profiles:
        cell = table.cells.get((workload, profile.name, job.batch))
        if cell is None:
            reasons.append(f"{profile.name}: batch {job.batch} was not measured")
            continue
        problem = memory_problem(cell, profile, job.min_memory_mib)
        if not problem and (cell.status != "ok" or cell.throughput is None):
            problem = cell.message or cell.status
        if problem:
            reasons.append(f"{profile.name}: {problem}")
        elif cell.throughput is not None:
            found.append((profile, cell, cell.throughput))
    best = max((throughput.middle for _, _, throughput in found), default=0.0)
    return [Training(profile, cell, rate, rate.middle / best) for profile, cell, rate in found], reasons
