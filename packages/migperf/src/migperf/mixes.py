"""Mixes of jobs: what each job can do in each profile, and the best way to share out given instances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from migperf.feasibility import Service, Training, choose, services, trainings
from migperf.jobs import InferenceJob, Job, TrainingJob, check_names
from migperf.profiles import Layout, Profile
from migperf.tables import Table
from shared_core import InputError

Objective = Literal["throughput", "energy", "fairness", "cost"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "energy", "fairness", "cost")
Counts = tuple[int, ...]
"""How many instances of each of the mix's profiles."""
Score = tuple[int, ...]
"""Levels of an objective, the most important first, greater is better. Shares are in units of 1e-9, so that
sums are exact and ties are ties."""

UNIT = 10**9
_ENOUGH = 1 - 1e-9  # capacities that add up to the rate but for rounding


@dataclass(frozen=True)
class Mix:
    """Jobs with what the table knows of them.

    Attributes:
        jobs: In the user's order.
        profiles: Profiles in which at least one job can run.
        services: Ways to serve, by job and profile name.
        trainings: By job and profile name.
        reasons: By job, why it cannot run in some profile or batch.
    """

    jobs: tuple[Job, ...]
    profiles: tuple[Profile, ...]
    services: Mapping[tuple[str, str], Sequence[Service]]
    trainings: Mapping[tuple[str, str], Training]
    reasons: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, jobs: Sequence[Job], layout: Layout, table: Table) -> "Mix":
        """Look all jobs up.

        Raises:
            InputError: Two jobs have one name, or a workload is not in the table.
        """
        check_names(tuple(jobs))
        serving: dict[tuple[str, str], Sequence[Service]] = {}
        training: dict[tuple[str, str], Training] = {}
        reasons: dict[str, list[str]] = {}
        for job in jobs:
            if isinstance(job, TrainingJob):
                found, reasons[job.name] = trainings(job, layout.profiles, table)
                training |= {(job.name, one.profile.name): one for one in found}
                continue
            reasons[job.name] = []
            for profile in layout.profiles:
                ways, why = services(job, profile, table)
                reasons[job.name] += why
                if ways:
                    serving[job.name, profile.name] = ways
        useful = {name for _, name in (*serving, *training)}
        profiles = tuple(profile for profile in layout.profiles if profile.name in useful)
        return cls(tuple(jobs), profiles, serving, training, reasons)

    @cached_property
    def capacities(self) -> Mapping[tuple[str, str], float]:
        """The most items per second of a job that an instance of a profile can serve."""
        return {key: max(way.capacity for way in ways) for key, ways in self.services.items()}

    def capacity(self, job: InferenceJob, counts: Counts) -> float:
        """Return what all these instances together can serve of a job."""
        caps = (self.capacities.get((job.name, profile.name), 0.0) for profile in self.profiles)
        return sum(count * cap for count, cap in zip(counts, caps, strict=True))

    def satisfied(self, job: InferenceJob, counts: Counts) -> bool:
        """Return whether these instances serve the whole rate in time, and none of them is of no use."""
        useful = all(
            (job.name, profile.name) in self.services
            for profile, count in zip(self.profiles, counts, strict=True)
            if count
        )
        return useful and self.capacity(job, counts) >= job.rate * _ENOUGH

    def shares(self, job: InferenceJob, counts: Counts) -> list[tuple[Service, float]]:
        """Return how each instance serves and its share of the rate, which is as its capacity."""
        total = self.capacity(job, counts)
        found = []
        for profile, count in zip(self.profiles, counts, strict=True):
            if count:
                share = job.rate * self.capacities[job.name, profile.name] / total
                found += [(choose(self.services[job.name, profile.name], share), share)] * count
        return found

    def training(self, job: TrainingJob, counts: Counts) -> Training | None:
        """Return the training in the one instance that these counts stand for, if it can run there."""
        if sum(counts) != 1:
            return None
        return self.trainings.get((job.name, self.profiles[counts.index(1)].name))


class Sharing:
    """The best way to give all of some instances to jobs: exact, by dynamic programming over jobs.

    An inference job may own several instances, a training job one. Like instances are not told apart, which
    is what prunes the symmetric cases.

    Args:
        mix: The jobs.
        objective: What is better.
        least: With fairness: the least normalised throughput that any training job may have, in 1e-9.
    """

    def __init__(self, mix: Mix, objective: Objective, least: int | None = None) -> None:
        self.mix, self.objective, self.least = mix, objective, least
        self._known: dict[tuple[int, Counts], tuple[Score, Counts] | None] = {}
        self._scores: dict[tuple[int, Counts], Score | None] = {}
        self._energy = _least_energy(mix) if objective == "energy" else {}
        self._minimum = objective == "fairness" and least is None

    def best(self, counts: Counts) -> tuple[Score, tuple[Counts, ...]] | None:
        """Return the best score, and what each job owns; None if there is no way to use every instance."""
        found = self._best(0, counts)
        if found is None:
            return None
        score, owned, left = found[0], [], counts
        for index in range(len(self.mix.jobs)):
            step = self._best(index, left)
            assert step is not None
            owned.append(step[1])
            left = _minus(left, step[1])
        return score, tuple(owned)

    def _best(self, index: int, counts: Counts) -> tuple[Score, Counts] | None:
        if index == len(self.mix.jobs):
            return (self._nothing(), ()) if not any(counts) else None
        key = (index, counts)
        if key in self._known:
            return self._known[key]
        best: tuple[Score, Counts] | None = None
        for part in self._parts(index, counts):
            score = self._score(index, part)
            rest = None if score is None else self._best(index + 1, _minus(counts, part))
            if score is None or rest is None:
                continue
            total = self._combine(score, rest[0])
            if best is None or total > best[0]:
                best = (total, part)
        self._known[key] = best
        return best

    def _parts(self, index: int, counts: Counts) -> list[Counts]:
        if isinstance(self.mix.jobs[index], InferenceJob):
            return list(product(*(range(count + 1) for count in counts)))
        none = (0,) * len(counts)
        return [none, *((*none[:i], 1, *none[i + 1 :]) for i, count in enumerate(counts) if count)]

    def _combine(self, one: Score, rest: Score) -> Score:
        if self._minimum:
            return one[0] + rest[0], min(one[1], rest[1])
        return tuple(a + b for a, b in zip(one, rest, strict=True))

    def _nothing(self) -> Score:
        if self._minimum:
            return (0, UNIT)
        return (0, 0) if self.objective in ("throughput", "fairness") else (0, 0, 0)

    def _score(self, index: int, part: Counts) -> Score | None:
        """Return what a job with these instances adds; None if it may not have them."""
        key = (index, part)
        if key not in self._scores:
            self._scores[key] = self._score_of(self.mix.jobs[index], part)
        return self._scores[key]

    def _score_of(self, job: Job, part: Counts) -> Score | None:
        if isinstance(job, InferenceJob):
            if not any(part):
                return self._nothing()
            if not self.mix.satisfied(job, part):
                return None
            if self._minimum:
                return (1, UNIT)
            return (1, 0) if self.objective in ("throughput", "fairness") else (1, 0, self._thrift(job, part))
        training = self.mix.training(job, part)
        if any(part) and training is None:
            return None
        share = 0 if training is None else round(training.normalised * UNIT)
        if self._minimum:
            return (0, share)
        if self.objective == "fairness" and share < (self.least or 0):
            return None
        if self.objective in ("throughput", "fairness"):
            return (0, round(job.weight * share))
        return (0, 1, self._thrift(job, part)) if training else (0, 0, 0)

    def _thrift(self, job: Job, part: Counts) -> int:
        """Return the last level: of `cost` minus the memory slices, of `energy` least J/item over J/item."""
        if self.objective == "cost":
            return -sum(count * profile.size for count, profile in zip(part, self.mix.profiles, strict=True))
        joules = _joules(self.mix, job, part)
        return 0 if joules is None else round(UNIT * min(1.0, self._energy[job.name] / joules))


def _joules(mix: Mix, job: Job, part: Counts) -> float | None:
    """Return joules an item, over the instances as their shares; None where one was not measured."""
    if isinstance(job, TrainingJob):
        training = mix.training(job, part)
        spread = training.cell.joules_per_item if training else None
        return None if spread is None else spread.middle
    total = 0.0
    for way, share in mix.shares(job, part):
        if way.cell.joules_per_item is None:
            return None
        total += way.cell.joules_per_item.middle * share / job.rate
    return total


def _least_energy(mix: Mix) -> dict[str, float]:
    """Return each job's least J/item in any one instance.

    Raises:
        InputError: No energy was measured of some job that could run.
    """
    least = {}
    for job in mix.jobs:
        cells = [way.cell for (name, _), ways in mix.services.items() if name == job.name for way in ways]
        cells += [one.cell for (name, _), one in mix.trainings.items() if name == job.name]
        joules = [cell.joules_per_item.middle for cell in cells if cell.joules_per_item is not None]
        if cells and not joules:
            raise InputError("no energy was measured of it, choose another objective", field=job.name)
        least[job.name] = min(joules, default=1.0)
    return least


def _minus(counts: Counts, part: Counts) -> Counts:
    return tuple(a - b for a, b in zip(counts, part, strict=True))
