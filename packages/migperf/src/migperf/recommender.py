"""The recommender: exact over all geometries of a device and all ways to share their instances among jobs."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from migperf.errors import GeometryError
from migperf.geometry import Geometry, Slot, enumerate_geometries
from migperf.jobs import InferenceJob, Job, TrainingJob
from migperf.mixes import OBJECTIVES, UNIT, Counts, Mix, Objective, Score, Sharing
from migperf.profiles import HasLayout, Layout, layout_of
from migperf.recommendation import LEVELS, PLACEMENT_LEVELS, Placed, Recommendation, RunnerUp, Unmet
from migperf.scaling import complete
from migperf.tables import Table, as_table
from shared_core import InputError

_ALONE = (
    "instances share power, clocks and the host, and the cells need not have been measured beside these "
    "neighbours: confirm runs all jobs together"
)


@dataclass(frozen=True)
class Site:
    """A placed geometry seen from the live state.

    Attributes:
        geometry: Instances with a job.
        unusable: Memory slices that nothing more could use.
        idle: Live instances that can stay beside it.
        create: Instances that do not exist yet.
        destroy: Live instances that are in the way.
    """

    geometry: Geometry
    unusable: int
    idle: tuple[Slot, ...]
    create: tuple[Slot, ...]
    destroy: tuple[Slot, ...]

    @property
    def rank(self) -> tuple[int, int]:
        """Slices left unusable and instances created or destroyed, both negative."""
        return -self.unusable, -len(self.create) - len(self.destroy)


def recommend(
    device: Layout | HasLayout | str,
    jobs: Sequence[Job],
    table: Table | str | os.PathLike[str],
    *,
    objective: Objective = "throughput",
    live: Geometry | None = None,
    predict: bool = True,
    legacy_driver: bool = False,
) -> Recommendation:
    """Return the best partition for a mix of jobs; exact.

    Lexicographic, the first level first. `throughput`: objectives met; weighted training throughput, each as
    its share of the job's best profile; fewest memory slices left unusable; fewest instances created or
    destroyed. `fairness`: the second level is the greatest least share, then the sum. `energy` and `cost`:
    training jobs that run, then least J/item over J/item summed over jobs, or fewest memory slices; then as
    before.

    Args:
        device: A layout, a backend (whose live instances are asked for) or the name of a model.
        jobs: The mix.
        table: What was measured on that device, or the folder of its records.
        objective: What is better.
        live: What exists now, placed; None: what the backend says, or nothing.
        predict: Whether missing cells may be predicted by the two-resource law.
        legacy_driver: Without what drivers before R510 refuse.

    Raises:
        InputError: The table is of another device, a job's workload is not in it, or no energy was measured.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"expected one of {', '.join(OBJECTIVES)}", field="objective", value=objective)
    table = as_table(table)
    layout = layout_of(device)
    mix = prepare(layout, jobs, table, predict=predict)
    live = live if live is not None else _live(device, layout)
    states = grouped(mix, layout, legacy_driver=legacy_driver)
    sharing = Sharing(mix, objective)
    if objective == "fairness":
        first = [found[0] for counts in states if (found := sharing.best(counts)) is not None]
        sharing = Sharing(
            mix, objective, least=max(first)[1] if any(isinstance(j, TrainingJob) for j in jobs) else 0
        )
    best, *others = _two_best(states, sharing, live)
    return _recommendation(
        layout, mix, table, objective, best, others, len(states), getattr(device, "spec", "")
    )


def prepare(layout: Layout, jobs: Sequence[Job], table: Table, *, predict: bool = True) -> Mix:
    """Look the jobs up in the table, its missing cells predicted if they may be.

    Raises:
        InputError: The table has none of the device's profiles, or a workload is not in it.
    """
    known = {profile.name for profile in layout.profiles}
    names = {profile for _, profile, _ in table.cells}
    if not known & names:
        raise InputError(
            f"is of {table.device}; {layout.device} has no profile {' or '.join(sorted(names))}",
            field="table",
        )
    return Mix.of(jobs, layout, complete(table, layout) if predict else table)


def grouped(mix: Mix, layout: Layout, *, legacy_driver: bool = False) -> dict[Counts, list[Geometry]]:
    """Return all placed geometries of profiles that some job can use, by how many there are of each."""
    names = [profile.name for profile in mix.profiles]
    found: dict[Counts, list[Geometry]] = defaultdict(list)
    for geometry in enumerate_geometries(layout, names, legacy_driver=legacy_driver):
        have = geometry.profiles
        found[tuple(have[name] for name in names)].append(geometry)
    return dict(found)


def _live(device: Any, layout: Layout) -> Geometry:
    if not hasattr(device, "instances"):
        return Geometry(layout)
    from migperf.plans import current

    return current(device)


Ranked = tuple[tuple[int, ...], Score, tuple[Counts, ...], Site]


def _two_best(states: Mapping[Counts, list[Geometry]], sharing: Sharing, live: Geometry) -> list[Ranked]:
    """Return the best set of instances and the next one, each with its best sharing and placement."""
    by_score: dict[Score, list[tuple[Counts, tuple[Counts, ...]]]] = defaultdict(list)
    for counts in states:
        shared = sharing.best(counts)
        if shared is not None:
            by_score[shared[0]].append((counts, shared[1]))
    found: list[Ranked] = []
    for score in sorted(by_score, reverse=True):  # placements are looked at only where the score ties
        tied: list[Ranked] = []
        for counts, owned in by_score[score]:
            site = best_site(states[counts], live)
            tied.append(((*score, *site.rank, *_taste(sharing.mix, owned, site)), score, owned, site))
        found += sorted(tied, key=lambda one: one[0], reverse=True)
        others = [one for one in found[1:] if _sizes(one[3]) != _sizes(found[0][3])]
        if others:
            return [found[0], others[0]]
    return found[:1]


def _sizes(site: Site) -> list[tuple[int, int]]:
    """Return what instances amount to: one with media engines is no other size."""
    return sorted((slot.profile.slices, slot.profile.size) for slot in site.geometry.slots)


def _taste(mix: Mix, owned: Sequence[Counts], site: Site) -> tuple[int, ...]:
    """Decide between what the objective finds equal: fewer slices, instances, predictions, media engines."""
    slots = site.geometry.slots
    predicted = sum(one.cell == "predicted" for one in _placed(mix, owned, site.geometry))
    media = sum(slot.profile.media for slot in slots)
    return -sum(slot.profile.size for slot in slots), -len(slots), -predicted, -media


def best_site(states: Sequence[Geometry], live: Geometry) -> Site:
    """Return the placement that leaves fewest slices unusable, then changes fewest live instances."""
    sites = (site_of(state, live) for state in states)
    return max(sites, key=lambda site: (site.rank, [-slot.cells.start for slot in site.geometry.slots]))


def site_of(geometry: Geometry, live: Geometry) -> Site:
    """Look at a placed geometry from the live state; live instances that are in nobody's way stay."""
    wanted = {(slot.profile.name, slot.start): slot for slot in geometry.slots}
    there = {(slot.profile.name, slot.start) for slot in live.slots if slot.compute is None}
    create = tuple(slot for key, slot in wanted.items() if key not in there)
    idle: list[Slot] = []
    destroy: list[Slot] = []
    for slot in live.slots:
        if slot.compute is None and (slot.profile.name, slot.start) in wanted:
            continue
        (idle if _fits(slot, (*geometry.slots, *idle)) else destroy).append(slot)
    return Site(geometry, unusable_slices(geometry), tuple(idle), create, tuple(destroy))


def _fits(slot: Slot, others: Sequence[Slot]) -> bool:
    """Return whether a placed slot can be beside others that are valid together."""
    profile = slot.profile
    same = sum(other.profile.id == profile.id for other in others)
    media = profile.media and any(other.profile.media for other in others)
    return same < profile.maximum and not media and not any(slot.mask & other.mask for other in others)


def unusable_slices(geometry: Geometry) -> int:
    """Return the memory slices that are neither taken nor could be taken by one more instance.

    >>> unusable_slices(Geometry.parse("3g@0,1g@4,1g@5,1g@6", "a100-40gb"))
    1
    """
    layout = geometry.layout
    taken = 0
    for slot in geometry.slots:
        taken |= slot.mask
    have = Counter(slot.profile.id for slot in geometry.slots)
    media = any(slot.profile.media for slot in geometry.slots)
    reached = taken
    for profile_id, maximum, needs_media, mask in _intervals(layout):
        if not mask & taken and have[profile_id] < maximum and not (needs_media and media):
            reached |= mask
    return layout.axis - reached.bit_count()


@lru_cache(maxsize=32)
def _intervals(layout: Layout) -> tuple[tuple[int, int, bool, int], ...]:
    return tuple(
        (profile.id, profile.maximum, profile.media, ((1 << profile.size) - 1) << start)
        for profile in layout.profiles
        for start in profile.starts
    )


def _recommendation(
    layout: Layout,
    mix: Mix,
    table: Table,
    objective: Objective,
    best: Ranked,
    others: Sequence[Ranked],
    considered: int,
    spec: str,
) -> Recommendation:
    _, score, owned, site = best
    geometry = Geometry(layout, (*site.geometry.slots, *site.idle))
    changes = [*map(str, site.destroy), *map(str, site.create)]
    command = f'migperf apply "{geometry}"' + (f" --device {spec}" if spec else "")
    notes = [_ALONE, *_unmeasured(mix, layout, table)]
    if table.contaminated:
        notes.append(f"{table.contaminated} of {table.records} records were contaminated and left out")
    return Recommendation(
        device=layout.device,
        simulated=table.simulated,
        objective=objective,
        geometry=geometry,
        idle=tuple(map(str, site.idle)),
        placed=tuple(_placed(mix, owned, site.geometry)),
        unmet=tuple(_unmet(mix, layout, owned)),
        ranks=_values(objective, score, site),
        levels=(*LEVELS[objective], *PLACEMENT_LEVELS),
        create=tuple(map(str, site.create)),
        destroy=tuple(map(str, site.destroy)),
        runner_up=_runner_up(objective, best, others[0]) if others else None,
        considered=considered,
        notes=tuple(notes),
        commands=(command,) if changes else (),
    )


def _unmeasured(mix: Mix, layout: Layout, table: Table) -> Iterator[str]:
    """Say in which profiles nobody knows what a job would do: the exact answer is one among the others."""
    for job in mix.jobs:
        workload = table.resolve(job.workload, job.mode)
        known = {profile for name, profile, _ in table.cells if name == workload}
        known |= {profile for name, profile in (*mix.services, *mix.trainings) if name == job.name}
        missing = [p.name for p in layout.profiles if p.name not in known and not p.media]
        if missing:
            names = ", ".join(missing)
            yield f"{job.name} was neither measured nor predicted in {names}: not considered there"


def _values(objective: Objective, score: Score, site: Site) -> tuple[float, ...]:
    shares = {"throughput": (1,), "fairness": (1,), "energy": (2,), "cost": ()}[objective]
    found = [value / UNIT if level in shares else float(value) for level, value in enumerate(score)]
    return (*found, *map(float, site.rank))


def _runner_up(objective: Objective, best: Ranked, other: Ranked) -> RunnerUp:
    mine, other_values = _values(objective, best[1], best[3]), _values(objective, other[1], other[3])
    levels = (*LEVELS[objective], *PLACEMENT_LEVELS)
    for level, one, two in zip(levels, mine, other_values, strict=True):
        if one != two:
            return RunnerUp(str(other[3].geometry), level, one - two, other_values)
    return RunnerUp(str(other[3].geometry), "", 0.0, other_values)


def _placed(mix: Mix, owned: Sequence[Counts], geometry: Geometry) -> Iterator[Placed]:
    free = {p.name: [slot for slot in geometry.slots if slot.profile.name == p.name] for p in mix.profiles}
    for job, counts in zip(mix.jobs, owned, strict=True):
        if isinstance(job, TrainingJob):
            training = mix.training(job, counts)
            if training is not None:
                cell, instance = training.cell, str(free[training.profile.name].pop(0))
                evidence = cell.source
                yield Placed(
                    job.name, cell.workload, instance, job.batch, None, None, None, None, None,
                    training.throughput, evidence, cell.source, _note(cell),
                )  # fmt: skip
            continue
        for way, share in mix.shares(job, counts) if any(counts) else ():
            latency, evidence = way.latency_ms(share)
            cell, instance = way.cell, str(free[way.profile.name].pop(0))
            yield Placed(
                job.name, cell.workload, instance, cell.batch, share, way.capacity, job.percentile,
                job.slo_ms, latency, cell.throughput, evidence, cell.source, _note(cell),
            )  # fmt: skip


def _note(cell: Any) -> str:
    return cell.message if cell.source == "predicted" else ""


def _unmet(mix: Mix, layout: Layout, owned: Sequence[Counts]) -> Iterator[Unmet]:
    for job, counts in zip(mix.jobs, owned, strict=True):
        if any(counts):
            continue
        reasons = tuple(mix.reasons[job.name])
        if isinstance(job, InferenceJob):
            yield _unserved(mix, layout, job, reasons)
        elif any(name == job.name for name, _ in mix.trainings):
            yield Unmet(job.name, True, "can run, but not beside the jobs that come before it", reasons)
        else:
            yield Unmet(job.name, False, f"fits no profile: {'; '.join(reasons)}", reasons)


def _unserved(mix: Mix, layout: Layout, job: InferenceJob, reasons: tuple[str, ...]) -> Unmet:
    able = [profile.name for profile in mix.profiles if (job.name, profile.name) in mix.services]
    if not able:
        return Unmet(job.name, False, f"no instance keeps p{job.percentile} within {job.slo_ms:g} ms: "
                     f"{'; '.join(reasons) or 'nothing was measured'}", reasons)  # fmt: skip
    most, where = 0.0, ""
    for geometry in enumerate_geometries(layout, able, multisets=True):
        total = sum(count * mix.capacities[job.name, name] for name, count in geometry.profiles.items())
        if total > most:
            most, where = total, str(geometry)
    limit = (
        f"p{job.percentile} stays within {job.slo_ms:g} ms up to {most:.4g} items/s ({where}), "
        f"{job.rate:g} are wanted"
    )
    if most >= job.rate * (1 - 1e-9):
        return Unmet(job.name, True, f"can be served alone ({limit}), but not beside the other jobs", reasons)
    return Unmet(job.name, False, f"cannot be served even alone: {limit}", reasons)


def require_feasible(recommendation: Recommendation) -> Recommendation:
    """Return the recommendation itself if every job runs in time.

    Raises:
        GeometryError: Some do not; the message says which and why.
    """
    if recommendation.unmet:
        lines = "; ".join(f"{one.job}: {one.reason}" for one in recommendation.unmet)
        raise GeometryError(f"no geometry of {recommendation.device} carries all jobs: {lines}", field="jobs")
    return recommendation
