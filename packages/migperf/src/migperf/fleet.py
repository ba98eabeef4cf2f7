"""Several GPUs: one mix of jobs over all of them, by integer programming over each GPU's geometries."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from migperf.errors import DataError
from migperf.geometry import Geometry
from migperf.jobs import InferenceJob, Job, TrainingJob
from migperf.mixes import Counts, Mix, Sharing
from migperf.profiles import HasLayout, Layout, layout_of
from migperf.recommendation import plain
from migperf.recommender import Site, best_site, grouped, prepare
from migperf.tables import Table, as_table
from shared_core import InputError

_SLACK = 1e-7  # what a level may lose to rounding while the next one is made better


@dataclass(frozen=True)
class Gpu:
    """One GPU of a fleet.

    Attributes:
        name: `node1:0`.
        device: A layout or the name of a model.
        table: What was measured on that model, or the folder of its records.
        live: What exists on it now.
    """

    name: str
    device: Layout | HasLayout | str
    table: Table | str | os.PathLike[str]
    live: Geometry | None = None


@dataclass(frozen=True)
class Share:
    """Instances of one profile on one GPU that a job owns, and their part of its rate (None: training)."""

    job: str
    gpu: str
    profile: str
    instances: int
    rate: float | None


@dataclass(frozen=True)
class FleetPlan:
    """What runs where.

    Attributes:
        sites: Placed geometry of each GPU, by name.
        shares: Who owns what.
        unmet: Names of jobs that do not run, or not in time.
        ranks: Objectives met; weighted normalised training throughput; memory slices left unusable and
            instances created or destroyed, both negative.
        bound: No plan meets more objectives, or as many with more training throughput, than this.
        method: `milp`, or `greedy` where the solver found nothing in its time.
    """

    sites: Mapping[str, Site]
    shares: tuple[Share, ...]
    unmet: tuple[str, ...]
    ranks: tuple[float, float, float, float]
    bound: tuple[float, float]
    method: str

    @property
    def gap(self) -> tuple[float, float]:
        """How far the first two levels may be from the best plan, 0 when it is proven best."""
        met = max(0.0, math.floor(self.bound[0] + _SLACK) - self.ranks[0])
        return met, max(0.0, self.bound[1] - self.ranks[1]) if not met else self.bound[1]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        geometries = {name: str(site.geometry) for name, site in self.sites.items()}
        found = {name: plain(getattr(self, name)) for name in ("shares", "unmet", "ranks", "bound", "method")}
        return {"geometries": geometries, **found, "gap": plain(self.gap), "proven": self.proven}

    @property
    def proven(self) -> bool:
        """Whether no plan is better in the first two levels."""
        return not any(gap > 1e-6 for gap in self.gap)

    def text(self) -> str:
        """Return it as lines for a person."""
        lines = [f"{name}: {site.geometry}" for name, site in self.sites.items()]
        for share in self.shares:
            rate = "" if share.rate is None else f", {share.rate:.4g} items/s"
            lines.append(f"  {share.job}: {share.instances} x {share.profile} on {share.gpu}{rate}")
        lines += [f"  NOT MET {job}" for job in self.unmet]
        exact = "proven best" if self.proven else "not proven best"
        lines.append(
            f"  {self.method}: {self.ranks[0]:.0f} objectives, training {self.ranks[1]:.6g}, gap "
            f"{self.gap[0]:.0f} objectives, {self.gap[1]:.3g} training ({exact})"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Member:
    """A GPU with its mix, its geometries by counts, and the best placement of each."""

    gpu: Gpu
    mix: Mix
    sites: Mapping[Counts, Site]

    def gain(self, job: Job, profile: str) -> float:
        """Return what an instance of a profile can do of a job, in items per second; 0 if nothing."""
        if isinstance(job, InferenceJob):
            return self.mix.capacities.get((job.name, profile), 0.0)
        training = self.mix.trainings.get((job.name, profile))
        return 0.0 if training is None else training.throughput.middle


def recommend_fleet(
    gpus: Sequence[Gpu],
    jobs: Sequence[Job],
    *,
    predict: bool = True,
    time_limit: float = 60.0,
) -> FleetPlan:
    """Return the best plan for a mix over several GPUs, by the levels of `recommend`'s throughput objective.

    An inference job's rate may be split over GPUs; a training job has one instance of one GPU. A column
    chooses one geometry (by its numbers of instances, best placed) of each GPU; whole numbers give its
    instances to jobs. The levels are solved one after the other by HiGHS.

    Args:
        gpus: Their names differ; tables may.
        jobs: The mix.
        predict: Whether missing cells may be predicted.
        time_limit: Seconds for the solver over all levels; the greedy plan stands in if it finds none.

    Raises:
        InputError: As for `recommend`.
    """
    names = [gpu.name for gpu in gpus]
    if not names or len(set(names)) < len(names):
        raise InputError("expected one or more GPUs with different names", field="gpus", value=names)
    program = _Program([_member(gpu, jobs, predict) for gpu in gpus], jobs)
    solved, bound = program.solve(time_limit)
    plans = [program.plan(program.greedy(), bound, "greedy")]
    if solved is not None:
        plans.insert(0, program.plan(solved, bound, "milp"))
    return max(plans, key=lambda plan: plan.ranks)


def _member(gpu: Gpu, jobs: Sequence[Job], predict: bool) -> _Member:
    layout = layout_of(gpu.device)
    mix = prepare(layout, jobs, as_table(gpu.table), predict=predict)
    live = gpu.live if gpu.live is not None else Geometry(layout)
    return _Member(
        gpu, mix, {counts: best_site(states, live) for counts, states in grouped(mix, layout).items()}
    )


class _Program:
    """The integer program: the geometry of each GPU, how many instances each job owns, and who is met."""

    def __init__(self, members: Sequence[_Member], jobs: Sequence[Job]) -> None:
        self.members, self.jobs = members, tuple(jobs)
        self.best = {
            job.name: max((m.gain(job, p.name) for m in members for p in m.mix.profiles), default=0.0)
            for job in jobs
            if isinstance(job, TrainingJob)
        }
        self.columns = [(g, counts) for g, member in enumerate(members) for counts in member.sites]
        self.owned = [
            (j, g, p)
            for j, job in enumerate(self.jobs)
            for g, member in enumerate(members)
            for p, profile in enumerate(member.mix.profiles)
            if member.gain(job, profile.name) > 0
        ]
        self.first_owned = len(self.columns)
        self.first_met = self.first_owned + len(self.owned)
        self.size = self.first_met + len(self.jobs)
        self.most = {
            index: float(self.members[g].mix.profiles[p].maximum)
            for index, (_, g, p) in enumerate(self.owned, self.first_owned)
        }
        self.levels = self._levels()

    def _levels(self) -> list[np.ndarray]:
        met, trained, unusable, changed = (np.zeros(self.size) for _ in range(4))
        for j, job in enumerate(self.jobs):
            if isinstance(job, InferenceJob):
                met[self.first_met + j] = 1
        for index, (j, g, p) in enumerate(self.owned, self.first_owned):
            job = self.jobs[j]
            if isinstance(job, TrainingJob):
                name = self.members[g].mix.profiles[p].name
                trained[index] = job.weight * self.members[g].gain(job, name) / self.best[job.name]
        for index, (g, counts) in enumerate(self.columns):
            unusable[index], changed[index] = self.members[g].sites[counts].rank
        return [met, trained, unusable, changed]

    def _constraints(self) -> list[LinearConstraint]:
        rows: list[tuple[dict[int, float], float, float]] = []
        for g, member in enumerate(self.members):  # each GPU has one geometry, and all its instances an owner
            rows.append(({i: 1.0 for i, (h, _) in enumerate(self.columns) if h == g}, 1.0, 1.0))
            for p in range(len(member.mix.profiles)):
                row = {
                    i: -float(counts[p]) for i, (h, counts) in enumerate(self.columns) if h == g and counts[p]
                }
                row |= {
                    i: 1.0 for i, (_, h, q) in enumerate(self.owned, self.first_owned) if (h, q) == (g, p)
                }
                rows.append((row, 0.0, 0.0))
        for j, job in enumerate(self.jobs):
            mine = {i: self.owned[i - self.first_owned] for i in range(self.first_owned, self.first_met)}
            mine = {i: (g, p) for i, (k, g, p) in mine.items() if k == j}
            if isinstance(job, TrainingJob):
                rows.append((dict.fromkeys(mine, 1.0), 0.0, 1.0))
                continue
            gains = {
                i: self.members[g].gain(job, self.members[g].mix.profiles[p].name)
                for i, (g, p) in mine.items()
            }
            scaled = {i: gain / job.rate for i, gain in gains.items()}
            rows.append(({**scaled, self.first_met + j: -(1 - 1e-9)}, 0.0, np.inf))
            # what is not met owns nothing: idle instances are not created
            rows += [({i: 1.0, self.first_met + j: -self.most[i]}, -np.inf, 0.0) for i in mine]
        matrix = lil_array((len(rows), self.size))
        for r, (row, _, _) in enumerate(rows):
            for column, value in row.items():
                matrix[r, column] = value
        # scipy's own annotations say float, its documentation arrays
        lows: Any = [low for _, low, _ in rows]
        highs: Any = [high for _, _, high in rows]
        return [LinearConstraint(matrix.tocsc(), lows, highs)]

    def solve(self, time_limit: float) -> tuple[np.ndarray | None, tuple[float, float]]:
        """Make one level after the other as great as it can be; also bound the first two from above."""
        constraints = self._constraints()
        zeros: Any = np.zeros(self.size)
        upper: Any = np.ones(self.size)
        upper[list(self.most)] = list(self.most.values())
        best: np.ndarray | None = None
        services = [job for job in self.jobs if isinstance(job, InferenceJob)]
        weights = [job.weight for job in self.jobs if isinstance(job, TrainingJob)]
        bounds = [float(len(services)), float(sum(weights))]
        for number, level in enumerate(self.levels):
            if not level.any():
                if number < 2:
                    bounds[number] = 0.0
                continue
            found = milp(
                -level,
                constraints=constraints,
                integrality=np.ones(self.size),
                bounds=Bounds(zeros, upper),
                options={"time_limit": time_limit / len(self.levels), "mip_rel_gap": 0.0},
            )
            if number < 2 and found.mip_dual_bound is not None:
                bounds[number] = min(bounds[number], -float(found.mip_dual_bound))
            if found.x is None:
                break
            best = np.round(found.x)
            constraints = [*constraints, LinearConstraint(level, float(level @ best) - _SLACK, np.inf)]
        return best, (bounds[0], bounds[1])

    def greedy(self) -> np.ndarray:
        """Fill GPU after GPU: each takes the geometry and owners that add most to what is still wanted."""
        chosen = np.zeros(self.size)
        left = {job.name: job for job in self.jobs}
        for g, member in enumerate(self.members):
            mix = Mix(
                tuple(left.values()), member.mix.profiles, member.mix.services, member.mix.trainings, {}
            )
            none = (0,) * len(member.mix.profiles)
            best, owners = none, ()
            if left:
                sharing = Sharing(mix, "throughput")
                shared = [(sharing.best(counts), counts) for counts in member.sites]
                _, best, owners = max((one[0], counts, one[1]) for one, counts in shared if one is not None)
            chosen[self.columns.index((g, best))] = 1
            for job, counts in zip(tuple(left.values()), owners, strict=True):
                for p, count in enumerate(counts):
                    if count:
                        chosen[self.first_owned + self.owned.index((self.jobs.index(job), g, p))] = count
                if any(counts):
                    chosen[self.first_met + self.jobs.index(job)] = isinstance(job, InferenceJob)
                    del left[job.name]
        return chosen

    def plan(self, chosen: np.ndarray, bound: tuple[float, float], method: str) -> FleetPlan:
        """Read the solution."""
        sites = {
            self.members[g].gpu.name: self.members[g].sites[counts]
            for index, (g, counts) in enumerate(self.columns)
            if chosen[index]
        }
        if len(sites) != len(self.members):
            raise DataError("the solver gave a GPU no geometry", field="fleet")
        shares = []
        for j, job in enumerate(self.jobs):
            counts = chosen[self.first_owned : self.first_met]
            mine = [(g, p, int(n)) for (k, g, p), n in zip(self.owned, counts, strict=True) if k == j and n]
            names = [self.members[g].mix.profiles[p].name for g, p, _ in mine]
            gains = [self.members[g].gain(job, name) * n for (g, _, n), name in zip(mine, names, strict=True)]
            for (g, _, count), name, gain in zip(mine, names, gains, strict=True):
                rate = job.rate * gain / sum(gains) if isinstance(job, InferenceJob) else None
                shares.append(Share(job.name, self.members[g].gpu.name, name, count, rate))
        running = {share.job for share in shares}
        ranks = [float(level @ chosen) for level in self.levels]
        return FleetPlan(
            sites=sites,
            shares=tuple(shares),
            unmet=tuple(job.name for job in self.jobs if job.name not in running),
            ranks=(ranks[0], ranks[1], ranks[2], ranks[3]),
            bound=bound,
            method=method,
        )
