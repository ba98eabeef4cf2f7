"""Rivals of the recommender: partitions as other published methods choose them.

Each rival chooses instances by its own rule, from the same table; the jobs are then shared out over them in
the best way, which favours the rival. What a rival's paper leaves open is decided here and said where it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float64, Int64

from migperf.jobs import InferenceJob, Job, TrainingJob
from migperf.mixes import UNIT, Counts, Mix, Sharing
from migperf.profiles import HasLayout, Layout, layout_of
from migperf.tables import Table, as_table

KNEE = 0.8
"""Share of its best throughput from which on a larger batch is not worth its latency (PARIS)."""


@dataclass(frozen=True)
class Rival:
    """What a rule chose, and what the jobs get there at best.

    Attributes:
        name: Of the rule.
        geometry: Its instances, `3g.20gb,1g.5gb*2`.
        met: Latency objectives met.
        trained: Weighted normalised training throughput.
    """

    name: str
    geometry: str
    met: int
    trained: float


def compare(device: Layout | HasLayout | str, jobs: Sequence[Job], table: Table | str) -> list[Rival]:
    """Return what each rival makes of a mix.

    Args:
        device: A layout, a backend or the name of a model.
        jobs: The mix.
        table: What was measured on that device, or the folder of its records. Nothing is predicted.

    >>> from migperf import InferenceJob, TrainingJob, official_a100
    >>> jobs = [InferenceJob("chat", "minilm-l12", 900, 250), TrainingJob("tune", "vit_base_patch16", 8)]
    >>> [rival.geometry for rival in compare("a100-40gb", jobs, official_a100())]
    ['3g.20gb,1g.5gb', '3g.20gb,3g.20gb', '3g.20gb,1g.5gb,1g.5gb,1g.5gb,1g.5gb']
    """
    from migperf.recommender import grouped, prepare

    layout, known = layout_of(device), as_table(table)
    mix = prepare(layout, jobs, known, predict=False)
    states = tuple(grouped(mix, layout))
    return [_judged(name, rule(mix, known, states), mix) for name, rule in RULES.items()]


def _judged(name: str, counts: Counts, mix: Mix) -> Rival:
    met, trained = best_shared(mix, counts)
    chosen = [p.name for p, count in zip(mix.profiles, counts, strict=True) for _ in range(count)]
    return Rival(name, ",".join(chosen[::-1]) or "empty", met, trained)


def best_shared(mix: Mix, counts: Counts) -> tuple[int, float]:
    """Return objectives met and weighted training throughput of the best use of some or all instances."""
    sharing = Sharing(mix, "throughput")
    shared = (sharing.best(used) for used in product(*(range(count + 1) for count in counts)))
    met, trained = max(found[0] for found in shared if found is not None)
    return met, trained / UNIT


def by_fitness(mix: Mix, table: Table, states: Sequence[Counts]) -> Counts:
    """Take, again and again, the step that gives the jobs most of what they lack per memory slice.

    In the style of MIG-serving's greedy algorithm (Tan et al., 2021), which knows services only: they lack
    the share of their rate that nothing serves yet. A step adds an instance for a service or a training, or
    (ours) moves a training into a larger one.
    """
    valid = set(states)
    counts: Counts = (0,) * len(mix.profiles)
    served = {job.name: 0.0 for job in mix.jobs}
    owned: dict[str, int] = {}
    while True:
        best, taken = 0.0, None
        for job, index in product(mix.jobs, range(len(counts))):
            old = owned.get(job.name)
            more = _changed(counts, old, index)
            size = mix.profiles[index].size - (0 if old is None else mix.profiles[old].size)
            gain = _gain(mix, job, mix.profiles[index].name, served[job.name])
            if more in valid and gain > 0 and gain / max(size, 1) > best:
                best, taken = gain / max(size, 1), (more, job, index, gain)
        if taken is None:
            return counts
        counts, job, index, gain = taken
        served[job.name] += gain
        if isinstance(job, TrainingJob):
            owned[job.name] = index


def _changed(counts: Counts, old: int | None, new: int) -> Counts:
    """Return the instances with one more, and one less where it takes the place of an old one."""
    changed = list(counts)
    changed[new] += 1
    if old is not None:
        changed[old] -= 1
    return tuple(changed)


def _gain(mix: Mix, job: Job, profile: str, served: float) -> float:
    """Return what an instance more (a training: instead) adds to a service's share or a training's worth."""
    if isinstance(job, InferenceJob):
        return min(1.0 - served, mix.capacities.get((job.name, profile), 0.0) / job.rate)
    training = mix.trainings.get((job.name, profile))
    return 0.0 if training is None else job.weight * training.normalised - served


def by_speed(mix: Mix, table: Table, states: Sequence[Counts]) -> Counts:
    """Give each job one instance so that the sum of their speeds is greatest, as MISO does (Li et al., 2022).

    A job's speed is its throughput over that in its best profile. MISO predicts it from runs under MPS; here
    it is the table's, so nothing is lost by a predictor. It knows no latency objectives.
    """
    from scipy.optimize import linear_sum_assignment

    speed = np.array([[_speed(job, profile.name, table) for profile in mix.profiles] for job in mix.jobs])
    speed /= np.maximum(speed.max(axis=1, keepdims=True), 1e-300)
    most = min(len(mix.jobs), max(map(sum, states)))
    best: tuple[float, Counts] = (-1.0, states[0])
    for counts in states:
        if sum(counts) == most:
            columns = np.repeat(np.arange(len(counts)), counts)
            rows, chosen = linear_sum_assignment(speed[:, columns], maximize=True)
            best = max(best, (float(speed[rows, columns[chosen]].sum()), counts))
    return best[1]


def _speed(job: Job, profile: str, table: Table) -> float:
    """Return the most items/s that were measured; 0 where the job does not run."""
    workload = table.resolve(job.workload, job.mode)
    batches = [job.batch] if isinstance(job, TrainingJob) else job.batches or table.batches(workload)
    cells = (table.cells.get((workload, profile, batch)) for batch in batches)
    return max((c.throughput.middle for c in cells if c and c.status == "ok" and c.throughput), default=0.0)


def by_knees(mix: Mix, table: Table, states: Sequence[Counts]) -> Counts:
    """Return instances in proportion to the work that each size is best for (PARIS, Kim et al., 2022).

    A size is for batches from the knee of the next smaller one to its own, the least batch with 80 % of its
    best throughput; its share is the sum over them of frequency over throughput. PARIS has measured
    utilisation and a distribution of batches; here throughput stands for the former and all batches of the
    table are equally frequent. Trainings have no part in it. The set of instances whose proportions are
    nearest is taken, and of those the one with most memory slices.
    """
    demand = np.zeros(len(mix.profiles))
    for job in mix.jobs:
        if isinstance(job, InferenceJob):
            demand += job.rate * _work_by_size(job, mix, table)
    sizes = np.array([profile.size for profile in mix.profiles])
    wanted = demand / demand.sum() if demand.sum() else np.full(len(sizes), 1 / len(sizes))
    whole = [np.array(counts) for counts in states if any(counts)]
    if not whole:
        return states[0]
    chosen = min(whole, key=lambda c: (round(float(np.abs(c / c.sum() - wanted).sum()), 9), -(c @ sizes)))
    return tuple(int(count) for count in chosen)


def _work_by_size(job: InferenceJob, mix: Mix, table: Table) -> Float64[np.ndarray, " profiles"]:
    """Return seconds of each profile that an item takes, over the batches that the profile is for."""
    workload = table.resolve(job.workload, job.mode)
    batches = sorted(job.batches or table.batches(workload))
    work, below = np.zeros(len(mix.profiles)), 0
    order = sorted(range(len(mix.profiles)), key=lambda i: (mix.profiles[i].slices, mix.profiles[i].size))
    rates = {i: _rates(workload, mix.profiles[i].name, batches, table) for i in order}
    order = [i for i in order if rates[i]]
    for place, i in enumerate(order):
        knee = min(batch for batch, rate in rates[i].items() if rate >= KNEE * max(rates[i].values()))
        last = place == len(order) - 1
        mine = [batch for batch in rates[i] if batch > below and (last or batch <= knee)]
        work[i] = sum(1 / len(batches) / rates[i][batch] for batch in mine)
        below = max(below, knee)
    return work


def _rates(workload: str, profile: str, batches: Sequence[int], table: Table) -> dict[int, float]:
    cells = {batch: table.cells.get((workload, profile, batch)) for batch in batches}
    return {b: c.throughput.middle for b, c in cells.items() if c and c.status == "ok" and c.throughput}


RULES: Mapping[str, Callable[[Mix, Table, Sequence[Counts]], Counts]] = {
    "greedy by fitness": by_fitness,
    "MISO": by_speed,
    "PARIS": by_knees,
}


def elsa(
    schedule: Int64[np.ndarray, " requests"],
    service_ms: Sequence[float],
    slo_ms: float,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Float64[np.ndarray, " requests"]:
    """Return the latencies in ms of requests that ELSA sends to instances (Kim et al., 2022).

    A request goes to the smallest instance whose slack, the objective less alpha times the wait and beta
    times the estimated service, is above 0; where there is none, to the one that would end it first. A
    recommended partition splits the rate beforehand instead; this tells what looking at the queues is worth.

    Args:
        schedule: Arrivals in ns, ascending.
        service_ms: Of one request in each instance, the smallest instance first.
        slo_ms: The objective.
        alpha: Of wait and service.
        beta: Of the service.
    """
    free = [0.0] * len(service_ms)
    latencies = np.empty(len(schedule))
    for number, arrival in enumerate((schedule / 1e6).tolist()):
        waits = [max(0.0, moment - arrival) for moment in free]
        slack = [slo_ms - alpha * (w + beta * s) for w, s in zip(waits, service_ms, strict=True)]
        chosen = next((i for i, left in enumerate(slack) if left > 0), None)
        if chosen is None:
            chosen = min(range(len(free)), key=lambda i: waits[i] + service_ms[i])
        latencies[number] = waits[chosen] + service_ms[chosen]
        free[chosen] = arrival + latencies[number]
    return latencies
