"""Records: what one measurement was and what it gave, one JSON line each, raw latencies beside it."""

from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = 1

Status = Literal["ok", "oom", "failed", "saturated", "insufficient"]
"""`ok`; `oom`: out of memory, nothing else is known; `failed`; `saturated`: the queue grew without end, so no
percentile is given; `insufficient`: too short or too few samples."""


@dataclass(frozen=True)
class Record:
    """One worker's measurement in one cell (a geometry with its workloads and loads) and one repeat.

    Attributes:
        run_id: Of the sweep or bench; with `cell`, `repeat` and `worker` it names the record.
        cell: Of the sweep.
        repeat: From 0.
        worker: From 0, in the order of instances.
        started: UTC, ISO 8601.
        backend: Kind of backend.
        device: Model of the device.
        simulated: Whether any number comes from a model and not from a clock.
        contaminated: Why the run tells nothing of the partition ("" if it does).
        mode: How the device was shared: `partition`, `whole`, `timeslice`, `mps`, `unpinned`,
            `unpinned-matched`.
        geometry: Of all instances, `3g.20gb@4,2g.10gb@0`.
        instance: The worker's own, `2g.10gb@0`; "" where it has none.
        profile: Its profile's name.
        slices: Its compute slices.
        memory_slices: Its length on the memory axis.
        workload: Spec: source, model, mode ("infer", "train", "generate"), batch, shapes, dtype, seed.
        load: Spec: kind ("closed", "poisson", "constant", "gamma"), concurrency or rate, seed, duration.
        status: What it came to.
        message: One line, where the status is not ok.
        items_per_second: Of the measured window; None unless measured.
        latency_ms: mean, p50, p90, p95, p99, max; p99 is left out below 100 samples. Closed loop: service
            time. Open loop: from the scheduled arrival to completion.
        latency_interval_ms: 95 % interval by percentile, p50 -> (low, high).
        samples: Requests or steps measured.
        window_seconds: Length of the overlap window.
        peak_memory_mib: Largest memory of the worker's device (GPU) or process (CPU).
        energy_joules: Of the whole board in the window; None where there is no counter.
        metrics: Means of samplers in the window, and facts such as send lag, backlog, core share.
        host: Facts about host and software.
        raw: Name of the file of raw latencies beside the records; "" if there is none.
        extra: Whatever a workload adds (time to first token).
    """

    run_id: str
    cell: str
    repeat: int
    worker: int
    started: str
    backend: str
    device: str
    simulated: bool
    contaminated: str
    mode: str
    geometry: str
    instance: str
    profile: str
    slices: int
    memory_slices: int
    workload: dict[str, Any]
    load: dict[str, Any]
    status: Status
    message: str = ""
    items_per_second: float | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    latency_interval_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: int = 0
    window_seconds: float = 0.0
    peak_memory_mib: float | None = None
    energy_joules: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    raw: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
