"""The two-resource law: what a step would take in an instance that was not measured.

time_k = t0 + A/SM_k + B/MEM_k: a part that no resource shortens, one that streaming multiprocessors share and
one that memory slices share. Where the whole device is not saturated the law does not hold, and nothing is
predicted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from migperf.profiles import Layout, Profile
from migperf.tables import Cell, Spread, Table

LAW_ERROR = 0.05
"""What the law misses measured cells by at most on the official charts' saturated batches; the least
half-width of a prediction's interval."""
_NEGATIVE = 0.01
"""A part of the time that comes out further below 0 than this share of it is no rounding of measurements."""
_WORST_FIT = 0.10
"""A fit that misses a measured point by more than this share is no law of these data."""

CONTEXT_OVERHEAD_MIB = {1: 0.0, 2: 60.0, 3: 124.0, 4: 183.0, 7: 359.0}
"""Memory that the same work takes more than on one slice, by compute slices: the context grows with the
instance. Official charts for 2, 3 and 7; 4 lies on the line between its neighbours."""


@dataclass(frozen=True)
class Point:
    """One measured instance: its SMs (or compute slices), its memory slices, seconds of a step."""

    sm: float
    memory: float
    seconds: float


@dataclass(frozen=True)
class Law:
    """A fitted law; `error` is the largest share by which it misses a point that it was fitted on."""

    t0: float
    a: float
    b: float
    error: float = 0.0

    def seconds(self, sm: float, memory: float) -> float:
        """Return the time of a step in an instance."""
        return self.t0 + self.a / sm + self.b / memory


@dataclass(frozen=True)
class Refusal:
    """Why there is no law."""

    reason: str


def fit(points: Sequence[Point], t0: float | None = None) -> Law | Refusal:
    """Fit the law to the measured instances of one workload at one batch.

    Two points fix A and B given t0 (0 unless it is known); more fit all that is not given, by non-negative
    least squares on relative errors. Source: two points of the official charts, 1g and 7g at batch 256.

    Args:
        points: At least two different instances.
        t0: Seconds of a step that no resource shortens, where it is known from small batches.

    Returns:
        The law, or why not: too few instances, or the largest instance is not saturated, which shows in a
        part of the time that leaves [0, 1] of it.
    """
    if len({(point.sm, point.memory) for point in points}) < 2:
        return Refusal("fewer than two sizes of instance were measured")
    sm = np.array([point.sm for point in points])
    memory = np.array([point.memory for point in points])
    seconds = np.array([point.seconds for point in points])
    alike = bool(np.allclose(sm / memory, sm[0] / memory[0]))  # then A and B cannot be told apart
    columns = [1 / sm] if alike else [1 / sm, 1 / memory]
    free_t0 = t0 is None and len(points) > len(columns)
    design = np.stack([*columns, np.ones_like(sm)] if free_t0 else columns, axis=1)
    target = seconds - (t0 or 0.0)
    exact, *_ = np.linalg.lstsq(design / seconds[:, None], target / seconds, rcond=None)
    if (exact * design / seconds[:, None]).min() < -_NEGATIVE:
        return Refusal("the largest instance is not saturated: a part of the time would have to be negative")
    found, _ = nnls(design / seconds[:, None], target / seconds)
    found = [*found[: len(columns)], *([0.0] if alike else []), *found[len(columns) :]]
    law = Law(float(found[2]) if free_t0 else t0 or 0.0, float(found[0]), float(found[1]))
    error = max(abs(law.seconds(p.sm, p.memory) / p.seconds - 1) for p in points)
    if error > _WORST_FIT:
        return Refusal(
            f"no law of both resources fits the measured instances (misses one by {error:.0%}): "
            "the largest is not saturated"
        )
    return replace(law, error=float(error))


def floor_seconds(table: Table, workload: str) -> float | None:
    """Return the time of a step that no instance shortens: of a batch that takes all equally long.

    Returns:
        Seconds, or None if no batch takes every measured instance (two at least) the same time within 5 %.
    """
    for batch in table.batches(workload):
        times = [
            seconds
            for (name, _, size), cell in table.cells.items()
            if (name, size) == (workload, batch) and (seconds := step_seconds(cell)) is not None
        ]
        if len(times) > 1 and max(times) <= 1.05 * min(times):
            return float(np.median(times))
    return None


def step_seconds(cell: Cell) -> float | None:
    """Return the measured seconds of a step: batch over throughput."""
    if cell.status != "ok" or cell.throughput is None or cell.source != "measured":
        return None
    return cell.batch / cell.throughput.middle


def complete(table: Table, layout: Layout) -> Table:
    """Return the table with its missing cells predicted, and marked so, where law and memory allow it.

    A cell stays missing where the law was refused (the reason is in its message, its status `insufficient`),
    where it would be larger than all that was measured, or where its memory is unknown.
    """
    cells = dict(table.cells)
    names = {profile.name: profile for profile in layout.profiles}
    for workload in table.workloads():
        t0 = floor_seconds(table, workload)
        for batch in table.batches(workload):
            measured = {
                names[profile]: cell
                for (name, profile, size), cell in table.cells.items()
                if (name, size) == (workload, batch) and profile in names
            }
            for profile in layout.profiles:
                if profile not in measured:
                    key = (workload, profile.name, batch)
                    cells[key] = _predict(
                        Cell(*key, status="insufficient", source="predicted"), profile, measured, t0
                    )
    for cell in list(cells.values()):  # more items, or less memory, than what already ran out of it
        if cell.source == "predicted" and cell.profile in names:
            why = _runs_out(cell, names, table)
            if why:
                cells[cell.workload, cell.profile, cell.batch] = replace(
                    cell, status="oom", throughput=None, service_ms={}, message=why
                )
    return replace(table, cells=dict(sorted(cells.items())))


def _predict(empty: Cell, profile: Profile, measured: Mapping[Profile, Cell], t0: float | None) -> Cell:
    ran = {other: cell for other, cell in measured.items() if step_seconds(cell) is not None}
    memory, problem = _memory_bound(profile, measured)
    if problem:
        return replace(empty, message=problem)
    for other, cell in ran.items():
        if _resources(other) == _resources(profile):
            note = f"as {other.name}, which has the same slices"
            return replace(
                cell, profile=profile.name, source="predicted", open_loop=(), memory_mib=memory, message=note
            )
    if ran and all(profile.slices > other.slices or profile.size > other.size for other in ran):
        return replace(empty, message="no instance as large was measured")
    points = [
        Point(*_resources(other), seconds)
        for other, cell in ran.items()
        if (seconds := step_seconds(cell)) is not None
    ]
    found = fit(points)
    if isinstance(found, Refusal) and t0 is not None:
        again = fit(points, t0)
        found = found if isinstance(again, Refusal) else again
    if isinstance(found, Refusal):
        return replace(empty, message=found.reason)
    sm, size = _resources(profile)
    ratios = [point.sm / point.memory for point in points]
    if np.allclose(ratios, ratios[0]) and not np.isclose(sm / size, ratios[0]):
        return replace(
            empty, message="all measured instances have SMs and memory in one ratio, this one has not"
        )
    slower = [point.seconds for point in points if point.sm <= sm and point.memory <= size]
    faster = [point.seconds for point in points if point.sm >= sm and point.memory >= size]
    seconds = max(min([found.seconds(sm, size), *slower]), max(faster, default=0.0))  # no law beats these
    width = max(LAW_ERROR, found.error)
    rate, time = empty.batch / seconds, 1000 * seconds
    return replace(
        empty,
        status="ok",
        throughput=Spread(rate, rate / (1 + width), rate / (1 - width), 0),
        service_ms={"mean": Spread(time, time * (1 - width), time * (1 + width), 0)},
        memory_mib=memory,
        message=f"two-resource law fitted on {', '.join(sorted(other.name for other in ran))}",
    )


def _resources(profile: Profile) -> tuple[float, float]:
    return float(profile.sms or profile.slices), float(profile.size)


def _memory_bound(profile: Profile, measured: Mapping[Profile, Cell]) -> tuple[float | None, str]:
    """Return the most memory that the work can need in the profile, or why that is unknown."""
    if profile.memory_mib is None:
        return None, ""
    ran = {other: cell for other, cell in measured.items() if cell.status == "ok"}
    grown = CONTEXT_OVERHEAD_MIB.get(profile.slices, 0.0)
    bounds = [
        cell.memory_mib + max(0.0, grown - CONTEXT_OVERHEAD_MIB.get(other.slices, 0.0))
        for other, cell in ran.items()
        if cell.memory_mib is not None
    ]
    if bounds:
        return min(bounds), ""
    if any((other.memory_mib or 0.0) <= profile.memory_mib for other in ran):
        return None, ""  # it ran with less
    return None, "its memory was not measured"


def _runs_out(cell: Cell, names: Mapping[str, Profile], table: Table) -> str:
    memory = names[cell.profile].memory_mib
    for (workload, other, batch), known in table.cells.items():
        if known.status != "oom" or workload != cell.workload or batch > cell.batch or other not in names:
            continue
        limit = names[other].memory_mib
        if memory is not None and limit is not None and memory <= limit:
            return f"batch {batch} ran out of memory in {other}"
    return ""
