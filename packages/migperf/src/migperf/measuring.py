"""Measuring: one process an instance, begun together, measured while all of them are at work.

The protocol: spawned workers, a barrier, steady state, the overlap window trimmed by one warm-up interval at
each end, latencies pooled, contamination said.
"""

import os
import platform
import queue
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from migperf import contamination, energy, latency, loads, windows
from migperf.backends import Backend, Instance
from migperf.loads import CLOSED, Load, Open
from migperf.parts import Part, assign, cell_name, name_of, own_schedule
from migperf.processes import Worker, gather, living
from migperf.records import Record, Writer
from migperf.samplers import Recorder, Window, device_activity, of_device
from migperf.samplers.procfs import CpuSampler, ProcessSampler
from migperf.samplers.psi import PressureSampler
from migperf.whereabouts import misplaced, wrong_threads
from migperf.worker import threads_of
from migperf.workloads import Workload
from shared_core import InputError

LEAD_NS = 60_000_000
"""Between the last worker's `ready` and the common start: long enough for the line to reach all of them."""

IDLE_SECONDS = 1.0
"""For which the board's energy is read before the workers start."""


@dataclass
class Result:
    """What a run gave.

    Attributes:
        records: One a worker and repeat.
        raws: Name of a raw file -> latencies in ns of the window.
        problem: Why it gave nothing, where the device does not allow what was asked.
    """

    records: list[Record] = field(default_factory=list)
    raws: dict[str, Int64[np.ndarray, " _"]] = field(default_factory=dict)
    problem: str = ""

    def summary(self) -> dict[str, Any]:
        """Return medians and ranges over repeats, and percentiles of all clean requests pooled.

        `items_per_second`, `range` and `latency_ms` leave contaminated repeats out unless all are.
        """
        repeats = sorted({record.repeat for record in self.records})
        dirty = {record.repeat for record in self.records if record.contaminated}
        kept = [repeat for repeat in repeats if repeat not in dirty] or repeats
        totals = []
        for repeat in kept:
            rates = [r.items_per_second for r in self.records if r.repeat == repeat]
            if rates and all(rate is not None for rate in rates):
                totals.append(sum(rate for rate in rates if rate is not None))
        measured = [r for r in self.records if r.repeat in kept and r.status == "ok" and r.raw in self.raws]
        pooled = latency.pooled([self.raws[r.raw] for r in measured]) if measured else None
        statuses = [record.status for record in self.records]
        return {
            "items_per_second": float(np.median(totals)) if totals else None,
            "range": (min(totals), max(totals)) if totals else None,
            "latency_ms": pooled.ms if pooled else {},
            "latency_interval_ms": pooled.interval_ms if pooled else {},
            "warning": pooled.warning if pooled else "",
            "samples": pooled.samples if pooled else 0,
            "statuses": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
            "messages": list(dict.fromkeys(record.message for record in self.records if record.message)),
            "contaminated": list(dict.fromkeys(r.contaminated for r in self.records if r.contaminated)),
            "repeats": len(repeats),
            "clean_repeats": len(repeats) - len(dirty),
            "simulated": any(record.simulated for record in self.records),
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Append the records and their raw latencies to a folder, and return the file of records."""
        writer = Writer(folder, any(record.simulated for record in self.records))
        for key in dict.fromkeys((record.cell, record.repeat) for record in self.records):
            some = [record for record in self.records if (record.cell, record.repeat) == key]
            writer.append(some, {r.raw: self.raws[r.raw] for r in some if r.raw in self.raws})
        return writer.path


def run(
    workloads: Workload | Sequence[Workload],
    instances: Sequence[Instance],
    backend: Backend | None = None,
    load: Load | Sequence[Load] = CLOSED,
    duration: float = 10.0,
    repeats: int = 3,
    mode: str = "partition",
    *,
    run_id: str = "",
    cell: str = "",
    first_repeat: int = 0,
    timeout: float = 300.0,
    warmup_seconds: float = 30.0,
    observed_mode: Callable[[], str] | None = None,
    model: Any = None,
) -> Result:
    """Measure workloads in instances, all at once.

    Args:
        workloads: One for all instances, or one each.
        instances: One a worker; several may be the same instance where it is shared.
        backend: The device that they are parts of; instances of `partitioned` know it.
        load: What asks them: one for all (each worker draws its own schedule), or one each.
        duration: Seconds of the measured window.
        repeats: How often; each with new processes.
        mode: `partition`, `whole`, `timeslice`, `mps`; `unpinned`: no affinity and the libraries' own number
            of threads; `unpinned-matched`: no affinity, as many threads as the instance has cores.
        run_id: Names the run; drawn if empty.
        cell: Names what is measured; made of geometry, mode and workloads if empty.
        first_repeat: Number of the first repeat.
        timeout: Seconds that workers have to get ready.
        warmup_seconds: After that long, 20 iterations are enough even if they vary.
        observed_mode: Says while the workers run how the device is shared in truth (is there an MPS server?).
        model: For simulated devices: how long steps take; see `migperf.simulating`.

    Raises:
        InputError: The numbers do not fit together, or a time is not above 0.
    """
    if backend is None:
        backend = getattr(instances, "backend", None)
    if backend is None:
        raise InputError("name the device that these instances are parts of", field="backend")
    parts = assign(workloads, instances, backend, load, mode)
    if not (np.isfinite(duration) and duration > 0):
        raise InputError("expected seconds above 0", field="duration", value=duration)
    if repeats < 1:
        raise InputError("expected at least 1", field="repeats", value=repeats)
    run_id = run_id or f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    cell = cell or cell_name(parts, mode)
    result = Result()
    for repeat in range(first_repeat, first_repeat + repeats):
        seeded = [
            replace(part, load=own_schedule(part.load, index, repeat)) for index, part in enumerate(parts)
        ]
        measured = CellRun(backend, seeded, mode, duration, run_id, cell, repeat)
        if backend.simulated:
            from migperf.simulating import simulate

            simulate(measured, model)
        else:
            measured.measure(timeout, warmup_seconds, observed_mode)
        result.records += measured.records
        result.raws |= measured.raws
    return result


class Crew:
    """Worker processes of one cell, started together, pinned, warmed up, and waiting to be measured.

    Args:
        parts: What each does and where.
        timeout: Seconds that they have to get ready; one that does not is a failure, nobody waits for it.
        warmup_seconds: After that long, 20 iterations are enough even if they vary.
    """

    def __init__(self, parts: Sequence[Part], timeout: float, warmup_seconds: float) -> None:
        self.parts, self.timeout, self.warmup_seconds = parts, timeout, warmup_seconds
        self.answers: queue.Queue[tuple[int, Any]] = queue.Queue()
        self.workers: list[Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="migperf-")
        self.folder = Path(self._folder.name)

    def __enter__(self) -> "Crew":
        try:
            for index, part in enumerate(self.parts):
                task = {
                    "workload": part.workload.spec,
                    "load": loads.spec_of(part.load),
                    "raw": str(self.folder / f"{index}.npz"),
                    "warmup_seconds": self.warmup_seconds,
                }
                self.workers.append(Worker(index, part.launch, task, self.answers))
            gather(self.workers, self.answers, "start or warm-up", self.timeout)
            for worker in living(self.workers):
                if problem := misplaced(self.parts[worker.index], worker.ready, worker.pid):
                    worker.fail(problem)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End all of them."""
        for worker in self.workers:
            worker.end()
        self._folder.cleanup()


@dataclass
class CellRun:
    """One repeat of one cell."""

    backend: Backend
    parts: list[Part]
    mode: str
    duration: float
    run_id: str
    cell: str
    repeat: int
    records: list[Record] = field(default_factory=list)
    raws: dict[str, Int64[np.ndarray, " _"]] = field(default_factory=dict)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    # Real measurement.

    def measure(self, timeout: float, warmup_seconds: float, observed: Callable[[], str] | None) -> None:
        """Start the workers, measure them, and make their records."""
        before, idle = contamination.baseline(), self._idle_watts()
        with Crew(self.parts, timeout, warmup_seconds) as crew:
            self.window(crew, before, observed, idle)

    def window(
        self,
        crew: "Crew",
        before: float,
        observed: Callable[[], str] | None = None,
        idle: float | None = None,
    ) -> None:
        """Measure workers that are ready for one window, and make their records.

        Args:
            crew: The workers, of parts like these.
            before: Cores' worth of others' work before.
            observed: Says how the device is shared in truth.
            idle: The board's power before anything ran.
        """
        workers = crew.workers
        start, stop, trim = self._begin(living(workers))
        edges = [start + trim, stop - trim]
        with Recorder(self._samplers(workers), edges=edges) as recorder:
            self._watch(workers, (edges[0] + edges[1]) // 2, observed)
            gather(workers, crew.answers, "measurement", self.duration + 2 * trim / 1e9 + 60)
        self._keep(workers, crew.folder, edges, recorder, before, idle)

    def _idle_watts(self) -> float | None:
        """Return the board's power before anything runs; None where there is no counter of energy."""
        board = next((sampler for sampler in of_device(self.backend) if sampler.name == "board"), None)
        if board is None:
            return None

        def read_mj() -> float | None:
            joules = board.sample().get("energy_joules_total")
            return None if joules is None else joules * 1000

        return energy.idle_floor(read_mj, IDLE_SECONDS)

    def _begin(self, ready: Sequence[Worker]) -> tuple[int, int, int]:
        """Name the moment at which all begin, and the one at which they end, to those that are ready."""
        trim = round(max((worker.ready["interval"] for worker in ready), default=0))
        start = time.perf_counter_ns() + LEAD_NS
        stop = start + round(self.duration * 1e9) + 2 * trim
        for worker in ready:
            load = loads.spec_of(self.parts[worker.index].load)
            worker.tell({"start": start, "stop": stop, "load": load})
        return start, stop, trim

    def _samplers(self, workers: Sequence[Worker]) -> list[Any]:
        cpus = sorted({cpu for part in self.parts for cpu in part.launch.cpus or ()}) or None
        found: list[Any] = [
            ProcessSampler(f"worker{worker.index}", [worker.pid]) for worker in living(workers)
        ]
        found += [ProcessSampler("parent", [os.getpid()]), CpuSampler(cpus), PressureSampler()]
        ids = {part.instance.handle["gi"] for part in self.parts if "gi" in part.instance.handle}
        found += of_device(self.backend, sorted(ids))
        for part in self.parts:
            found += self.backend.samplers(part.instance)
        return found

    def _watch(self, workers: Sequence[Worker], middle: int, observed: Callable[[], str] | None) -> None:
        """In mid-window, look where the workers' threads may run and how the device is shared."""
        time.sleep(max(0.0, (middle - time.perf_counter_ns()) / 1e9))
        for worker in living(workers):
            cpus = self.parts[worker.index].launch.cpus
            if cpus is not None and worker.process.poll() is None:
                try:
                    wrong = wrong_threads(threads_of(worker.pid), cpus)
                except OSError:  # it ended between the two calls
                    continue
                if wrong:
                    worker.fail(f"left its partition during the run: {wrong}")
        if observed is not None:
            self.mode = observed()

    def _keep(
        self,
        workers: Sequence[Worker],
        folder: Path,
        edges: Sequence[int],
        recorder: Recorder,
        before: float,
        idle: float | None = None,
    ) -> None:
        start, end = edges
        for worker in workers:
            if worker.failure is not None and worker.failure.at > start:
                end = min(end, worker.failure.at)
            elif worker.done.get("saturated"):
                end = min(end, int(worker.done["end"]))
        seen = recorder.window(start, max(start, end))
        ours = [worker.pid for worker in workers]
        board = {**_split(self.parts, seen), **_activity(self.parts, seen, self.backend.layout.slices)}
        if idle is not None:
            board["idle_watts"] = idle
        for worker in workers:
            part = self.parts[worker.index]
            if worker.failure is not None:
                record = self.record(worker.index, worker.failure.status, worker.failure.message)
            else:
                timings = windows.load_timings(folder / f"{worker.index}.npz", worker.done)
                record = self.from_timings(worker.index, timings, start, end, len(living(workers)))
                record = replace(
                    record,
                    peak_memory_mib=worker.done["peak_memory_mib"],
                    energy_joules=seen.differences.get("board.energy_joules_total"),
                    metrics={**record.metrics, **_of_worker(worker, seen)},
                    extra={**record.extra, "facts": worker.ready["facts"], **_told(seen, recorder), **board},
                    host={
                        **record.host,
                        **{k: worker.ready[k] for k in ("torch", "uuid") if k in worker.ready},
                    },
                )
            evidence = self._evidence(worker.index, part, seen, (end - start) / 1e9, before, ours)
            self.records.append(replace(record, contaminated=contamination.verdict(evidence)))

    def _evidence(
        self, index: int, part: Part, seen: Window, seconds: float, before: float, ours: Sequence[int]
    ) -> contamination.Evidence:
        grown = seen.differences
        ran, waited = (grown.get(f"worker{index}.{name}_seconds_total") for name in ("cpu", "wait"))
        own = [value for name, value in grown.items() if name.endswith(".cpu_seconds_total")]
        busy, steal = grown.get("cpus.busy_seconds_total"), grown.get("cpus.steal_seconds_total")
        cpus = {cpu for one in self.parts for cpu in one.launch.cpus or ()} or os.sched_getaffinity(0)
        pressure = grown.get("psi.cpu_some_seconds_total")
        api, device = getattr(self.backend, "api", None), getattr(self.backend, "device", None)
        on_gpu = part.launch.torch_device.startswith("cuda") and api is not None
        slow = seen.means.get("board.slowdown", 0.0) > 0
        return contamination.Evidence(
            pinned=part.launch.cpus is not None,
            core_share=contamination.core_share(ran, waited),
            foreign_cores=_foreign(busy, own, seconds),
            foreign_before=before,
            stolen_cores=None if steal is None or seconds <= 0 else steal / seconds,
            cores=len(cpus),
            gpu_processes=contamination.strangers(api, device, ours) if on_gpu else (),
            slowdowns=("slowed down by heat or power",) if slow else (),
            pressure=None if pressure is None or seconds <= 0 else pressure / seconds,
        )

    # Records.

    def record(self, index: int, status: Any, message: str = "") -> Record:
        """Return a worker's record without numbers."""
        part, pinned = self.parts[index], not self.mode.startswith("unpinned")
        profile = part.instance.profile
        facts = dict(self.backend.facts())
        return Record(
            run_id=self.run_id,
            cell=self.cell,
            repeat=self.repeat,
            worker=index,
            started=self.started,
            backend=self.backend.kind,
            device=self.backend.layout.device,
            simulated=self.backend.simulated,
            contaminated="",
            mode=self.mode,
            geometry=",".join(name_of(one.instance) for one in self.parts),
            instance=name_of(part.instance) if pinned else "",
            profile=profile.name if pinned else "",
            slices=profile.slices,
            memory_slices=profile.size,
            workload=part.workload.spec,
            load={**loads.spec_of(part.load), "duration": self.duration},
            status=status,
            message=message,
            host={
                **facts,
                "not_isolated": list(self.backend.not_isolated),
                "kernel": platform.release(),
                "python": platform.python_version(),
            },
            workers=len(self.parts),
        )

    def from_timings(self, index: int, timings: loads.Timings, start: int, end: int, active: int) -> Record:
        """Return a worker's record from its timings, those that belong to the window.

        A request belongs to the window in which it was to begin, whenever it ended: a long one is not lost.
        """
        part = self.parts[index]
        inside = (timings.scheduled >= start) & (timings.scheduled < end)
        window = max(0, end - start) / 1e9
        if timings.saturated:
            achieved = windows.rate(timings, np.ones_like(inside), part.workload.batch)
            message = f"the queue grew without end: {achieved or 0:.4g} items/s were achieved"
            record = self.record(index, "saturated", message)
            metrics = {"backlog": float(timings.backlog)}
            return replace(record, items_per_second=achieved, window_seconds=window, metrics=metrics)
        count = int(inside.sum())
        if count < 2:
            message = (
                f"{count} requests began in a window of {window:.3g} s: a longer duration would be right"
            )
            return replace(self.record(index, "insufficient", message), window_seconds=window, samples=count)
        chosen = timings.latency[inside]
        found = latency.summarize(chosen)
        raw = f"raw/{self.run_id}-{_digest(self.cell)}-{self.repeat}-{index}{self._suffix}.npy"
        self.raws[raw] = chosen
        missing = len(self.parts) - active
        extra: dict[str, Any] = {"phases_ms": windows.phases(timings, inside)} if timings.phases else {}
        if found.warning:
            extra["warning"] = found.warning
        if missing:
            extra["neighbours_missing"] = missing
        record = self.record(index, "ok")
        return replace(
            record,
            items_per_second=windows.rate(timings, inside, part.workload.batch),
            latency_ms=found.ms,
            latency_interval_ms=found.interval_ms,
            samples=count,
            window_seconds=window,
            metrics=windows.metrics(timings, inside, isinstance(part.load, Open)),
            raw=raw,
            extra=extra,
        )

    @property
    def _suffix(self) -> str:
        return ".simulated" if self.backend.simulated else ""


def _of_worker(worker: Worker, seen: Window) -> dict[str, float]:
    name = f"worker{worker.index}."
    ran, waited = (seen.differences.get(f"{name}{kind}_seconds_total") for kind in ("cpu", "wait"))
    share = contamination.core_share(ran, waited)
    found = {
        "warmup_iterations": float(worker.ready["warmup_iterations"]),
        "warmup_spread": worker.ready["warmup_spread"],
        "first_ms": worker.ready["first_ms"],
        "threads": float(len(worker.done["threads"])),
        "late_ms": worker.done["late_ns"] / 1e6,
    }
    if share is not None:
        found["core_share"] = share
    for metric, value in seen.means.items():
        if metric.startswith(name):
            found[metric.removeprefix(name)] = value
        elif not metric.startswith(("worker", "parent")):
            found[metric] = value
    counted = {k: v for k, v in seen.differences.items() if v is not None and k.startswith(("psi.", "cpus."))}
    return found | counted


def _split(parts: Sequence[Part], seen: Window) -> dict[str, Any]:
    """Return the board's energy by instance, an estimate from their activity, where that was read of all."""
    active = {}
    for part in parts:
        share = seen.means.get(f"gpm{part.instance.handle.get('gi')}.sm_active")
        if share is None:
            return {}
        active[name_of(part.instance)] = share, part.instance.profile.slices
    found = energy.split(seen.differences.get("board.energy_joules_total"), active)
    return {"energy_split": {name: asdict(estimate) for name, estimate in found.items()}} if found else {}


def _activity(parts: Sequence[Part], seen: Window, slices: int) -> dict[str, float]:
    """Return the whole device's activity, each instance's weighed with its slices; {} if one is unknown."""
    found = []
    for part in parts:
        active = seen.means.get(f"gpm{part.instance.handle.get('gi')}.gr_active")
        if active is None:
            return {}
        found.append((active, part.instance.profile.slices))
    return {"device_activity": device_activity(found, slices)}


def _told(seen: Window, recorder: Recorder) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if seen.insufficient:
        found["insufficient_samples"] = list(seen.insufficient)
    if recorder.problems:
        found["sampler_problems"] = dict(recorder.problems)
    return found


def _foreign(busy: float | None, own: Sequence[float | None], seconds: float) -> float | None:
    """Return how many cores others used; None where our own use is not known."""
    used = [one for one in own if one is not None]
    if busy is None or len(used) < len(own) or seconds <= 0:
        return None
    return max(0.0, busy - sum(used)) / seconds


def _digest(cell: str) -> str:
    import hashlib

    return hashlib.sha256(cell.encode()).hexdigest()[:10]
