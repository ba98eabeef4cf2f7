"""What a recommendation says: who runs where, what is expected and on what evidence, and what came second."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from migperf.feasibility import Evidence
from migperf.geometry import Geometry
from migperf.records import Record
from migperf.tables import Source, Spread, batch_of, workload_key

LEVELS = {
    "throughput": ("objectives met", "weighted normalised training throughput"),
    "fairness": ("objectives met", "weighted normalised training throughput, the least one at its greatest"),
    "energy": ("objectives met", "training jobs that run", "least J/item over J/item, summed over jobs"),
    "cost": ("objectives met", "training jobs that run", "memory slices used (negative)"),
}
PLACEMENT_LEVELS = ("memory slices left unusable (negative)", "instances created or destroyed (negative)")


@dataclass(frozen=True)
class Placed:
    """A job in an instance, and what is expected of it.

    Attributes:
        job: Name of the job.
        workload: Key of its workload in the table.
        instance: `3g.20gb@4`.
        batch: Items of a step at most.
        rate: Share of the job's items per second; None for training.
        capacity: Items per second that the instance could serve in time; None for training.
        percentile: That `latency_ms` is about.
        slo_ms: Objective; None for training.
        latency_ms: Expected, with its interval; None for training.
        throughput: Expected items per second of training; of inference, the closed loop's.
        evidence: What the expectation rests on.
        cell: Whether the table's cell was measured or predicted.
        note: What a prediction rests on.
    """

    job: str
    workload: str
    instance: str
    batch: int
    rate: float | None
    capacity: float | None
    percentile: int | None
    slo_ms: float | None
    latency_ms: Spread | None
    throughput: Spread | None
    evidence: Evidence
    cell: Source
    note: str = ""


@dataclass(frozen=True)
class Unmet:
    """A job that the recommendation leaves out.

    Attributes:
        job: Its name.
        alone: Whether the device could carry it without the others.
        reason: Why not, and the nearest miss.
        details: What is wrong with each profile and batch.
    """

    job: str
    alone: bool
    reason: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunnerUp:
    """The best other set of instances; `level` is the first in which it is worse, `margin` by how much."""

    geometry: str
    level: str
    margin: float
    ranks: tuple[float, ...]


@dataclass(frozen=True)
class Recommendation:
    """The best partition for a mix of jobs.

    Attributes:
        device: Model of the device.
        simulated: Whether the table came from a simulator.
        objective: What was better.
        geometry: All instances, placed: those with a job and those that may stay.
        idle: Live instances that are in nobody's way and stay without a job.
        placed: Who runs where.
        unmet: Who does not run, or not in time.
        ranks: Values of the objective's levels, then of the placement's; greater is better.
        levels: Their names.
        create: Instances to create.
        destroy: Instances to destroy.
        runner_up: Second best; None if there is nothing else.
        considered: Sets of instances that were compared.
        notes: What a reader must know.
        commands: What leads there.
    """

    device: str
    simulated: bool
    objective: str
    geometry: Geometry
    idle: tuple[str, ...]
    placed: tuple[Placed, ...]
    unmet: tuple[Unmet, ...]
    ranks: tuple[float, ...]
    levels: tuple[str, ...]
    create: tuple[str, ...]
    destroy: tuple[str, ...]
    runner_up: RunnerUp | None
    considered: int
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether every job runs, and every objective is met as far as the table tells."""
        return not self.unmet

    def of(self, job: str) -> tuple[Placed, ...]:
        """Return what a job owns."""
        return tuple(one for one in self.placed if one.job == job)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON; what is not finite becomes None."""
        names = ("device", "simulated", "objective", "idle", "placed", "unmet", "ranks", "levels", "create")
        rest = ("destroy", "runner_up", "considered", "notes", "commands")
        found = {name: plain(getattr(self, name)) for name in (*names, *rest)}
        return {**found, "geometry": str(self.geometry), "feasible": self.feasible}

    def text(self) -> str:
        """Return it as lines for a person."""
        mark = " (SIMULATED)" if self.simulated else ""
        lines = [f"{self.device.removesuffix(' (simulated)')}{mark}: {self.geometry}"]
        lines += [f"  {_line(one)}" for one in self.placed]
        lines += [f"  {name}: stays, no job" for name in self.idle]
        lines += [f"  NOT MET {one.job}: {one.reason}" for one in self.unmet]
        lines += [f"  {level}: {value:.6g}" for level, value in zip(self.levels, self.ranks, strict=True)]
        if self.runner_up is not None:
            margin = f"{self.runner_up.margin:.4g} less in {self.runner_up.level}"
            equal = "equal in all levels"
            lines.append(f"  second: {self.runner_up.geometry}: {margin if self.runner_up.level else equal}")
        return "\n".join(
            [*lines, *(f"  note: {note}" for note in self.notes), *(f"  $ {c}" for c in self.commands)]
        )


def _line(one: Placed) -> str:
    marks = one.evidence if one.cell == "measured" else f"{one.evidence}, cell predicted"
    if one.evidence == "predicted":
        marks = "predicted"
    if one.rate is None and one.throughput is not None:
        expected = f"{_spread(one.throughput)} items/s"
    else:
        latency = "?" if one.latency_ms is None else _spread(one.latency_ms)
        expected = f"{one.rate:.4g} items/s, p{one.percentile} {latency} ms of {one.slo_ms:g}"
    return f"{one.instance}: {one.job}, batch {one.batch}: {expected} [{marks}]"


def _spread(value: Spread) -> str:
    if value.low == value.high:
        return f"{value.middle:.4g}"
    return f"{value.middle:.4g} ({value.low:.4g} to {value.high:.4g})"


def plain(value: Any) -> Any:
    """Return dataclasses, tuples and mappings as what JSON knows; what is not finite becomes None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Compared:
    """One expectation beside what was measured with all jobs together.

    Attributes:
        what: `p99 ms` or `items/s`.
        ratio: Measured over expected; None where nothing was measured.
        verdict: `as expected` (within the interval or a tenth), `better`, `worse`, or why there is no
            verdict.
        kept: Whether the objective was kept; None for training and where nothing was measured.
    """

    job: str
    instance: str
    what: str
    expected: Spread | None
    measured: float | None
    ratio: float | None
    verdict: str
    kept: bool | None


@dataclass(frozen=True)
class Confirmation:
    """A recommendation beside the measurement of it."""

    compared: tuple[Compared, ...]
    problems: tuple[str, ...] = field(default=())

    @property
    def holds(self) -> bool | None:
        """Whether all objectives were kept and no job was slower than expected; None if that is not known."""
        if self.problems or not self.compared:
            return None
        return all(one.kept is not False and one.verdict != "worse" for one in self.compared)


TOLERANCE = 0.10
"""A measurement within a tenth of its expectation, or within the expectation's interval, is as expected."""


def confirm(recommendation: Recommendation, records: Iterable[Record]) -> Confirmation:
    """Compare what was expected with what all jobs gave together in the recommended geometry.

    Args:
        recommendation: What was run.
        records: Of that run; an instance's repeats are reduced to their median.

    Returns:
        One comparison for each job in an instance; contaminated or missing measurements are problems.
    """
    of_instance: dict[str, list[Record]] = {}
    for record in records:
        of_instance.setdefault(record.instance, []).append(record)
    compared, problems = [], []
    for one in recommendation.placed:
        known = [
            record
            for record in of_instance.get(one.instance, [])
            if workload_key(record.workload) == one.workload and batch_of(record) == one.batch
        ]
        clean = [record for record in known if not record.contaminated]
        if not clean:
            why = f"contaminated: {known[0].contaminated}" if known else "not measured"
            problems.append(f"{one.job} in {one.instance}: {why}")
            continue
        compared.append(_compare(one, clean))
    return Confirmation(tuple(compared), tuple(problems))


def _compare(one: Placed, records: Sequence[Record]) -> Compared:
    inference = one.rate is not None
    name = f"p{one.percentile}"
    what, expected = (f"{name} ms", one.latency_ms) if inference else ("items/s", one.throughput)
    bad = next((r for r in records if r.status != "ok"), None)
    values = [r.latency_ms.get(name) if inference else r.items_per_second for r in records]
    found = sorted(value for value in values if value is not None)
    if bad is not None or not found or expected is None:
        verdict = "not enough samples" if bad is None else f"{bad.status}: {bad.message}".rstrip(": ")
        failed = bad is not None and bad.status != "insufficient"
        kept = False if inference and failed else None
        return Compared(
            one.job, one.instance, what, expected, None, None, "worse" if failed else verdict, kept
        )
    middle = (
        found[len(found) // 2]
        if len(found) % 2
        else (found[len(found) // 2 - 1] + found[len(found) // 2]) / 2
    )
    ratio = middle / expected.middle
    near = expected.low <= middle <= expected.high or abs(ratio - 1) <= TOLERANCE
    verdict = "as expected" if near else "better" if (ratio < 1) == inference else "worse"
    kept = middle <= one.slo_ms if inference and one.slo_ms is not None else None
    return Compared(one.job, one.instance, what, expected, middle, ratio, verdict, kept)
