"""Windows: what a worker's timings say of the part of the run in which all workers were at work."""

from pathlib import Path
from typing import Any

import numpy as np

from migperf import latency, loads


def load_timings(path: Path, done: dict[str, Any]) -> loads.Timings:
    """Read what a worker wrote, with what it said of it."""
    with np.load(path, allow_pickle=False) as found:
        phases = {name[6:]: found[name].tolist() for name in found.files if name.startswith("phase_")}
        return loads.Timings(
            found["scheduled"],
            found["started"],
            found["completed"],
            found["calls"],
            phases,
            bool(done["saturated"]),
            int(done["backlog"]),
            int(done["end"]),
        )


def rate(timings: loads.Timings, chosen: Any, batch: int) -> float | None:
    """Return items per second from the first scheduled start to the last completion."""
    if not chosen.any():
        return None
    seconds = (timings.completed[chosen].max() - timings.scheduled[chosen].min()) / 1e9
    return float(chosen.sum() * batch / seconds) if seconds > 0 else None


def metrics(timings: loads.Timings, inside: Any, is_open: bool) -> dict[str, float]:
    """Return service times, send lag, backlog, and how the first calls compare with the last."""
    service = timings.service[inside] / 1e6
    found = {f"service_ms_p{p}": float(np.percentile(service, p)) for p in (50, 99)}
    found["service_ms_mean"] = float(service.mean())
    if len(service) >= 20:  # above 1: the window began before the workload was steady
        found["first10_over_last10"] = float(np.mean(service[:10]) / np.mean(service[-10:]))
    if is_open:
        lag = timings.lag[inside] / 1e6
        found |= {f"send_lag_ms_p{p}": float(np.percentile(lag, p)) for p in (50, 99)}
        found["backlog"] = float(timings.backlog)
        found["requests_per_call"] = float(len(lag) / len(np.unique(timings.calls[inside])))
    return found


def phases(timings: loads.Timings, inside: Any) -> dict[str, dict[str, float]]:
    """Return mean, median and p99 in ms of what the workload times apart, of the window's calls."""
    calls = np.unique(timings.calls[inside])
    found = {}
    for name, values in timings.phases.items():
        every = np.asarray(values) / 1e6
        some = every[calls] if len(every) > calls.max() else every
        found[name] = {"mean": float(some.mean()), "p50": float(np.median(some))}
        if len(some) >= latency.P99_LEAST:
            found[name]["p99"] = float(np.percentile(some, 99))
    return found
